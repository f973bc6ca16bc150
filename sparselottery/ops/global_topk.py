"""Exactly `keep` survivors over a list of tensors, without concatenating them.

Ties go to the lowest flat index in list order, -0 equals +0, infinities are ordered, NaN raises. Backends: reference,
cpu (csrc/cpu/global_topk.cpp), cuda, triton.
"""

import dataclasses
import operator
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _ext, kernels, masks
from .._ext import DTYPE_CODES, extension
from . import bitmask, dispatch, reference
from .bitmask import rows_and_strides, words_shape
from .library import LIBRARY

# Returns the words and, as 0-d tensors on the device of the tensors (so that nothing has to wait for it), the float64
# key of the smallest survivor and the int64 index of the first tensor that holds a NaN (-1: none, else the words are
# garbage).
# `eligible` has one entry per tensor: its words, or None for all.
LIBRARY.define(
    "global_topk(Tensor[] tensors, int keep, Tensor?[] eligible, bool by_value) -> (Tensor[], Tensor, Tensor)"
)


def global_topk(
    tensors, keep: int, *, eligible=None, by: str = "magnitude", names=None
) -> "tuple[list[masks.Mask], float]":
    """Masks of exactly `keep` survivors over all tensors together.

    Args:
        tensors: floating-point tensors of any shapes and strides, on one device; float32, float16, bfloat16 and float64
            may be mixed and are compared exactly.
        keep: how many survive, 0 to the number of eligible weights.
        eligible: None, or one entry per tensor: a `Mask`, a bool tensor of its shape, or None for all. The others never
            survive.
        by: "magnitude" keeps the largest absolute values, "value" the largest values.
        names: one per tensor, for error messages.

    Returns:
        The masks and the threshold: the key of the smallest survivor (+inf when `keep` is 0).

    Raises:
        TypeError: not floating-point tensors, or eligible entries of another kind.
        ValueError: NaN in any tensor, eligible or not (the message names it); `keep` out of range; shapes or devices
            that differ.
    """
    tensors, names = _checked(tensors, names)
    if tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("global_topk reads the threshold, which a CUDA graph cannot: capture ops.global_topk.select")
    chosen = select(tensors, keep, eligible=eligible, by=by)
    # The only time that the host waits for the device.
    allowed, nan_tensor, bits = torch.stack(
        [chosen.allowed, chosen.nan_tensor, chosen.threshold.view(torch.int64)]
    ).tolist()
    if operator.index(keep) > allowed:
        raise ValueError(_keep_out_of_range(allowed, keep))
    if nan_tensor >= 0:
        raise ValueError(f"{names[nan_tensor]}: holds NaN, which has no rank")
    return chosen.masks, struct.unpack("d", struct.pack("q", bits))[0]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `select` chose, without having looked at it. The 0-d tensors lie on the device of the weights.

    Attributes:
        masks: garbage where `nan_tensor` is not -1 or more were to be kept than `allowed`.
        threshold: float64, the key of the smallest survivor (+inf when none was asked for).
        nan_tensor: int64, the first tensor that holds a NaN, or -1.
        allowed: int64, how many weights are eligible.
    """

    masks: "list[masks.Mask]"
    threshold: Tensor
    nan_tensor: Tensor
    allowed: Tensor


def select(tensors: list, keep: int, *, eligible=None, by: str = "magnitude") -> Selection:
    """`global_topk` without waiting for the device, so that it can be captured in a CUDA graph; its arguments.

    What only the weights can tell is not raised but returned: NaN, and (on a GPU with the CUDA kernels) too few eligible
    weights. Other backends count the eligible ones first, and may wait.

    Raises:
        TypeError, ValueError: an argument is wrong in a way that shows without looking at the weights.
    """
    tensors, _ = _checked(tensors, None)
    words, counts, most = _eligible_words(tensors, eligible)
    if isinstance(keep, bool):
        raise TypeError("keep: expected an int, got bool")
    try:
        keep = operator.index(keep)  # numpy's integers too
    except TypeError:
        raise TypeError(f"keep: expected an int, got {type(keep).__name__}") from None
    device = tensors[0].device if tensors else torch.device("cpu")
    if counts and (
        device.type == "cpu" or not 0 <= keep <= most
    ):  # no one has to wait for a CPU, or for a sure mistake
        most, counts = most - sum(size - int(count) for size, count in counts), []
    if not 0 <= keep <= most:
        raise ValueError(_keep_out_of_range(most, keep))
    if by not in ("magnitude", "value"):
        raise ValueError(f"by: expected 'magnitude' or 'value', got {by!r}")
    with torch.no_grad():
        kept, threshold, nan_tensor = torch.ops.sparselottery.global_topk(tensors, keep, words, by == "value")
        allowed = torch.full((), most - sum(size for size, _ in counts), dtype=torch.int64, device=device)
        if counts:
            allowed = allowed + torch.stack([count for _, count in counts]).sum()
    chosen = [masks.Mask._trusted(w, t.shape) for w, t in zip(kept, tensors, strict=True)]
    return Selection(chosen, threshold, nan_tensor, allowed)


def _checked(tensors, names) -> tuple[list, list]:
    """Lists of the tensors and of what messages call them; raises where the tensors cannot be ranked."""
    if isinstance(tensors, Tensor):
        raise TypeError("tensors: expected a list of tensors, got a tensor")
    tensors = _listed("tensors", "a list of tensors", tensors)
    names = [f"tensors[{i}]" for i in range(len(tensors))] if names is None else _listed("names", "a list", names)
    if len(names) != len(tensors):
        raise ValueError(f"names: expected {len(tensors)}, one per tensor, got {len(names)}")
    for name, t in zip(names, tensors, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got layout {t.layout}")
        if t.dtype not in bitmask.FLOATS:
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {t.dtype}")
        if t.device != tensors[0].device:
            raise ValueError(f"{name}: expected device {tensors[0].device} like the first tensor, got {t.device}")
    return tensors, names


def _keep_out_of_range(allowed, keep):
    return f"keep: expected 0 to {allowed} (the number of eligible weights), got {keep}"


def _listed(name, expected, values) -> list:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {type(values).__name__}")
    return list(values)


def _eligible_words(tensors, eligible) -> tuple[list, list, int]:
    """Per tensor its words or None; (weights, 0-d count of the eligible ones) of those with words; all weights."""
    most = sum(t.numel() for t in tensors)
    if eligible is None:
        return [None] * len(tensors), [], most
    if isinstance(eligible, Tensor):
        raise TypeError("eligible: expected None or a list with one entry per tensor, got a tensor")
    eligible = _listed("eligible", "None or a list with one entry per tensor", eligible)
    if len(eligible) != len(tensors):
        raise ValueError(f"eligible: expected {len(tensors)} entries, one per tensor, got {len(eligible)}")
    words, counts = [], []
    for i, (entry, t) in enumerate(zip(eligible, tensors, strict=True)):
        if entry is None:
            words.append(None)
            continue
        if not isinstance(entry, masks.Mask) and not (isinstance(entry, Tensor) and entry.dtype == torch.bool):
            got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f"eligible[{i}]: expected a Mask, a bool tensor or None, got {got}")
        if tuple(entry.shape) != tuple(t.shape):
            raise ValueError(f"eligible[{i}]: expected shape {list(t.shape)} like its tensor, got {list(entry.shape)}")
        if entry.device != t.device:
            raise ValueError(f"eligible[{i}]: expected device {t.device} like its tensor, got {entry.device}")
        words.append(entry.words if isinstance(entry, masks.Mask) else bitmask.pack(entry))
        counts.append((t.numel(), torch.ops.sparselottery.bitmask_count(words[-1])))
    return words, counts, most


# ---- implementations, with the op's signature ----


def _reference(tensors, keep, eligible, by_value):
    """Plain torch: any device, several copies of the weights."""
    dense = [
        torch.ones_like(t, dtype=torch.bool) if w is None else bitmask.unpack(w, t.shape)
        for w, t in zip(eligible, tensors, strict=True)
    ]
    nan_tensor = next((i for i, t in enumerate(tensors) if bool(t.isnan().any())), -1)
    kept, threshold = reference.global_topk(tensors, keep, dense, by_value)
    return [bitmask.pack(m) for m in kept], *_scalars(threshold, nan_tensor, tensors)


def _cpu(tensors, keep, eligible, by_value):
    kept = [t.new_empty(words_shape(t.shape), dtype=torch.int32) for t in tensors]
    held = [None if w is None else w.contiguous() for w in eligible]
    arguments = [
        (t.data_ptr(), DTYPE_CODES[t.dtype], *rows_and_strides(t), 0 if w is None else w.data_ptr(), k.data_ptr())
        for t, w, k in zip(tensors, held, kept, strict=True)
    ]
    nan_tensor, threshold = extension().cpu_global_topk(arguments, keep, by_value)
    return kept, *_scalars(threshold, nan_tensor, tensors)


def _scalars(threshold, nan_tensor, tensors):
    device = tensors[0].device if tensors else None
    threshold = torch.tensor(threshold, dtype=torch.float64, device=device)
    return threshold, torch.tensor(nan_tensor, dtype=torch.int64, device=device)


def _cuda(tensors, keep, eligible, by_value):
    """One pass of csrc/cuda/global_topk.cu; the host does not wait for the device."""
    first = tensors[0]
    kept = [t.new_empty(words_shape(t.shape), dtype=torch.int32) for t in tensors]
    held = [None if w is None else w.contiguous() for w in eligible]
    dense = [t.contiguous() for t in tensors]
    arguments = [
        (t.data_ptr(), DTYPE_CODES[t.dtype], *rows_and_strides(t), 0 if w is None else w.data_ptr(), k.data_ptr())
        for t, w, k in zip(dense, held, kept, strict=True)
    ]
    with torch.cuda.device_of(first):
        library = extension()
        scratch = first.new_empty(library.cuda_global_topk_scratch(arguments), dtype=torch.uint8)
        result = first.new_empty(2, dtype=torch.int64)
        library.cuda_global_topk(
            arguments, keep, by_value, scratch.data_ptr(), result.data_ptr(), bitmask.stream_of(first)
        )
    return kept, result.view(torch.float64)[1].clone(), result[0].clone()


def _triton(tensors, keep, eligible, by_value):
    from ..kernels import global_topk as kernel

    return kernel.select(tensors, keep, eligible, by_value)


def backend_of(device: torch.device) -> str:
    """Which backend ranks tensors of this device: "cpu", "cuda", "triton" or "reference".

    On a GPU the first of CUDA C++, Triton and plain torch that is there; SPARSELOTTERY_BACKEND may name another. The name
    of a backend that is not there, or that this op or device lacks (dense), is ignored.

    Raises:
        ValueError: SPARSELOTTERY_BACKEND names no backend at all.
    """
    forced = dispatch.forced()
    if device.type != "cuda":
        return "cpu" if device.type == "cpu" else "reference"
    there = {"cuda": _ext.why_no_cuda(device) is None, "triton": kernels.AVAILABLE, "reference": True}
    if there.get(forced):
        return forced
    return next(name for name, is_there in there.items() if is_there)


_BACKENDS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference}


def _dispatch(tensors, keep, eligible, by_value):
    device = tensors[0].device if tensors else torch.device("cpu")
    return _BACKENDS[backend_of(device)](tensors, keep, eligible, by_value)


LIBRARY.impl("global_topk", _dispatch, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::global_topk")
def _(tensors, keep, eligible, by_value):
    like = tensors[0] if tensors else torch.empty(0)
    words = [t.new_empty(words_shape(t.shape), dtype=torch.int32) for t in tensors]
    return words, like.new_empty((), dtype=torch.float64), like.new_empty((), dtype=torch.int64)
