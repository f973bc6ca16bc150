"""csrc/cuda/*.cu executed on the CPU (tests/host_cuda), bit for bit against ops/reference.py."""

import math

import numpy as np
import pytest
import torch
from host_cuda import harness
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselottery import _ext
from sparselottery._ext import DTYPE_CODES
from sparselottery.ops import bitmask, global_topk, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GARBAGE = 0x5A5A5A5A


@pytest.fixture(scope="module")
def kernels():
    i64, pointer = harness.I64, harness.POINTER
    functions = {
        "sl_pack": [pointer, i64, i64, pointer],
        "sl_unpack": [pointer, i64, i64, pointer],
        "sl_count": [pointer, i64, pointer],
        "sl_hamming": [pointer, pointer, i64, pointer],
        "sl_apply": [pointer, i64, pointer, i64, pointer, pointer],
        "sl_topk": [pointer, i64, i64, harness.INT, harness.INT, pointer, pointer],
        "sl_topk_scratch": [harness.INT, i64, pointer],
        "sl_topk_capture": [pointer, i64, pointer, pointer],
        "sl_replay": [],
    }
    return harness.caller(harness.load("library.cpp", functions))


def empty_words(shape):
    return torch.full(reference.words_shape(shape), GARBAGE, dtype=torch.int32)


# ---- bitmask ----

SHAPES = [
    (0,),
    (1,),
    (31,),
    (32,),
    (1000,),
    (5, 33),
    (7, 64),
    (3, 1),
    (64, 3, 3, 3),
    (0, 4),
    (4, 0),
    (2, 2100),
    (300, 9),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitmask(kernels, shape):
    g = torch.Generator().manual_seed(1)
    dense = torch.rand(shape, generator=g) < 0.4
    other = torch.rand(shape, generator=g) < 0.6
    rows, columns = reference.rows_columns(shape)
    words, other_words = empty_words(shape), empty_words(shape)
    kernels("sl_pack", dense, rows, columns, words)
    kernels("sl_pack", other, rows, columns, other_words)
    assert torch.equal(words, reference.bitmask_pack(dense))
    back = torch.full(shape, 7, dtype=torch.uint8)
    kernels("sl_unpack", words, rows, columns, back)
    assert torch.equal(back, dense.to(torch.uint8))
    out = torch.tensor(-99)
    kernels("sl_count", words, words.numel(), out)
    assert out.item() == dense.sum().item()
    kernels("sl_hamming", words, other_words, words.numel(), out)
    assert out.item() == (dense != other).sum().item()


def strided(shape, order, offset, dtype, g):
    """A tensor of `shape` whose dimension order[-1] is the innermost in memory, `offset` elements into its storage."""
    store = torch.randn(math.prod(shape) + offset, generator=g, dtype=torch.float64).to(dtype)
    view = store[offset:].view([shape[d] for d in order])
    return view.permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape, order",
    [((5, 70), (0, 1)), ((70, 5), (1, 0)), ((4, 3, 5, 7), (0, 2, 3, 1)), ((6, 3, 1, 2, 9), (4, 0, 3, 2, 1))],
    ids=str,
)
def test_bitmask_apply(kernels, dtype, shape, order):
    g = torch.Generator().manual_seed(2)
    for offset in (0, 1, 3):
        weights = strided(shape, order, offset, dtype, g)
        dense = torch.rand(shape, generator=g) < 0.5
        weights[tuple((~dense).nonzero()[0])] = math.nan  # a dead weight may hold anything
        want = weights.masked_fill(~dense, 0)
        sizes = np.array(shape, dtype=np.int64)
        strides = np.array(weights.stride(), dtype=np.int64)
        words = reference.bitmask_pack(dense)
        kernels("sl_apply", weights.data_ptr(), weights.element_size(), words, len(shape), sizes, strides)
        torch.testing.assert_close(weights, want, rtol=0, atol=0, equal_nan=True)
        assert not torch.signbit(weights[~dense]).any()


def test_bitmask_apply_rejects_what_it_cannot_do(kernels):
    one = np.ones(9, dtype=np.int64)
    with pytest.raises(RuntimeError, match="2 to 8 dimensions, got 9"):
        kernels("sl_apply", 0, 4, 0, 9, one, one)
    with pytest.raises(RuntimeError, match="2, 4 or 8 bytes, got 3"):
        kernels("sl_apply", 0, 3, 0, 2, one, one)


