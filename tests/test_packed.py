"""packed: expand, gather and the layers' ops: parity, gradients, registration, memory, bad input."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from sparselottery import _ext
from sparselottery.ops import packed, packed_layers, reference
from sparselottery.ops.packed_layers import packed_conv2d, packed_linear

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(0,), (1,), (31,), (1000,), (5, 33), (7, 64), (3, 1), (64, 3, 3, 3), (0, 4), (4, 0), (2, 140_000), (900, 700)]


def sample(shape, density=0.3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=g) < density
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), keep, reference.bitmask_pack(keep)


@pytest.fixture(params=_ext._C.cpu_isas())
def isa(request):
    _ext._C.cpu_set_isa(request.param)
    yield request.param
    _ext._C.cpu_set_isa("auto")


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(isa, shape, dtype, density):
    dense, keep, words = sample(shape, density, dtype)
    values = packed.gather(dense, words)
    assert torch.equal(values, dense[keep]) and values.dtype == dtype
    assert torch.equal(values, reference.packed_gather(dense, words))
    back = packed.expand(values, words, shape)
    assert torch.equal(back, torch.where(keep, dense, 0)) and not torch.signbit(back[~keep]).any()
    assert torch.equal(back, reference.packed_expand(values, words, shape))


def test_bits_are_moved_not_numbers(isa):
    dense, keep, words = sample((40, 70))
    dense[::2] = torch.nan
    dense[1::4] = -0.0
    values = packed.gather(dense, words)
    assert torch.equal(values.view(torch.int32), dense[keep].view(torch.int32))
    back = packed.expand(values, words, dense.shape)
    assert torch.equal(back.view(torch.int32), torch.where(keep, dense, 0).view(torch.int32))


def test_every_element_of_the_output_is_written(isa):
    """Memory that holds NaN shows what a kernel leaves out."""
    dense, keep, words = sample((33, 4000))
    values = dense[keep]
    got = torch.full(dense.shape, torch.nan)
    _ext._C.cpu_packed_expand(values.data_ptr(), values.numel(), 4, words.data_ptr(), 33, 4000, got.data_ptr())
    assert torch.equal(got, torch.where(keep, dense, 0))
    guarded = torch.full((values.numel() + 32,), torch.nan)
    out = guarded[16:-16]
    _ext._C.cpu_packed_gather(
        dense.data_ptr(), 4, words.data_ptr(), [33, 4000], [4000, 1], out.data_ptr(), values.numel()
    )
    assert torch.equal(out, values) and guarded[:16].isnan().all() and guarded[-16:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_reads_any_strides(isa, dtype):
    dense, keep, words = sample((6, 5, 3, 4), dtype=dtype)
    for view in (
        dense.to(memory_format=torch.channels_last),
        dense.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        assert torch.equal(packed.gather(view, words), dense[keep])
    wide = torch.cat([dense.flatten(1), dense.flatten(1)], 1)[:, 1:61]
    assert torch.equal(packed.gather(wide, reference.bitmask_pack(wide > 0)), wide[wide > 0])
    assert torch.equal(packed.gather(dense[:1].expand(6, 5, 3, 4), words), dense[:1].expand(6, 5, 3, 4)[keep])


def test_results_do_not_depend_on_threads(isa):
    dense, keep, words = sample((700, 3001))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(packed.gather(dense, words), dense[keep])
            assert torch.equal(packed.expand(dense[keep], words, dense.shape), torch.where(keep, dense, 0))
    finally:
        torch.set_num_threads(before)


def test_a_count_that_does_not_fit_is_an_error():
    dense, keep, words = sample((9, 40))
    count = int(keep.sum())
    for wrong in (0, count - 1, count + 1):
        with pytest.raises(ValueError, match=f"the mask keeps {count} weights, got {wrong} values"):
            packed.expand(torch.zeros(wrong), words, (9, 40))
        with pytest.raises(ValueError, match=f"the mask keeps {count} weights, got {wrong} values"):
            packed.gather(dense, words, wrong)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda v, d, w: packed.expand([1.0], w, (9, 40)), TypeError, "values: expected a tensor, got list"),
        (lambda v, d, w: packed.expand(v.int(), w, (9, 40)), TypeError, "values: expected float32"),
        (lambda v, d, w: packed.expand(v[None], w, (9, 40)), ValueError, r"values: expected \[count\]"),
        (lambda v, d, w: packed.expand(v, w, (9, 80)), ValueError, r"words: expected int32 \[9, 3\]"),
        (lambda v, d, w: packed.expand(v, w.float(), (9, 40)), TypeError, "words: expected int32"),
        (lambda v, d, w: packed.gather(3, w), TypeError, "dense: expected a tensor, got int"),
        (lambda v, d, w: packed.gather(d.long(), w), TypeError, "dense: expected float32"),
        (lambda v, d, w: packed.gather(d[:3], w), ValueError, r"words: expected int32 \[3, 2\]"),
        (lambda v, d, w: packed_linear(d[:, 1:], v, w, None, (9, 40)), ValueError, r"x: expected \[\*, 40\]"),
        (lambda v, d, w: packed_linear(d, v, w, None, (9,)), ValueError, "shape: expected 2 sizes"),
        (lambda v, d, w: packed_linear(d.double(), v, w, None, (9, 40)), TypeError, "values: expected torch.float64"),
        (lambda v, d, w: packed_linear(d, v, w, d[0], (9, 40)), ValueError, r"bias: expected \[9\]"),
        (lambda v, d, w: packed_linear([1], v, w, None, (9, 40)), TypeError, "x: expected a tensor"),
        (lambda v, d, w: packed_linear(d.to_sparse(), v, w, None, (9, 40)), ValueError, "x: expected a dense tensor, got"),
        (lambda v, d, w: packed_linear(d, v, w, None, 9), TypeError, "shape: expected sizes, got int"),
        (lambda v, d, w: packed_linear(d, v, w, None, (9.0, 40.0)), TypeError, "shape: expected sizes, got 9.0"),
        (lambda v, d, w: packed.expand(v, w, None), TypeError, "shape: expected sizes, got NoneType"),
        (lambda v, d, w: packed.gather(d.to_sparse(), w), ValueError, "dense: expected a dense tensor, got layout"),
        (lambda v, d, w: packed.gather(d, w, -1), ValueError, "count: expected at least 0, got -1"),
        (lambda v, d, w: packed.gather(d, w, 2.0), TypeError, "count: expected an int or None, got float"),
        (lambda v, d, w: packed_conv2d(d, v, w, None, (9, 10, 2, 2)), ValueError, r"x: expected \[N, 10, H, W\]"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    dense, keep, words = sample((9, 40))
    with pytest.raises(error, match=says):
        call(dense[keep], dense, words)


# ---- the sparse kernels on a CPU ----


@pytest.fixture
def sparse(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    "batch, inputs, outputs",
    [(1, 64, 32), (1, 70_000, 3), (5, 7, 3), (8, 33, 65), (40, 300, 100), (3, 1200, 1100), (4, 1, 1)],
)
def test_sparse_kernels_match_float64(isa, sparse, batch, inputs, outputs, density):
    dense, keep, words = sample((outputs, inputs), density, seed=batch)
    g = torch.Generator().manual_seed(7)
    arguments = [torch.randn(batch, inputs, generator=g), dense[keep], torch.randn(outputs, generator=g)]
    grad = torch.randn(batch, outputs, generator=g)
    for wanted in ((True, True, True), (False, True, False), (True, False, True)):
        x, values, bias = (t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True))
        y = packed_linear(x, values, words, bias, (outputs, inputs))
        weight = torch.where(keep, dense, 0).double().requires_grad_()
        wide = [x.detach().double().requires_grad_(), weight, bias.detach().double().requires_grad_()]
        want = F.linear(*wide)
        y.backward(grad)
        want.backward(grad.double())
        results = [(y, want), (x.grad, wide[0].grad), (values.grad, weight.grad[keep]), (bias.grad, wide[2].grad)]
        for got, expected in results:
            if got is not None:
                assert got.shape == expected.shape
                assert (got.double() - expected).norm() <= 1e-5 * (1 + expected.norm())
        assert [t.grad is not None for t in (x, values, bias)] == list(wanted)


def test_sparse_kernels_see_every_change(sparse):
    """Of the values, in place and behind autograd's back, and of the mask."""
    dense, keep, words = sample((60, 80))
    values, x = dense[keep], torch.randn(4, 80)

    def check():
        torch.testing.assert_close(packed_linear(x, values, words, None, (60, 80)), x @ torch.where(keep, dense, 0).t())

    check()
    for change in (values.mul_, values.data.mul_):
        change(2)
        dense *= 2
        check()
    values, dense = values + 1, dense + 1
    check()
    keep = keep.flip(0)
    words.copy_(reference.bitmask_pack(keep))
    values = dense[keep]
    check()
    with torch.inference_mode():
        check()
    with pytest.raises(ValueError, match=f"the mask keeps {values.numel()} weights, got 3 values"):
        packed_linear(x, values[:3], words, None, (60, 80))


