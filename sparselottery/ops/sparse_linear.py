"""float32 linear layers of high sparsity on a GPU: forward and dX over the survivors only (csrc/cuda/sparse_linear.cu).

A candidate of masked_linear's dispatcher, where the extension was built with nvcc. The survivors' places are derived from the
mask once and kept with it; their values are read from the weight on each call. dW is the library's, masked.

Products run in the order of the columns without atomic additions: results repeat bit for bit.
"""

import torch
from torch import Tensor

from .. import _ext
from . import bitmask, derived

CHUNK = 64  # kSparseChunk
DENSEST = 0.25  # above, the kernel's shared memory takes longer than the dense product's arithmetic
_MOST = 2**31  # survivors that `starts` can number


def takes(t: Tensor, density: float) -> bool:
    """Whether the kernel can run a product of `t` with a mask of this density, and may win."""
    return t.is_cuda and t.dtype is torch.float32 and density <= DENSEST and _ext.has_cuda_kernels(t)


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


def forward(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    """x `[*, in]`, weight `[out, in]`, bias `[out]` or None -> `[*, out]`."""
    return _product(x, weight, words, bias, False)


def backward_input(grad: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    """grad `[*, out]` -> dX `[*, in]`."""
    return _product(grad, weight, words, None, True)
