"""The loss around a network: directions by filter and mask, points stacked and one by one, memory, holes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.analysis import landscape, points

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3


def network(density=1.0, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = sl.sparsify(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    if density < 1:
        sl.prune(model, density=density)
    return model


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.output = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_filters_of_a_direction_have_the_norms_of_the_weights():
    model = Convolutions()
    for direction in landscape.directions(model, 0):
        assert set(direction) == {"conv.weight", "output.weight"}, "biases and normalization stay where they are"
        for name, value in direction.items():
            weight = model.get_parameter(name).detach()
            torch.testing.assert_close(value.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    first, second = landscape.directions(model, 0)
    assert not torch.equal(first["conv.weight"], second["conv.weight"])


def test_directions_of_a_ticket_lie_inside_its_mask_and_share_their_draws_with_the_dense_network():
    dense, ticket = network(), network(0.4)
    for wide, narrow in zip(landscape.directions(dense, 7), landscape.directions(ticket, 7), strict=True):
        for name, value in narrow.items():
            kept = ticket.get_submodule(name.removesuffix(".weight")).mask.to_dense()
            assert not value[~kept].any() and kept.any()
            torch.testing.assert_close(value.norm(dim=1), ticket.get_parameter(name).detach().norm(dim=1))
            same_sign = (value[kept] * wide[name][kept] > 0).all()
            assert same_sign, "a filter of the ticket's is the dense draw times the mask, scaled"


def test_a_filter_without_weights_has_no_direction():
    model = network()
    keep = torch.ones(8, 6, dtype=torch.bool)
    keep[2] = False
    model[0].set_mask(sl.Mask.from_dense(keep))
    direction = landscape.directions(model, 0)[0]["0.weight"]
    assert torch.isfinite(direction).all() and not direction[2].any() and direction[1].any()


def test_a_transposed_layer_has_its_filters_in_columns():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers").Conv1D
    model = nn.Sequential(conv1d(5, 6))
    value = landscape.directions(model, 0)[0]["0.weight"]
    torch.testing.assert_close(value.norm(dim=0), model[0].weight.detach().norm(dim=0))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_the_grid_holds_the_losses_of_the_moved_networks(density):
    model = network(density)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plane = landscape.Plane(model, X, Y, seed=1, resolution=5, extent=0.5)
    losses = plane.losses()
    assert losses.shape == (5, 5)
    delta, eta = landscape.directions(model, 1)
    moved = network(density)
    for i, a in enumerate((-0.5, -0.25, 0, 0.25, 0.5)):
        for j, b in enumerate((-0.5, -0.25, 0, 0.25, 0.5)):
            with torch.no_grad():
                for name in delta:
                    moved.get_parameter(name).copy_(model.get_parameter(name) + a * delta[name] + b * eta[name])
                assert losses[i, j].item() == pytest.approx(F.cross_entropy(moved(X), Y).item(), abs=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the network is left as it was"


def test_many_at_once_are_as_one_by_one_and_batchnorm_keeps_its_statistics():
    model = Convolutions().eval()
    x, y = torch.randn(30, 1, 6, 6), torch.arange(30) % 3
    found = [
        landscape.Plane(model, x, y, resolution=3, extent=1.0, at_once=n).losses() for n in (1, 4, 9)
    ]  # 4 leaves a rest
    for other in found[1:]:  # the network computes in float32, whatever the losses are summed in
        torch.testing.assert_close(found[0].float(), other.float())
    assert found[0][1, 1].item() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)
    assert model.norm.num_batches_tracked == 0


def test_memory_bounds_the_points_and_examples_at_once():
    model = network()
    weights = 2 * 4 * sum(p.numel() for p in model.parameters())
    small = points.Points(model, X, Y, memory=1)
    assert (small.examples, small.most) == (1, 1), "one example and one point are always taken"
    wide = points.Points(model, X, Y, memory=3 * weights + 10**4)
    assert wide.examples == 40 and 1 <= wide.most <= 3
    assert points.Points(model, X, Y).most > 100
    plane = landscape.Plane(model, X, Y, resolution=3)
    expected = plane.losses()
    tight = landscape.Plane(model, X, Y, resolution=3, memory=1)
    torch.testing.assert_close(tight.losses(), expected)


def test_the_cost_is_that_of_all_points_and_the_way_is_chosen():
    plane = landscape.Plane(network(), X, Y, resolution=5)
    assert plane.cost() > 0 and plane.points.at_once in (1, 25)
    asked = landscape.Plane(network(), X, Y, resolution=5, at_once=7)
    assert asked.cost() > 0 and asked.points.at_once == 7
    told = []
    asked.losses(lambda done, total: told.append((done, total)))
    assert told == [(7, 25), (14, 25), (21, 25), (25, 25)]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        y = self.output(x)
        return y if y.sum() > 0 else 2 * y  # torch.func.vmap cannot


def test_a_network_that_cannot_be_batched_goes_one_by_one():
    plane = landscape.Plane(Branching(), X, Y, resolution=3)
    assert plane.losses().isfinite().all() and plane.points.at_once == 1
    with pytest.raises(RuntimeError, match="vmap"):
        landscape.Plane(Branching(), X, Y, resolution=3, at_once=9).losses()


def numbers(dense, ticket, **about):
    planes = {name: landscape.Plane(network(), X, Y, resolution=5) for name in ("dense", "ticket")}
    return landscape.numbers(planes, {"dense": dense, "ticket": ticket}, {"density": 0.2, "seed": 0, **about})


def bowl(low, high):
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return low + (high - low) * (axis[:, None] ** 2 + axis**2) / 2


def test_figures_and_their_tables():
    figures = landscape.figures(numbers(bowl(0.1, 0.3), bowl(0.2, 0.5)))
    assert [f.name for f in figures] == ["landscape_surface", "landscape_contours", "landscape_profile"]
    assert figures[0].header == ["distance", "dense", "ticket, 20.0 %"]
    assert figures[0].rows[0] == ["0", "0.1000", "0.2000"] and len(figures[1].rows) == 5
    assert "logarithmic" not in figures[0].caption
    assert figures[1].rows[2] == ["0.00", "0.1000", "0.1000", "0.2000", "0.2000"]
    assert "logarithmic" in landscape.figures(numbers(bowl(0.001, 3), bowl(0.2, 0.5)))[0].caption


def test_rings_are_means_over_circles():
    axis = [-1.0, -0.5, 0.0, 0.5, 1.0]
    grid = [[math.hypot(a, b) for b in axis] for a in axis]
    found = landscape.rings(axis, grid)
    assert found[0] == 0 and found == sorted(found) and found[-1] == pytest.approx(1.0, abs=0.2)


def test_points_that_are_not_finite_are_holes():
    from sparselottery import analysis

    broken = bowl(0.1, 0.3)
    broken[0, 0] = math.inf
    broken[2, 3] = math.nan
    told = analysis.plain(numbers(broken, bowl(0.2, 0.5)))
    figures = landscape.figures(told)
    assert figures[0].rows[-1] == ["points not finite", "2", "0"] and figures[0].rows[2][1] == "–"
    told["loss"] = {name: [[None] * 5] * 5 for name in told["loss"]}
    with pytest.raises(ValueError, match="no point of the landscape has a finite loss"):
        landscape.figures(told)


def test_a_flat_landscape_is_drawn():
    assert landscape.figures(numbers(bowl(0.5, 0.5), bowl(0.5, 0.5)))[0].rows[0][1] == "0.5000"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"resolution": 4}, ValueError, "resolution: expected an odd number of at least 3, got 4"),
        ({"resolution": 1}, ValueError, "resolution"),
        ({"resolution": 5.0}, TypeError, "resolution: expected an int"),
        ({"extent": 0}, ValueError, "extent: expected a number above 0"),
        ({"extent": math.nan}, ValueError, "extent"),
        ({"memory": 0}, ValueError, "memory: expected at least 1"),
        ({"at_once": 0}, ValueError, "at_once: expected at least 1"),
        ({"at_once": True}, TypeError, "at_once: expected an int"),
    ],
)
def test_what_does_not_fit_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        landscape.Plane(network(), X, Y, **settings)


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        points.Points(lambda x: x, X, Y)
    with pytest.raises(ValueError, match="x, y: expected"):
        points.Points(network(), X[:0], Y[:0])
    with pytest.raises(ValueError, match="x, y: expected"):
        points.Points(network(), X, Y[:3])
    with pytest.raises(ValueError, match="model: is packed"):
        points.Points(sl.pack(network(0.5)), X, Y)
