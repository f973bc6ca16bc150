"""kernels/global_topk under Triton's interpreter, bit for bit against ops/reference.py."""

import math

import pytest
import torch

from sparselottery.kernels import global_topk as kernels
from sparselottery.ops import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(tensors, keep, eligible=None, signed=False):
    packed = (
        [None] * len(tensors)
        if eligible is None
        else [None if e is None else reference.bitmask_pack(e) for e in eligible]
    )
    dense = None
    if eligible is not None:
        dense = [
            torch.ones(t.shape, dtype=torch.bool) if e is None else e for t, e in zip(tensors, eligible, strict=True)
        ]
    words, threshold, nan_tensor = kernels.select(tensors, keep, packed, signed)
    want, want_threshold = reference.global_topk(tensors, keep, dense, signed)
    assert nan_tensor.item() == -1
    assert threshold.item() == want_threshold
    for t, (got, mask) in enumerate(zip(words, want, strict=True)):
        assert torch.equal(got, reference.bitmask_pack(mask)), f"tensor {t}"


def adversarial(dtype):
    g = torch.Generator().manual_seed(3)
    rare = normal(6000, seed=1, dtype=dtype) * (torch.rand(6000, generator=g) < 0.01)
    tiny = torch.finfo(dtype).smallest_normal / 4
    extremes = torch.tensor([math.inf, -math.inf, tiny, -tiny, 0.0, -0.0] * 30, dtype=dtype)
    return {
        "normal": [
            normal(64, 33, seed=4, dtype=dtype),
            normal(7, seed=5, dtype=dtype),
            normal(3000, seed=6, dtype=dtype),
        ],
        "all equal": [torch.full((70, 10), 0.5, dtype=dtype), torch.full((900,), -0.5, dtype=dtype)],
        "99 % zeros": [rare[:3000].view(30, 100), rare[3000:]],
        "two values": [torch.where(torch.rand(3000, generator=g) < 0.5, 1.0, 2.0).to(dtype)],
        "extremes": [extremes[torch.randperm(180, generator=g)], normal(50, seed=7, dtype=dtype)],
        "odd columns": [normal(20, c, seed=c, dtype=dtype) for c in (1, 3, 31, 32, 33, 65)],
        "empty ones": [normal(0), normal(40, dtype=dtype), normal(0, 5), normal(5, 0), normal(dtype=dtype), normal(0)],
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", list(adversarial(torch.float32)))
def test_short_lists(name, dtype):
    tensors = adversarial(dtype)[name]
    total = sum(t.numel() for t in tensors)
    for i, keep in enumerate((0, 1, total // 5, total // 2, total)):
        check(tensors, keep, signed=i % 2 == 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", list(adversarial(torch.float32)))
def test_sampled(monkeypatch, name, dtype, signed):
    """The bracket, missed brackets and a pool that overflows, on lists short enough for the interpreter."""
    monkeypatch.setattr(kernels, "SAMPLE_ABOVE", 256)
    tensors = adversarial(dtype)[name]
    total = sum(t.numel() for t in tensors)
    for keep in (3, total // 10, total // 2, total - 1):
        check(tensors, keep, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bracket", [(0.0, 0.01), (3.0, 4.0), (0.5, 0.5)], ids=["below", "above", "empty"])
def test_missed_bracket(monkeypatch, bracket, dtype, signed):
    bits, wide = (torch.int64, torch.float64) if dtype == torch.float64 else (torch.int32, torch.float32)
    bounds = torch.tensor(bracket, dtype=wide).view(bits).long()
    monkeypatch.setattr(kernels, "_bracket", lambda *_: bounds)
    check([normal(40, 50, seed=1, dtype=dtype), normal(300, seed=2, dtype=dtype)], 700, signed=signed)


@pytest.mark.parametrize("above", [64, 65536])
def test_eligible(monkeypatch, above):
    monkeypatch.setattr(kernels, "SAMPLE_ABOVE", above)
    tensors = [normal(30, 70, seed=1), normal(2000, seed=2), normal(8, 3, 3, 3, seed=3)]
    g = torch.Generator().manual_seed(4)
    eligible = [torch.rand(tensors[0].shape, generator=g) < 0.2, None, torch.rand(tensors[2].shape, generator=g) < 0.5]
    allowed = 2000 + sum(int(e.sum()) for e in eligible if e is not None)
    for keep in (0, 1, allowed // 2, allowed):
        check(tensors, keep, eligible)


def test_mixed_and_misaligned(monkeypatch):
    monkeypatch.setattr(kernels, "SAMPLE_ABOVE", 512)
    store = normal(3001, seed=1)
    tensors = [store[1:], normal(40, 40, seed=2, dtype=torch.bfloat16), normal(33, 9, seed=3, dtype=torch.float16)]
    for extra in ([], [normal(50, 3, seed=4, dtype=torch.float64)]):
        check(tensors + extra, 2000)
        check([t.mT if t.ndim == 2 else t for t in tensors + extra], 2000)


def test_one_huge_and_a_thousand_tiny():
    tensors = [normal(1 + i % 7, seed=i) for i in range(500)] + [normal(250, 301, seed=9)]
    tensors += [normal(1 + i % 3, 1 + i % 5, seed=i) for i in range(500)]
    check(tensors, sum(t.numel() for t in tensors) // 5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_names_the_first_tensor(dtype):
    tensors = [normal(20, dtype=dtype), normal(90, 40, dtype=dtype), normal(40, dtype=dtype)]
    tensors[2][7] = tensors[1][33, 17] = math.nan
    for keep in (0, 100):
        assert kernels.select(tensors, keep, [None] * 3, False)[2].item() == 1


def test_nothing():
    for tensors in ([], [torch.empty(0), torch.empty(3, 0)]):
        words, threshold, nan_tensor = kernels.select(tensors, 0, [None] * len(tensors), False)
        assert [w.numel() for w in words] == [0] * len(tensors)
        assert threshold.item() == math.inf and nan_tensor.item() == -1
