"""Exactly `keep` survivors over a list of tensors in Triton: the design of csrc/cuda/global_topk.cu.

A sample brackets the key of the last survivor; one pass over all tensors (through a table of addresses) writes the mask
words, counts, looks for NaN and appends the few keys inside the bracket with their positions; the last survivor is found
among those. A missed bracket or heavy ties are settled from exact counts by histograms over the weights.

Keys are integers that order like the numbers: int32 for lists without float64 (float16 and bfloat16 widen exactly), else
int64. 16-bit floats are read as int16, so nothing here computes in bfloat16. A position is 32 * word + bit, the words of all
masks counted through in list order: it orders like the flat index. A tile is R words of one tensor.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

R = 64  # words of a tile: 2048 weights
BINS = 2048
TILES_PER_HISTOGRAM = 16
SAMPLE_ABOVE = 65536  # shorter lists go to the pool whole
MAX_SAMPLE = 1 << 20
SIGMAS = 4.5
SAMPLES_PER_PROGRAM = 256
# KIND: sl::DType (csrc/common.h)
KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Rows of the table, one int64 per tensor.
WEIGHTS, WORDS, ELIGIBLE, COLUMNS, PER_ROW, COUNT, GROUP_TILE, FIRST_TILE, FIRST_WORD, FIRST_INDEX, INDEX, KIND = range(
    12
)
_ROWS = 12


@triton.jit
def _find(starts, x, count, STEPS: tl.constexpr):
    """The last i with starts[i] <= x (tensors without words begin where the next one does)."""
    low = x * 0
    high = low + count - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        after = tl.load(starts + middle) <= x
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle - 1)
    return low


@triton.jit
def _keys(address, offset, ok, KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    """(keys, which are NaN) of the weights at `address + offset`; 0 where not ok."""
    if KIND == 0:
        p = address.to(tl.pointer_type(tl.int32))
    elif KIND == 1:
        p = address.to(tl.pointer_type(tl.int64))
    else:
        p = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:  # an address from a table has no known alignment, and without one every load is of a single weight
        p = tl.multiple_of(p, 16)
    raw = tl.load(p + offset, mask=ok, other=0)
    if KIND == 2:
        bits = raw.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    elif KIND == 3:
        bits = raw.to(tl.int32) << 16
    else:
        bits = raw
    if WIDE:
        if KIND != 1:
            bits = bits.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        nan = magnitude > 0x7FF0000000000000
    else:
        magnitude = bits & 0x7FFFFFFF
        nan = magnitude > 0x7F800000
    # Negative numbers order downwards by magnitude; -0 equals +0.
    key = tl.where(bits < 0, -magnitude, magnitude) if SIGNED else magnitude
    return key, nan & ok


@triton.jit
def _tile(
    table, count, group_tile,
    KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, FLAT: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tile of [R, 32] weights: (tensor, first word, keys, which count, which are NaN)."""
    t = _find(table + 6 * count, group_tile, count, STEPS)
    first = (group_tile - tl.load(table + 6 * count + t)) * R
    first = tl.multiple_of(first, R)
    address = tl.load(table + t)
    eligible = tl.load(table + 2 * count + t)
    columns = tl.load(table + 3 * count + t)
    words = tl.load(table + 5 * count + t)
    word = first + tl.arange(0, R)
    j = tl.arange(0, 32)
    if FLAT:  # rows follow each other without padding
        offset = word[:, None] * 32 + j[None, :]
        ok = offset < columns
    else:
        per_row = tl.load(table + 4 * count + t)
        row = word // per_row
        column = (word - row * per_row)[:, None] * 32 + j[None, :]
        offset = row[:, None] * columns + column
        ok = (column < columns) & (word < words)[:, None]
    key, nan = _keys(address, offset, ok, KIND, WIDE, SIGNED, FLAT)
    if eligible != 0:
        allowed = tl.load(eligible.to(tl.pointer_type(tl.int32)) + word, mask=word < words, other=0)
        ok = ok & (((allowed[:, None] >> j[None, :]) & 1) != 0)
    return t, first, key, ok, nan


@triton.jit
def _as_words(bits):
    """bool [R, 32] -> int32 [R]"""
    j = tl.arange(0, 32).to(tl.uint32)
    return tl.sum(bits.to(tl.uint32) << j[None, :], 1).to(tl.int32, bitcast=True)


