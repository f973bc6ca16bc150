"""SNIP, GraSP and SynFlow against their formulas on small networks, and what they refuse."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.pruning import sensitivity_scores


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 4, dtype=dtype), nn.ReLU(), nn.Linear(4, 3, dtype=dtype)
    )


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator, dtype=dtype), torch.arange(12) % 3


def loss_of(model, weights, x, y):
    """The loss as a function of the weights alone."""
    state = {f"{name}.weight": w for name, w in weights.items()}
    return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)


def test_snip_is_the_derivative_by_the_mask():
    model, (x, y) = network(), batch()
    found = sensitivity_scores("snip", model, (x, y))
    assert list(found) == ["0", "2", "4"]
    masks = {name: torch.ones_like(s, requires_grad=True) for name, s in found.items()}
    weights = {name: m * model.get_submodule(name).weight.detach() for name, m in masks.items()}
    loss_of(model, weights, x, y).backward()
    for name, score in found.items():
        torch.testing.assert_close(score, masks[name].grad.abs())


def test_snip_is_the_loss_that_a_weight_is_worth():
    """To first order: by finite differences, with another loss."""
    model, (x, y) = network(), batch()

    def loss(output, y):
        return (output - F.one_hot(y, 3)).square().mean()

    score = sensitivity_scores("snip", model, (x, y), loss=loss)["2"]
    weight, step = model[2].weight, 1e-6
    with torch.no_grad():
        before = loss(model(x), y)
        for i, j in [(0, 0), (1, 3), (3, 5)]:
            keep = weight[i, j].item()
            weight[i, j] = keep * (1 - step)
            torch.testing.assert_close((loss(model(x), y) - before).abs() / step, score[i, j], rtol=1e-3, atol=1e-8)
            weight[i, j] = keep


def test_grasp_is_the_hessian_gradient_product():
    model, (x, y) = network(), batch()
    found = sensitivity_scores("grasp", model, (x, y), loss=F.cross_entropy)
    names = list(found)
    weights = [model.get_submodule(n).weight.detach() for n in names]
    sizes = [w.numel() for w in weights]

    def flat_loss(flat):
        parts = [p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)]
        return loss_of(model, dict(zip(names, parts, strict=True)), x, y)

    flat = torch.cat([w.flatten() for w in weights])
    hessian = torch.autograd.functional.hessian(flat_loss, flat)
    gradient = torch.autograd.functional.jacobian(flat_loss, flat)
    torch.testing.assert_close(torch.cat([s.flatten() for s in found.values()]), flat * (hessian @ gradient))


def test_grasp_keeps_what_carries_the_gradient():
    """The paper's S(-w) = -w H g is the change of |gradient|^2 / 2 when w goes: what it raises goes first."""
    model, (x, y) = network(), batch()
    score = sensitivity_scores("grasp", model, (x, y), loss=F.cross_entropy)["0"]

    def square():
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, [m.weight for m in model if isinstance(m, nn.Linear)])
        return sum(g.square().sum() for g in grads) / 2

    weight, step = model[0].weight, 1e-6
    before = square()
    for i, j in [(0, 0), (2, 1), (5, 4)]:
        with torch.no_grad():
            keep = weight[i, j].item()
            weight[i, j] = keep * (1 - step)
        torch.testing.assert_close((square() - before) / step, -score[i, j], rtol=1e-3, atol=1e-7)
        with torch.no_grad():
            weight[i, j] = keep


def test_grasp_by_default_has_its_authors_temperature():
    model, (x, y) = network(), batch()
    found = sensitivity_scores("grasp", model, (x, y))
    tempered = sensitivity_scores("grasp", model, (x, y), loss=lambda output, y: F.cross_entropy(output / 200, y))
    plain = sensitivity_scores("grasp", model, (x, y), loss=F.cross_entropy)
    for name, score in found.items():
        assert torch.equal(score, tempered[name])
        assert not torch.equal(score.flatten().argsort(), plain[name].flatten().argsort())


