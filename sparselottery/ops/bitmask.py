"""Masks as bits: pack, unpack, count, Hamming distance, apply to weights in place.

Words are int32 `[rows, ceil(columns / 32)]` (see `reference`). Backends: reference, cpu (csrc/cpu/bitmask.cpp), cuda.
"""

import torch
from torch import Tensor

from .. import _ext
from .._ext import extension
from . import reference
from .library import LIBRARY
from .reference import rows_columns, words_shape

__all__ = ["apply_", "check_words", "count", "full_words", "hamming", "pack", "rows_columns", "unpack", "words_shape"]

LIBRARY.define("bitmask_pack(Tensor dense) -> Tensor")
LIBRARY.define("bitmask_unpack(Tensor words, SymInt[] shape) -> Tensor")
LIBRARY.define("bitmask_count(Tensor words) -> Tensor")
LIBRARY.define("bitmask_hamming(Tensor a, Tensor b) -> Tensor")
LIBRARY.define("bitmask_apply_(Tensor(a!) tensor, Tensor words) -> ()")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pack(dense: Tensor) -> Tensor:
    """bool `[*]` -> int32 words.

    Raises:
        TypeError: `dense` is not a bool tensor.
    """
    _check_tensor("dense", dense)
    if dense.dtype != torch.bool:
        raise TypeError(f"dense: expected torch.bool, got {dense.dtype}")
    return torch.ops.sparselottery.bitmask_pack(dense)


def unpack(words: Tensor, shape) -> Tensor:
    """int32 words -> bool of `shape`.

    Raises:
        TypeError, ValueError: `words` are not the words of a tensor of `shape`, or that is none.
    """
    shape = check_shape(shape)
    check_words(words, shape)
    return torch.ops.sparselottery.bitmask_unpack(words, shape)


def count(words: Tensor) -> int:
    """How many bits are set."""
    _check_int32("words", words)
    return int(torch.ops.sparselottery.bitmask_count(words))


def hamming(a: Tensor, b: Tensor) -> int:
    """In how many bits two masks of one shape differ.

    Raises:
        TypeError, ValueError: not int32, or of different shapes or devices.
    """
    _check_int32("a", a)
    _check_int32("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected {list(a.shape)} like a, got {list(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"b: expected device {a.device} like a, got {b.device}")
    return int(torch.ops.sparselottery.bitmask_hamming(a, b))


@torch.no_grad()
def apply_(tensor: Tensor, words: Tensor) -> Tensor:
    """Write +0 into `tensor` `[*]` wherever the mask is 0, in place, also over NaN and inf. Returns `tensor`.

    Any strides. Not a step that autograd records: a weight that requires a gradient keeps it.

    Raises:
        TypeError: `tensor` is not float32, float64, float16 or bfloat16.
        ValueError: `words` do not fit its shape or device.
    """
    _check_tensor("tensor", tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"tensor: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")
    check_words(words, tensor.shape)
    if words.device != tensor.device:
        raise ValueError(f"words: expected device {tensor.device} like tensor, got {words.device}")
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError("tensor: several of its elements share one place in memory (expanded); clone it first")
    torch.ops.sparselottery.bitmask_apply_(tensor, words)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)  # the kernel wrote behind autograd's back
    return tensor


def zero_dead_(tensor: Tensor, words: Tensor) -> Tensor:
    """`apply_` for inner loops: `words` are known to fit, and no graph holds `tensor`."""
    if tensor.is_cpu:
        _apply(tensor, words)
    else:
        torch.ops.sparselottery.bitmask_apply_(tensor, words)
    return tensor


def full_words(shape, value: bool, device=None) -> Tensor:
    """Words that keep everything (`value` True) or nothing."""
    words = torch.full(words_shape(shape), -1 if value else 0, dtype=torch.int32, device=device)
    tail = rows_columns(shape)[1] % 32
    if value and tail:
        words[:, -1] = (1 << tail) - 1
    return words


def check_shape(shape) -> tuple[int, ...]:
    """A shape as a tuple of sizes; a TypeError that names the argument where it is something else."""
    try:
        shape = tuple(shape)
    except TypeError:
        raise TypeError(f"shape: expected sizes, got {type(shape).__name__}") from None
    for size in shape:
        if not hasattr(size, "__index__"):  # numpy's integers too, and sizes that torch.compile has not fixed
            raise TypeError(f"shape: expected sizes, got {size!r}")
    return shape


def check_words(words: Tensor, shape, name: str = "words") -> None:
    """Raise unless `words` has the dtype and the shape of a mask of a tensor of `shape`."""
    _check_int32(name, words)
    if tuple(words.shape) != words_shape(shape):
        raise ValueError(
            f"{name}: expected int32 {list(words_shape(shape))} for shape {list(shape)}, got {list(words.shape)}"
        )


def _check_tensor(name, value):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check_int32(name, words):
    _check_tensor(name, words)
    if words.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32 words, got {words.dtype}")


# ---- implementations ----


