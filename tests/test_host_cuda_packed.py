"""csrc/cuda/packed.cu executed on the CPU (tests/host_cuda), bit for bit against ops/reference.py."""

import math

import numpy as np
import pytest
import torch
from host_cuda import harness
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery.ops import bitmask, packed, reference

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    (0,),
    (1,),
    (31,),
    (1000,),
    (5, 33),
    (7, 64),
    (3, 1),
    (64, 3, 3, 3),
    (0, 4),
    (4, 0),
    (2, 2100),
    (300, 9),
    (40, 1024),
]
GUARD = 64  # elements on either side of what a kernel may write


@pytest.fixture(scope="module")
def kernels():
    i64, pointer = harness.I64, harness.POINTER
    functions = {
        "sl_counts": [pointer, i64, pointer],
        "sl_expand": [pointer, i64, i64, pointer, pointer, i64, i64, pointer],
        "sl_gather": [pointer, i64, pointer, pointer, i64, pointer, pointer, pointer, i64],
    }
    return harness.caller(harness.load("library_packed.cpp", functions, kernels="packed"))


def bits(tensor):
    """Compared as integers: NaN is like itself, -0 is not +0."""
    return tensor.view(INTEGERS[tensor.element_size()])


def offsets_of(kernels, words):
    tiles = -(-words.numel() // 32)
    counts = torch.full((tiles + 1,), -77)
    kernels("sl_counts", words, words.numel(), counts[1:])
    counts[0] = 0
    return counts.cumsum(0)


def check(kernels, dense, keep):
    """expand and gather of `dense` (any strides) against the reference; nothing outside their outputs is touched."""
    words, shape = reference.bitmask_pack(keep), dense.shape
    offsets = offsets_of(kernels, words)
    want = reference.packed_gather(dense, words)
    count, dtype = want.numel(), dense.dtype
    assert offsets[-1].item() == count
    sizes, strides = (np.array(n, dtype=np.int64) for n in bitmask.rows_and_strides(dense))

    memory = torch.full((count + 2 * GUARD,), -123.0, dtype=dtype)
    values = memory[GUARD : GUARD + count]
    size = dense.element_size()
    kernels("sl_gather", dense.data_ptr(), size, words, offsets, len(sizes), sizes, strides, values.data_ptr(), count)
    assert torch.equal(bits(values), bits(want))
    memory[GUARD : GUARD + count] = -123.0
    assert (memory == -123).all()

    total = math.prod(shape)
    memory = torch.full((total + 2 * GUARD,), -123.0, dtype=dtype)
    back = memory[GUARD : GUARD + total]
    rows, columns = reference.rows_columns(shape)
    kernels("sl_expand", want, count, size, words, offsets, rows, columns, back.data_ptr())
    assert torch.equal(bits(back.view(shape)), bits(reference.packed_expand(want, words, shape)))
    memory[GUARD : GUARD + total] = -123.0
    assert (memory == -123).all()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(kernels, shape, density):
    g = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=g)
    check(kernels, dense, torch.rand(shape, generator=g) < density)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_dtypes_alignments_and_odd_values(kernels, dtype, offset):
    g = torch.Generator().manual_seed(2)
    dense = torch.randn(35 * 67 + offset, generator=g, dtype=torch.float64).to(dtype)[offset:].view(35, 67)
    dense[::3], dense[1::5], dense[2::7] = math.nan, -0.0, -math.inf
    check(kernels, dense, torch.rand(35, 67, generator=g) < 0.4)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)], ids=str)
def test_any_strides(kernels, order):
    g = torch.Generator().manual_seed(3)
    shape = (6, 5, 3, 7)
    view = torch.randn([shape[d] for d in order], generator=g).permute([order.index(d) for d in range(4)])
    check(kernels, view, torch.rand(shape, generator=g) < 0.4)
    check(kernels, view[:, 1:4, :, ::2], torch.rand(6, 3, 3, 4, generator=g) < 0.4)
    check(kernels, view[:1].expand(shape), torch.rand(shape, generator=g) < 0.4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mask(kernels, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    dense = torch.randn(shape, generator=g).to(data.draw(st.sampled_from(FLOATS)))
    keep = torch.rand(shape, generator=g) < data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0]))
    if data.draw(st.booleans()) and len(shape) > 1:
        keep[data.draw(st.integers(0, 70)) % shape[0] if shape[0] else ...] = data.draw(st.booleans())
    check(kernels, dense, keep)