def test_synflow_of_a_linear_network_is_the_product_of_its_paths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    found = sensitivity_scores("synflow", model, (torch.zeros(1, 4), None))
    first, second = model[0].weight.detach().double().abs(), model[2].weight.detach().double().abs()
    torch.testing.assert_close(found["0"], second.sum(0)[:, None] * first)
    torch.testing.assert_close(found["2"], first.sum(1)[None, :] * second)
    assert found["0"].dtype == torch.float64
    torch.testing.assert_close(found["0"].sum(), found["2"].sum())  # the paper's conservation, theorem 2


def synflow_by_hand(model, density, rounds):
    """Algorithm 1, written out for a chain of linear layers."""
    weights = [m.weight.detach().double().abs() for m in model if isinstance(m, nn.Linear)]
    masks = [torch.ones_like(w) for w in weights]
    total = sum(w.numel() for w in weights)
    for k in range(1, rounds + 1):
        alive = [(w * m).requires_grad_() for w, m in zip(weights, masks, strict=True)]
        flow = torch.ones(1, weights[0].shape[1], dtype=torch.float64)
        for w in alive:
            flow = flow @ w.t()
        scores = [g * w.detach() for g, w in zip(torch.autograd.grad(flow.sum(), alive), alive, strict=True)]
        keep = round(total * density ** (k / rounds))
        flat = torch.cat([s.flatten() for s in scores])
        best = torch.zeros_like(flat)
        best[flat.argsort(descending=True)[:keep]] = 1
        masks = [b.view_as(w) for b, w in zip(best.split([w.numel() for w in weights]), weights, strict=True)]
    return masks


def test_synflow_prunes_in_a_hundred_rounds():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    expected = synflow_by_hand(model, 0.1, 100)
    once = synflow_by_hand(model, 0.1, 1)
    report = sl.prune(model, density=0.1, criterion="synflow", batch=(torch.zeros(2, 8), None))
    assert report.kept == round(0.1 * 256)
    got = [m.mask.to_dense().double() for m in model]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(got, once, strict=True)), "one round would choose others"


def test_synflow_keeps_every_layer_where_one_round_does_not():
    """Section 5 of the paper: without the rounds a layer is emptied before the others."""

    def deep():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 40), *[nn.Linear(40, 40, bias=False) for _ in range(3)], nn.Linear(40, 400))

    x = torch.zeros(1, 40)
    report = sl.prune(deep(), density=0.004, criterion="synflow", batch=(x, None))
    assert all(layer.kept for layer in report.layers.values())
    with pytest.warns(UserWarning, match="nothing is left in"):
        once = sl.prune(deep(), density=0.004, criterion="synflow", batch=(x, None), rounds=1)
    assert once.kept == report.kept and not all(layer.kept for layer in once.layers.values())


def test_synflow_of_a_deep_network_does_not_overflow():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1e4)
    report = sl.prune(model, density=0.1, criterion="synflow", batch=(torch.zeros(1, 64), None), rounds=3)
    assert report.kept == round(0.1 * 12 * 4096) and report.threshold > 3.5e38


def test_rounds_score_anew():
    model, other, (x, y) = network(), network(), batch()
    sl.prune(model, density=0.2, criterion="snip", batch=(x, y), rounds=2)
    sl.prune(other, density=round((66 * 13) ** 0.5) / 66, criterion="snip", batch=(x, y))  # on the way to 13 of 66
    sl.prune(other, density=0.2, criterion="snip", batch=(x, y))
    assert all(m.mask == o.mask for m, o in zip(model[::2], other[::2], strict=True))


def test_layer_scope_structures_and_rates():
    x, y = batch(torch.float32)
    report = sl.prune(network(torch.float32), density=0.3, scope="layer", criterion="synflow", batch=(x, None))
    assert report.kept == round(0.3 * 66)
    assert all(abs(r.density - 0.3) < 0.1 for r in report.layers.values())
    model = network(torch.float32)
    sl.prune(model, density=0.5, structure="channel", criterion="snip", batch=(x, y), exclude="4")
    rows = torch.cat([model[i].mask.to_dense().any(1) for i in (0, 2)])
    assert rows.sum() == 5
    model = network(torch.float32)
    report = sl.prune(model, rate=0.5, rates={"output": 0.0}, criterion="synflow", batch=(x, None), rounds=10)
    assert report.layers["4"].kept == 12 and report.kept == 12 + 27


