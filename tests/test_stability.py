"""Stability: barriers of lines that are known, BatchNorm's statistics along them, overlap against chance."""

import math

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.analysis import stability
from sparselottery.masks import Mask

X = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]])
Y = torch.tensor([0, 1, 0, 1])
ABOUT = {"density": 0.5, "level": 2, "seeds": [0], "rewind": "init"}


def linear(w):
    """Classifies by the sign of w x: right for w > 0."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[w], [-w]]))
    return model


def two_layers(first, second):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(first)
        model[1].weight.copy_(torch.tensor([[second], [-second]]))
    return model


def test_a_line_without_a_barrier():
    found = stability.line(linear(1.0), linear(3.0), X, Y, steps=5)
    assert found["at"] == [0, 0.25, 0.5, 0.75, 1] and found["error"] == [0] * 5
    assert found["barrier_error"] == 0 and found["barrier_loss"] == pytest.approx(
        found["loss"][0] - (found["loss"][0] + found["loss"][-1]) / 2
    )
    for w, loss in zip((1, 1.5, 2, 2.5, 3), found["loss"], strict=True):
        assert loss == pytest.approx(nn.functional.cross_entropy(linear(w)(X), Y).item(), abs=1e-6)


def test_networks_that_mirror_each_other_have_a_barrier():
    """w1 w2 = 4 at both ends by opposite signs, 0 in the middle, where the loss is that of guessing."""
    found = stability.line(two_layers(2.0, 2.0), two_layers(-2.0, -2.0), X, Y, steps=3)
    ends = (found["loss"][0] + found["loss"][2]) / 2
    assert found["loss"][1] == pytest.approx(math.log(2)) and found["barrier_loss"] == pytest.approx(math.log(2) - ends)
    assert found["error"] == [0, 0.5, 0] and found["barrier_error"] == 0.5


def test_masked_networks_and_plain_ones():
    dense, masked = linear(1.0), sl.sparsify(linear(3.0))
    masked[0].set_mask(Mask.from_dense(torch.tensor([[True], [False]])))
    found = stability.line(sl.sparsify(dense), masked, X, Y, steps=3)
    expected = nn.functional.cross_entropy(X @ torch.tensor([[3.0, 0.0]]), Y).item()
    assert found["loss"][2] == pytest.approx(expected, abs=1e-6)
    assert sl.MaskedLinear is type(masked[0]) and masked[0].density == 0.5, "neither network is changed"


class Normalized(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.norm, self.output = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.output(self.drop(torch.relu(self.norm(self.inner(x)))))


def test_batchnorm_statistics_are_taken_anew_at_every_point():
    x, y = torch.randn(60, 3), torch.arange(60) % 2
    first, second = Normalized(0).eval(), Normalized(1).eval()
    found = stability.line(first, second, x, y, steps=3, statistics=x)
    assert found == stability.line(first, second, x, y, steps=3, statistics=x), "dropout stays out"
    assert first.norm.num_batches_tracked == 0 and first.norm.running_mean.abs().sum() == 0
    middle = Normalized(0)
    middle.load_state_dict(
        {k: (v + second.state_dict()[k]) / 2 if v.is_floating_point() else v for k, v in first.state_dict().items()}
    )
    hidden = middle.inner(x).detach()
    normal = (hidden - hidden.mean(0)) / (hidden.var(0) + middle.norm.eps).sqrt()
    normal = normal * middle.norm.weight + middle.norm.bias
    loss = nn.functional.cross_entropy(middle.output(torch.relu(normal)), y).item()
    assert found["loss"][1] == pytest.approx(loss, abs=1e-5)
    with pytest.raises(ValueError, match="statistics: expected training examples"):
        stability.line(first, second, x, y)


def test_renewed_statistics_are_the_mean_over_batches():
    model = Normalized(0).train()
    model.norm.running_mean.fill_(100.0)
    x = torch.randn(2 * stability.STATISTICS_BATCH + 1, 3)
    stability.renew_statistics(model, x)
    batches = [model.inner(b) for b in x.split(stability.STATISTICS_BATCH)][:2]  # the last has one example: no variance
    torch.testing.assert_close(model.norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    assert model.training and model.norm.training and model.norm.momentum == 0.1


def test_a_line_with_losses_that_are_not_finite_has_no_barrier():
    broken = linear(float("nan"))
    found = stability.line(linear(1.0), broken, X, Y, steps=3)
    assert found["barrier_error"] is None and found["barrier_loss"] is None
    from sparselottery import analysis

    told = analysis.plain(stability.numbers({"dense": [found], "ticket": [found]}, [], ABOUT))
    assert "no barrier" in stability.figures(told)[0].caption


@pytest.mark.parametrize(
    ("second", "settings", "error", "message"),
    [
        (linear(1.0), {"steps": 2}, ValueError, "steps: expected at least 3"),
        (linear(1.0), {"steps": 3.0}, TypeError, "steps: expected an int"),
        (two_layers(1.0, 1.0), {}, ValueError, "second: expected the architecture"),
    ],
)
def test_what_does_not_fit_is_named(second, settings, error, message):
    with pytest.raises(error, match=message):
        stability.line(linear(1.0), second, X, Y, **settings)


# ---- overlap ----


def random_masks(seed, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 50), "b": (10, 33)}
    return {name: Mask.from_dense(torch.rand(s, generator=generator) < density) for name, s in shapes.items()}


def test_equal_masks_overlap_wholly():
    found = stability.overlap([random_masks(0), random_masks(0)])
    for entry in found.values():
        assert entry["jaccard"]["mean"] == 1 and entry["distance"]["mean"] == 0 and entry["z"]["mean"] > 10
    assert list(found) == ["a", "b", stability.ALL]


def test_random_masks_overlap_as_chance_says():
    found = stability.overlap([random_masks(seed) for seed in range(12)])
    for entry in found.values():
        assert len(entry["jaccard"]["values"]) == 66
        assert entry["jaccard"]["mean"] == pytest.approx(entry["jaccard_by_chance"]["mean"], rel=0.03)
        assert entry["distance"]["mean"] == pytest.approx(entry["distance_by_chance"]["mean"], rel=0.03)
        z = torch.tensor(entry["z"]["values"])
        assert abs(z.mean()) < 0.4 and 0.7 < z.std() < 1.3, "deviations are in standard deviations"


def test_overlap_by_hand_and_where_nothing_is_kept():
    a = {"a": Mask.from_dense(torch.tensor([True, True, False, False])), "b": Mask.zeros((2,))}
    b = {"a": Mask.from_dense(torch.tensor([True, False, True, False])), "b": Mask.zeros((2,))}
    found = stability.overlap([a, b])
    assert found["a"]["jaccard"]["mean"] == pytest.approx(1 / 3) and found["a"]["distance"]["mean"] == 0.5
    assert found["a"]["distance"]["mean"] == a["a"].distance(b["a"])
    assert found["a"]["jaccard_by_chance"]["mean"] == pytest.approx(1 / 3) and found["a"]["z"]["mean"] == 0
    assert found["b"]["jaccard"] is None and found["b"]["z"] is None and found["b"]["distance"]["mean"] == 0


def test_whole_units_are_no_independent_draws():
    """Two random choices of 10 of 40 channels: one in common more or less moves 50 weights at once."""
    found, same = [], random_masks(0)["b"]
    for seed in (0, 1):
        channels = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:10]
        kept = torch.zeros(40, 50, dtype=torch.bool)
        kept[channels[:, None], torch.arange(5, 45)] = True
        found.append({"a": Mask.from_dense(kept), "b": same})
    overlap = stability.overlap(found)
    assert overlap["a"]["z"] is None and overlap[stability.ALL]["z"] is None and overlap["b"]["z"]["mean"] > 10
    assert overlap["a"]["jaccard_by_chance"]["mean"] == pytest.approx((400 / 5) / (800 - 400 / 5))
    line = stability.line(linear(1.0), linear(3.0), X, Y, steps=3)
    shown = stability.numbers({"dense": [line] * 2, "ticket": [line] * 2}, found, {**ABOUT, "seeds": [0, 1]})
    assert "of tickets that keep whole units" in stability.figures(shown)[1].caption


def test_one_seed_has_no_overlap_but_a_barrier():
    line = stability.line(linear(1.0), linear(3.0), X, Y, steps=3)
    numbers = stability.numbers({"dense": [line], "ticket": [line]}, [random_masks(0)], ABOUT)
    assert numbers["overlap"] is None and numbers["children"]["dense"]["barrier_error"]["ci95"] is None
    assert [f.name for f in stability.figures(numbers)] == ["barrier"]


def test_figures_and_their_tables():
    line = stability.line(linear(1.0), linear(3.0), X, Y, steps=3)
    about = {**ABOUT, "seeds": [0, 1], "rewind": "2ep", "batchnorm": True}
    masks = [random_masks(0), random_masks(1)]
    barrier, overlap = stability.figures(stability.numbers({"dense": [line] * 2, "ticket": [line] * 2}, masks, about))
    assert "step 2ep" in barrier.caption and "BatchNorm" in barrier.caption
    assert [row[:2] for row in barrier.rows] == [
        ["0", "dense"], ["1", "dense"], ["mean", "dense"],
        ["0", "ticket, 50.0 %"], ["1", "ticket, 50.0 %"], ["mean", "ticket, 50.0 %"],
    ]  # fmt: skip
    assert [row[0] for row in overlap.rows] == [stability.ALL, "a", "b"]


def test_masks_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="tickets: expected masks of the same layers"):
        stability.overlap([random_masks(0), {"a": random_masks(0)["a"]}])