@triton.jit
def sample(
    table, count, index, samples, keys,
    KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, STEPS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """keys[i] = key of weight number index[i] of the list, for the tensors of one dtype; the least key if not eligible."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < samples
    at = tl.load(index + i, mask=inside, other=0)
    t = _find(table + 9 * count, at, count, STEPS)
    mine = inside & (tl.load(table + 11 * count + t) == KIND)
    local = at - tl.load(table + 9 * count + t)
    key, _ = _keys(tl.load(table + t), local, mine, KIND, WIDE, SIGNED, False)
    eligible = tl.load(table + 2 * count + t)
    columns = tl.load(table + 3 * count + t)
    row = local // columns
    column = local - row * columns
    word = row * tl.load(table + 4 * count + t) + column // 32
    allowed = tl.load(eligible.to(tl.pointer_type(tl.int32)) + word, mask=mine & (eligible != 0), other=-1)
    least = -0x7FFFFFFFFFFFFFFF if WIDE else -0x7FFFFFFF
    tl.store(keys + i, tl.where(((allowed >> (column % 32).to(tl.int32)) & 1) != 0, key, least), mask=mine)


@triton.jit
def mark(
    table, count, bounds, counters, tile_inside, pool, capacity, position_bits,
    KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, FLAT: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The pass over the weights: words = key >= hi; counters = (keys >= hi, keys in [lo, hi), first tensor with NaN)."""
    group_tile = tl.program_id(0).to(tl.int64)
    t, first, key, ok, nan = _tile(table, count, group_tile, KIND, WIDE, SIGNED, FLAT, STEPS, R)
    lo = tl.load(bounds)
    hi = tl.load(bounds + 1)
    above = ok & (key >= hi)
    inside = ok & (key >= lo) & (key < hi)
    words = tl.load(table + 5 * count + t)
    word = first + tl.arange(0, R)
    tl.store(tl.load(table + 1 * count + t).to(tl.pointer_type(tl.int32)) + word, _as_words(above), mask=word < words)
    tl.atomic_add(counters, tl.sum(tl.reshape(above.to(tl.int32), (R * 32,)), 0).to(tl.int64))
    if tl.sum(tl.reshape(nan.to(tl.int32), (R * 32,)), 0) > 0:
        tl.atomic_min(counters + 2, tl.load(table + 10 * count + t))
    flat = tl.reshape(inside.to(tl.int32), (R * 32,))
    total = tl.sum(flat, 0)
    tile = tl.load(table + 7 * count + t) + first // R
    tl.store(tile_inside + tile, total)
    if total > 0:
        at = tl.atomic_add(counters + 1, total.to(tl.int64))
        slot = at + tl.cumsum(flat, 0) - flat
        position = (tl.load(table + 8 * count + t) + first) * 32 + tl.arange(0, R * 32)
        last = (tl.full((R * 32,), 1, tl.int64) << position_bits) - 1
        value = ((tl.reshape(key, (R * 32,)).to(tl.int64) - lo) << position_bits) | (last - position)
        tl.store(pool + slot, value, mask=(flat > 0) & (slot < capacity))


@triton.jit
def set_bits(first_words, addresses, count, positions, n, STEPS: tl.constexpr, B: tl.constexpr):
    """Sets the bits at n positions."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = i < n
    position = tl.load(positions + i, mask=ok, other=0)
    t = _find(first_words, position // 32, count, STEPS)
    p = tl.load(addresses + t).to(tl.pointer_type(tl.int32)) + (position // 32 - tl.load(first_words + t))
    bit = (tl.full((B,), 1, tl.uint32) << (position % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(p, bit, mask=ok)


@triton.jit
def histogram(
    table, count, tiles, bounds, bins,
    KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, FLAT: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Adds to bins[(key - lo) >> shift] for every key in [lo, hi); bounds = (lo, hi, shift)."""
    lo = tl.load(bounds)
    hi = tl.load(bounds + 1)
    shift = tl.load(bounds + 2).to(tl.uint64)
    begin = tl.program_id(0).to(tl.int64) * TILES
    total = tl.zeros((BINS,), tl.int32)
    outside = 0
    for tile in range(begin, tl.minimum(begin + TILES, tiles)):
        _, _, key, ok, _ = _tile(table, count, tile, KIND, WIDE, SIGNED, FLAT, STEPS, R)
        inside = tl.reshape(ok & (key >= lo) & (key < hi), (R * 32,))
        distance = (tl.reshape(key, (R * 32,)).to(tl.int64) - lo).to(tl.uint64, bitcast=True)
        total += tl.histogram(tl.where(inside, distance >> shift, 0).to(tl.int32), BINS)
        outside += R * 32 - tl.sum(inside.to(tl.int32), 0)  # these were counted in bin 0
    i = tl.arange(0, BINS)
    total = tl.where(i == 0, total - outside, total)
    tl.atomic_add(bins + i, total.to(tl.int64), mask=total != 0)


@triton.jit
def set_ties(
    table, count, bounds, before, wanted,
    KIND: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, FLAT: tl.constexpr, STEPS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sets the bits of the first `wanted` keys in [lo, hi); before[tile]: how many lie in the tiles before it."""
    group_tile = tl.program_id(0).to(tl.int64)
    t = _find(table + 6 * count, group_tile, count, STEPS)
    first_group_tile = tl.load(table + 6 * count + t)
    taken = tl.load(before + tl.load(table + 7 * count + t) + group_tile - first_group_tile)
    if taken < wanted:
        _, first, key, ok, _ = _tile(table, count, group_tile, KIND, WIDE, SIGNED, FLAT, STEPS, R)
        tie = ok & (key >= tl.load(bounds)) & (key < tl.load(bounds + 1))
        flat = tl.reshape(tie.to(tl.int32), (R * 32,))
        chosen = (flat > 0) & (taken + tl.cumsum(flat, 0) <= wanted)
        word = first + tl.arange(0, R)
        p = tl.load(table + 1 * count + t).to(tl.pointer_type(tl.int32)) + word
        ok_word = word < tl.load(table + 5 * count + t)
        old = tl.load(p, mask=ok_word, other=0)
        tl.store(p, old | _as_words(tl.reshape(chosen, (R, 32))), mask=ok_word)


class _List:
    """The tables of a list of tensors, grouped by what a kernel must know at compile time."""

    def __init__(self, tensors, words, eligible):
        self.device = tensors[0].device
        self.wide = any(t.dtype == torch.float64 for t in tensors)
        columns = [w.numel() and t.numel() // w.shape[0] for t, w in zip(tensors, words, strict=True)]
        counts = [w.numel() for w in words]
        tiles = [triton.cdiv(c, R) for c in counts]

        def starts(sizes):
            total, result = 0, []
            for size in sizes:
                result.append(total)
                total += size
            return result, total

        first_tile, self.tiles = starts(tiles)
        first_word, self.words = starts(counts)
        first_index, self.weights = starts([t.numel() for t in tensors])
        self.kinds = sorted({KINDS[t.dtype] for t in tensors})
        groups = {}
        for i, (t, w) in enumerate(zip(tensors, words, strict=True)):
            flat = (w.shape[0] == 1 or columns[i] % 32 == 0) and t.data_ptr() % 16 == 0
            if tiles[i]:
                groups.setdefault((KINDS[t.dtype], flat), []).append(i)
        everything = range(len(tensors))

        def table(members, flat):
            group_tile, total = starts([tiles[i] for i in members])
            rows = [
                [tensors[i].data_ptr() for i in members],
                [words[i].data_ptr() for i in members],
                [0 if eligible[i] is None else eligible[i].data_ptr() for i in members],
                [tensors[i].numel() if flat else columns[i] for i in members],
                [words[i].shape[1] for i in members],
                [counts[i] for i in members],
                group_tile,
                [first_tile[i] for i in members],
                [first_word[i] for i in members],
                [first_index[i] for i in members],
                list(members),
                [KINDS[tensors[i].dtype] for i in members],
            ]
            return torch.tensor(rows, dtype=torch.int64).to(self.device), total

        self.groups = []
        for (kind, flat), members in groups.items():
            rows, total = table(members, flat)
            meta = {"KIND": kind, "WIDE": self.wide, "FLAT": flat, "STEPS": _steps(len(members)), "R": R}
            self.groups.append((rows, len(members), total, meta))
        self.table, _ = table(everything, False)
        self.steps = _steps(len(tensors))


def _steps(count: int) -> int:
    """Rounds of a binary search, a power of two so that few kernels are compiled."""
    steps = max(1, (count - 1).bit_length())
    return 1 << (steps - 1).bit_length()


def select(
    tensors: list[Tensor], keep: int, eligible: list[Tensor | None], signed: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masks of exactly `keep` survivors over all tensors: the largest |weight|, or (signed) the largest weight.

    Args:
        tensors: float32, float64, float16, bfloat16 (may be mixed), any shapes, one device.
        keep: 0 to the number of eligible weights (the op checks it).
        eligible: int32 words or None per tensor.
        signed: rank the values instead of their magnitudes.

    Returns:
        (int32 words of every tensor, 0-d float64 key of the smallest survivor or +inf, 0-d int64 index of the first tensor
        that holds a NaN or -1).
    """
    tensors = [t.detach().contiguous() for t in tensors]
    eligible = [None if e is None else e.contiguous() for e in eligible]
    words = []
    for t in tensors:
        rows = t.shape[0] if t.ndim > 1 else 1
        columns = math.prod(t.shape[1:]) if t.ndim > 1 else t.numel()
        words.append(t.new_empty(rows, triton.cdiv(columns, 32), dtype=torch.int32))
    device = tensors[0].device if tensors else torch.device("cpu")

    def result(threshold, nan_tensor):
        threshold = torch.tensor(threshold, dtype=torch.float64, device=device)
        return words, threshold, torch.tensor(nan_tensor, dtype=torch.int64, device=device)

    if not any(w.numel() for w in words):
        return result(math.inf, -1)
    every = _List(tensors, words, eligible)
    top = 2**63 - 1 if every.wide else 2**31 - 1
    bottom = -top if signed else 0
    capacity = max(min(every.weights, SAMPLE_ABOVE), sum(t.nbytes for t in tensors) // 400)
    position_bits = (every.words * 32).bit_length()
    pool = torch.empty(capacity, dtype=torch.int64, device=device)
    tile_inside = torch.empty(every.tiles, dtype=torch.int32, device=device)

    def run_mark(bounds, capacity):
        counters = torch.tensor([0, 0, len(tensors)], dtype=torch.int64).to(device)
        for table, count, tiles, meta in every.groups:
            arguments = (table, count, bounds, counters, tile_inside, pool, capacity, position_bits)
            mark[(tiles,)](*arguments, SIGNED=signed, num_warps=8, **meta)
        return counters

    bounds = _bracket(every, keep, signed, bottom, top)
    # The one time the host waits in the common case.
    above, inside, nan_tensor, lo, hi = torch.cat([run_mark(bounds, capacity), bounds]).tolist()
    if nan_tensor < len(tensors):
        return result(0.0, nan_tensor)
    if keep == 0:
        return result(math.inf, -1)
    fits = (hi - lo).bit_length() + position_bits <= 63
    if above < keep <= above + inside and inside <= capacity and fits:
        chosen = pool[:inside].sort(descending=True).values[: keep - above]
        mask = (1 << position_bits) - 1
        _set_bits(every, mask - (chosen & mask))
        key = lo + (int(chosen[-1]) >> position_bits)
    else:
        if above >= keep:
            lo, hi, rank = hi, top, keep
        elif above + inside < keep:
            lo, hi, rank = bottom, lo, keep - above - inside
        else:
            rank = keep - above
        key, rank = _narrow(every, lo, hi, rank, signed)
        bounds = torch.tensor([key, key + 1], dtype=torch.int64).to(device)
        run_mark(bounds, 0)
        before = tile_inside.cumsum(0, dtype=torch.int64) - tile_inside
        for table, count, tiles, meta in every.groups:
            set_ties[(tiles,)](table, count, bounds, before, rank, SIGNED=signed, num_warps=8, **meta)
    return result(_number(key, every.wide), -1)


def _bracket(every: _List, keep: int, signed: bool, bottom: int, top: int) -> Tensor:
    """int64 (lo, hi), on the device: the key of the last survivor is most probably in [lo, hi)."""
    if keep == 0:
        return torch.tensor([top, top], dtype=torch.int64).to(every.device)
    if every.weights <= SAMPLE_ABOVE:
        return torch.tensor([bottom, top], dtype=torch.int64).to(every.device)
    samples = min(max(every.weights // 64, SAMPLE_ABOVE // 4), MAX_SAMPLE)
    i = torch.arange(samples, dtype=torch.float64, device=every.device)
    jitter = (i * 0.6180339887498949) % 1  # a weight from each part of the list, at no regular distance
    index = ((i + jitter) * (every.weights / samples)).long().clamp_(max=every.weights - 1)
    keys = torch.empty(samples, dtype=torch.int64 if every.wide else torch.int32, device=every.device)
    grid = (triton.cdiv(samples, SAMPLES_PER_PROGRAM),)
    for kind in every.kinds:
        meta = {"KIND": kind, "WIDE": every.wide, "SIGNED": signed, "STEPS": every.steps, "B": SAMPLES_PER_PROGRAM}
        sample[grid](every.table, every.table.shape[1], index, samples, keys, **meta)
    keys = keys.sort(descending=True).values.long()
    part = keep / every.weights
    rank, margin = part * samples, SIGMAS * math.sqrt(part * (1 - part) * samples) + 2
    upper, lower = math.floor(rank - margin), math.ceil(rank + margin)
    ends = torch.tensor([bottom, top], dtype=torch.int64).to(every.device)
    lo = keys[lower - 1 : lower].clamp(min=bottom) if lower <= samples else ends[:1]
    hi = keys[upper - 1 : upper].clamp(min=bottom) + 1 if upper >= 1 else ends[1:]
    return torch.cat([lo, hi])


def _set_bits(every: _List, positions: Tensor) -> None:
    table, block = every.table, 256
    grid = (triton.cdiv(positions.numel(), block),)
    arguments = (table[FIRST_WORD], table[WORDS], table.shape[1], positions, positions.numel())
    set_bits[grid](*arguments, STEPS=every.steps, B=block)


def _narrow(every: _List, lo: int, hi: int, rank: int, signed: bool) -> tuple[int, int]:
    """The rank-th largest key in [lo, hi), and its rank among the keys equal to it."""
    while hi - lo > 1:
        shift = max((hi - lo - 1).bit_length() - 11, 0)
        bounds = torch.tensor([lo, hi, shift], dtype=torch.int64).to(every.device)
        bins = torch.zeros(BINS, dtype=torch.int64, device=every.device)
        for table, count, tiles, meta in every.groups:
            grid = (triton.cdiv(tiles, TILES_PER_HISTOGRAM),)
            more = {"SIGNED": signed, "TILES": TILES_PER_HISTOGRAM, "BINS": BINS, "num_warps": 8}
            histogram[grid](table, count, tiles, bounds, bins, **more, **meta)
        through = bins.flip(0).cumsum(0)
        bin_from_top = int((through < rank).sum())
        if bin_from_top:
            rank -= int(through[bin_from_top - 1])
        lo += (BINS - 1 - bin_from_top) << shift
        hi = min(hi, lo + (1 << shift))
    return lo, rank


def _number(key: int, wide: bool) -> float:
    dtypes = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    number = torch.tensor(abs(key), dtype=dtypes[0]).view(dtypes[1]).item()
    return -number if key < 0 else number


def _cases():
    table = {"table": "*i64", "count": "i32"}
    cases = []
    for kind, name in ((0, "fp32"), (3, "bf16"), (2, "fp16"), (1, "fp64")):
        for flat in (True, False):
            meta = {"KIND": kind, "WIDE": kind == 1, "SIGNED": flat, "FLAT": flat, "STEPS": 8, "R": R}
            label = f"{name} {'flat' if flat else 'rows'}"
            more = {"num_warps": 8, "divisible_by_16": ("table", "bounds", "counters", "pool", "bins", "tile_inside")}
            signature = table | {"bounds": "*i64", "counters": "*i64", "tile_inside": "*i32", "pool": "*i64"}
            signature |= {"capacity": "i64", "position_bits": "i32"}
            cases.append((f"mark {label}", mark, signature, meta, more))
            if kind > 1:  # the others read weights the same way
                continue
            signature = table | {"tiles": "i32", "bounds": "*i64", "bins": "*i64"}
            deep = meta | {"TILES": TILES_PER_HISTOGRAM, "BINS": BINS}
            cases.append((f"histogram {label}", histogram, signature, deep, more))
            signature = table | {"bounds": "*i64", "before": "*i64", "wanted": "i64"}
            cases.append((f"set_ties {label}", set_ties, signature, meta, more))
        signature = table | {"index": "*i64", "samples": "i32", "keys": "*i64" if kind == 1 else "*i32"}
        meta = {"KIND": kind, "WIDE": kind == 1, "SIGNED": True, "STEPS": 8, "B": SAMPLES_PER_PROGRAM}
        cases.append((f"sample {name}", sample, signature, meta, {}))
    signature = {"first_words": "*i64", "addresses": "*i64", "count": "i32", "positions": "*i64", "n": "i32"}
    cases.append(("set_bits", set_bits, signature, {"STEPS": 8, "B": 256}, {}))
    result = []
    for name, fn, signature, meta, more in cases:
        aligned = tuple(a for a in more.get("divisible_by_16", ()) if a in signature)
        result.append(AotCase(name, fn, signature, meta, num_warps=more.get("num_warps", 4), divisible_by_16=aligned))
    return result


AOT_CASES = _cases()
