"""masked_linear: parity with float64 on every backend, gradients, registration, what F.linear accepts, bad input."""

import pytest
import torch
from torch.nn import functional as F

from sparselottery.ops import reference
from sparselottery.ops.masked_linear import masked_linear

SHAPES = [(5, 7, 3), (1, 64, 32), (8, 33, 65), (0, 4, 2), (4, 1, 1), (3, 0, 2), (3, 2, 0)]  # batch, in, out


def sample(batch, inputs, outputs, dtype=torch.float32, density=0.3):
    g = torch.Generator().manual_seed(batch * 10007 + inputs * 101 + outputs)
    x = torch.randn(batch, inputs, generator=g, dtype=torch.float64)
    w = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    keep = torch.rand(outputs, inputs, generator=g) < density
    return x.to(dtype), w.to(dtype), reference.bitmask_pack(keep), b.to(dtype), keep


@pytest.mark.parametrize("premasked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_matches_float64(shape, dtype, tolerance, premasked):
    x, w, words, b, keep = sample(*shape, dtype)
    if premasked:
        w = torch.where(keep, w, 0)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    got = masked_linear(inputs[0], inputs[1], words, inputs[2], premasked=premasked)
    wanted = reference.masked_linear(x.double(), w.double(), words, b.double())
    assert got.dtype == dtype and got.shape == wanted.shape
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(got, inputs, grad)
    expected = reference.masked_linear_backward(grad.double(), x.double(), w.double(), words)
    for ours, theirs in zip((got, *gradients), (wanted, *expected), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * (1 + theirs.norm())


def test_dead_weights_count_as_zero_whatever_they_hold():
    x, w, words, b, keep = sample(4, 9, 6)
    clean = torch.where(keep, w, 0)
    dirty = torch.where(keep, w, torch.nan)
    assert torch.equal(masked_linear(x, dirty, words, b), masked_linear(x, clean, words, b, premasked=True))


@pytest.mark.parametrize("layout", ["1-d", "3-d", "transposed", "offset", "expanded"])
def test_accepts_what_linear_accepts(layout):
    x, w, words, b, keep = sample(4, 9, 6, torch.float64)
    x = {
        "1-d": x[0],
        "3-d": torch.stack([x, x + 1]),
        "transposed": x.t().contiguous().t(),
        "offset": torch.cat([x[:, :1], x], 1)[:, 1:],
        "expanded": x[:1].expand(5, 9),
    }[layout].detach()
    w = torch.cat([w.t(), w.t()])[9:].t()
    x.requires_grad_()
    w.requires_grad_()
    ours, theirs = masked_linear(x, w, words, b), F.linear(x, w * keep, b)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), (x, w)), torch.autograd.grad(theirs.sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck_twice():
    x, w, words, b, _ = sample(4, 9, 6, torch.float64)
    inputs = [t.requires_grad_() for t in (x, w, b)]

    def f(x, w, b):
        return masked_linear(x, w, words, b)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_the_asked_gradients(frozen):
    x, w, words, b, keep = sample(4, 9, 6, torch.float64)
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate((x, w, b))]
    masked_linear(x, w, words, b).square().sum().backward()
    got = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    F.linear(x, w * keep, b).square().sum().backward()
    for i, (ours, t) in enumerate(zip(got, inputs, strict=True)):
        if i in frozen:
            assert ours is None and t.grad is None
        else:
            torch.testing.assert_close(ours, t.grad)


# ---- activation="relu" ----