def rows_and_strides(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of a tensor as the kernels want them: two dimensions or more, the first one the mask's rows."""
    sizes, strides = list(tensor.shape), list(tensor.stride())
    if tensor.ndim == 0:
        return [1, 1], [1, 1]
    return (sizes, strides) if tensor.ndim > 1 else ([1, *sizes], [0, *strides])


def _pack(dense):
    if dense.device.type != "cpu":
        return reference.bitmask_pack(dense)
    dense = dense.contiguous()  # a byte a weight; what is packed is nearly always fresh
    words = dense.new_empty(words_shape(dense.shape), dtype=torch.int32)
    extension().cpu_bitmask_pack(dense.data_ptr(), *rows_columns(dense.shape), words.data_ptr())
    return words


def _unpack(words, shape):
    if words.device.type != "cpu":
        return reference.bitmask_unpack(words, shape)
    words = words.contiguous()
    dense = words.new_empty(shape, dtype=torch.bool)
    extension().cpu_bitmask_unpack(words.data_ptr(), *rows_columns(shape), dense.data_ptr())
    return dense


def _count(words):
    if words.device.type != "cpu":
        return reference.bitmask_count(words)
    words = words.contiguous()
    return torch.tensor(extension().cpu_bitmask_count(words.data_ptr(), words.numel()))


def _hamming(a, b):
    if a.device.type != "cpu":
        return reference.bitmask_hamming(a, b)
    a, b = a.contiguous(), b.contiguous()
    return torch.tensor(extension().cpu_bitmask_hamming(a.data_ptr(), b.data_ptr(), a.numel()))


def _apply(tensor, words):
    if tensor.device.type != "cpu":
        reference.bitmask_apply_(tensor, words)
        return
    words = words.contiguous()
    extension().cpu_bitmask_apply(tensor.data_ptr(), tensor.element_size(), words.data_ptr(), *rows_and_strides(tensor))


LIBRARY.impl("bitmask_pack", _pack, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_unpack", _unpack, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_count", _count, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_hamming", _hamming, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_apply_", _apply, "CompositeExplicitAutograd")

# ---- CUDA kernels, where this build has them for the GPU; plain torch there otherwise (above) ----


def stream_of(tensor: Tensor) -> int:
    """The address of the current CUDA stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _pack_cuda(dense):
    if not _ext.has_cuda_kernels(dense):
        return _pack(dense)
    dense = dense.contiguous()
    words = dense.new_empty(words_shape(dense.shape), dtype=torch.int32)
    with torch.cuda.device_of(dense):
        extension().cuda_bitmask_pack(dense.data_ptr(), *rows_columns(dense.shape), words.data_ptr(), stream_of(dense))
    return words


def _unpack_cuda(words, shape):
    if not _ext.has_cuda_kernels(words):
        return _unpack(words, shape)
    words = words.contiguous()
    dense = words.new_empty(shape, dtype=torch.bool)
    with torch.cuda.device_of(words):
        extension().cuda_bitmask_unpack(words.data_ptr(), *rows_columns(shape), dense.data_ptr(), stream_of(words))
    return dense


def _count_cuda(words):
    if not _ext.has_cuda_kernels(words):
        return _count(words)
    words = words.contiguous()
    out = words.new_empty((), dtype=torch.int64)
    with torch.cuda.device_of(words):
        extension().cuda_bitmask_count(words.data_ptr(), words.numel(), out.data_ptr(), stream_of(words))
    return out


def _hamming_cuda(a, b):
    if not _ext.has_cuda_kernels(a):
        return _hamming(a, b)
    a, b = a.contiguous(), b.contiguous()
    out = a.new_empty((), dtype=torch.int64)
    with torch.cuda.device_of(a):
        extension().cuda_bitmask_hamming(a.data_ptr(), b.data_ptr(), a.numel(), out.data_ptr(), stream_of(a))
    return out


def _apply_cuda(tensor, words):
    if not _ext.has_cuda_kernels(tensor):
        return _apply(tensor, words)
    sizes, strides = rows_and_strides(tensor)
    if len(sizes) > 8:  # more than the kernel takes
        reference.bitmask_apply_(tensor, words)
        return
    words = words.contiguous()
    with torch.cuda.device_of(tensor):
        extension().cuda_bitmask_apply(
            tensor.data_ptr(), tensor.element_size(), words.data_ptr(), sizes, strides, stream_of(tensor)
        )


LIBRARY.impl("bitmask_pack", _pack_cuda, "CUDA")
LIBRARY.impl("bitmask_unpack", _unpack_cuda, "CUDA")
LIBRARY.impl("bitmask_count", _count_cuda, "CUDA")
LIBRARY.impl("bitmask_hamming", _hamming_cuda, "CUDA")
LIBRARY.impl("bitmask_apply_", _apply_cuda, "CUDA")


@torch.library.register_fake("sparselottery::bitmask_pack")
def _(dense):
    return dense.new_empty(words_shape(dense.shape), dtype=torch.int32)


@torch.library.register_fake("sparselottery::bitmask_unpack")
def _(words, shape):
    return words.new_empty(shape, dtype=torch.bool)


@torch.library.register_fake("sparselottery::bitmask_count")
def _(words):
    return words.new_empty((), dtype=torch.int64)


@torch.library.register_fake("sparselottery::bitmask_hamming")
def _(a, b):
    return a.new_empty((), dtype=torch.int64)


@torch.library.register_fake("sparselottery::bitmask_apply_")
def _(tensor, words):
    pass
