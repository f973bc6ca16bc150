"""global_topk: exact against the reference, ties, specials, layouts, dtypes, instruction sets, memory, bad input."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparselottery as sl
from sparselottery import Mask, _ext
from sparselottery.ops import bitmask, reference
from sparselottery.ops import global_topk as op
from sparselottery.ops.global_topk import global_topk

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (0,), (31,), (100,), (3, 32), (5, 27), (4, 3, 3, 3), (2, 65), (0, 4), (3, 0), (1, 1), (7, 1, 5)]
NO_SAMPLE = 8192  # up to here every weight is a candidate; more go through the sampled bracket


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def check(tensors, keep, eligible=None, by="magnitude"):
    """Masks and threshold equal the reference's; returns them."""
    dense = (
        None
        if eligible is None
        else [
            torch.ones_like(t, dtype=torch.bool) if e is None else e.to_dense() if isinstance(e, sl.Mask) else e
            for e, t in zip(eligible, tensors, strict=True)
        ]
    )
    masks, threshold = global_topk(tensors, keep, eligible=eligible, by=by)
    want, want_threshold = reference.global_topk(tensors, keep, dense, by == "value")
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    for mask, wanted in zip(masks, want, strict=True):
        assert torch.equal(mask.words, reference.bitmask_pack(wanted))  # the padding bits too
    assert threshold == want_threshold and math.copysign(1, threshold) == math.copysign(1, want_threshold + 0.0)
    assert sum(m.count for m in masks) == keep
    return masks, threshold


def values(kind, count, generator):
    """`count` float64 weights of one of the distributions that selection algorithms stumble over."""
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return normal
    if kind == "all equal":
        return torch.full((count,), -0.5, dtype=torch.float64)
    if kind == "99% zeros":
        return torch.where(torch.rand(count, generator=generator) < 0.01, normal, 0.0 * normal)  # of both signs
    if kind == "two values":
        return torch.where(normal > 0.8, 0.25, -0.125).double()
    if kind == "few values":
        return (normal * 2).round()
    if kind == "denormals":
        return normal * 1e-40
    if kind == "specials":
        special = torch.tensor(
            [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 6e-8, 65504.0, -65504.0], dtype=torch.float64
        )
        return special[torch.randint(len(special), (count,), generator=generator)]
    if kind == "sorted":
        return torch.arange(count, dtype=torch.float64) - count / 2
    raise AssertionError(kind)