# ---- global_topk ----


def run_topk(kernels, tensors, keep, eligible=None, by_value=False, reverse=False):
    """(words, threshold, index of the first tensor with NaN)"""
    eligible = eligible or [None] * len(tensors)
    words = [empty_words(t.shape) for t in tensors]
    packed = [None if e is None else reference.bitmask_pack(e) for e in eligible]
    table = np.array(
        [
            [
                t.data_ptr(),
                DTYPE_CODES[t.dtype],
                *reference.rows_columns(t.shape),
                0 if e is None else e.data_ptr(),
                w.data_ptr(),
            ]
            for t, e, w in zip(tensors, packed, words, strict=True)
        ],
        dtype=np.int64,
    ).reshape(-1)
    nan, threshold = np.array([-7]), np.array([-7.0])
    kernels("sl_topk", table, len(tensors), keep, int(by_value), int(reverse), nan, threshold)
    return words, float(threshold[0]), int(nan[0])


def check_topk(kernels, tensors, keep, eligible=None, by_value=False, reverse=False):
    words, threshold, nan = run_topk(kernels, tensors, keep, eligible, by_value, reverse)
    dense = (
        None
        if eligible is None
        else [torch.ones(t.shape, dtype=torch.bool) if e is None else e for t, e in zip(tensors, eligible, strict=True)]
    )
    want, want_threshold = reference.global_topk(tensors, keep, dense, by_value)
    assert nan == -1
    assert threshold == want_threshold
    for t, (got, mask) in enumerate(zip(words, want, strict=True)):
        assert torch.equal(got, reference.bitmask_pack(mask)), f"tensor {t}"


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adversarial(dtype):
    g = torch.Generator().manual_seed(3)
    big = 9000
    rare = normal(big, seed=1, dtype=dtype) * (torch.rand(big, generator=g) < 0.01)
    smallest = torch.finfo(dtype).smallest_normal / 4
    return {
        "normal": [
            normal(64, 33, seed=4, dtype=dtype),
            normal(7, seed=5, dtype=dtype),
            normal(5000, seed=6, dtype=dtype),
        ],
        "all equal": [torch.full((70, 10), 0.5, dtype=dtype), torch.full((900,), -0.5, dtype=dtype)],
        "99 % zeros": [rare[:4000].view(40, 100), rare[4000:]],
        "two values": [torch.where(torch.rand(4000, generator=g) < 0.5, 1.0, 2.0).to(dtype)],
        "signed zeros": [torch.tensor([0.0, -0.0] * 40, dtype=dtype), torch.tensor([-0.0] * 33, dtype=dtype)],
        "infinities and subnormals": [
            torch.tensor([math.inf, -math.inf, smallest, -smallest, 0.0, 1.0] * 30, dtype=dtype)[
                torch.randperm(180, generator=g)
            ],
            normal(500, seed=7, dtype=dtype),
        ],
        "odd columns": [normal(100, c, seed=c, dtype=dtype) for c in (1, 3, 31, 32, 33, 65)],
        "convolution": [normal(16, 3, 3, 3, seed=8, dtype=dtype), normal(32, 16, 1, 1, seed=9, dtype=dtype)],
        "empty ones": [
            normal(0),
            normal(40, dtype=dtype),
            normal(0, 5),
            normal(5, 0),
            normal(30, 2, dtype=dtype),
            normal(0),
        ],
        "a scalar": [normal(dtype=dtype), normal(3, dtype=dtype)],
    }


