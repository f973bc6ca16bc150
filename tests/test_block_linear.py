"""block_linear without a GPU: parity with float64, gradients, registration, what a mask's blocks are, bad input.

Its kernels are tested in tests/triton/test_block_linear.py.
"""

import re

import pytest
import torch
from torch.nn import functional as F

import sparselottery as sl
from sparselottery.ops import block_linear as op
from sparselottery.ops import derived, reference
from sparselottery.ops.block_linear import block_linear

SHAPES = [(5, 70, 40), (3, 16, 16), (0, 20, 20), (4, 1, 1), (3, 0, 20), (3, 20, 0)]  # batch, in, out


def block_mask(shape, block, density=0.4, seed=0):
    """bool of `shape`, in blocks that the edges cut off."""
    live = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=torch.Generator().manual_seed(seed))
    live = (live < density).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return live[: shape[0], : shape[1]].contiguous()


def sample(batch, inputs, outputs, dtype=torch.float32, block=(16, 16)):
    g = torch.Generator().manual_seed(batch * 10007 + inputs * 101 + outputs)
    x = torch.randn(batch, inputs, generator=g, dtype=torch.float64)
    w = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
    b = torch.randn(outputs, generator=g, dtype=torch.float64)
    keep = block_mask((outputs, inputs), block)
    return x.to(dtype), w.to(dtype), reference.bitmask_pack(keep), b.to(dtype), keep


@pytest.mark.parametrize("premasked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
def test_matches_float64(shape, dtype, tolerance, premasked):
    x, w, words, b, keep = sample(*shape, dtype)
    if premasked:
        w = torch.where(keep, w, 0)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    got = block_linear(inputs[0], inputs[1], words, inputs[2], block=(16, 16), premasked=premasked)
    wanted = reference.masked_linear(x.double(), w.double(), words, b.double())
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(got, inputs, grad)
    expected = reference.masked_linear_backward(grad.double(), x.double(), w.double(), words)
    for ours, theirs in zip((got, *gradients), (wanted, *expected), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * (1 + theirs.norm())


def test_gradcheck_twice():
    x, w, words, b, _ = sample(3, 20, 18, torch.float64)
    inputs = [t.requires_grad_() for t in (x, w, b)]

    def run(x, w, b):
        return block_linear(x, w, words, b, block=(16, 16))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("output_mask", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck(output_mask):
    x, w, words, b, _ = sample(4, 40, 20)
    torch.library.opcheck(torch.ops.sparselottery.block_linear, (x, w, words, b, [16, 16], False))
    arguments = (torch.randn(4, 20), x, w, words, [16, 16], False, list(output_mask))
    torch.library.opcheck(torch.ops.sparselottery.block_linear_backward, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend):
    x, w, words, b, _ = sample(4, 40, 20)
    x, w, b = (t.requires_grad_() for t in (x, w, b))

    def loss(*tensors):
        return block_linear(*tensors, block=(16, 16)).square().sum()

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(x, w, words, b), (x, w, b))
    for got, want in zip(ours, torch.autograd.grad(loss(x, w, words, b), (x, w, b)), strict=True):
        torch.testing.assert_close(got, want)


def test_transforms_and_leading_dimensions():
    x, w, words, b, keep = sample(6, 40, 20)
    want = F.linear(x, w * keep, b)

    def run(x):
        return block_linear(x, w, words, b, block=(16, 16))

    torch.testing.assert_close(run(x.view(2, 3, 40)), want.view(2, 3, 20))
    torch.testing.assert_close(run(x[0]), want[0])
    torch.testing.assert_close(torch.func.vmap(run)(x), want)
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), (w * keep).sum(0).expand(6, 40))


def test_autocast_follows_linear():
    x, w, words, b, keep = sample(6, 40, 20)
    with torch.autocast("cpu", torch.bfloat16):
        got = block_linear(x, w, words, b, block=(16, 16))
        want = F.linear(x, w * keep, b)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


# ---- what is known of a mask ----