KINDS = ["normal", "all equal", "99% zeros", "two values", "few values", "denormals", "specials", "sorted"]


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), max_size=6),
    kind=st.sampled_from(KINDS),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.99, 1.0]),
    eligible_share=st.sampled_from([None, 0.0, 0.3, 1.0]),
    by=st.sampled_from(["magnitude", "value"]),
    seed=st.integers(0, 2**16),
)
def test_small_lists(shapes, kind, dtypes, share, eligible_share, by, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [values(kind, math.prod(s), g).reshape(s).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    eligible, allowed = None, sum(t.numel() for t in tensors)
    if eligible_share is not None:
        dense = [torch.rand(s, generator=g) < eligible_share for s in shapes]
        eligible = [(d, sl.Mask.from_dense(d), None)[i % 3] for i, d in enumerate(dense)]
        allowed = sum(d.numel() if i % 3 == 2 else int(d.sum()) for i, d in enumerate(dense))
    check(tensors, round(share * allowed), eligible, by)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors(kind, dtype, isa):
    """Enough weights for the sampled bracket, in shapes with and without padding."""
    g = torch.Generator().manual_seed(1)
    shapes = [(257, 100), (64, 320), (30011,), (16, 9, 3, 3)]
    tensors = [values(kind, math.prod(s), g).reshape(s).to(dtype) for s in shapes]
    total = sum(t.numel() for t in tensors)
    nonzero = sum(int((t != 0).sum()) for t in tensors)
    for keep in {0, 1, nonzero, min(nonzero + 1, total), total // 5, total - 1, total}:
        check(tensors, keep)
    check(tensors, total // 3, by="value")
    eligible = [sl.Mask.from_dense(torch.rand(s, generator=g) < 0.3) for s in shapes]
    check(tensors, sum(m.count for m in eligible) // 2, eligible)


def test_sample_that_misleads():
    """Weights laid out so that every sampled stretch shows the wrong distribution: the exact counts must notice."""
    g = torch.Generator().manual_seed(2)
    for period in (16, 64, 256, 4096):
        x = torch.rand(1 << 18, generator=g)
        x[torch.arange(len(x)) // period % 2 == 0] += 1
        x[:20000] = 1.5
        for keep in (1, 10000, len(x) // 2 - 1, len(x) // 2, 20001 + len(x) // 2, len(x) - 5):
            check([x], keep)


def test_heavy_ties_inside_the_bracket():
    """Two keys that share nearly all weights, and the last survivor among either, above or between."""
    x = torch.full((200_000,), 0.5)
    x[::2] = 0.25
    x[:50] = 1.0
    for keep in (49, 50, 51, 100_000, 100_024, 100_025, 100_026, 199_999):
        check([x], keep)
        check([x.double()], keep)


def test_one_huge_tensor_and_a_thousand_tiny_ones():
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(300_000, generator=g)]
    tensors += [torch.randn(int(n), generator=g) for n in torch.randint(0, 70, (1000,), generator=g)]
    total = sum(t.numel() for t in tensors)
    check(tensors, total // 10)
    check(tensors[::-1], total // 2)


def test_mixed_dtypes_are_compared_exactly():
    """Neighbours that would collapse if they were rounded to a common 16 bits, or to float32."""
    tensors = [
        torch.tensor([1.0, 1.0 + 2**-10], dtype=torch.float16),
        torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16),
        torch.tensor([1.0 + 2**-10 + 2**-23, 1e-40]),
        torch.tensor([6e-8], dtype=torch.float16),
    ]
    for keep in range(7):
        check(tensors, keep)
    tensors.append(torch.tensor([1.0 + 2**-10 + 2**-23 + 2**-52, 1e-310, 1e-40], dtype=torch.float64))
    for keep in range(10):
        check(tensors, keep)
        check(tensors, keep, by="value")


def test_denormals_count_where_the_thread_flushes_them():
    tensors = [torch.tensor([1e-40, 2e-40, 3e-40]), torch.tensor([2.5e-40], dtype=torch.float64)]
    masks, _ = global_topk(tensors, 2)
    flushed = torch.set_flush_denormal(True)
    try:
        again, threshold = global_topk(tensors, 2)
    finally:
        torch.set_flush_denormal(False)
    assert flushed and masks == again and masks[0].to_dense().tolist() == [False, False, True] and threshold > 0


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.reshape(960, 30).T,
    "sliced": lambda x: x[::2, 1::3],
    "expanded": lambda x: x[:, :1].expand(24, 40, 6, 5),
    "strided vector": lambda x: x.flatten()[::7],
    "columns of a wider matrix": lambda x: x.reshape(48, 600)[:, 5:518],
    "rows that follow one another, but not their columns": lambda x: x.reshape(10, 72, 40).transpose(1, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(name, dtype, isa):
    g = torch.Generator().manual_seed(4)
    x = LAYOUTS[name](torch.randn(24, 40, 6, 5, generator=g, dtype=torch.float64).to(dtype))
    other = torch.randn(9000, generator=g, dtype=torch.float64).to(dtype)[1:]
    assert not x.is_contiguous()
    for keep in (x.numel() // 7, x.numel() // 2):
        check([x], keep)
        eligible = [torch.rand(x.shape, generator=g) < 0.6, None]
        check([x, other], keep, eligible)


def test_more_weights_than_32_bits_count():
    """2**31 + 12288 weights that are rows of one memory, so that only the masks need room (268 MB)."""
    row = torch.randn(4096, generator=torch.Generator().manual_seed(6))
    rows = 2**19 + 3
    order = row.abs().argsort(descending=True)

    def best(count):
        return bitmask.pack(torch.zeros(4096, dtype=torch.bool).index_fill(0, order[:count], True))

    for keep in (100 * rows + 7, 4096 * rows - 5):
        (mask,), threshold = global_topk([row.expand(rows, 4096)], keep)
        each, more = divmod(keep, rows)
        assert bool((mask.words[:more] == best(each + 1)).all()) and bool((mask.words[more:] == best(each)).all())
        assert threshold == float(row.abs()[order[each]]) and mask.count == keep


def test_weights_that_are_only_element_aligned():
    raw = torch.zeros(4 * 20000 + 64, dtype=torch.uint8)
    for dtype, shift in ((torch.bfloat16, 2), (torch.float32, 4)):
        size = 20000 * dtype.itemsize
        x = raw[shift : shift + size].view(dtype)
        x.copy_(torch.randn(20000))
        check([x], 3000)


def test_same_bits_for_any_number_of_threads():
    x = [torch.randn(700, 901, generator=torch.Generator().manual_seed(5)).round(decimals=2), torch.randn(300_000)]
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(check(x, 200_000))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_parameters_and_empty_lists():
    layer = torch.nn.Linear(20, 30)
    masks, _ = global_topk(layer.parameters(), 100)
    assert not masks[0].words.requires_grad
    assert global_topk([], 0) == ([], math.inf)
    assert sl.global_topk is global_topk


@pytest.mark.parametrize("count", [50, 100_000])
@pytest.mark.parametrize("keep", [0, 10])
def test_nan_is_named(count, keep):
    x, y = torch.randn(count), torch.randn(3, count)
    y[1, count // 3] = math.nan
    with pytest.raises(ValueError, match=r"tensors\[1\]: holds NaN"):
        global_topk([x, y, y], keep)
    with pytest.raises(ValueError, match=r"layer\.weight: holds NaN"):
        global_topk([x, y], keep, names=["bias", "layer.weight"], by="value")
    for dtype in DTYPES:  # among weights that are not eligible too: such a model is broken, whatever survives
        with pytest.raises(ValueError, match=r"tensors\[0\]: holds NaN"):
            global_topk([-y.to(dtype)], keep, eligible=[~y.isnan()])


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"keep": -1}, ValueError, "keep: expected 0 to 6"),
        ({"keep": 7}, ValueError, "keep: expected 0 to 6"),
        ({"keep": 2.0}, TypeError, "keep: expected an int, got float"),
        ({"keep": True}, TypeError, "keep: expected an int, got bool"),
        ({"keep": 2, "eligible": [torch.eye(2, 3).bool()]}, None, ""),
        ({"keep": 3, "eligible": [torch.eye(2, 3).bool()]}, ValueError, "keep: expected 0 to 2"),
        ({"eligible": [torch.ones(3, 2).bool()]}, ValueError, r"eligible\[0\]: expected shape \[2, 3\]"),
        ({"eligible": [torch.ones(2, 3)]}, TypeError, r"eligible\[0\]: expected a Mask, a bool tensor or None"),
        ({"eligible": []}, ValueError, "eligible: expected 1 entries"),
        ({"tensors": [torch.ones(2, 3).int()]}, TypeError, r"tensors\[0\]: expected float32"),
        ({"tensors": [None]}, TypeError, r"tensors\[0\]: expected a tensor"),
        ({"tensors": torch.ones(2, 3)}, TypeError, "tensors: expected a list"),
        ({"tensors": [torch.ones(2, 3).to_sparse()]}, ValueError, r"tensors\[0\]: expected a dense"),
        ({"by": "size"}, ValueError, "by: expected 'magnitude' or 'value'"),
        ({"names": []}, ValueError, "names: expected 1"),
        ({"names": 5}, TypeError, "names: expected a list, got int"),
        ({"tensors": 5}, TypeError, "tensors: expected a list of tensors, got int"),
        ({"eligible": 5}, TypeError, "eligible: expected None or a list with one entry per tensor, got int"),
        ({"eligible": Mask.ones((2, 3))}, TypeError, "eligible: expected None or a list .* got Mask"),
        ({"eligible": torch.ones(1, 2, 3).bool()}, TypeError, "eligible: expected None or a list .* got a tensor"),
        ({"keep": np.float64(2)}, TypeError, "keep: expected an int, got float64"),
        ({"keep": torch.tensor(2.0)}, TypeError, "keep: expected an int, got Tensor"),
        ({"keep": np.int64(2)}, None, ""),
    ],
)
def test_bad_input_names_the_argument(arguments, error, says):
    arguments = {"tensors": [torch.randn(2, 3)], "keep": 1} | arguments
    call = lambda: global_topk(arguments.pop("tensors"), arguments.pop("keep"), **arguments)  # noqa: E731
    if error is None:
        call()
        return
    with pytest.raises(error, match=says):
        call()


def test_opcheck_and_compile():
    x, y = torch.randn(40, 33), torch.randn(9)
    words = sl.Mask.from_dense(torch.rand(40, 33) < 0.5).words
    op = torch.ops.sparselottery.global_topk
    for eligible in ([None, None], [words, None]):
        torch.library.opcheck(op, ([x, y], 100, eligible, False))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def prune(x, y):
        words, threshold, _ = op([x, y], 100, [None, None], False)
        return words[0], threshold * 1

    kept, threshold = prune(x, y)
    (mask, _), want = global_topk([x, y], 100)
    assert torch.equal(kept, mask.words) and float(threshold) == want


MEMORY = """
import resource, torch
from sparselottery.ops.global_topk import global_topk
{prepare}
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
def rss():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
global_topk([torch.randn(100_000)], 1000)  # code, thread pool and allocator are warm
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
before = rss()
masks, _ = global_topk(x, sum(t.numel() for t in x) // 5)
print(peak() - before, sum(m.words.nbytes for m in masks), sum(t.nbytes for t in x))
"""


@pytest.mark.parametrize(
    "prepare",
    [
        "x = [torch.randn(3000, 3001)]",
        "x = [torch.randn(9_000_000).bfloat16(), torch.randn(3000, 1000).bfloat16()]",
        "x = [torch.randn(3000, 3000).T]",
        "x = [torch.zeros(9_000_000)]",
    ],
    ids=["float32", "bfloat16", "transposed", "ties"],
)
def test_extra_memory_is_at_most_five_percent(prepare):
    script = MEMORY.format(prepare=prepare)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra, masks, weights = map(int, done.stdout.split())
    assert extra - masks <= 0.05 * weights


def test_select_never_looks_at_a_gpu(monkeypatch):
    """Fake tensors hold no numbers: whoever wanted to read one on the host would fail."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    monkeypatch.setattr(op, "backend_of", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        tensors = [torch.empty(7, 40, device="cuda"), torch.empty(9, device="cuda")]
        eligible = [torch.empty(7, 40, dtype=torch.bool, device="cuda"), None]
        for entries in (None, eligible):
            chosen = op.select(tensors, 20, eligible=entries)
            assert [m.words.shape for m in chosen.masks] == [(7, 2), (1, 1)]
            assert all(t.shape == () and t.is_cuda for t in (chosen.threshold, chosen.nan_tensor, chosen.allowed))
        with pytest.raises(ValueError, match="keep: expected 0 to 289"):
            op.select(tensors, 290)
        with pytest.raises(DataDependentOutputException):
            global_topk(tensors, 20)


def test_select_is_what_global_topk_returns():
    tensors = [torch.randn(7, 40), torch.randn(9)]
    eligible = [torch.rand(7, 40) < 0.5, None]
    masks, threshold = global_topk(tensors, 20, eligible=eligible, by="value")
    chosen = op.select(tensors, 20, eligible=eligible, by="value")
    assert chosen.masks == masks and chosen.threshold.item() == threshold and chosen.nan_tensor.item() == -1
    assert chosen.allowed.item() == int(eligible[0].sum()) + 9
    tensors[1][3] = math.nan
    assert op.select(tensors, 20).nan_tensor.item() == 1


def test_under_capture_the_way_out_is_told(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"capture ops\.global_topk\.select"):
        global_topk([torch.empty(5, device="cuda")], 2)
