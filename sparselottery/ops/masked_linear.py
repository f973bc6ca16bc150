"""Masked linear layer as an op: y = x (W∘M)ᵀ + b, with dX = dY (W∘M), dW∘M and db.

Source: the subnetwork f(x; m∘θ) of Frankle & Carbin 2019, section 1. Backends: reference, dense (the library's matmul, the
mask applied to dW in place) and those of `candidates` below, chosen per call by `dispatch`.

A weight off the mask counts as +0 whatever it holds, NaN and inf too. Where x or dY holds inf or NaN, a sparse backend leaves
out the products with dead weights that a dense one turns into NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch, reference
from .library import LIBRARY

OP = "masked_linear"

LIBRARY.define("masked_linear(Tensor x, Tensor weight, Tensor words, Tensor? bias, bool premasked) -> Tensor")
LIBRARY.define(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, bool premasked, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)"
)


# ---- dense: the library's matmul ----


def _masked(weight, words, premasked):
    return weight if premasked else reference.bitmask_apply_(weight.clone(), words)


def _dense(x, weight, words, bias, premasked):
    return F.linear(x, _masked(weight, words, premasked), bias)


def _dense_backward(grad, x, weight, words, premasked, output_mask):
    dx = grad @ _masked(weight, words, premasked) if output_mask[0] else _none(grad)
    dw = _none(grad)
    if output_mask[1]:
        dw = reference.bitmask_apply_(_rows(grad).t() @ _rows(x), words)
    return dx, dw, _rows(grad).sum(0) if output_mask[2] else _none(grad)


def _rows(t):
    """`[*, n]` -> `[rows, n]`; spelled out because reshape(-1, 0) is ambiguous."""
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _none(like):
    """What an undefined gradient is in the op's schema: a tensor without elements."""
    return like.new_empty(0)


# ---- the ops ----


def _reference_backward(grad, x, weight, words, output_mask):
    gradients = reference.masked_linear_backward(grad, x, weight, words)
    return tuple(g if wanted else _none(grad) for g, wanted in zip(gradients, output_mask, strict=True))


def _forward(x, weight, words, bias, premasked):
    candidates = {
        "dense": lambda: _dense(x, weight, words, bias, premasked),
        "reference": lambda: reference.masked_linear(x, weight, words, bias),
    }
    return candidates[dispatch.choose(OP, ("forward", tuple(weight.shape)), candidates, rule=lambda: "dense")]()


def _backward(grad, x, weight, words, premasked, output_mask):
    candidates = {
        "dense": lambda: _dense_backward(grad, x, weight, words, premasked, output_mask),
        "reference": lambda: _reference_backward(grad, x, weight, words, output_mask),
    }
    return candidates[dispatch.choose(OP, ("backward", tuple(weight.shape)), candidates, rule=lambda: "dense")]()


LIBRARY.impl("masked_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::masked_linear")
def _(x, weight, words, bias, premasked):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("sparselottery::masked_linear_backward")
def _(grad, x, weight, words, premasked, output_mask):
    shapes = ((*grad.shape[:-1], weight.shape[1]), weight.shape, (weight.shape[0],))
    return tuple(grad.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, output_mask, strict=True))


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, words, bias, premasked):
        return torch.ops.sparselottery.masked_linear(x, weight, words, bias, premasked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, words, bias, ctx.premasked = inputs
        # As F.linear does, keep x only where dW will be asked for.
        ctx.save_for_backward(x if weight.requires_grad else x.new_empty(0), weight, words)

    @staticmethod
    def backward(ctx, grad):
        x, weight, words = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            dx, dw, db = _differentiable_backward(grad, x, weight, words, wanted)
        else:
            gradients = torch.ops.sparselottery.masked_linear_backward(grad, x, weight, words, ctx.premasked, wanted)
            dx, dw, db = (g if asked else None for g, asked in zip(gradients, wanted, strict=True))
        return dx, dw, None, db, None


def _differentiable_backward(grad, x, weight, words, wanted):
    keep = reference.bitmask_unpack(words, weight.shape)
    dx = grad @ torch.where(keep, weight, 0) if wanted[0] else None
    dw = torch.where(keep, _rows(grad).t() @ _rows(x), 0) if wanted[1] else None
    return dx, dw, _rows(grad).sum(0) if wanted[2] else None


def masked_linear(
    x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None = None, *, premasked: bool = False
) -> Tensor:
    """Apply a linear layer whose weight is masked by bits.

    Args:
        x: `[*, in_features]`, floating point; any strides.
        weight: `[out_features, in_features]`, the dtype and device of `x` (under autocast: any that F.linear takes).
        words: int32 `[out_features, ceil(in_features / 32)]`; bit i of word w keeps column 32 w + i.
        bias: `[out_features]` or None.
        premasked: the caller's promise that `weight` is 0 wherever the mask is; it spares the dense backend a masked copy.

    Returns:
        `[*, out_features]`. The gradient of `weight` is zero wherever the mask is. Differentiable twice.

    Raises:
        TypeError: a dtype that is not floating point, or that differs between arguments.
        ValueError: a shape or device that does not fit; the message names the argument.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, words, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _MaskedLinear.apply(x, weight, words, bias, premasked)
    return torch.ops.sparselottery.masked_linear(x, weight, words, bias, premasked)


def _autocast(*tensors):
    """What autocast does to F.linear's arguments: floating-point ones to its dtype, float64 untouched."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _check(x, weight, words, bias):
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point dtype, got {dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got {list(weight.shape)}")
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x: expected [*, {columns}] for weight {[rows, columns]}, got {list(x.shape)}")
    expected = (rows, (columns + 31) // 32)
    if words.dtype is not torch.int32 or words.shape != expected:
        raise ValueError(f"words: expected int32 {list(expected)}, got {words.dtype} {list(words.shape)}")
    if weight.dtype is not dtype:
        raise TypeError(f"weight: expected {dtype} like x, got {weight.dtype}")
    if bias is not None:
        if bias.dtype is not dtype:
            raise TypeError(f"bias: expected {dtype} like x, got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"bias: expected [{rows}], got {list(bias.shape)}")
    device = x.device
    for name, t in (("weight", weight), ("words", words), ("bias", bias)):
        if t is not None and t.device != device:
            raise ValueError(f"{name}: expected device {device}, got {t.device}")