def test_dispatch_chooses_by_measurement(monkeypatch):
    dense, keep, words = sample((100, 100), 0.02)
    x, values = torch.randn(32, 100, requires_grad=True), dense[keep].requires_grad_()
    asked = []

    def choose(op, key, candidates, *, rule):
        asked.append((op, key[0], sorted(candidates), rule()))
        return "cpu"

    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    monkeypatch.setattr(packed_layers.dispatch, "lookup", lambda op, key: None)
    monkeypatch.setattr(packed_layers.dispatch, "choose", choose)
    y = packed_linear(x, values, words, None, (100, 100))
    y.sum().backward()
    names = ["cpu", "dense", "reference"]
    assert [a[:3] for a in asked] == [("packed_linear", d, names) for d in ("forward", "backward")]
    torch.testing.assert_close(y, F.linear(x, torch.where(keep, dense, 0)))


# ---- as ops ----


def test_opcheck():
    dense, keep, words = sample((6, 33), dtype=torch.float64)
    values = dense[keep]
    ops = torch.ops.sparselottery
    torch.library.opcheck(ops.packed_expand, (values, words, [6, 33]))
    torch.library.opcheck(ops.packed_gather, (dense, words, values.numel()))
    x, grad, b = torch.randn(4, 33).double(), torch.randn(4, 6).double(), torch.randn(6).double()
    torch.library.opcheck(ops.packed_linear, (x, values, words, b, [6, 33], False))
    for wanted in itertools.product([True, False], repeat=3):
        torch.library.opcheck(ops.packed_linear_backward, (grad, x, values, words, [6, 33], False, list(wanted)))
    dense, keep, words = sample((6, 2, 3, 3), dtype=torch.float64)
    values = dense[keep]
    geometry = [[2, 1], [1, 1], [1, 1], 2]
    x = torch.randn(2, 4, 8, 8).double()
    for layout in (x, x.to(memory_format=torch.channels_last)):
        torch.library.opcheck(ops.packed_conv2d, (layout, values, words, b, [6, 2, 3, 3], *geometry))
        grad = torch.randn_like(ops.packed_conv2d(layout, values, words, b, [6, 2, 3, 3], *geometry))
        for wanted in itertools.product([True, False], repeat=3):
            arguments = (grad, layout, values, words, [6, 2, 3, 3], *geometry, list(wanted))
            torch.library.opcheck(ops.packed_conv2d_backward, arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_linear(transposed):
    shape = (9, 6) if transposed else (6, 9)
    dense, keep, words = sample(shape, dtype=torch.float64)
    x, b = torch.randn(2, 4, 9).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    values = dense[keep].requires_grad_()

    def f(x, values, b):
        return packed_linear(x, values, words, b, shape, transposed=transposed)

    plain = torch.where(keep, dense, 0)
    torch.testing.assert_close(f(x, values, b), F.linear(x, plain.t() if transposed else plain, b))
    assert torch.autograd.gradcheck(f, (x, values, b))
    assert torch.autograd.gradgradcheck(f, (x, values, b))
    for frozen in itertools.product([True, False], repeat=3):
        inputs = [t.detach().requires_grad_(not cold) for t, cold in zip((x, values, b), frozen, strict=True)]
        if not all(frozen):
            f(*inputs).square().sum().backward()
        assert [t.grad is None for t in inputs] == list(frozen)


def test_gradients_of_conv2d():
    dense, keep, words = sample((4, 2, 3, 3), dtype=torch.float64)
    x, b = torch.randn(2, 4, 6, 5).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    values = dense[keep].requires_grad_()
    geometry = ((2, 1), (1, 0), (1, 2), 2)

    def f(x, values, b):
        return packed_conv2d(x, values, words, b, (4, 2, 3, 3), *geometry)

    torch.testing.assert_close(f(x, values, b), F.conv2d(x, torch.where(keep, dense, 0), b, *geometry))
    assert torch.autograd.gradcheck(f, (x, values, b))
    assert torch.autograd.gradgradcheck(f, (x, values, b))
    for frozen in itertools.product([True, False], repeat=3):
        inputs = [t.detach().requires_grad_(not cold) for t, cold in zip((x, values, b), frozen, strict=True)]
        if not all(frozen):
            f(*inputs).square().sum().backward()
        assert [t.grad is None for t in inputs] == list(frozen)


def test_expand_and_gather_are_each_others_gradient():
    dense, keep, words = sample((5, 40), dtype=torch.float64)
    values = dense[keep].requires_grad_()
    dense.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: packed.expand(v, words, (5, 40)), (values,))
    assert torch.autograd.gradgradcheck(lambda v: packed.expand(v, words, (5, 40)).sin(), (values,))
    assert torch.autograd.gradcheck(lambda d: packed.gather(d, words), (dense,))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    dense, keep, words = sample((6, 33))
    inputs = [torch.randn(4, 33, requires_grad=True), dense[keep].requires_grad_(), torch.randn(6, requires_grad=True)]

    def f(x, values, b):
        return packed_linear(x, values, words, b, (6, 33)).relu().sum()

    want = torch.autograd.grad(f(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend=backend)(*inputs), inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vmap_over_values():
    dense, keep, words = sample((6, 33))
    stacked = torch.stack([dense[keep], 2 * dense[keep]])
    x = torch.randn(4, 33)
    got = torch.func.vmap(lambda v: packed_linear(x, v, words, None, (6, 33)))(stacked)
    torch.testing.assert_close(got[1], 2 * got[0])


def test_autocast():
    dense, keep, words = sample((6, 33))
    x, values = torch.randn(4, 33), dense[keep].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, values, words, torch.randn(6), (6, 33))
        want = F.linear(x, torch.where(keep, dense, 0))
    assert y.dtype == want.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.shape == values.shape


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_nothing_dense_lives_between_forward_and_backward(layer):
    shape = (64, 100) if layer == "linear" else (16, 16, 5, 5)
    dense, keep, words = sample(shape, 0.1)
    values = dense[keep].requires_grad_()
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if layer == "linear":
            y = packed_linear(torch.randn(2, 100, requires_grad=True), values, words, None, shape)
        else:
            y = packed_conv2d(torch.randn(1, 16, 6, 6, requires_grad=True), values, words, None, shape)
    assert kept and max(kept) < dense.numel() / 5, kept
    y.sum().backward()
    assert values.grad.shape == values.shape
