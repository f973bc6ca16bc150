"""masked_conv2d: parity with float64, gradients, layouts, registration, bad input."""

import inspect
import os
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery._ext import extension
from sparselottery.ops import dispatch, reference
from sparselottery.ops import masked_conv2d as op
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
    "many images": (70, 3, 4, 5, 7, (3, 3), 1, 1, 1, 1),
    "panels": (2, 96, 100, 6, 6, (3, 3), 1, 1, 1, 1),  # too many channels for the first cache at once
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
BACKENDS = ["dense", "reference", *(f"cpu {isa}" for isa in extension().cpu_isas())]
SPARSE = BACKENDS[2:]


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch):
    """Backends must write all of what new_empty gives them."""
    new_empty = torch.Tensor.new_empty

    def nan_filled(*args, **kwargs):
        t = new_empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)


@pytest.fixture
def use(monkeypatch):
    """use("cpu avx2") forces that backend and instruction set."""

    def use(backend):
        name, _, isa = backend.partition(" ")
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", name)
        extension().cpu_set_isa(isa or "auto")

    yield use
    extension().cpu_set_isa("auto")


def run(tensors, arguments, grad=None, **options):
    """(y, dX, dW, db) of the op."""
    x, w, words, b = tensors
    x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
    y = masked_conv2d(x, w, words, b, *arguments, **options)
    return y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y) if grad is None else grad)