@pytest.mark.parametrize("shape", [(64, 64), (130, 70), (1, 1), (15, 33), (40, 17)])
@pytest.mark.parametrize("block", [(16, 16), (64, 16), (7, 32), (1, 128)])
def test_live_blocks(shape, block):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.01
    got = derived.live_blocks(reference.bitmask_pack(keep), shape, *block)
    want = [[part.any() for part in strip.split(block[1], 1)] for strip in keep.split(block[0], 0)]
    assert torch.equal(got, torch.tensor(want))


@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(512, 512), (300, 500)])
def test_blocks_are_found(side, shape):
    keep = block_mask(shape, (side, side), 0.15, seed=1)
    found = op.find_block(reference.bitmask_pack(keep), shape)
    assert keep.any() and found is not None and found[0] == found[1] >= side
    live = derived.live_blocks(reference.bitmask_pack(keep), shape, *found)
    covered = live.repeat_interleave(found[0], 0).repeat_interleave(found[1], 1)[: shape[0], : shape[1]]
    assert covered.sum() <= 1.1 * keep.sum(), "no blocks that are mostly dead"
    assert op._area(live, shape, *found) == covered.sum()
    ragged = keep & (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    assert op.find_block(reference.bitmask_pack(ragged), shape) == found, "survivors need not fill their blocks"


def test_no_blocks_are_found_where_there_are_none():
    scattered = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < 0.1
    full = torch.ones(512, 512, dtype=torch.bool)
    for keep in (scattered, full, full[:0], full[:, :0]):
        assert op.find_block(reference.bitmask_pack(keep), tuple(keep.shape)) is None


def test_a_mask_changed_in_place_is_looked_at_again():
    words = reference.bitmask_pack(block_mask((512, 512), (64, 64), 0.1))
    assert op.find_block(words, (512, 512)) == (64, 64)
    words.copy_(reference.bitmask_pack(torch.ones(512, 512, dtype=torch.bool)))
    assert op.find_block(words, (512, 512)) is None


def test_on_a_cpu_a_layer_does_not_ask(monkeypatch):
    def never(*arguments):
        raise AssertionError("looked for blocks")

    monkeypatch.setattr(op, "_find_block", never)
    layer = sl.MaskedLinear(256, 256, mask=block_mask((256, 256), (64, 64)))
    x = torch.randn(4, 256)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert "block" not in str(sl.explain(layer))


def test_a_compiled_layer_goes_by_the_blocks_of_the_last_eager_call(monkeypatch):
    layer = sl.MaskedLinear(256, 256, mask=block_mask((256, 256), (64, 64)))
    x, called = torch.randn(4, 256), []
    monkeypatch.setattr(op, "blocks_for", lambda x, words, shape: op.find_block(words, shape))
    want = layer(x)
    assert layer._block == (64, 64)

    def look(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=look)(x), want)
    assert any("block_linear" in name for name in called)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    assert "_block" not in layer.__getstate__()


# ---- bad input ----


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(x=torch.ones(2, 9)), ValueError, "x: expected [*, 40] for weight [20, 40], got [2, 9]"),
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (dict(words=torch.ones(20, 1)), ValueError, "words: expected int32 [20, 2], got torch.float32 [20, 1]"),
        (dict(bias=torch.ones(3)), ValueError, "bias: expected [20], got [3]"),
        (dict(weight=torch.ones(20, 40, dtype=torch.float64)), TypeError, "weight: expected torch.float32 like x"),
        (dict(block=16), TypeError, "block: expected a pair of ints, rows and columns, got 16"),
        (dict(block=(16, 16.0)), TypeError, "block: expected a pair of ints, rows and columns, got (16, 16.0)"),
        (dict(block=(0, 16)), ValueError, "block: expected at least 1 row and 1 column, got (0, 16)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_names_the_argument(change, error, says):
    x, weight, words, bias, _ = sample(4, 40, 20)
    arguments = dict(x=x, weight=weight, words=words, bias=bias, block=(16, 16)) | change
    with pytest.raises(error, match=re.escape(says)):
        block_linear(**arguments)