@pytest.mark.parametrize("backend", ["dense", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_is_that_of_torch(monkeypatch, backend, dtype):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    x, w, words, b, _ = sample(20, 65, 33, dtype)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    grad = torch.randn(20, 33, dtype=dtype)
    ours = masked_linear(x, w, words, b, activation="relu")
    theirs = masked_linear(x, w, words, b).relu()
    assert torch.equal(ours, theirs) and (ours == 0).any()
    with torch.no_grad():  # which may take other loops than a call that trains
        assert torch.equal(masked_linear(x, w, words, b, activation="relu"), masked_linear(x, w, words, b).relu())
        one = masked_linear(x[0], w, words, b, activation="relu")
        torch.testing.assert_close(one, theirs[0], rtol=0.02, atol=0.02)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_relu_keeps_nan(monkeypatch, backend):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    x, w, words, b, _ = sample(4, 33, 6)
    b[2] = torch.nan
    for rows in (x, x[0]):
        y = masked_linear(rows, w, words, b, activation="relu")
        assert y[..., 2].isnan().all() and (y[..., 3:] >= 0).all()


def test_relu_gradcheck_twice():
    x, w, words, b, _ = sample(4, 9, 6, torch.float64)  # no sum within 1e-3 of the kink
    inputs = [t.requires_grad_() for t in (x, w, b)]
    assert masked_linear(x, w, words, b).abs().min() > 1e-3

    def f(x, w, b):
        return masked_linear(x, w, words, b, activation="relu")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_relu_under_transforms_and_compiled():
    x, w, words, b, _ = sample(4, 33, 6)

    def f(x, w, b):
        return masked_linear(x, w, words, b, activation="relu").square().sum()

    inputs = [t.requires_grad_() for t in (x, w, b)]
    wanted = torch.autograd.grad(f(*inputs), inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for found in (torch.func.grad(f, (0, 1, 2))(x, w, b), torch.autograd.grad(compiled(*inputs), inputs)):
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want)
    detached = (x.detach(), w.detach(), words, b.detach(), False, True)
    torch.library.opcheck(torch.ops.sparselottery.masked_linear, detached)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output_mask", [(True, True, True), (False, True, False)])
def test_opcheck(shape, output_mask):
    x, w, words, b, _ = sample(*shape)
    torch.library.opcheck(torch.ops.sparselottery.masked_linear, (x, w, words, b, False))
    grad = torch.randn(shape[0], shape[2])
    arguments = (grad, x, w, words, False, list(output_mask))
    torch.library.opcheck(torch.ops.sparselottery.masked_linear_backward, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    x, w, words, b, _ = sample(4, 33, 6)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    f = torch.compile(lambda *a: masked_linear(*a).square().sum(), fullgraph=True, backend=backend)
    ours = torch.autograd.grad(f(x, w, words, b), (x, w, b))
    theirs = torch.autograd.grad(masked_linear(x, w, words, b).square().sum(), (x, w, b))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_exports():
    x, w, words, b, _ = sample(4, 33, 6)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return masked_linear(x, w, words, b)

    program = torch.export.export(Layer(), (x,))
    torch.testing.assert_close(program.module()(x), masked_linear(x, w, words, b))


def test_autocast_follows_linear():
    x, w, words, b, keep = sample(4, 33, 6)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = masked_linear(x, w, words, b), F.linear(x, w * keep, b)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    ours.float().sum().backward()
    assert w.grad.dtype == torch.float32 and (w.grad[~keep] == 0).all()


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"x": torch.ones(2, 8)}, ValueError, "x: expected [*, 9]"),
        ({"x": torch.ones(2, 9, dtype=torch.int64)}, TypeError, "x: expected a floating-point"),
        ({"words": torch.ones(6, 2, dtype=torch.int32)}, ValueError, "words: expected int32 [6, 1]"),
        ({"words": torch.ones(6, 1, dtype=torch.int64)}, ValueError, "words: expected int32 [6, 1]"),
        ({"bias": torch.ones(5)}, ValueError, "bias: expected [6]"),
        ({"bias": torch.ones(6, dtype=torch.float64)}, TypeError, "bias: expected torch.float32"),
        ({"weight": torch.ones(6, 9, dtype=torch.float16)}, TypeError, "weight: expected torch.float32"),
        ({"weight": torch.ones(6, 9, 1)}, ValueError, "weight: expected [out_features, in_features]"),
        ({"weight": torch.ones(6, 9, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"x": [1, 2]}, TypeError, "x: expected a tensor, got list"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"weight": torch.ones(6, 9).to_sparse()}, ValueError, "weight: expected a dense tensor, got layout"),
        ({"x": torch.ones(2, 9).to_sparse()}, ValueError, "x: expected a dense tensor, got layout"),
        ({"words": 3}, TypeError, "words: expected a tensor, got int"),
        ({"bias": 0.5}, TypeError, "bias: expected a tensor, got float"),
        ({"activation": "gelu"}, ValueError, 'activation: expected None or "relu"'),
    ],
)
def test_bad_input_names_the_argument(change, error, says):
    x, w, words, b, _ = sample(2, 9, 6)
    arguments = {"x": x, "weight": w, "words": words, "bias": b} | change
    with pytest.raises(error) as caught:
        masked_linear(**arguments)
    assert says in str(caught.value)