def assert_parity(tensors, arguments, keep, tolerance=1e-5, **options):
    shape = masked_conv2d(*tensors, *arguments).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    results = run(tensors, arguments, grad, **options)
    for got, wanted in zip(results, expected(tensors, arguments, grad), strict=True):
        assert got.dtype == tensors[0].dtype
        assert_near(got, wanted, tolerance)
    assert (results[2][~keep] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_matches_float64(case, backend, use):
    use(backend)
    assert_parity(*sample(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("premasked", [False, True])
def test_dtypes(case, dtype, premasked, use):
    use("dense")
    (x, w, words, b), arguments, keep = sample(case, dtype)
    w = w * keep if premasked else w
    assert_parity((x, w, words, b), arguments, keep, DTYPES[dtype], premasked=premasked)


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("survivors", ["none", "all", "one", "no filter 2", "no input channel 1", "one tap"])
def test_special_masks(survivors, backend, use):
    use(backend)
    for case in ("3x3", "stride 2"):
        (x, w, _, b), arguments, keep = sample(case, density=0.5)
        keep = {
            "none": torch.zeros_like(keep),
            "all": torch.ones_like(keep),
            "one": torch.zeros_like(keep).index_put_([torch.tensor([i]) for i in (3, 2, 1, 0)], torch.tensor(True)),
            "no filter 2": keep.index_fill(0, torch.tensor(2), False),
            "no input channel 1": keep.index_fill(1, torch.tensor(1), False),
            "one tap": torch.zeros_like(keep).index_fill(2, torch.tensor(2), True),
        }[survivors]
        assert_parity((x, w, reference.bitmask_pack(keep), b), arguments, keep)


@st.composite
def convolutions(draw):
    small = st.integers(1, 3)
    kernel, stride, dilation = ((draw(small), draw(small)) for _ in range(3))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    height, width = (draw(st.integers(n, n + 18)) for n in least)
    groups = draw(small)
    inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
    batch = draw(st.sampled_from([1, 2, 3, 33, 70]))
    return batch, inputs, outputs, height, width, kernel, stride, padding, dilation, groups


def strided(x, w, layout):
    """The same numbers in other places of memory."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    if layout == "padded":
        return torch.cat([x, x], 3)[..., x.shape[3] :], torch.cat([w, w], 2)[:, :, w.shape[2] :]
    if layout == "transposed":
        return x.mT.contiguous().mT, w.transpose(0, 1).contiguous().transpose(0, 1)
    return (x[:1].expand_as(x) if layout == "expanded" else x), w


@pytest.mark.parametrize("backend", SPARSE)
def test_any_convolution(backend, use):
    use(backend)

    @settings(max_examples=15 if "SPARSELOTTERY_SANITIZED" in os.environ else 60, deadline=None, derandomize=True)
    @given(
        case=convolutions(),
        density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
        without=st.sampled_from(["", "all but one", "a filter", "an input"]),
        layout=st.sampled_from(["plain", "channels_last", "padded", "transposed", "expanded"]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    )
    def check(case, density, without, layout, dtype):
        (x, w, _, b), arguments, keep = sample(case, dtype, density)
        if without == "all but one":
            keep[:] = False
            keep.view(-1)[keep.numel() // 2] = True
        elif without == "a filter":
            keep[keep.shape[0] // 2] = False
        elif without == "an input":
            keep[:, keep.shape[1] // 2] = False
        x, w = strided(x, w, layout)
        assert_parity((x, w, reference.bitmask_pack(keep), b), arguments, keep, DTYPES[dtype] / 2)

    check()


@pytest.mark.parametrize("backend", SPARSE)
def test_bfloat16_is_rounded_once(backend, use):
    """y and the gradients are those of float32 on the same numbers, rounded: no sum is kept in 8 bits."""
    use(backend)
    (x, w, words, b), arguments, _ = sample("3x3", torch.bfloat16)
    half = run((x, w, words, b), arguments)
    for got, full in zip(half, run((x.float(), w.float(), words, b.float()), arguments), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, full.bfloat16())


@pytest.mark.parametrize("case", ["seventeen images", "many images", "stride 2", "panels"])
def test_bit_equal_for_any_number_of_threads(case, use):
    use("cpu")
    tensors, arguments, _ = sample(case)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run(tensors, arguments, torch.ones_like(masked_conv2d(*tensors, *arguments)) * 0.3))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_choice_is_measured_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    tensors, arguments, keep = sample((4, 16, 16, 12, 12, (3, 3), 1, 1, 1, 1), density=0.05)
    assert_parity(tensors, arguments, keep)
    rows = [row for row in dispatch.table() if row["op"] == "masked_conv2d"]
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert set(row["us"]) == {"dense", "cpu"} and row["backend"] in row["us"]
    measured = len(rows)
    assert_parity(tensors, arguments, keep)
    assert len([row for row in dispatch.table() if row["op"] == "masked_conv2d"]) == measured
    dispatch.clear()


def test_without_a_stopwatch_the_rule_decides(monkeypatch):
    for density, backend in ((0.05, "cpu"), (0.5, "dense")):
        tensors, arguments, _ = sample((4, 16, 16, 12, 12, (3, 3), 1, 1, 1, 1), density=density)
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
        want = run(tensors, arguments)
        monkeypatch.delenv("SPARSELOTTERY_BACKEND")
        with dispatch.reproducible():
            got = run(tensors, arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_backend_that_cannot_is_refused(use):
    use("cpu")
    tensors, arguments, _ = sample("3x3", torch.float64)
    with pytest.raises(ValueError, match=r"SPARSELOTTERY_BACKEND=cpu: masked_conv2d .* can run on: dense, reference"):
        masked_conv2d(*tensors, *arguments)


def test_a_mask_changed_in_place_is_noticed(use):
    use("cpu")
    (x, w, words, b), arguments, keep = sample("3x3")
    assert_parity((x, w, words, b), arguments, keep)
    changed = ~keep
    words.copy_(reference.bitmask_pack(changed))
    assert_parity((x, w, words, b), arguments, changed)
    with torch.inference_mode():  # whose tensors do not count their changes
        words = reference.bitmask_pack(keep)
        for mask in (keep, changed):
            words.copy_(reference.bitmask_pack(mask))
            assert_near(masked_conv2d(x, w, words, b, *arguments), expected((x, w, words, b), arguments)[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_weights_never_count_even_when_not_finite(backend, use):
    use(backend)
    (x, w, words, b), arguments, keep = sample("3x3")
    want = masked_conv2d(x, w, words, b, *arguments)
    poisoned = torch.where(keep, w, float("nan")).requires_grad_()
    y = masked_conv2d(x, poisoned, words, b, *arguments)
    assert torch.equal(y, want)
    y.sum().backward()
    assert torch.isfinite(poisoned.grad).all() and (poisoned.grad[~keep] == 0).all()


@pytest.mark.parametrize("case", ["3x3", "groups", "pairs"])
def test_gradcheck(case, use):
    use("dense")
    tensors, arguments, _ = sample(case, torch.float64)
    x, w, words, b = (t.requires_grad_() if t.is_floating_point() else t for t in tensors)
    assert torch.autograd.gradcheck(lambda x, w, b: masked_conv2d(x, w, words, b, *arguments), [x, w, b])
    if case == "groups":
        x, w, b = (t.detach()[..., :3, :3].requires_grad_() if t.ndim == 4 else t for t in (x[:1], w, b))
        assert torch.autograd.gradgradcheck(lambda x, w, b: masked_conv2d(x, w, words, b, *arguments), [x, w, b])


def test_transforms_of_torch_func(use):
    use("dense")
    (x, w, words, b), arguments, keep = sample("3x3", torch.float64)

    def loss(w, x):
        return masked_conv2d(x[None], w, words, b, *arguments).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    again = [torch.func.grad(lambda w, x=x: (F.conv2d(x[None], w * keep, b, *arguments) ** 2).sum())(w) for x in x]
    torch.testing.assert_close(per_image, torch.stack(again))
    direction = torch.randn(w.shape, dtype=torch.float64)
    second = torch.func.grad(lambda w: (torch.func.grad(loss)(w, x[0]) * direction).sum())(w)
    v = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(v, x[0]), v, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad((first * direction).sum(), v)[0])


def test_a_call_does_not_inspect_signatures(monkeypatch, use):
    use("dense")
    (x, w, words, b), arguments, _ = sample("3x3")

    def inspected(*_, **__):
        raise AssertionError("autograd.Function.apply looks at forward's signature where setup_context stands apart")

    monkeypatch.setattr(inspect, "signature", inspected)
    y = masked_conv2d(x, w.requires_grad_(), words, b, *arguments)
    assert y.grad_fn is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend, use):
    use(backend)
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


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "both"])
@pytest.mark.parametrize("case", ["3x3", "stride 2", "seventeen images"])
def test_layouts(layout, which, case, backend, use):
    use(backend)
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


@pytest.mark.filterwarnings("ignore:Using padding='same'")
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


def test_autocast_follows_conv2d(use):
    use("dense")
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
@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_opcheck(case, memory_format, backend, use):
    use(backend)
    (x, w, words, b), arguments, _ = sample(case)
    x = x.to(memory_format=memory_format)
    stride, padding, dilation = (pair(a) for a in arguments[:3])
    rest = (stride, padding, dilation, arguments[3], False)
    torch.library.opcheck(torch.ops.sparselottery.masked_conv2d, (x, w, words, b, *rest))
    grad = torch.ops.sparselottery.masked_conv2d(x, w, words, b, *rest)
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.sparselottery.masked_conv2d_backward, (grad, x, w, words, *rest, mask))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_without_a_graph_break(memory_format, use):
    use("cpu")
    (x, w, words, b), arguments, _ = sample("3x3")
    x, w = x.to(memory_format=memory_format), w.requires_grad_()
    f = torch.compile(lambda *t: masked_conv2d(*t, *arguments), fullgraph=True, backend="aot_eager")
    y = f(x, w, words, b)
    eager = masked_conv2d(x, w, words, b, *arguments)
    assert torch.equal(y, eager) and y.stride() == eager.stride()
    (compiled,) = torch.autograd.grad(y.sum(), w)
    (plain,) = torch.autograd.grad(eager.sum(), w)
    assert torch.equal(compiled, plain)
    use("dense")
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
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
        ({"words": [1]}, TypeError, "words: expected a tensor, got list"),
        ({"groups": 4}, ValueError, "groups: expected a divisor of the 6 output channels, got 4"),
    ],
)
def test_bad_input_names_the_argument(change, error, says):
    (x, w, words, b), _, _ = sample("3x3")
    arguments = {"x": x, "weight": w, "words": words, "bias": b, "padding": 1} | change
    with pytest.raises(error, match=re.escape(says)):
        masked_conv2d(**arguments)


@pytest.mark.parametrize("negative", ["x", "grad"])
def test_negative_views(monkeypatch, negative):
    """z.conj().imag is a strided view whose sign is still to be applied."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")
    (x, w, words, b), arguments, _ = sample("3x3")
    grad = torch.randn(2, 6, 7, 9)
    exact = expected((x, w, words, b), arguments, grad)
    if negative == "x":
        x = torch.complex(x, -x).conj().imag
    else:
        grad = torch.complex(grad, -grad).conj().imag
    assert (x if negative == "x" else grad).is_neg()
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    y = masked_conv2d(inputs[0], inputs[1], words, inputs[2], *arguments)
    for found, wanted in zip((y, *torch.autograd.grad(y, inputs, grad)), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [9, (3, 10**6), 2**40])
def test_strides_beyond_the_image(monkeypatch, stride):
    """One output, whatever the stride: nothing is counted in strides then."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")
    (x, w, words, b), _, _ = sample("3x3")
    x, w, b = (t.detach().float().requires_grad_() for t in (x, w, b))
    y = masked_conv2d(x, w, words, b, stride, padding=1)
    got = torch.autograd.grad(y.sum(), (x, w, b))
    near = tuple(min(s, 9) for s in (stride if isinstance(stride, tuple) else (stride, stride)))
    expected = reference.masked_conv2d(x, w, words, b, near, (1, 1), (1, 1), 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), (x, w, b)))


def test_masks_of_one_density_differ_in_their_live_tiles():
    weight = torch.empty(128, 64, 3, 3)
    blocks = torch.zeros(weight.shape, dtype=torch.bool)
    blocks[:64, :16, 0, 0] = blocks[64:, 48:, 2, 1] = True  # 2 tiles of 72
    scattered = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 2 / 72
    words = [reference.bitmask_pack(keep) for keep in (blocks, scattered, torch.zeros_like(blocks))]
    found = [op.live_bucket(w, weight) for w in words]
    assert found == [dispatch.density_bucket(2 / 72), 0, 99]
    assert op.live_bucket(torch.zeros(0, 1, dtype=torch.int32), torch.empty(0, 3, 3, 3)) == 0
