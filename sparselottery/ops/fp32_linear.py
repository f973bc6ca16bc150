"""float32 linear layers through the tensor cores of a GPU, at float32 accuracy: a candidate of masked_linear's dispatcher.

Every factor is taken apart into three bfloat16 numbers (kernels/fp32_linear.py, reference.bf16x6_matmul). Against float64 the
error is no larger than that of a float32 product (tests/test_fp32_linear.py), but results are not those of the float32
library bit for bit, and where x, weight or dY holds inf, what depends on it is NaN. So nobody gets it who did not ask.
Convolutions never use it: they have cuDNN's float32, or its TF32 where torch allows that.
"""

import os

import torch
from torch import Tensor

from .. import kernels
from . import dispatch

NAME = "bf16x6"  # what dispatch and `explain` call it

_allowed = os.environ.get("SPARSELOTTERY_FP32_EMULATION", "") not in ("", "0")


def allow_fp32_emulation(allowed: bool = True) -> None:
    """Let masked linear layers of float32 on a GPU use bfloat16 tensor cores where that is measured faster, or stop it.

    Products keep float32's accuracy (error against float64 no larger than a float32 product's), but not its bits: off by default.
    The environment variable SPARSELOTTERY_FP32_EMULATION=1 sets it at the start. Holds for the process. Nothing changes where
    torch may use TF32 (torch.backends.cuda.matmul.allow_tf32), which is faster and less accurate, on a CPU, or for convolutions.

    Raises:
        TypeError: `allowed` is not a bool.
    """
    global _allowed
    if not isinstance(allowed, bool):
        raise TypeError(f"allowed: expected True or False, got {allowed!r}")
    _allowed = allowed
    dispatch.changed()


def takes(t: Tensor) -> bool:
    """Whether a product of `t` may be computed this way."""
    if not _allowed or not t.is_cuda or t.dtype is not torch.float32:
        return False
    return not torch.backends.cuda.matmul.allow_tf32 and kernels.AVAILABLE


def _module():
    from ..kernels import fp32_linear

    return fp32_linear


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `[*, in]`, weight `[out, in]`, bias `[out]` or None -> `[*, out]`."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return _module().forward(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def backward(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """grad `[*, out]` -> (dX `[*, in]`, dW `[out, in]`); None for the gradient whose other factor, weight or x, is None."""
    lead = grad.shape[:-1]
    rows = None if x is None else x.reshape(lead.numel(), x.shape[-1])
    dx, dw = _module().backward(grad.reshape(lead.numel(), grad.shape[-1]), rows, weight)
    return None if dx is None else dx.view(*lead, dx.shape[-1]), dw
