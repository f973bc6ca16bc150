"""masked_conv2d: parity with float64, gradients, layouts, registration, bad input."""

import re

import pytest
import torch
import torch.nn.functional as F

from sparselottery.ops import reference
from sparselottery.ops.masked_conv2d import masked_conv2d

# batch, in, out, height, width, kernel, stride, padding, dilation, groups
CASES = {
    "3x3": (2, 4, 6, 7, 9, (3, 3), 1, 1, 1, 1),
    "1x1": (3, 40, 5, 4, 4, (1, 1), 1, 0, 1, 1),
    "stride 2": (2, 3, 4, 9, 8, (3, 3), 2, 1, 1, 1),
    "dilation 2": (1, 3, 5, 9, 11, (3, 3), 1, 2, 2, 1),
    "groups": (2, 6, 9, 6, 5, (3, 3), 1, 1, 1, 3),
    "depthwise": (2, 5, 5, 6, 6, (3, 3), 2, 1, 1, 5),
    "pairs": (2, 3, 4, 8, 10, (2, 5), (2, 1), (0, 3), (3, 1), 1),
    "padding above the kernel": (1, 2, 3, 4, 5, (2, 2), 3, 3, 1, 1),
    "one pixel": (4, 7, 3, 1, 1, (1, 1), 1, 0, 1, 1),
    "empty batch": (0, 3, 4, 6, 6, (3, 3), 1, 1, 1, 1),
    "seventeen images": (17, 3, 8, 6, 18, (3, 3), 1, 1, 1, 1),
}


def pair(v):
    return v if isinstance(v, tuple) else (v, v)


def sample(case, dtype=torch.float32, density=0.3):
    n, inputs, outputs, height, width, kernel, stride, padding, dilation, groups = CASES.get(case, case)
    g = torch.Generator().manual_seed(n * 31 + inputs * 7 + outputs * 3 + height + width)
    x = torch.randn(n, inputs, height, width, generator=g, dtype=torch.float64)
    w = torch.randn(outputs, inputs // groups, *kernel, generator=g, dtype=torch.float64)
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    keep = torch.rand(w.shape, generator=g) < density
    return (
        (x.to(dtype), w.to(dtype), reference.bitmask_pack(keep), b.to(dtype)),
        (stride, padding, dilation, groups),
        keep,
    )


def expected(tensors, arguments, grad=None):
    """The float64 reference's (y, dX, dW∘M, db)."""
    x, w, words, b = (t if t.dtype == torch.int32 else t.double() for t in tensors)
    stride, padding, dilation = (pair(a) for a in arguments[:3])
    y = reference.masked_conv2d(x, w, words, b, stride, padding, dilation, arguments[3])
    grad = y.new_ones(y.shape) if grad is None else grad.double()
    return y, *reference.masked_conv2d_backward(grad, x, w, words, stride, padding, dilation, arguments[3])


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= tolerance * (1 + want.norm())


DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("premasked", [False, True])
def test_matches_float64(case, dtype, premasked):
    (x, w, words, b), arguments, keep = sample(case, dtype)
    if premasked:
        w = w * keep
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    y = masked_conv2d(x, w, words, b, *arguments, premasked=premasked)
    assert y.dtype == dtype
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad)
    want = expected([t.detach() for t in (x, w, words, b)], arguments, grad)
    for got, wanted in zip((y.detach(), x.grad, w.grad, b.grad), want, strict=True):
        assert_near(got, wanted, DTYPES[dtype])
    assert (w.grad[~keep] == 0).all()


def test_dead_weights_never_count_even_when_not_finite():
    (x, w, words, b), arguments, keep = sample("3x3")
    want = masked_conv2d(x, w, words, b, *arguments)
    poisoned = torch.where(keep, w, float("nan")).requires_grad_()
    y = masked_conv2d(x, poisoned, words, b, *arguments)
    assert torch.equal(y, want)
    y.sum().backward()
    assert torch.isfinite(poisoned.grad).all() and (poisoned.grad[~keep] == 0).all()


@pytest.mark.parametrize("case", ["3x3", "groups", "pairs"])
def test_gradcheck(case):
    tensors, arguments, _ = sample(case, torch.float64)
    x, w, words, b = (t.requires_grad_() if t.is_floating_point() else t for t in tensors)
    assert torch.autograd.gradcheck(lambda x, w, b: masked_conv2d(x, w, words, b, *arguments), [x, w, b])


def test_only_the_gradients_asked_for():
    (x, w, words, b), arguments, _ = sample("3x3")
    for wanted in range(3):
        inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w, b))]
        masked_conv2d(inputs[0], inputs[1], words, inputs[2], *arguments).sum().backward()
        want = expected((x, w, words, b), arguments)[1 + wanted]
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        assert_near(inputs[wanted].grad, want, 1e-5)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "both"])
@pytest.mark.parametrize("case", ["3x3", "stride 2", "seventeen images"])
def test_layouts(layout, which, case):
    (x, w, words, b), arguments, _ = sample(case)
    x = LAYOUTS[layout](x) if which != "weight" else x
    w = LAYOUTS[layout](w) if which != "x" else w
    y = masked_conv2d(x.requires_grad_(), w.requires_grad_(), words, b, *arguments)
    like = F.conv2d(x, w, b, *arguments)
    assert y.stride() == like.stride()
    y.sum().backward()
    want = expected([t.detach() for t in (x, w, words, b)], arguments)
    for got, wanted in zip((y.detach(), x.grad, w.grad), want, strict=False):
        assert_near(got, wanted, 1e-5)


