"""bitmask and global_topk on a GPU, CUDA C++ and Triton: what the small cases of test_parity.py do not reach."""

import math

import pytest
import torch

from sparselottery import _ext
from sparselottery.ops import bitmask, global_topk, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
needs_cuda_build = pytest.mark.skipif(
    not hasattr(_ext._C, "cuda_global_topk"), reason="needs an extension built with nvcc for this GPU"
)


@pytest.fixture(params=[pytest.param("cuda", marks=needs_cuda_build), "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", request.param)
    assert global_topk.backend_of(torch.device("cuda")) == request.param
    return request.param


def normal(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda").to(dtype)


def check(tensors, keep, eligible=None, by="magnitude"):
    masks, threshold = global_topk.global_topk(tensors, keep, eligible=eligible, by=by)
    allowed = None if eligible is None else [e.cpu() for e in eligible]
    want, want_threshold = reference.global_topk([t.cpu() for t in tensors], keep, allowed, by == "value")
    assert threshold == want_threshold
    for t, (got, mask) in enumerate(zip(masks, want, strict=True)):
        assert got.device.type == "cuda"
        assert torch.equal(got.words.cpu(), reference.bitmask_pack(mask)), f"tensor {t}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_topk(backend, dtype, by):
    big = normal(3000, 1000, dtype=dtype)
    lists = {
        "normal": [big, normal(77, dtype=dtype), normal(64, 3, 3, 3, seed=1, dtype=dtype)],
        "all equal": [torch.full_like(big, 0.5), torch.full((999,), -0.5, dtype=dtype, device="cuda")],
        "99 % zeros": [big * (normal(3000, 1000, seed=2) > 2.33)],
        "infinities": [big / (normal(3000, 1000, seed=3) > 2), normal(5, 0, dtype=dtype)],
    }
    for name, tensors in lists.items():
        tensors = [t.nan_to_num(0.0, math.inf, -math.inf) for t in tensors]
        total = sum(t.numel() for t in tensors)
        for keep in (0, 1, total // 5, total // 2, total - 1, total):
            check(tensors, keep, by=by)
        if name == "normal":
            eligible = [torch.rand(t.shape, device="cuda") < 0.3 for t in tensors]
            check(tensors, int(sum(e.sum() for e in eligible)) // 2, eligible, by)


def test_topk_one_huge_and_a_thousand_tiny(backend):
    tensors = [normal(1 + i % 40, seed=i) for i in range(1000)]
    check([*tensors[:500], normal(20_000_001, seed=1), *tensors[500:]], 4_000_000)


def test_topk_misaligned_and_strided(backend):
    store = normal(1_000_003)
    tensors = [
        store[1:],
        normal(300, 500, seed=1).mT,
        normal(64, 16, 3, 3, seed=2).to(memory_format=torch.channels_last),
    ]
    check(tensors, 300_000)
    check([t.to(torch.bfloat16)[..., 1:] for t in tensors], 300_000)


def test_topk_nan_names_the_tensor(backend):
    tensors = [normal(1000), normal(500, 400), normal(10)]
    tensors[1][333, 17] = math.nan
    with pytest.raises(ValueError, match="layer1: holds NaN"):
        global_topk.global_topk(tensors, 10, names=["layer0", "layer1", "layer2"])


def test_topk_is_deterministic(backend):
    tensors = [normal(2_000_000).round(decimals=1)]
    first, _ = global_topk.global_topk(tensors, 700_001)
    for _ in range(10):
        again, _ = global_topk.global_topk(tensors, 700_001)
        assert torch.equal(again[0].words, first[0].words)


def prepare(tensors, garbage):
    """(arguments of the extension's calls, words, scratch, result), all but the tensors filled with garbage."""
    words = [torch.full(bitmask.words_shape(t.shape), garbage, dtype=torch.int32, device="cuda") for t in tensors]
    arguments = [
        (t.data_ptr(), _ext.DTYPE_CODES[t.dtype], *bitmask.rows_and_strides(t), 0, w.data_ptr())
        for t, w in zip(tensors, words, strict=True)
    ]
    size = _ext._C.cuda_global_topk_scratch(arguments)
    scratch = torch.full((size + 4096,), garbage % 251, dtype=torch.uint8, device="cuda")
    return arguments, words, scratch, torch.full((2,), garbage, dtype=torch.int64, device="cuda")


@needs_cuda_build
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_topk_dirty_scratch(dtype):
    tensors = [normal(700, 900, dtype=dtype), normal(33, 31, seed=1, dtype=dtype)]
    want, _ = reference.global_topk([t.cpu() for t in tensors], 100_000)
    for garbage in (0, -1, 0x5A5A5A5A):
        arguments, words, scratch, result = prepare(tensors, garbage)
        stream = torch.cuda.current_stream().cuda_stream
        _ext._C.cuda_global_topk(arguments, 100_000, False, scratch.data_ptr(), result.data_ptr(), stream)
        assert result[0].item() == -1
        assert (scratch[-4096:] == garbage % 251).all()
        assert all(torch.equal(w.cpu(), reference.bitmask_pack(m)) for w, m in zip(words, want, strict=True))


@needs_cuda_build
def test_topk_in_a_cuda_graph():
    tensors = [normal(1000, 1000), normal(77)]
    arguments, words, scratch, result = prepare(tensors, -1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        _ext._C.cuda_global_topk(arguments, 200_000, False, scratch.data_ptr(), result.data_ptr(), stream)
    for seed in range(3):
        for i, t in enumerate(tensors):
            t.copy_(normal(*t.shape, seed=10 * seed + i))
        if seed == 2:
            tensors[0].fill_(1.0)  # heavy ties: another way through the same launches
        graph.replay()
        want, threshold = reference.global_topk([t.cpu() for t in tensors], 200_000)
        assert result.view(torch.float64)[1].item() == threshold
        assert all(torch.equal(w.cpu(), reference.bitmask_pack(m)) for w, m in zip(words, want, strict=True))


@needs_cuda_build
def test_topk_a_thousand_replays_are_bit_equal_to_eager():
    tensors = [normal(1000, 1000), normal(77)]
    global_topk.select(tensors, 200_000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = global_topk.select(tensors, 200_000)
    for replay in range(1000):
        if replay % 250 == 0:
            tensors[0].copy_(normal(1000, 1000, seed=replay))
            wanted = global_topk.select(tensors, 200_000)
            for mask in chosen.masks:
                mask.words.fill_(-1)
        graph.replay()
        assert chosen.threshold == wanted.threshold
        assert all(torch.equal(a.words, b.words) for a, b in zip(chosen.masks, wanted.masks, strict=True)), replay


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", ["normal", "all equal"])
def test_topk_takes_two_percent_of_memory_beside_the_masks(dtype, values):
    """Of the weights' bytes, at 1e8 of them, as the allocator saw it; the words of the mask are the result."""
    count = 100_000_000
    if torch.cuda.mem_get_info()[0] < 3 * count * dtype.itemsize:
        pytest.skip("needs 1.2 GB of free GPU memory")
    weights = torch.full((count,), 0.5, dtype=dtype, device="cuda")
    if values == "normal":
        weights.normal_()
    global_topk.global_topk([weights[:1000]], 10)  # whatever the first call keeps
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (mask,), _ = global_topk.global_topk([weights], count // 5)
    extra = torch.cuda.max_memory_allocated() - before - mask.words.numel() * 4
    assert extra <= 0.02 * count * dtype.itemsize


def test_topk_on_another_stream(backend):
    tensors = [torch.zeros(1_000_000, device="cuda")]
    fresh = normal(1_000_000)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tensors[0].copy_(fresh)
        check(tensors, 123_456)


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (1000,), (5, 33), (70, 64), (64, 3, 3, 3), (4, 0), (2, 100_000)], ids=str
)
def test_bitmask(shape):
    dense = torch.rand(shape, device="cuda") < 0.4
    other = torch.rand(shape, device="cuda") < 0.6
    words = bitmask.pack(dense)
    assert torch.equal(words.cpu(), reference.bitmask_pack(dense.cpu()))
    assert torch.equal(bitmask.unpack(words, shape), dense)
    assert bitmask.count(words) == dense.sum().item()
    assert bitmask.hamming(words, bitmask.pack(other)) == (dense != other).sum().item()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitmask_apply(dtype):
    weights = [
        normal(300, 70, dtype=dtype),
        normal(300 * 70 + 1, dtype=dtype)[1:].view(300, 70),
        normal(70, 300, dtype=dtype).mT,
        normal(30, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        normal(3, 1, 2, 2, 2, 2, 2, 2, 5, dtype=dtype).transpose(0, -1),  # more dimensions than the kernel takes
    ]
    for w in weights:
        dense = torch.rand(w.shape, device="cuda") < 0.5
        w[~dense] = math.nan
        want = w.masked_fill(~dense, 0)
        bitmask.apply_(w, bitmask.pack(dense))
        assert torch.equal(w, want) and not torch.signbit(w[~dense]).any()


@needs_cuda_build
def test_select_in_a_cuda_graph():
    """The op itself, with the eligible counted on the device; global_topk says what to capture instead."""
    tensors, eligible = [normal(1000, 1000), normal(77)], [torch.rand(1000, 1000, device="cuda") < 0.5, None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"capture ops\.global_topk\.select"):
            global_topk.global_topk(tensors, 200_000)
        chosen = global_topk.select(tensors, 200_000, eligible=eligible)
    for seed in range(3):
        for i, t in enumerate(tensors):
            t.copy_(normal(*t.shape, seed=10 * seed + i))
        graph.replay()
        allowed = [eligible[0].cpu(), torch.ones(77, dtype=torch.bool)]
        want, threshold = reference.global_topk([t.cpu() for t in tensors], 200_000, allowed)
        assert chosen.threshold.item() == threshold and chosen.nan_tensor.item() == -1
        assert chosen.allowed.item() == sum(int(a.sum()) for a in allowed)
        for got, mask in zip(chosen.masks, want, strict=True):
            assert torch.equal(got.words.cpu(), reference.bitmask_pack(mask))
    tensors[0][3, 4] = math.nan
    graph.replay()
    assert chosen.nan_tensor.item() == 0


def test_more_weights_than_32_bits_count(backend):
    """Survivors sit where an index of 32 bits would wrap: before and after 2^31, and at the end."""
    rows, columns = 2**15 + 3, 2**16 + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * columns:
        pytest.skip("needs 13 GB of free GPU memory")
    weights = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 2**20 + 7, rows * columns - 1], device="cuda")
    weights.view(-1)[places] = torch.tensor([3.0, -1.0, 2.0, 5.0, 4.0], dtype=torch.bfloat16, device="cuda")
    for keep, threshold in ((5, 1.0), (3, 3.0)):
        (mask,), got = global_topk.global_topk([weights], keep)
        kept = bitmask.unpack(mask.words, weights.shape).view(-1).nonzero().flatten()
        want = places[weights.view(-1)[places].abs() >= threshold]
        assert got == threshold and torch.equal(kept, want) and bitmask.count(mask.words) == keep
    bitmask.apply_(weights.fill_(1.0), mask.words)
    assert torch.equal(weights.view(-1).nonzero().flatten(), kept)
