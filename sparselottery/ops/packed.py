"""Packed parameters: the survivors' values as one vector, the dense weight only while somebody computes with it.

`values` `[count]` holds the weights that a mask keeps, in the row-major order of the mask; `expand` and `gather` go there
and back, and are each other's gradient. Layers that compute with values: packed_layers.py. Backends: cpu
(csrc/cpu/packed.cpp), cuda (csrc/cuda/packed.cu), plain torch elsewhere.
"""

import math

import torch
from torch import Tensor

from .. import _ext
from .._ext import extension
from . import bitmask, derived, reference
from .library import LIBRARY, transformed

LIBRARY.define("packed_expand(Tensor values, Tensor words, SymInt[] shape) -> Tensor")
LIBRARY.define("packed_gather(Tensor dense, Tensor words, SymInt count) -> Tensor")


# ---- expand and gather ----


def _expand(values, words, shape):
    if values.device.type != "cpu":
        return reference.packed_expand(values, words, shape)
    values, words = values.contiguous(), words.contiguous()
    dense = values.new_empty(shape)
    rows, columns = bitmask.rows_columns(shape)
    extension().cpu_packed_expand(
        values.data_ptr(), values.numel(), values.element_size(), words.data_ptr(), rows, columns, dense.data_ptr()
    )
    return dense


def _gather(dense, words, count):
    if dense.device.type != "cpu":
        return _checked(reference.packed_gather(dense, words), count)
    words = words.contiguous()
    values = dense.new_empty(count)
    extension().cpu_packed_gather(
        dense.data_ptr(),
        dense.element_size(),
        words.data_ptr(),
        *bitmask.rows_and_strides(dense),
        values.data_ptr(),
        count,
    )
    return values


def _checked(values, count):
    if values.numel() != count:
        raise ValueError(f"packed: the mask keeps {values.numel()} weights, got {count} values")
    return values


