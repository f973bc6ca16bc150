"""Linear layers of high sparsity on a GPU: forward and dX in float32 over the survivors only (csrc/cuda/sparse_linear.cu),
in 16 bits on the tensor cores over the columns that 16 rows have between them (csrc/cuda/sparse_linear_half.cu).

A candidate of masked_linear's dispatcher, where the extension was built with nvcc. The survivors' places are derived from the
mask once and kept with it; their values are read from the weight on each call. dW is the library's, masked.

Products run in an order that the mask alone decides, without atomic additions: results repeat bit for bit. In 16 bits a row
multiplies the columns of its 15 neighbours by 0, so inf or NaN in x may reach it from there, as in a dense product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ext
from . import bitmask, derived

CHUNK = 64  # kSparseChunk
HALF_CHUNK, SIDE = 192, 16  # kHalfChunk, kHalfSide
DENSEST = 0.25  # above, the kernel's shared memory takes longer than the dense product's arithmetic
DENSEST_HALF = 0.055  # with dispatch's bucket of 5 % (up to 0.0573); above, 16 rows have most columns between them
_WORTH_SORTING = 0.95  # groups left by an order of rows that is worth scattered writes of the result
_MOST = 2**31  # survivors that `starts` can number
_HALVES = (torch.bfloat16, torch.float16)


def takes(t: Tensor, density: float) -> bool:
    """Whether the kernel can run a product of `t` with a mask of this density, and may win."""
    densest = DENSEST if t.dtype is torch.float32 else DENSEST_HALF if t.dtype in _HALVES else -1.0
    return t.is_cuda and density <= densest and _ext.has_cuda_kernels(t)


def index(words: Tensor, shape: tuple[int, int], transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(places in the weight int64 [survivors], entries int32 [survivors, 2], starts int32), of W∘M or of its transpose.

    An entry is a column within its chunk of 64 columns, and room for a value. Made once per mask: it waits for the device.
    """
    kept = derived.of(words)
    key = ("sparse_linear", tuple(shape), transposed)
    if key not in kept:
        kept[key] = _make_index(words, tuple(shape), transposed)
    return kept[key]