def test_the_model_is_left_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 3)
    ).eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(8, 2, 5, 5), torch.arange(8) % 3
    first, second = (sensitivity_scores("snip", model, (x, y)) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first), "dropout would make them differ"
    assert not model.training and type(model[0]) is nn.Conv2d
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    model.train()
    output = F.cross_entropy(model[4](model[3](model[1](model[0](x)))), y)
    by_batch = (torch.autograd.grad(output, model[0].weight)[0] * model[0].weight).abs()
    torch.testing.assert_close(first["0"], by_batch.detach())


def test_pruned_weights_score_nothing_and_stay_pruned():
    model, (x, y) = network(), batch()
    sl.prune(model, density=0.5)
    masks = [m.mask for m in model[::2]]
    found = sensitivity_scores("grasp", model, (x, y))
    assert all(bool((s[~m.to_dense()] == 0).all()) for s, m in zip(found.values(), masks, strict=True))
    for criterion in ("snip", "grasp", "synflow"):
        sl.prune(model, rate=0.2, criterion=criterion, batch=(x, y))
    assert all((m.mask & before) == m.mask for m, before in zip(model[::2], masks, strict=True))


def test_an_emptied_layer_is_allowed_and_told():
    model, (x, y) = network(), batch()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
        model[2].bias.fill_(1)
    with pytest.warns(UserWarning, match=r"prune: nothing is left in 0, 2;"):
        report = sl.prune(model, density=12 / 66, criterion="snip", batch=(x, y))
    assert report.kept == report.layers["4"].kept == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.prune(network(), density=0, criterion="snip", batch=(x, y))  # asked for
        report = sl.prune(network(), density=0.3, criterion="snip", batch=(x, y), scope="layer")
    assert all(r.kept for r in report.layers.values())


def test_nan_gradients():
    model, (x, y) = network(), batch()
    x[0, 0] = float("nan")
    for criterion in ("snip", "grasp"):
        with pytest.raises(ValueError, match=f"criterion: {criterion} found a gradient of 0 that is not finite"):
            sl.prune(model, density=0.5, criterion=criterion, batch=(x, y))
    assert all(m.density == 1 for m in model[::2])


def test_a_layer_that_is_not_used_counts_as_nothing():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    found = sensitivity_scores("snip", Spare(), batch(torch.float32))
    assert found["used"].sum() > 0 and found["spare"].eq(0).all()


BAD = [
    (dict(criterion="snip"), ValueError, "batch: expected (x, y), tensors of examples [N, *] and labels [N], which"),
    (dict(criterion="snip", batch=torch.ones(3)), TypeError, "batch: expected (x, y), tensors of examples"),
    (dict(criterion="grasp", batch=(torch.ones(3, 5), None)), TypeError, "got a y of NoneType"),
    (
        dict(criterion="grasp", batch=(torch.ones(3, 5), torch.zeros(2, dtype=torch.int64))),
        ValueError,
        "batch: expected as many labels as examples, got 2 and 3",
    ),
    (dict(criterion="snip", batch=(torch.ones(0, 5), torch.ones(0))), ValueError, "expected at least one example"),
    (
        dict(criterion="synflow", batch=(torch.ones(3, 5, dtype=torch.int64), None)),
        TypeError,
        "batch: expected floating-point x for synflow",
    ),
    (dict(criterion="snip", batch=batch(), loss="mse"), TypeError, "loss: expected a callable (output, y) -> scalar"),
    (dict(criterion="snip", batch=batch(), loss=lambda o, y: o), TypeError, "loss: expected it to return a scalar"),
]


@pytest.mark.parametrize("arguments, error, text", BAD)
def test_bad_input(arguments, error, text):
    model = network()
    before = [m.weight.detach().clone() for m in model[::2]]
    with pytest.raises(error, match=re.escape(text)):
        sl.prune(model, density=0.5, **arguments)
    assert all(torch.equal(m.weight, b) for m, b in zip(model[::2], before, strict=True))


def test_bad_input_of_scores():
    with pytest.raises(ValueError, match="criterion: expected one of snip, grasp, synflow, got 'magnitude'"):
        sensitivity_scores("magnitude", network(), batch())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        sensitivity_scores("snip", {}, batch())
    with pytest.raises(ValueError, match="model: expected a linear or convolutional layer, found none"):
        sensitivity_scores("snip", nn.Sequential(nn.ReLU()), batch())
