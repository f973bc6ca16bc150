"""bitmask: pack, unpack, count, hamming, apply_ on every instruction set; layouts, specials, registration, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery import _ext
from sparselottery.ops import bitmask, reference

SHAPES = [(), (1,), (0,), (31,), (32,), (33,), (5, 27), (4, 64), (3, 65), (4, 3, 3, 3), (0, 4), (3, 0), (7, 1, 5)]
LARGE = [(600, 1000), (1001, 777), (3, 200_003), (700_001,)]  # several threads, several runs a row
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def sample(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_matches_the_reference(shape, density, isa):
    dense, other = sample(shape, density), sample(shape, 0.5, seed=1)
    words = bitmask.pack(dense)
    assert torch.equal(words, reference.bitmask_pack(dense))
    assert torch.equal(bitmask.unpack(words, shape), dense)
    assert bitmask.count(words) == int(dense.sum())
    assert bitmask.hamming(words, bitmask.pack(other)) == int((dense ^ other).sum())
    assert torch.equal(bitmask.full_words(shape, True), bitmask.pack(torch.ones(shape, dtype=torch.bool)))
    assert torch.equal(bitmask.full_words(shape, False), bitmask.pack(torch.zeros(shape, dtype=torch.bool)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 999))
def test_any_shape(shape, density, seed):
    dense = sample(shape, density, seed)
    words = bitmask.pack(dense)
    assert torch.equal(words, reference.bitmask_pack(dense))
    assert torch.equal(bitmask.unpack(words, shape), dense)
    weight = torch.full(shape, math.nan)
    assert torch.equal(bitmask.apply_(weight, words).isnan(), dense)


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.97, 1.0])
def test_apply_writes_plus_zero_over_anything(shape, dtype, density, isa):
    """Dead: all bits zero, whatever was there. Live: not a bit changed. And nothing beside the tensor."""
    dense = sample(shape, density)
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1.5, -1e-7], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    numel = math.prod(shape)
    guarded = special[torch.arange(numel + 2) % len(special)]
    before = guarded.clone().view(integer)
    weight = guarded[1 : numel + 1].view(shape)  # only element-aligned, too
    assert bitmask.apply_(weight, bitmask.pack(dense)) is weight
    after = guarded.view(integer)
    want = before.clone()
    want[1 : numel + 1][~dense.flatten()] = 0
    assert torch.equal(after, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_to_any_strides(dtype, isa):
    base = torch.randn(24, 40, 6, 5, dtype=torch.float64).to(dtype)
    for view in (
        base.clone().to(memory_format=torch.channels_last),
        base.clone().reshape(960, 30).T,
        base.clone()[::2, 1::3],
        base.clone().flatten()[::7],
        base.clone().reshape(48, 600)[:, 5:518],
        base.clone().permute(3, 1, 0, 2)[1:],
    ):
        assert not view.is_contiguous()
        dense = sample(view.shape, 0.4)
        whole = view._base if view._base is not None else view
        outside = whole.sum(dtype=torch.float64) - view.sum(dtype=torch.float64)
        want = torch.where(dense, view, 0)
        bitmask.apply_(view, bitmask.pack(dense))
        assert torch.equal(view, want)
        torch.testing.assert_close(whole.sum(dtype=torch.float64) - view.sum(dtype=torch.float64), outside)


def test_packing_a_strided_mask():
    dense = sample((60, 50, 3, 3), 0.3)
    for view in (dense.transpose(0, 1), dense[::2, 3:], dense.to(memory_format=torch.channels_last)):
        assert torch.equal(bitmask.pack(view), reference.bitmask_pack(view))
    words = bitmask.pack(dense)
    assert bitmask.count(words[::2]) == int(dense[::2].sum())


def test_apply_to_a_parameter():
    """Not recorded by autograd, but noticed by it: what was saved for a backward pass is no longer what it was."""
    weight = torch.nn.Parameter(torch.randn(5, 40))
    words = bitmask.pack(sample((5, 40), 0.5))
    version = weight._version
    bitmask.apply_(weight, words)
    assert weight.requires_grad and weight.is_leaf and weight._version > version
    loss = (weight * weight).sum()
    bitmask.apply_(weight, words)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck_and_compile():
    dense, weight = sample((6, 45), 0.5), torch.randn(6, 45)
    words = bitmask.pack(dense)
    ops = torch.ops.sparselottery
    torch.library.opcheck(ops.bitmask_pack, (dense,))
    torch.library.opcheck(ops.bitmask_unpack, (words, [6, 45]))
    torch.library.opcheck(ops.bitmask_count, (words,))
    torch.library.opcheck(ops.bitmask_hamming, (words, ~words))
    torch.library.opcheck(ops.bitmask_apply_, (weight.clone(), words))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(weight, dense):
        words = bitmask.pack(dense)
        weight = weight + 1
        bitmask.apply_(weight, words)
        return weight, bitmask.unpack(words, dense.shape)

    got, unpacked = step(weight, dense)
    assert torch.equal(got, torch.where(dense, weight + 1, 0)) and torch.equal(unpacked, dense)


W = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: bitmask.pack(torch.ones(3)), TypeError, "dense: expected torch.bool"),
        (lambda: bitmask.pack([True]), TypeError, "dense: expected a tensor, got list"),
        (lambda: bitmask.unpack(W, (3, 65)), ValueError, r"words: expected int32 \[3, 3\] for shape \[3, 65\]"),
        (lambda: bitmask.unpack(W, 3), TypeError, "shape: expected sizes, got int"),
        (lambda: bitmask.unpack(W, (3, "a")), TypeError, "shape: expected sizes, got 'a'"),
        (lambda: bitmask.unpack(W.long(), (3, 64)), TypeError, "words: expected int32 words, got torch.int64"),
        (lambda: bitmask.count(W.float()), TypeError, "words: expected int32"),
        (lambda: bitmask.hamming(W, W[:2]), ValueError, r"b: expected \[3, 2\] like a, got \[2, 2\]"),
        (lambda: bitmask.apply_(torch.ones(3, 64).int(), W), TypeError, "tensor: expected float32"),
        (lambda: bitmask.apply_(torch.ones(3, 65), W), ValueError, r"words: expected int32 \[3, 3\]"),
        (lambda: bitmask.apply_(torch.ones(3, 1).expand(3, 64), W), ValueError, "tensor: several of its elements"),
        (lambda: bitmask.apply_(torch.ones(3, 64, device="meta"), W), ValueError, "words: expected device meta"),
    ],
)
def test_bad_input_names_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call()