def _offsets(words):
    """Where the survivors of every 32 words begin (int64 on the words' device), and how many there are (int).

    Kept with the mask: counting waits for the device, which a step of training must not.
    """
    kept = derived.of(words)
    if "packed" not in kept:
        tiles = -(-words.numel() // 32)
        offsets = words.new_zeros(tiles + 1, dtype=torch.int64)
        with torch.cuda.device_of(words):
            extension().cuda_packed_counts(
                words.data_ptr(), words.numel(), offsets[1:].data_ptr(), bitmask.stream_of(words)
            )
        offsets = offsets.cumsum(0)
        kept["packed"] = offsets, int(offsets[-1])
    return kept["packed"]


def _expand_cuda(values, words, shape):
    if not _ext.has_cuda_kernels(values):
        return _expand(values, words, shape)
    values, words = values.contiguous(), words.contiguous()
    offsets, count = _offsets(words)
    check_count(values.numel(), count)
    dense = values.new_empty(shape)
    with torch.cuda.device_of(values):
        extension().cuda_packed_expand(
            values.data_ptr(),
            count,
            values.element_size(),
            words.data_ptr(),
            offsets.data_ptr(),
            *bitmask.rows_columns(shape),
            dense.data_ptr(),
            bitmask.stream_of(values),
        )
    return dense


def _gather_cuda(dense, words, count):
    if not _ext.has_cuda_kernels(dense):
        return _gather(dense, words, count)
    sizes, strides = bitmask.rows_and_strides(dense)
    if len(sizes) > 8:  # more than the kernel takes
        return _checked(reference.packed_gather(dense, words), count)
    words = words.contiguous()
    offsets, kept = _offsets(words)
    check_count(count, kept)
    values = dense.new_empty(count)
    with torch.cuda.device_of(dense):
        extension().cuda_packed_gather(
            dense.data_ptr(),
            dense.element_size(),
            words.data_ptr(),
            offsets.data_ptr(),
            sizes,
            strides,
            values.data_ptr(),
            count,
            bitmask.stream_of(dense),
        )
    return values


def check_count(got, kept):
    if got != kept:
        raise ValueError(f"packed: the mask keeps {kept} weights, got {got} values")


LIBRARY.impl("packed_expand", _expand, "CompositeExplicitAutograd")
LIBRARY.impl("packed_gather", _gather, "CompositeExplicitAutograd")
LIBRARY.impl("packed_expand", _expand_cuda, "CUDA")
LIBRARY.impl("packed_gather", _gather_cuda, "CUDA")


@torch.library.register_fake("sparselottery::packed_expand")
def _(values, words, shape):
    return values.new_empty(shape)


@torch.library.register_fake("sparselottery::packed_gather")
def _(dense, words, count):
    return dense.new_empty(count)


class _Expand(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values, words, shape):
        return torch.ops.sparselottery.packed_expand(values, words, shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, words, _ = inputs
        ctx.count = values.numel()
        ctx.save_for_backward(words)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.saved_tensors[0], ctx.count), None, None


class _Gather(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dense, words, count):
        return torch.ops.sparselottery.packed_gather(dense, words, count)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dense, words, _ = inputs
        ctx.shape = tuple(dense.shape)
        ctx.save_for_backward(words)

    @staticmethod
    def backward(ctx, grad):
        return _Expand.apply(grad, ctx.saved_tensors[0], ctx.shape), None, None


def expand(values: Tensor, words: Tensor, shape) -> Tensor:
    """The dense tensor `[*shape]` whose survivors are `values`; +0 wherever the mask is 0.

    Args:
        values: `[count]`, float32, float64, float16 or bfloat16, in the row-major order of the mask.
        words: int32 words of a mask of `shape` that keeps `count` weights.

    Returns:
        A fresh contiguous tensor. Its gradient, gathered at the survivors, is that of `values`. Differentiable twice,
        in forward mode, and under `torch.func`'s transforms.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    shape = bitmask.check_shape(shape)
    check_values(values, words, shape)
    if transformed():
        return plain_expand(values, words, shape)
    if torch.is_grad_enabled() and values.requires_grad:
        return _Expand.apply(values, words, shape)
    return torch.ops.sparselottery.packed_expand(values, words, shape)


def gather(dense: Tensor, words: Tensor, count: int | None = None) -> Tensor:
    """The survivors of a dense tensor `[*]`, any strides: values `[count]` in the row-major order of the mask.

    Args:
        words: int32 words of a mask of the tensor's shape.
        count: how many it keeps; None counts, which on a GPU waits for the device.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense: expected a tensor, got {type(dense).__name__}")
    if dense.dtype not in bitmask.FLOATS:
        raise TypeError(f"dense: expected float32, float64, float16 or bfloat16, got {dense.dtype}")
    if dense.layout is not torch.strided:
        raise ValueError(f"dense: expected a dense tensor, got layout {dense.layout}")
    bitmask.check_words(words, dense.shape)
    if words.device != dense.device:
        raise ValueError(f"words: expected device {dense.device} like dense, got {words.device}")
    if count is None:
        count = bitmask.count(words)
    elif not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"count: expected an int or None, got {type(count).__name__}")
    elif count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    if transformed():
        return dense.reshape(-1)[_places(words, dense.shape)]
    if torch.is_grad_enabled() and dense.requires_grad:
        return _Gather.apply(dense, words, count)
    return torch.ops.sparselottery.packed_gather(dense, words, count)


def _places(words, shape):
    """int64: the flat indices of the survivors."""
    return bitmask.unpack(words, shape).flatten().nonzero().squeeze(1)


def plain_expand(values, words, shape):
    """`expand` in operations that every transform of torch.func knows."""
    dense = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    return dense.index_copy(0, _places(words, shape), values).view(tuple(shape))


def check_values(values, words, shape):
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a tensor, got {type(values).__name__}")
    if values.dtype not in bitmask.FLOATS:
        raise TypeError(f"values: expected float32, float64, float16 or bfloat16, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"values: expected [count], got {list(values.shape)}")
    bitmask.check_words(words, shape)
    if words.device != values.device:
        raise ValueError(f"words: expected device {values.device} like values, got {words.device}")