NAMES = list(adversarial(torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_topk_small(kernels, name, dtype):
    """Lists that fit the pool (float64: whose keys do not fit beside a position, so that the weights are searched)."""
    tensors = adversarial(dtype)[name]
    total = sum(t.numel() for t in tensors)
    for keep in sorted({0, 1, total // 5, total // 2, total - 1, total}):
        for by_value in (False, True):
            check_topk(kernels, tensors, keep, by_value=by_value, reverse=keep % 2 == 1)


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_topk_eligible(kernels, name, by_value):
    g = torch.Generator().manual_seed(11)
    tensors = adversarial(torch.float32)[name]
    eligible = [torch.rand(t.shape, generator=g) < 0.3 for t in tensors]
    eligible[0] = None
    allowed = tensors[0].numel() + sum(int(e.sum()) for e in eligible[1:])
    for keep in sorted({0, 1, allowed // 3, allowed}):
        check_topk(kernels, tensors, keep, eligible, by_value)


BIG = 100_000  # far above what goes to the pool whole: sampled, bracketed


def big_cases():
    g = torch.Generator().manual_seed(12)
    zeros = normal(BIG, seed=13) * (torch.rand(BIG, generator=g) < 0.01)
    clustered = 1 + normal(BIG, seed=14) * 1e-6
    return {
        "normal": [normal(300, 250, seed=15), normal(17, seed=16), normal(BIG - 75_017, seed=17)],
        "bfloat16": [normal(100, 1000, seed=18, dtype=torch.bfloat16)],
        "float16": [normal(1000, 100, seed=19, dtype=torch.float16)],
        "float64": [normal(100, 1000, seed=20, dtype=torch.float64)],
        "mixed": [
            normal(50_000, seed=21),
            normal(1000, 50, seed=22, dtype=torch.bfloat16),
            normal(30_000, seed=23, dtype=torch.float16),
        ],
        "mixed with float64": [
            normal(50_000, seed=24),
            normal(100, 50, seed=25, dtype=torch.float64),
            normal(30_000, seed=26, dtype=torch.float16),
        ],
        "all equal": [torch.full((BIG,), 0.25)],
        "all equal, bfloat16": [
            torch.full((BIG // 2,), 0.25, dtype=torch.bfloat16),
            torch.full((BIG // 2,), -0.25, dtype=torch.bfloat16),
        ],
        "99 % zeros": [zeros.view(100, 1000)],
        "clustered": [clustered],
        "sorted": [normal(BIG, seed=27).sort().values],
        "hidden peak": [torch.cat([torch.full((BIG - 50,), 1e-3), torch.full((50,), 1.0)])],
    }


@pytest.mark.parametrize("name", list(big_cases()))
def test_topk_sampled(kernels, name):
    tensors = big_cases()[name]
    total = sum(t.numel() for t in tensors)
    for i, keep in enumerate((1, 60, total // 10, total // 2, total - 1)):
        check_topk(kernels, tensors, keep, by_value=i == 2, reverse=i % 2 == 1)


def sampled_positions(weights):
    """Which weights of a list of this length csrc/cuda/global_topk.cu looks at first (its kernel `sample`)."""
    samples = max(weights // 64, 65536 // 4)
    x = np.arange(samples, dtype=np.uint32)
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    jitter = (x ^ x >> 16).astype(np.float64) * 2.0**-32
    return torch.from_numpy(((np.arange(samples) + jitter) * (weights / samples)).astype(np.int64))


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("misleading", ["below", "above"])
def test_topk_missed_bracket(kernels, misleading, dtype, by_value):
    """The sample sees nothing but the smallest (largest) weights, so that the last survivor is above (below) the bracket."""
    seen = torch.zeros(BIG, dtype=torch.bool)
    seen[sampled_positions(BIG)] = True
    large, small = 2 + torch.rand(BIG, generator=torch.Generator().manual_seed(34)), normal(BIG, seed=35).sigmoid()
    weights = torch.where(seen == (misleading == "above"), large, small).to(dtype)
    check_topk(kernels, [weights[:30_000], weights[30_000:].view(-1, 70)], BIG // 2, by_value=by_value)


def test_topk_sampled_eligible(kernels):
    tensors = [normal(100, 700, seed=30), normal(30_000, seed=31)]
    g = torch.Generator().manual_seed(32)
    eligible = [torch.rand(t.shape, generator=g) < 0.2 for t in tensors]
    allowed = sum(int(e.sum()) for e in eligible)
    for keep in (100, allowed // 2, allowed):
        check_topk(kernels, tensors, keep, eligible)


def test_topk_one_huge_and_a_thousand_tiny(kernels):
    tensors = (
        [normal(1 + i % 37, seed=i) for i in range(500)]
        + [normal(250, 301, seed=33)]
        + [normal(1 + i % 5, 1 + i % 7, seed=i) for i in range(500)]
    )
    total = sum(t.numel() for t in tensors)
    for keep in (total // 20, total // 2):
        check_topk(kernels, tensors, keep)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keep", [0, 5, 200_000])
def test_topk_names_the_first_tensor_with_nan(kernels, dtype, keep):
    tensors = [
        normal(20, dtype=dtype),
        normal(500, 400, dtype=dtype),
        normal(9, 9, dtype=dtype),
        normal(40, dtype=dtype),
    ]
    tensors[3][7] = math.nan
    tensors[1][333, 17] = -torch.tensor(math.nan, dtype=dtype)
    assert run_topk(kernels, tensors, keep)[2] == 1
    ineligible = [None, torch.ones(500, 400, dtype=torch.bool), None, None]
    ineligible[1][333, 17] = False
    assert run_topk(kernels, tensors, keep, ineligible)[2] == 1
    tensors[1][333, 17] = 0
    assert run_topk(kernels, tensors, keep)[2] == 3


def test_topk_of_nothing(kernels):
    check_topk(kernels, [], 0)
    check_topk(kernels, [torch.empty(0), torch.empty(3, 0)], 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_topk_captured_once_and_replayed_on_other_weights(kernels, dtype):
    """As a CUDA graph does it: nothing of the host runs between replays, every buffer holds what the last one left."""
    rows, columns, keep = 300, 250, 20_000
    size = np.array([-1])
    kernels("sl_topk_scratch", DTYPE_CODES[dtype], rows * columns, size)
    scratch, result = torch.full((int(size[0]),), 0x5A, dtype=torch.uint8), torch.full((2,), -99)
    weights, words = torch.zeros(rows, columns, dtype=dtype), empty_words((rows, columns))
    table = [weights.data_ptr(), DTYPE_CODES[dtype], rows, columns, 0, words.data_ptr()]
    kernels("sl_topk_capture", np.array(table), keep, scratch, result)
    assert (words == GARBAGE).all() and (result == -99).all(), "a capture does nothing"
    plain = normal(rows, columns, seed=50, dtype=dtype)
    bad = normal(rows, columns, seed=51, dtype=dtype)
    bad[7, 9] = math.nan
    for case in (
        plain,
        torch.full_like(weights, 0.5),  # ties only: the way through the histograms
        normal(rows, columns, seed=52, dtype=dtype),
        bad,
        plain * (normal(rows, columns, seed=53) > 1),  # more zeros than are dropped
        plain * 1e-3,
    ):
        weights.copy_(case)
        kernels("sl_replay")
        assert result[0].item() == (0 if case is bad else -1)
        if case is not bad:
            want, threshold = reference.global_topk([case], keep)
            assert torch.equal(words, reference.bitmask_pack(want[0]))
            assert result.view(torch.float64)[1].item() == threshold


def test_topk_of_more_than_are_eligible_only_writes_garbage(kernels):
    """global_topk finds out afterwards; until then a kernel must come to an end and stay within its buffers."""
    for shape, share in (((40, 30), 0.1), ((300, 250), 0.3)):
        eligible = torch.rand(shape, generator=torch.Generator().manual_seed(60)) < share
        for keep in (int(eligible.sum()) + 1, math.prod(shape)):
            for weights in (normal(*shape, seed=61), torch.ones(shape)):
                words = run_topk(kernels, [weights], keep, [eligible])[0]
                assert not (bitmask.unpack(words[0], shape) & ~eligible).any()


def test_topk_extra_memory(kernels):
    """At most 2 % of the weights' bytes from 4e7 weights on; of shorter lists also a pool that serves them whole."""
    for dtype in FLOATS:
        for weights in (1, 1_000_000, 40_000_000, 100_000_000, 10_000_000_000):
            fixed = 640_000 if weights < 40_000_000 else 0
            scratch = np.array([-1])
            kernels("sl_topk_scratch", DTYPE_CODES[dtype], weights, scratch)
            assert 0 < scratch[0] <= 0.02 * weights * dtype.itemsize + fixed


# ---- the ops' calls for CUDA tensors, here with CPU tensors and the kernels on the CPU ----


def dense_strides(sizes):
    """Strides of a contiguous tensor, where there is more than one element to step over."""
    return [math.prod(sizes[i + 1 :]) for i, size in enumerate(sizes) if size > 1]


class OnTheHost:
    """The cuda_* functions of the extension, with the signatures of csrc/bindings.cpp."""

    STREAM = 77

    def __init__(self, call):
        self.call = call

    def __getattr__(self, name):
        short = name.removeprefix("cuda_bitmask_")

        def function(*arguments):
            assert arguments[-1] == self.STREAM
            self.call("sl_" + short, *arguments[:-1])

        return function

    def cuda_bitmask_apply(self, weights, item_size, words, sizes, strides, stream):
        assert stream == self.STREAM
        sizes, strides = np.array(sizes, dtype=np.int64), np.array(strides, dtype=np.int64)
        self.call("sl_apply", weights, item_size, words, len(sizes), sizes, strides)

    def cuda_global_topk_scratch(self, arguments):
        return 100 + len(arguments)

    def cuda_global_topk(self, arguments, keep, by_value, scratch, result, stream):
        assert stream == self.STREAM and scratch != 0
        table = []
        for data, dtype, sizes, strides, eligible, words in arguments:
            assert [n for n, size in zip(strides, sizes, strict=True) if size > 1] == dense_strides(sizes)
            table += [data, dtype, sizes[0], math.prod(sizes[1:]), eligible, words]
        table = np.array(table, dtype=np.int64)
        self.call("sl_topk", table, len(arguments), keep, int(by_value), 0, result, result + 8)


@pytest.fixture
def on_the_host(kernels, monkeypatch):
    library = OnTheHost(kernels)
    monkeypatch.setattr(_ext, "why_no_cuda", lambda device: None)
    monkeypatch.setattr(bitmask, "extension", lambda: library)
    monkeypatch.setattr(global_topk, "extension", lambda: library)
    monkeypatch.setattr(bitmask, "stream_of", lambda tensor: OnTheHost.STREAM)


def test_calls_of_bitmask(on_the_host):
    g = torch.Generator().manual_seed(40)
    for shape in [(), (70,), (5, 33), (33, 5, 3)]:
        dense, other = (torch.rand(shape, generator=g) < 0.5 for _ in range(2))
        words = bitmask._pack_cuda(dense)
        assert torch.equal(words, reference.bitmask_pack(dense))
        assert torch.equal(bitmask._unpack_cuda(words, shape), dense)
        assert bitmask._count_cuda(words).item() == dense.sum().item()
        assert bitmask._hamming_cuda(words, reference.bitmask_pack(other)).item() == (dense != other).sum().item()
        weights = torch.randn(shape, generator=g)
        want = weights.masked_fill(~dense, 0)
        bitmask._apply_cuda(weights, words)
        assert torch.equal(weights, want)
    deep = torch.randn(2, 1, 2, 1, 2, 1, 2, 1, 3, generator=g)  # more dimensions than the kernel takes
    dense = deep > 0
    want = deep.masked_fill(~dense, 0)
    bitmask._apply_cuda(deep, reference.bitmask_pack(dense))
    assert torch.equal(deep, want)


def test_calls_of_global_topk(on_the_host):
    tensors = [normal(40, 30, seed=41).mT, normal(8, 3, 3, 3, seed=42), normal(50, seed=43), normal(seed=44)]
    eligible = [torch.rand(40, 30).mT < 0.5, None, None, None]
    packed = [None if e is None else reference.bitmask_pack(e) for e in eligible]
    dense = [torch.ones(t.shape, dtype=torch.bool) if e is None else e for t, e in zip(tensors, eligible, strict=True)]
    for by_value in (False, True):
        words, threshold, nan_tensor = global_topk._cuda(tensors, 200, packed, by_value)
        want, want_threshold = reference.global_topk(tensors, 200, dense, by_value)
        assert threshold.item() == want_threshold and nan_tensor.item() == -1
        assert all(torch.equal(w, reference.bitmask_pack(m)) for w, m in zip(words, want, strict=True))
    tensors[2][7] = math.nan
    assert global_topk._cuda(tensors, 200, packed, False)[2].item() == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_topk_any_list(kernels, data):
    dtype = data.draw(st.sampled_from(FLOATS))
    seed = data.draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=6))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))
    tensors = [(torch.randint(-levels, levels + 1, s, generator=g) / levels).to(dtype) for s in shapes]
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.9]))
    eligible = None if share is None else [torch.rand(s, generator=g) < share for s in shapes]
    allowed = sum(t.numel() for t in tensors) if eligible is None else sum(int(e.sum()) for e in eligible)
    keep = data.draw(st.integers(0, allowed))
    check_topk(kernels, tensors, keep, eligible, data.draw(st.booleans()), data.draw(st.booleans()))