def test_offsets_that_lie_touch_nothing_outside(kernels):
    """A mask changed behind the offsets' back may give wrong numbers, but no access past the values."""
    g = torch.Generator().manual_seed(4)
    dense = torch.randn(40, 70, generator=g)
    words = reference.bitmask_pack(torch.rand(40, 70, generator=g) < 0.2)
    offsets, count = offsets_of(kernels, words), int(reference.bitmask_count(words))
    full = bitmask.full_words((40, 70), True)
    memory = torch.full((count + 2 * GUARD,), -123.0)
    sizes, strides = np.array([40, 70]), np.array([70, 1])
    kernels("sl_gather", dense, 4, full, offsets, 2, sizes, strides, memory[GUARD:].data_ptr(), count)
    assert (memory[:GUARD] == -123).all() and (memory[GUARD + count :] == -123).all()
    values, back = torch.ones(count), torch.full((40, 70), math.nan)
    kernels("sl_expand", values, count, 4, full, offsets, 40, 70, back)
    assert ((back == 0) | (back == 1)).all()


def test_rejects_what_it_cannot_do(kernels):
    one = np.ones(9, dtype=np.int64)
    with pytest.raises(RuntimeError, match="2 to 8 dimensions, got 9"):
        kernels("sl_gather", 0, 4, 0, 0, 9, one, one, 0, 0)
    with pytest.raises(RuntimeError, match="2, 4 or 8 bytes, got 3"):
        kernels("sl_expand", 0, 0, 3, 0, 0, 1, 1, 0)


# ---- the op's calls for CUDA tensors, here with CPU tensors and the kernels on the CPU ----


class OnTheHost:
    """The cuda_* functions of the extension, with the signatures of csrc/bindings.cpp."""

    STREAM = 77

    def __init__(self, call):
        self.call = call

    def cuda_packed_counts(self, *arguments):
        assert arguments[-1] == self.STREAM
        self.call("sl_counts", *arguments[:-1])

    def cuda_packed_expand(self, *arguments):
        assert arguments[-1] == self.STREAM
        self.call("sl_expand", *arguments[:-1])

    def cuda_packed_gather(self, dense, item_size, words, offsets, sizes, strides, values, count, stream):
        assert stream == self.STREAM
        sizes, strides = np.array(sizes, dtype=np.int64), np.array(strides, dtype=np.int64)
        self.call("sl_gather", dense, item_size, words, offsets, len(sizes), sizes, strides, values, count)


@pytest.fixture
def on_the_host(kernels, monkeypatch):
    library = OnTheHost(kernels)
    monkeypatch.setattr(packed._ext, "why_no_cuda", lambda device: None)
    monkeypatch.setattr(packed, "extension", lambda: library)
    monkeypatch.setattr(bitmask, "stream_of", lambda tensor: OnTheHost.STREAM)


def test_calls_of_the_op(on_the_host):
    g = torch.Generator().manual_seed(40)
    for shape in [(), (70,), (5, 33), (33, 5, 3), (0, 4)]:
        dense = torch.randn(shape, generator=g)
        keep = torch.rand(shape, generator=g) < 0.5
        words = reference.bitmask_pack(keep)
        count = int(keep.sum())
        values = packed._gather_cuda(dense, words, count)
        assert torch.equal(values, dense[keep])
        assert torch.equal(packed._expand_cuda(values, words, shape), torch.where(keep, dense, 0))
        with pytest.raises(ValueError, match=f"the mask keeps {count} weights, got {count + 1} values"):
            packed._gather_cuda(dense, words, count + 1)
        with pytest.raises(ValueError, match=f"the mask keeps {count} weights, got {count + 1} values"):
            packed._expand_cuda(torch.zeros(count + 1), words, shape)
    deep = torch.randn(2, 1, 2, 1, 2, 1, 2, 1, 3, generator=g)  # more dimensions than the kernel takes
    words = reference.bitmask_pack(deep > 0)
    assert torch.equal(packed._gather_cuda(deep, words, int((deep > 0).sum())), deep[deep > 0])


def test_offsets_are_kept_until_the_mask_changes(on_the_host):
    words = reference.bitmask_pack(torch.ones(40, 70, dtype=torch.bool))
    offsets, count = packed._offsets(words)
    assert count == 2800 and packed._offsets(words)[0] is offsets
    words.copy_(reference.bitmask_pack(torch.eye(40, 70) > 0))
    assert packed._offsets(words)[1] == 40


# ---- ThreadSanitizer: one host thread per CUDA thread ----


def test_no_races():
    status, output = harness.race_check("race_check_packed.cpp", kernels="packed")()
    assert status == 0, output