@pytest.mark.parametrize("kernel, dilation", [((3, 3), 1), ((2, 4), 1), ((4, 1), 3), ((2, 3), (1, 2))])
def test_same_and_valid_padding(kernel, dilation):
    (x, w, words, b), _, keep = sample((2, 3, 4, 13, 12, kernel, 1, 0, 1, 1), torch.float64)
    for padding in ("same", "valid"):
        want = F.conv2d(x, w * keep, b, 1, padding, dilation)
        torch.testing.assert_close(masked_conv2d(x, w, words, b, 1, padding, dilation), want)


def test_unbatched():
    (x, w, words, b), arguments, keep = sample("3x3", torch.float64)
    got = masked_conv2d(x[0], w, words, b, *arguments)
    torch.testing.assert_close(got, F.conv2d(x[0], w * keep, b, *arguments))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(density):
    tensors, arguments, _ = sample("3x3", density=density)
    x, w, words, b = tensors
    w = w.requires_grad_()
    y = masked_conv2d(x, w, words, b, *arguments)
    y.sum().backward()
    want = expected([t.detach() for t in (x, w, words, b)], arguments)
    assert_near(y.detach(), want[0], 1e-5)
    assert_near(w.grad, want[2], 1e-5)


def test_autocast_follows_conv2d():
    (x, w, words, b), arguments, keep = sample("3x3")
    with torch.autocast("cpu", torch.bfloat16):
        w = (w * keep).requires_grad_()
        y = masked_conv2d(x, w, words, b, *arguments)
        like = F.conv2d(x, w, b, *arguments)
        double = masked_conv2d(x.double(), w.detach().double(), words, None, *arguments)
    assert y.dtype == like.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    y.sum().backward()
    assert w.grad.dtype == torch.float32
    assert_near(y.detach(), like.detach().double(), 1e-2)


@pytest.mark.parametrize("case", ["3x3", "groups", "pairs", "empty batch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(case, memory_format):
    (x, w, words, b), arguments, _ = sample(case)
    x = x.to(memory_format=memory_format)
    stride, padding, dilation = (pair(a) for a in arguments[:3])
    rest = (stride, padding, dilation, arguments[3], False)
    torch.library.opcheck(torch.ops.sparselottery.masked_conv2d, (x, w, words, b, *rest))
    grad = torch.ops.sparselottery.masked_conv2d(x, w, words, b, *rest)
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.sparselottery.masked_conv2d_backward, (grad, x, w, words, *rest, mask))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_without_a_graph_break(memory_format):
    (x, w, words, b), arguments, _ = sample("3x3")
    x, w = x.to(memory_format=memory_format), w.requires_grad_()
    f = torch.compile(lambda *t: masked_conv2d(*t, *arguments), fullgraph=True, backend="aot_eager")
    y = f(x, w, words, b)
    eager = masked_conv2d(x, w, words, b, *arguments)
    assert torch.equal(y, eager) and y.stride() == eager.stride()
    (compiled,) = torch.autograd.grad(y.sum(), w)
    (plain,) = torch.autograd.grad(eager.sum(), w)
    assert torch.equal(compiled, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x, w, words, b).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"x": torch.ones(2, 5, 7, 7)}, ValueError, "x: expected [N, 4, H, W] or [4, H, W]"),
        ({"x": torch.ones(4, 7)}, ValueError, "x: expected [N, 4, H, W]"),
        ({"x": torch.ones(2, 4, 7, 7, dtype=torch.int64)}, TypeError, "x: expected a floating-point"),
        ({"x": torch.ones(2, 4, 1, 7), "padding": 0}, ValueError, "x: expected height and width of at least [3, 3]"),
        ({"words": torch.ones(6, 1, dtype=torch.int32)}, ValueError, "words: expected int32 [6, 2]"),
        ({"words": torch.ones(6, 2, dtype=torch.int64)}, ValueError, "words: expected int32 [6, 2]"),
        ({"bias": torch.ones(5)}, ValueError, "bias: expected [6]"),
        ({"weight": torch.ones(6, 4, 3, 3, dtype=torch.float16)}, TypeError, "weight: expected torch.float32"),
        ({"weight": torch.ones(6, 4)}, ValueError, "weight: expected [out, C / groups, kH, kW]"),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"stride": 1.5}, TypeError, "stride: expected an int or a pair of ints, got 1.5"),
        ({"padding": (1, 1, 1)}, TypeError, "padding: expected an int or a pair"),
        ({"padding": -1}, ValueError, "padding: expected at least 0"),
        ({"padding": "full"}, ValueError, 'padding: expected an int, a pair of ints, "same" or "valid"'),
        ({"padding": "same", "stride": 2}, ValueError, 'padding: "same" needs stride 1'),
        ({"dilation": (1, 0)}, ValueError, "dilation: expected at least 1"),
        ({"groups": 4}, ValueError, "groups: expected a divisor of the 6 output channels, got 4"),
    ],
)
def test_bad_input_names_the_argument(change, error, says):
    (x, w, words, b), _, _ = sample("3x3")
    arguments = {"x": x, "weight": w, "words": words, "bias": b, "padding": 1} | change
    with pytest.raises(error, match=re.escape(says)):
        masked_conv2d(**arguments)
