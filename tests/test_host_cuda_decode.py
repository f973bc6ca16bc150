"""csrc/cuda/decode_linear.cu executed on the CPU (tests/host_cuda) against float64, and the wrappers of tensor-core
instructions against the PTX manual."""

import math

import numpy as np
import pytest
import torch
from host_cuda import harness
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery._ext import DTYPE_CODES
from sparselottery.ops import bitmask
from sparselottery.ops import decode_linear as op

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    i64, pointer, i32 = harness.I64, harness.POINTER, harness.INT
    functions = {
        "sl_decode": [pointer, i32, pointer, pointer, pointer, i64, i32],
        "sl_ldmatrix": [pointer, pointer, harness.BOOL, pointer],
        "sl_mma": [i32] + [pointer] * 3,
        "sl_copy_later": [pointer] * 2,
        "sl_convert": [i32] + [pointer] * 4 + [i64] * 2,
    }
    library = harness.load("library_decode.cpp", functions, kernels="decode_linear")
    library.sl_max_columns.restype = i64
    call = harness.caller(library)
    call.max_columns = library.sl_max_columns
    return call


def misaligned(t):
    """A copy that begins one element past an aligned address."""
    store = torch.empty(t.numel() + 9, dtype=t.dtype)
    offset = (-store.data_ptr() // t.element_size()) % 8 + 1
    view = store[offset : offset + t.numel()].view(t.shape)
    return view.copy_(t)


def product(kernels, packed, x, bias=None, *, odd=False, reversed=False):
    """What the kernel writes into a y full of NaN."""
    if odd:
        x, bias = misaligned(x), None if bias is None else misaligned(bias)
    y = torch.full((x.shape[0], packed.rows), math.nan, dtype=x.dtype)
    y = misaligned(y) if odd else y
    tensors = (packed.starts, packed.codes, packed.values)
    weight = [op.FORMATS[packed.format], packed.rows, packed.columns, packed.values.shape[0]]
    weight = np.array([*weight, *(t.data_ptr() for t in tensors)], dtype=np.int64)
    kernels("sl_decode", weight, DTYPE_CODES[x.dtype], x, bias if bias is not None else None, y, x.shape[0], reversed)
    return y


def check(kernels, mask, batch, format, dtype, *, bias=True, odd=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, columns = mask.shape
    weight, x = (torch.randn(s, generator=g).to(dtype) for s in ((rows, columns), (batch, columns)))
    add = torch.randn(rows, generator=g).to(dtype) if bias else None
    weight[~mask] = math.nan  # what lies off the mask must not be read
    packed = op.pack(weight, bitmask.pack(mask), format)
    y = product(kernels, packed, x, add, odd=odd)
    dense = weight.double().masked_fill(~mask, 0)
    want = x.double() @ dense.T + (add.double() if bias else 0)
    # float32 sums of products that are exact in float32, then one rounding to the dtype.
    size = x.double().abs() @ dense.abs().T + (add.double().abs() if bias else 0)
    bound = torch.finfo(dtype).eps / 2 * want.abs() + 2**-22 * math.sqrt(columns + 1) * size + 2**-24
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"{error.max()} over {bound[error > bound]}"
    assert torch.equal(y, product(kernels, packed, x, add, reversed=True)), "depends on the order of threads"


def random_mask(rows, columns, density, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def adversarial_masks():
    """name -> mask."""
    lonely = torch.zeros(37, 1000, dtype=torch.bool)
    lonely[::5, -1] = True
    gaps = torch.zeros(9, 1100, dtype=torch.bool)  # gaps about what a code can hold, and several fillers long
    for row, step in enumerate((15, 16, 17, 31, 255, 256, 257, 512, 1099)):
        gaps[row, ::step] = True
    every_other = random_mask(50, 200, 0.3)
    every_other[::2] = False
    one_full = random_mask(33, 130, 0.02)
    one_full[17] = True
    edges = torch.zeros(20, 65, dtype=torch.bool)
    edges[:, 0] = edges[:, -1] = True
    full_tile = torch.zeros(32, 128, dtype=torch.bool)
    full_tile[16:, 48:64] = True
    return {
        "empty": torch.zeros(19, 70, dtype=torch.bool),
        "full": torch.ones(18, 67, dtype=torch.bool),
        "one survivor in the last column": lonely,
        "long gaps": gaps,
        "every other row empty": every_other,
        "one full row": one_full,
        "first and last column": edges,
        "a full tile": full_tile,
        "a single weight": torch.ones(1, 1, dtype=torch.bool),
        "one column": torch.ones(40, 1, dtype=torch.bool),
        "one row": random_mask(1, 3000, 0.4),
        "many rows": random_mask(300, 24, 0.3),
    }


@pytest.mark.parametrize("format", op.FORMATS)
@pytest.mark.parametrize("name", adversarial_masks())
def test_adversarial_masks(kernels, name, format):
    mask = adversarial_masks()[name]
    for dtype in HALVES:
        for batch in (1, 5, 16):
            check(kernels, mask, batch, format, dtype, bias=batch != 5, odd=batch == 5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 32, 33, 64, 100, 128])
@pytest.mark.parametrize("format", op.FORMATS)
def test_every_batch(kernels, format, batch, dtype):
    check(kernels, random_mask(35, 138, 0.25, seed=1), batch, format, dtype)
    check(kernels, random_mask(50, 128, 0.1, seed=2), batch, format, dtype, bias=False)  # rows of whole 16 bytes


@pytest.mark.parametrize("format", op.FORMATS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.6, 1.0])
def test_every_density(kernels, format, density):
    """Few rows and many columns: the columns are split over blocks; from a quarter on, steps are more than two rounds."""
    for shape in ((20, 1000), (70, 520)):
        check(kernels, random_mask(*shape, density, seed=3), 6, format, torch.bfloat16, odd=shape[0] == 70)


@pytest.mark.parametrize("format", ["gap4", "gap8"])
def test_x_that_fills_shared_memory(kernels, format):
    for columns in (15_000, 30_000, 60_000, kernels.max_columns()):  # 8, 4, 2 and 1 rows of x at a time
        check(kernels, random_mask(3, columns, 0.01, seed=4), 9, format, torch.float16)
    with pytest.raises(RuntimeError, match=r"expected at most \d+ columns, got"):
        check(kernels, random_mask(2, kernels.max_columns() + 1, 0.01), 1, format, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", op.FORMATS)
def test_x_that_is_not_finite(kernels, format, dtype):
    """A row that keeps the column gets what a dense layer gives; another row the finite result, or NaN (0 times inf)."""
    mask = random_mask(48, 150, 0.2, seed=5)
    weight, x = torch.randn(48, 150).to(dtype), torch.randn(5, 150).to(dtype)
    x[0, 7], x[1, 149], x[2, 0], x[3, 64] = math.nan, math.inf, -math.inf, math.inf
    dense = weight.masked_fill(~mask, 0)
    y = product(kernels, op.pack(weight, bitmask.pack(mask), format), x)
    for b, column in ((0, 7), (1, 149), (2, 0), (3, 64)):
        kept = mask[:, column]
        want = x[b, column].double() * dense[kept, column].double()
        torch.testing.assert_close(y[b, kept].double(), want, rtol=0, atol=0, equal_nan=True)
        others = y[b, ~kept].double()
        rest = x[b].double().nan_to_num(0, 0, 0) @ dense[~kept].double().T
        assert kept.any() and (others.isnan() | ((others - rest).abs() < 0.1)).all()
    torch.testing.assert_close(y[4].double(), x[4].double() @ dense.double().T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("format", op.FORMATS)
def test_sums_beyond_the_dtype_are_infinite(kernels, format):
    weight, x = torch.full((17, 64), 200.0, dtype=torch.float16), torch.full((2, 64), 200.0, dtype=torch.float16)
    x[1] = 2.0
    y = product(kernels, op.pack(weight, bitmask.pack(weight > 0), format), x)
    assert (y[0] == math.inf).all() and (y[1] == 25600).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 300),
    batch=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    format=st.sampled_from(list(op.FORMATS)),
    dtype=st.sampled_from(HALVES),
    odd=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_layer(kernels, rows, columns, batch, density, format, dtype, odd, seed):
    check(kernels, random_mask(rows, columns, density, seed), batch, format, dtype, odd=odd, seed=seed)


@pytest.mark.parametrize("format", op.FORMATS)
def test_replays_with_other_data_in_the_same_buffers(kernels, format):
    """What a CUDA graph does: the same addresses, other inputs and weights."""
    mask = random_mask(40, 600, 0.2, seed=6)
    words, x = bitmask.pack(mask), torch.empty(3, 600, dtype=torch.bfloat16)
    packed = op.pack(torch.zeros(40, 600, dtype=torch.bfloat16), words, format)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(40, 600, generator=g).bfloat16()
        x.copy_(torch.randn(3, 600, generator=g))
        packed.values.copy_(op.pack(weight, words, format).values)
        want = x.double() @ (weight * mask).double().T
        torch.testing.assert_close(product(kernels, packed, x).double(), want, rtol=1e-2, atol=1e-2)


# ---- the op's call for CUDA tensors, here with CPU tensors and the kernels on the CPU ----


class OnTheHost:
    """The cuda_* functions of the extension, with the signatures of csrc/bindings.cpp."""

    STREAM = 77

    def __init__(self, call):
        self.call = call

    def cuda_decode_linear_scratch(self, weight, batch):
        return 16

    def cuda_decode_linear(self, weight, dtype, x, bias, y, batch, scratch, stream):
        assert stream == self.STREAM and scratch != 0
        self.call("sl_decode", np.array(weight, dtype=np.int64), dtype, x, bias or None, y, batch, 0)


@pytest.mark.parametrize("format", op.FORMATS)
def test_calls_of_the_op(kernels, monkeypatch, format):
    mask = random_mask(30, 90, 0.3, seed=7)
    weight = torch.randn(30, 90).half()
    packed = op.pack(weight, bitmask.pack(mask), format)
    dense = weight.masked_fill(~mask, 0)
    monkeypatch.setattr(op, "extension", lambda: OnTheHost(kernels))
    monkeypatch.setattr(op, "why_dense", lambda *_: None)
    monkeypatch.setattr(bitmask, "stream_of", lambda tensor: OnTheHost.STREAM)
    monkeypatch.setattr(op, "_unpack", None)  # only the kernel can answer
    for x in (torch.randn(90), torch.randn(2, 3, 90), torch.randn(90, 4).T, torch.randn(0, 90)):
        for bias in (None, torch.randn(30).half()):
            x = x.half()
            want = torch.nn.functional.linear(x.float(), dense.float(), None if bias is None else bias.float())
            got = op.decode_linear(x, packed, bias)
            assert got.shape == want.shape and got.dtype == torch.float16
            torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


# ---- the wrappers against the manual ----


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(kernels, transposed):
    """ "Matrix Load Instruction: ldmatrix": lane 8 m + r names row r of matrix m; lane l holds elements 2 (l % 4), + 1 of
    row l / 4 of matrix m in register m; with .trans, of its column l / 4."""
    elements = np.arange(1024, dtype=np.uint16)
    offsets = (np.random.default_rng(0).permutation(128)[:32] * 8).astype(np.int32)
    out = np.zeros((32, 4), dtype=np.uint32)
    kernels("sl_ldmatrix", elements, offsets, transposed, out)
    for lane in range(32):
        for m in range(4):
            matrix = np.stack([elements[first : first + 8] for first in offsets[8 * m : 8 * m + 8]])
            row = (matrix.T if transposed else matrix)[lane // 4]
            low, high = row[2 * (lane % 4)], row[2 * (lane % 4) + 1]
            assert out[lane, m] == int(low) | int(high) << 16
    with pytest.raises(RuntimeError, match="not aligned to 16 bytes"):
        kernels("sl_ldmatrix", elements, offsets + 1, transposed, out)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma(kernels, dtype):
    """The manual's fragments, element by element: "mma.m16n8k16 with floating point type", .f16 and .bf16.

    A: row = groupID for i in 0, 1, 4, 5, else groupID + 8; column = 2 threadID_in_group + (i & 1), + 8 for i >= 4.
    B: row = 2 threadID_in_group + (i & 1), + 8 for i >= 2; column = groupID.
    C: row = groupID for i in 0, 1, else groupID + 8; column = 2 threadID_in_group + (i & 1).
    """
    g = torch.Generator().manual_seed(8)
    a, b = (torch.randint(-8, 9, s, generator=g).to(dtype) for s in ((16, 16), (16, 8)))
    c = torch.randint(-8, 9, (16, 8), generator=g).float()
    lanes_a = torch.zeros(32, 8, dtype=dtype)
    lanes_b, lanes_c = torch.zeros(32, 4, dtype=dtype), torch.zeros(32, 4)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            lanes_a[lane, i] = a[group + (0 if i in (0, 1, 4, 5) else 8), 2 * thread + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            lanes_b[lane, i] = b[2 * thread + (i & 1) + (8 if i >= 2 else 0), group]
            lanes_c[lane, i] = c[group + (0 if i < 2 else 8), 2 * thread + (i & 1)]
    kernels("sl_mma", DTYPE_CODES[dtype], lanes_a, lanes_b, lanes_c)
    want = c + a.float() @ b.float()
    for lane in range(32):
        for i in range(4):
            assert lanes_c[lane, i] == want[lane // 4 + (0 if i < 2 else 8), 2 * (lane % 4) + (i & 1)]


def test_cp_async_comes_when_it_is_waited_for(kernels):
    given = torch.arange(256, dtype=torch.int16)
    seen = torch.zeros(3, 32, 16, dtype=torch.int16)
    kernels("sl_copy_later", given, seen)
    garbage = torch.full((32, 8), -0x5A5B, dtype=torch.int16)
    assert torch.equal(seen[0], torch.cat([garbage, garbage], 1))
    assert torch.equal(seen[1], torch.cat([given.view(32, 8), garbage], 1))
    assert torch.equal(seen[2], torch.cat([given.view(32, 8), torch.zeros_like(garbage)], 1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_16_bits(kernels, dtype):
    """All 2^16 numbers widen as torch widens them; floats near every one of them round as torch rounds them."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.full((2**16,), math.nan)
    exact = halves.view(dtype).float()
    bits = exact.view(torch.int32)
    nearby = [bits + k for k in (0, 1, -1, 2**12, 2**12 + 1, 2**12 - 1, 2**15, 2**15 + 1, 2**15 - 1, 2**11)]
    floats = torch.cat(nearby).view(torch.float32).contiguous()
    narrow = torch.zeros(floats.numel(), dtype=torch.int16)
    kernels("sl_convert", DTYPE_CODES[dtype], floats, narrow, halves, wide, floats.numel(), 2**16)
    torch.testing.assert_close(wide, exact, rtol=0, atol=0, equal_nan=True)
    got, want = narrow.view(dtype), floats.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16))


# ---- how entries lie ----


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.5])
def test_scattered_entries_miss_each_others_banks(density):
    """32 lanes store at once, which takes as many turns as most stores to one of 32 banks. No order of a step's entries
    could take fewer turns than the entries of its fullest bank, or than it has stores; a random order takes many more.
    """
    mask = random_mask(64, 512, density, seed=9)
    packed = op.pack(torch.randn(64, 512).half(), bitmask.pack(mask), "tiles")
    random = np.random.default_rng(0)
    turns = least = unordered = 0

    def count(banks):
        rounds = [banks[first : first + 32, i] for first in range(0, len(banks), 32) for i in range(4)]
        return sum(np.bincount(r).max() for r in rounds), len(rounds)

    for start, counts in packed.starts.tolist():
        units = sum(counts >> shift & 255 for shift in (0, 8, 16, 24))
        banks = packed.codes[start : start + units].numpy() // 2 % 32  # tiles begin at bank 0
        taken, stores = count(banks)
        turns += taken
        least += max(stores, np.bincount(banks.ravel()).max(initial=0))
        unordered += count(random.permutation(banks.ravel()).reshape(-1, 4))[0]
    assert turns <= 1.5 * least and turns <= 0.75 * unordered, f"{turns} turns, {least} at least, {unordered} at random"


def test_fragments_of_x_miss_each_others_banks():
    """The eight rows of 16 bytes that one phase of ldmatrix reads lie in 32 different banks."""
    source = (harness.CUDA_SOURCES / "decode_linear.cu").read_text()
    assert "(row * kStepChunks + (chunk ^ (row % kStepChunks))) * kChunk" in source
    for chunk in range(8):
        banks = {(16 * (row * 8 + (chunk ^ row % 8)) // 4 + word) % 32 for row in range(8) for word in range(4)}
        assert len(banks) == 32


# ---- ThreadSanitizer: one host thread per CUDA thread ----


@pytest.fixture(scope="module")
def race_check():
    return harness.race_check("race_check_decode.cpp", kernels="decode_linear", also=("cpu/decode_linear.cpp",))


def test_no_races(race_check):
    status, output = race_check()
    assert status == 0, output


@pytest.mark.parametrize("site", list(harness.barriers("decode_linear.cu", "tensor_core.cuh")))
def test_every_barrier_is_needed(race_check, site):
    harness.check_is_needed(race_check, site)
