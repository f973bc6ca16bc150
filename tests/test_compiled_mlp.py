"""Inference of a network of linear layers in one call into C++, against its modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.nn.compiled_mlp import CompiledMLP
from sparselottery.ops import dispatch


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def network(density=0.2, flatten=False, widths=(35, 50, 18, 7)):
    torch.manual_seed(0)
    a, b, c, d = widths
    layers = [nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c, bias=False), nn.ReLU(), nn.Linear(c, d)]
    model = nn.Sequential(*([nn.Flatten()] if flatten else []), *layers)
    if density < 1:
        sl.sparsify(model)
        sl.prune(model, density=density)
    return model.eval().requires_grad_(False)


def in_double(model, x):
    return sl.densify(copy.deepcopy(model)).double()(x.double())


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("batch", [1, 5, 16, 60, 64, 65, 200])
def test_outputs_are_those_of_the_modules(isa, density, batch, monkeypatch):
    model = network(density)
    x = torch.randn(batch, 35)
    compiled, expected = CompiledMLP(model), in_double(model, x)
    monkeypatch.setattr(nn.Sequential, "forward", None)  # C++ computes it, or nobody
    y = compiled(x)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert (y.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 4, 35), torch.randn(35, 9).t(), torch.randn(9, 70)[:, ::2], torch.randn(9, 80)[:, 3:38]],
    ids=["leading", "transposed", "every-other", "offset"],
)
def test_inputs_of_any_shape_and_strides(x):
    model = network()
    torch.testing.assert_close(CompiledMLP(model)(x), in_double(model, x).float(), rtol=1e-5, atol=1e-5)


def test_negative_views():
    model, x = network(1.0), torch.randn(6, 35)
    torch.testing.assert_close(CompiledMLP(model)(torch._neg_view(x)), model(-x), rtol=1e-5, atol=1e-5)
    compiled = CompiledMLP(model)
    model[0].weight = nn.Parameter(torch._neg_view(model[0].weight.detach().clone()), requires_grad=False)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_images_are_flattened():
    model, x = network(flatten=True), torch.randn(6, 5, 7)
    torch.testing.assert_close(CompiledMLP(model)(x), in_double(model, x).float(), rtol=1e-5, atol=1e-5)


def test_changed_weights_and_masks_are_seen():
    model, x = network(), torch.randn(9, 35)
    compiled = CompiledMLP(model)
    compiled(x)
    for change in (
        lambda: model[0].weight.mul_(2),
        lambda: model[0].bias.zero_(),
        lambda: model[2].set_mask(torch.rand(18, 50) < 0.1),
        lambda: model.load_state_dict(network(0.5).state_dict()),
        lambda: setattr(model[4], "weight", nn.Parameter(torch.randn(7, 18), requires_grad=False)),
    ):
        with torch.no_grad():
            change()
        torch.testing.assert_close(compiled(x), in_double(model, x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, sl.optim.Adam])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_steps_of_optimizers_are_seen(optimizer, options, density):
    x = torch.randn(9, 35)
    compiled = pickle.loads(pickle.dumps(CompiledMLP(network(density).requires_grad_())))
    stepping = optimizer(compiled.parameters(), lr=0.1, **options)
    for _ in range(2):
        with torch.no_grad():
            compiled(x)
        compiled(x).square().sum().backward()
        stepping.step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), in_double(compiled.network, x).float(), rtol=1e-4, atol=1e-4)


def test_a_changed_network_is_seen():
    x = torch.randn(9, 35)
    compiled = CompiledMLP(nn.Sequential(network(), nn.Sequential(nn.Identity())).requires_grad_(False))
    for change in (
        lambda: None,
        lambda: setattr(compiled.network[1], "0", nn.Linear(7, 7).requires_grad_(False)),
        lambda: compiled.network[1].append(nn.ReLU()),
        lambda: compiled.network.append(nn.Tanh()),
        lambda: setattr(compiled, "network", network(0.5)),
    ):
        change()
        torch.testing.assert_close(compiled(x), in_double(compiled.network, x).float(), rtol=1e-5, atol=1e-5)


def test_hooks_and_forwards_that_come_later_are_called():
    compiled, x, calls = CompiledMLP(network()), torch.randn(9, 35), []

    def note(*_):
        calls.append(1)

    compiled(x)
    for register in (compiled.network[2].register_forward_hook, compiled.network.register_forward_pre_hook):
        handle = register(note)
        compiled(x)
        handle.remove()
    assert len(calls) == 2
    handle = nn.modules.module.register_module_forward_hook(note)
    compiled(x)
    handle.remove()
    assert len(calls) == 2 + 1 + 6
    compiled.network[1].forward = torch.zeros_like
    torch.testing.assert_close(compiled(x), compiled.network(x))


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_parameters_lent_by_functional_call(density):
    compiled, x = CompiledMLP(network(density)), torch.randn(9, 35)
    lent = {"network.0.weight": nn.Parameter(torch.randn(50, 35), requires_grad=False)}
    before = lent["network.0.weight"].clone()
    expected = torch.func.functional_call(compiled.network, {"0.weight": before}, (x,))
    y = torch.func.functional_call(compiled, lent, (x,))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lent["network.0.weight"], before)


def test_forward_derivatives_and_sparse_inputs():
    compiled, x = CompiledMLP(network(1.0)), torch.randn(9, 35)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn(9, 35))
        tangent = torch.autograd.forward_ad.unpack_dual(compiled(dual)).tangent
        assert torch.equal(tangent, torch.autograd.forward_ad.unpack_dual(compiled.network(dual)).tangent)
    torch.testing.assert_close(compiled(x.to_sparse_csr()), compiled(x), rtol=1e-5, atol=1e-5)


def test_modules_run_where_cpp_cannot():
    compiled = CompiledMLP(network())
    x = torch.randn(4, 35)
    expected = in_double(compiled.network, x).float()
    wanting = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(wanting).sum(), wanting)
    assert gradient.abs().sum() > 0
    assert copy.deepcopy(compiled).double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(compiled)(x[:, None]), expected[:, None], rtol=1e-5, atol=1e-5)
    traced = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(compiled, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
    assert compiled(x[:0]).shape == (0, 7)
    with pytest.raises((RuntimeError, ValueError), match="34"):
        compiled(torch.randn(4, 34))


def test_copies_pickles_and_state_dicts():
    compiled, x = CompiledMLP(network()), torch.randn(4, 35)
    y = compiled(x)
    buffer = io.BytesIO()
    torch.save(compiled, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)), torch.load(buffer, weights_only=False)]
    fresh = CompiledMLP(network(0.6))
    fresh.load_state_dict(compiled.state_dict())
    for other in [*others, fresh]:
        assert torch.equal(other(x), y)


def test_same_bits_for_any_number_of_threads():
    compiled, x = CompiledMLP(network(widths=(35, 900, 400, 7))), torch.randn(300, 35)
    one = compiled(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(compiled(x), one)
    finally:
        torch.set_num_threads(1)


def test_what_it_is_not_made_for():
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential(nn.Linear(3, 4), nn.Tanh())):
        with pytest.raises(ValueError, match="network: expected linear layers and ReLU alone"):
            CompiledMLP(model)


def test_explain_says_cpp_only_where_it_runs():
    compiled = CompiledMLP(network())
    assert [row.backend for row in sl.explain(compiled).rows] == ["cpu"] * 3
    assert all("C++" not in row.note for row in sl.explain(compiled.double()).rows)


@pytest.mark.parametrize("fastest", ["compiled", "dense"])
def test_compress_takes_it_where_it_was_fastest(monkeypatch, fastest):
    def measure(candidates):
        return {name: 1.0 if name == fastest else 2.0 for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measure)
    model, x = network(), torch.randn(9, 35)
    result = sl.compress(model, x)
    assert isinstance(result, CompiledMLP) == (fastest == "compiled")
    assert not result.training and not any(p.requires_grad for p in result.parameters())
    torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    backends = {row.backend for row in sl.explain(result).rows}
    assert backends == ({"cpu"} if fastest == "compiled" else {"dense"})
    if fastest == "compiled":
        assert "in C++ with the whole network" in str(sl.explain(result))