def _make_index(words, shape, transposed):
    keep = bitmask.unpack(words, shape)
    rows, columns = (keep.t() if transposed else keep).nonzero(as_tuple=True)
    if len(rows) >= _MOST:
        raise ValueError(f"words: expected a mask of fewer than 2^31 survivors, got {len(rows)}")
    height, width = shape[::-1] if transposed else shape
    places = columns * shape[1] + rows if transposed else rows * shape[1] + columns
    entries = torch.zeros(len(rows), 2, dtype=torch.int32, device=words.device)
    entries[:, 0] = columns % CHUNK
    chunks = -(-width // CHUNK)
    counts = torch.bincount(rows * chunks + columns // CHUNK, minlength=height * chunks)
    starts = torch.zeros(height * chunks + 1, dtype=torch.int32, device=words.device)
    starts[1:] = counts.cumsum(0)
    return places, entries, starts


def _product(x, weight, words, bias, transposed):
    """x `[*, columns]` -> `[*, rows]` of S xᵀ, where S is W∘M or its transpose."""
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    batch = x.shape[:-1].numel()
    places, entries, starts = index(words, weight.shape, transposed)
    entries = entries.clone()  # another call may be running on another stream
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    upright = x.reshape(batch, columns).t().contiguous()
    target = torch.empty(rows, batch, dtype=torch.float32, device=x.device)
    extension, stream = _ext.extension(), bitmask.stream_of(x)
    with torch.cuda.device_of(x):
        extension.cuda_sparse_linear_fill(weight.data_ptr(), places.data_ptr(), len(places), entries.data_ptr(), stream)
        extension.cuda_sparse_linear_product(
            entries.data_ptr(), starts.data_ptr(), upright.data_ptr(), 0 if bias is None else bias.data_ptr(), rows,
            columns, batch, target.data_ptr(), stream,
        )  # fmt: skip
    return target.t().contiguous().view(*x.shape[:-1], rows)


class HalfIndex(NamedTuple):
    """Groups of 16 rows by 16 columns (csrc/sparse_linear.h says how they lie), all int32."""

    columns: Tensor  # [groups, 16], -1: none
    strips: Tensor  # [groups]
    order: Tensor  # [16 * strips], -1: none
    starts: Tensor  # [strips * chunks + 1]


def half_index(words: Tensor, shape: tuple[int, int], transposed: bool) -> HalfIndex:
    """The groups of W∘M or of its transpose, made once per mask: it waits for the device."""
    kept = derived.of(words)
    key = ("sparse_linear_half", tuple(shape), transposed)
    if key not in kept:
        keep = bitmask.unpack(words, shape)
        keep = keep.t() if transposed else keep
        plain, alike = (_groups(keep, order) for order in (None, _alike(keep)))
        kept[key] = alike if len(alike.strips) <= _WORTH_SORTING * len(plain.strips) else plain
    return kept[key]


def _alike(keep):
    """Rows in an order that puts those with common columns side by side: sorted by two min-hashes of their columns (two rows
    agree in one with a probability of their common columns over those that either has)."""
    g = torch.Generator().manual_seed(0)
    width = keep.shape[1]
    order = torch.arange(len(keep), device=keep.device)
    for _ in range(2):
        hashes = torch.randperm(width, generator=g).to(torch.int32).to(keep.device)
        least = torch.where(keep, hashes, width).amin(1) if width else order
        order = order[least[order].argsort(stable=True)]
    return order


def _groups(keep, order):
    height, width = keep.shape
    strips, chunks = -(-height // SIDE), -(-width // HALF_CHUNK)
    padded = torch.full((strips * SIDE,), -1, dtype=torch.int32, device=keep.device)
    padded[:height] = torch.arange(height, device=keep.device) if order is None else order
    union = torch.zeros(strips * SIDE, width, dtype=torch.bool, device=keep.device)
    union[:height] = keep if order is None else keep[order]
    strip, column = union.view(strips, SIDE, width).any(1).nonzero(as_tuple=True)
    cell = strip * chunks + column // HALF_CHUNK
    # Eight columns that ldmatrix reads at once lie in different banks where they differ modulo 8: within a cell come the
    # first columns of each residue, then the second ones, ...
    residue = cell * 8 + column % 8
    sizes = torch.bincount(residue, minlength=strips * chunks * 8)
    by_residue = residue.argsort(stable=True)
    rank = torch.empty_like(residue)
    rank[by_residue] = _counting(residue[by_residue], sizes)
    turn = ((cell * HALF_CHUNK + rank) * 8 + column % 8).argsort()
    cell, column = cell[turn], column[turn]
    counts = torch.bincount(cell, minlength=strips * chunks)
    groups = (counts + SIDE - 1) // SIDE
    starts = torch.zeros(strips * chunks + 1, dtype=torch.int64, device=keep.device)
    starts[1:] = groups.cumsum(0)
    total = int(starts[-1])
    if total >= _MOST // SIDE:
        raise ValueError(f"words: expected a mask of fewer than 2^27 groups of 16 by 16 weights, got {total}")
    columns = torch.full((total * SIDE,), -1, dtype=torch.int32, device=keep.device)
    columns[starts[cell] * SIDE + _counting(cell, counts)] = column.to(torch.int32)
    of = torch.arange(strips * chunks, device=keep.device) // max(chunks, 1)
    return HalfIndex(
        columns.view(total, SIDE), of.repeat_interleave(groups).to(torch.int32), padded, starts.to(torch.int32)
    )


def _counting(sorted_cells, counts):
    """0, 1, 2, ... within each run of equal numbers."""
    first = counts.cumsum(0) - counts
    return torch.arange(len(sorted_cells), device=counts.device) - first[sorted_cells]


def _half_product(x, weight, words, bias, transposed):
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    batch = x.shape[:-1].numel()
    index = half_index(words, weight.shape, transposed)
    weight, words, bias = weight.contiguous(), words.contiguous(), None if bias is None else bias.contiguous()
    padded = -(-batch // 8) * 8  # so that every row of `upright` can be read by 16 bytes
    upright = (x.new_empty if padded == batch else x.new_zeros)(columns, padded)
    upright[:, :batch] = x.reshape(batch, columns).t()
    values = x.new_empty(len(index.strips), SIDE * SIDE)
    y = x.new_empty(*x.shape[:-1], rows)
    extension, stream = _ext.extension(), bitmask.stream_of(x)
    where = (*(t.data_ptr() for t in index), len(index.strips))
    with torch.cuda.device_of(x):
        extension.cuda_sparse_linear_half_fill(
            weight.data_ptr(), words.data_ptr(), *where, weight.shape[1], transposed, values.data_ptr(), stream
        )
        extension.cuda_sparse_linear_half_product(
            _ext.DTYPE_CODES[x.dtype], *where, values.data_ptr(), upright.data_ptr(),
            0 if bias is None else bias.data_ptr(), rows, columns, batch, padded, y.data_ptr(), stream,
        )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    """x `[*, in]`, weight `[out, in]`, bias `[out]` or None -> `[*, out]`."""
    product = _half_product if x.dtype in _HALVES else _product
    return product(x, weight, words, bias, False)


def backward_input(grad: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    """grad `[*, out]` -> dX `[*, in]`."""
    product = _half_product if grad.dtype in _HALVES else _product
    return product(grad, weight, words, None, True)
