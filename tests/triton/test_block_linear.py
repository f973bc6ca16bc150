"""block_linear's Triton kernels in the interpreter, against float64."""

import math

import pytest
import torch

import sparselottery as sl
from sparselottery.kernels import block_linear
from sparselottery.ops import block_linear as op
from sparselottery.ops import dispatch, reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (128, 16), (8, 4)]
# rows, in, out: several strips with ragged edges, whole tiles, less than a block, one of everything
SHAPES = [(150, 200, 170), (20, 256, 128), (5, 7, 3), (1, 1, 1)]


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    """A kernel must write all of what it was given."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def blocks_of(shape, block, live):
    """bool of `shape` from bool [block rows, block columns]; cut off at the edges."""
    return live.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]].contiguous()


def sample(rows, inputs, outputs, block, dtype=torch.float32, density=0.3):
    g = torch.Generator().manual_seed(rows * 10007 + inputs * 101 + outputs + block[0])
    live = torch.rand(-(-outputs // block[0]), -(-inputs // block[1]), generator=g) < density
    live[-1], live[:, -1] = False, False  # a row and a column of blocks without survivors
    live[0, 0] = True
    keep = blocks_of((outputs, inputs), block, live)
    x, w, b, dy = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
        for s in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    return x, w * keep, b, dy, keep, reference.bitmask_pack(keep)


def run(x, w, b, dy, keep, words, block):
    """y, dX and dW."""
    shape, dtype = tuple(w.shape), x.dtype
    forward, backward, chunks = (op.index(words, shape, block, dtype, product) for product in ("y", "dX", "dW"))
    return (
        block_linear.forward(x, w, forward, b),
        block_linear.backward_input(dy, w, backward),
        block_linear.backward_weight(dy, x, words, chunks),
    )


def assert_parity(x, w, b, dy, keep, words, block):
    got = run(x, w, b, dy, keep, words, block)
    x64, w64, dy64 = x.double(), w.double(), dy.double()
    bias = 0 if b is None else b.double()
    for result, want in zip(got, (x64 @ w64.T + bias, dy64 @ w64, (dy64.T @ x64) * keep), strict=True):
        assert result.dtype == x.dtype and result.shape == want.shape
        assert (result.double() - want).norm() <= TOLERANCE[x.dtype] * (1e-30 + want.norm())
    assert (got[2][~keep] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_forward_and_gradients_match_float64(shape, block):
    assert_parity(*sample(*shape, block), block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("rows", [3, 20, 300])
def test_half_precision_and_every_tile_height(rows, block, dtype):
    """Batches that pick the tiles for few and for many rows."""
    assert_parity(*sample(rows, 150, 140, block, dtype), block)


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("alive", [False, True])
def test_all_dead_and_all_live(alive, block):
    x, w, b, dy, keep, _ = sample(20, 200, 140, block)
    keep = torch.full_like(keep, alive)
    w = torch.randn_like(w) * keep
    for bias in (b, None):
        assert_parity(x, w, bias, dy, keep, reference.bitmask_pack(keep), block)


@pytest.mark.parametrize("block", [(16, 16), (64, 64)], ids=str)
def test_any_mask_is_right(block):
    """Blocks say how the mask is read, not what it may be."""
    x, w, b, dy, keep, _ = sample(20, 200, 140, (64, 64))
    keep = keep & (torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    assert_parity(x, torch.where(keep, w, 0), b, dy, keep, reference.bitmask_pack(keep), block)


def test_any_strides():
    block = (16, 16)
    x, w, b, dy, keep, words = sample(24, 70, 40, block)
    want = run(x, w, b, dy, keep, words, block)
    x, w, dy = (torch.stack([t.t(), torch.full_like(t.t(), math.nan)], 2)[:, :, 0].t() for t in (x, w, dy))
    assert x.stride() == (2, 48) and w.stride() == (2, 80)
    for got, expected in zip(run(x, w, b, dy, keep, words, block), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 40, 20), (4, 0, 20), (4, 40, 0)])
def test_empty_sizes(rows, inputs, outputs):
    block, shape = (16, 16), (outputs, inputs)
    x, w, b, dy = (torch.ones(s) for s in ((rows, inputs), shape, (outputs,), (rows, outputs)))
    keep = torch.ones(shape, dtype=torch.bool)
    words = torch.zeros(reference.words_shape(shape), dtype=torch.int32) - 1
    y, dx, dw = run(x, w, b, dy, keep, words, block)
    assert torch.equal(y, x @ w.T + b) and torch.equal(dx, dy @ w) and torch.equal(dw, dy.T @ x)


def test_the_index_of_a_mask():
    """Live units in order, filled up to whole steps by a unit past the edge."""
    live = torch.zeros(10, 10, dtype=torch.bool)
    live[0, [0, 2, 3, 5, 9]] = live[9, 1] = True
    words = reference.bitmask_pack(blocks_of((155, 150), (16, 16), live))
    arguments = words, (155, 150), (16, 16), torch.bfloat16
    strip, unit, first, units = op.index(*arguments, "y")
    assert (strip, unit) == (64, 16) and first.tolist() == [0, 2, 2, 3]
    assert units.tolist() == [[0, 2, 3, 5], [9, 10, 10, 10], [1, 10, 10, 10]]
    _, _, first, units = op.index(*arguments, "dX")
    assert first.tolist() == [0, 1, 2, 3] and units[:, :2].tolist() == [[0, 9], [0, 10], [0, 10]]
    *_, owners, units, partial = op.index(*arguments, "dW")
    assert owners.tolist() == [0, 2] and units[1].tolist() == [1] + [10] * 7 and partial
    whole = reference.bitmask_pack(blocks_of((155, 150), (64, 64), torch.eye(3, dtype=torch.bool)))
    assert not op.index(whole, (155, 150), (64, 64), torch.bfloat16, "dW")[-1], "no mask is read for these"


@pytest.mark.parametrize(
    "block, dtype, tiles",
    [
        ((64, 64), torch.bfloat16, (64, 64)),
        ((128, 128), torch.float16, (128, 64)),
        ((256, 16), torch.bfloat16, (128, 16)),
        ((16, 96), torch.bfloat16, (64, 32)),
        ((4, 4), torch.bfloat16, (64, 16)),
        ((128, 128), torch.float32, (64, 32)),
    ],
)
def test_tiles_of_a_block(block, dtype, tiles):
    assert block_linear.tiling(block, dtype) == tiles


@pytest.mark.parametrize("kib, stages", [(227, 5), (163, 5), (99, 4), (64, 3), (1, 1)])
def test_stages_fit_into_shared_memory(monkeypatch, kib, stages):
    class Cuda:
        is_cuda, device = True, 0

        def element_size(self):
            return 2

    monkeypatch.setattr(block_linear, "_shared_memory", lambda device: kib << 10)
    config = block_linear._config(torch.bfloat16, 4096, 64)
    assert (config["BM"], config["BO"], config["BI"], config["num_stages"]) == (256, 64, 64, 5)
    assert block_linear._fitting(config, Cuda(), (256 + 64) * 64, 2) == config | {"num_stages": stages}


def test_other_dtypes_are_refused():
    x, w, _, _, _, words = sample(2, 20, 20, (16, 16))
    index = op.index(words, (20, 20), (16, 16), torch.float32, "y")
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16 for Triton"):
        block_linear.forward(x.double(), w.double(), index)


# ---- the op and the layer on these kernels ----


def block_layer(monkeypatch, side=64):
    """A layer with blocks, on a device that is said to have kernels for them; and the names of those that ran."""
    ran = []
    for name in ("forward", "backward_input", "backward_weight"):
        kernel = getattr(block_linear, name)
        monkeypatch.setattr(block_linear, name, lambda *a, _k=kernel, _n=name: ran.append(_n) or _k(*a))
    live = torch.zeros(-(-200 // side), -(-256 // side), dtype=torch.bool)
    live[0, 1] = live[1, 0] = live[2, 2] = True
    torch.manual_seed(0)
    layer = sl.MaskedLinear(256, 200, mask=blocks_of((200, 256), (side, side), live))
    return layer, torch.randn(2, 9, 256, requires_grad=True), ran


@pytest.mark.parametrize("side", [16, 64])
def test_a_layer_with_blocks_runs_on_them(monkeypatch, side):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    layer, x, ran = block_layer(monkeypatch, side)
    gradient = torch.randn(2, 9, 200)
    got = torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)
    assert ran == ["forward", "backward_input", "backward_weight"]
    keep = layer.mask.to_dense()
    want = torch.autograd.grad(
        torch.nn.functional.linear(x, layer.weight * keep, layer.bias), (x, *layer.parameters()), gradient
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (got[1][~keep] == 0).all()


def test_transposed_layers_of_transformers(monkeypatch):
    class Conv1D(torch.nn.Module):
        """As transformers has it."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(256, 200, generator=torch.Generator().manual_seed(0)))
            self.bias = torch.nn.Parameter(torch.zeros(200))

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    _, x, ran = block_layer(monkeypatch)
    model = sl.sparsify(torch.nn.Sequential(Conv1D()))
    keep = blocks_of((256, 200), (64, 64), torch.eye(4, dtype=torch.bool))
    model[0].set_mask(keep)
    got = torch.autograd.grad(model(x).square().sum(), (x, model[0].weight))
    assert ran == ["forward", "backward_input", "backward_weight"]
    want = torch.autograd.grad((x @ (model[0].weight * keep)).square().sum(), (x, model[0].weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_weight_that_is_not_masked_is_masked_first(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    x, w, b, dy, keep, words = sample(20, 200, 140, (64, 64))
    dirty = torch.where(keep, w, math.nan).requires_grad_()
    y = op.block_linear(x, dirty, words, b, block=(64, 64))
    torch.testing.assert_close(y, x @ w.T + b, rtol=1e-4, atol=1e-4)
    (dw,) = torch.autograd.grad(y, dirty, dy)
    torch.testing.assert_close(dw, (dy.T @ x) * keep, rtol=1e-4, atol=1e-4)


def test_the_choice_is_measured_and_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.setattr(op, "_goes_elsewhere", lambda t: False)
    dispatch.clear()
    layer, x, ran = block_layer(monkeypatch)
    assert "not yet measured" in sl.explain(layer).rows[0].note
    with torch.no_grad():
        y = layer(x)
    assert "forward" in ran, "it was measured"
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    row = sl.explain(layer).rows[0]
    assert row.backend == "dense" and set(row.measurements[0]["us"]) == {"dense", "triton"}
    key = next(iter(dispatch._decisions[op.OP]))
    dispatch._decisions[op.OP][key] = "triton"
    dispatch._records[op.OP, repr(key)]["backend"] = "triton"
    assert sl.explain(layer).rows[0].backend == "triton (blocks of 64x64)"
    del ran[:]
    layer._forget()
    layer(x).sum().backward()
    assert ran[0] == "forward"
    dispatch.clear()


def test_without_a_stopwatch_it_is_dense(monkeypatch):
    monkeypatch.setattr(op, "_goes_elsewhere", lambda t: False)
    layer, x, ran = block_layer(monkeypatch)
    with dispatch.reproducible():
        layer(x).sum().backward()
    assert not ran
