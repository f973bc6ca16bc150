"""Masked convolution as an op: y = conv2d(x, W∘M) + b, with dW∘M instead of dW.

Source: the subnetwork f(x; m∘θ) of Frankle & Carbin 2019, section 1. Backends: reference, dense (the library's
convolution on weights that are already zero off the mask).
"""

import torch
from torch import Tensor

from . import reference
from .library import LIBRARY

_ARGUMENTS = "int[2] stride, int[2] padding, int[2] dilation, int groups, bool premasked"
LIBRARY.define(f"masked_conv2d(Tensor x, Tensor weight, Tensor words, Tensor? bias, {_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, {_ARGUMENTS}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)"
)


# ---- backends ----


def _masked(weight, words, premasked):
    return weight if premasked else weight.masked_fill(~reference.bitmask_unpack(words, weight.shape), 0)


def _dense_forward(x, weight, words, bias, stride, padding, dilation, groups, premasked):
    return torch.nn.functional.conv2d(x, _masked(weight, words, premasked), bias, stride, padding, dilation, groups)


def _dense_backward(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    weight = _masked(weight, words, premasked) if output_mask[0] else weight
    dx, dw, db = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, output_mask
    )
    if output_mask[1]:
        dw.masked_fill_(~reference.bitmask_unpack(words, weight.shape), 0)
    return dx, dw, db


# ---- the ops: every backend's results leave in the layout that the fakes promise ----


def _forward(x, weight, words, bias, stride, padding, dilation, groups, premasked):
    y = _dense_forward(x, weight, words, bias, stride, padding, dilation, groups, premasked)
    return y.contiguous(memory_format=_format(x, weight))


def _backward(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    dx, dw, db = _dense_backward(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask)
    return (
        dx.contiguous(memory_format=_format(x, weight)) if output_mask[0] else x.new_empty(0),
        dw.contiguous(memory_format=_format(weight)) if output_mask[1] else x.new_empty(0),
        db if output_mask[2] else x.new_empty(0),
    )


def _format(*tensors):
    """channels_last where one of the `[N, C, H, W]` tensors is (torch's rule for convolutions), else contiguous."""
    for t in tensors:
        if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


LIBRARY.impl("masked_conv2d", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_conv2d_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::masked_conv2d", lib=LIBRARY)
def _(x, weight, words, bias, stride, padding, dilation, groups, premasked):
    sizes = (x.shape[0], weight.shape[0], *_output_size(x.shape, weight.shape, stride, padding, dilation))
    return x.new_empty(sizes).to(memory_format=_format(x, weight))


@torch.library.register_fake("sparselottery::masked_conv2d_backward", lib=LIBRARY)
def _(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    return (
        x.new_empty(x.shape).to(memory_format=_format(x, weight)) if output_mask[0] else x.new_empty(0),
        weight.new_empty(weight.shape).to(memory_format=_format(weight)) if output_mask[1] else x.new_empty(0),
        x.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


def _output_size(x_shape, weight_shape, stride, padding, dilation):
    return tuple(
        (x_shape[i + 2] + 2 * padding[i] - dilation[i] * (weight_shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, words, bias, stride, padding, dilation, groups, premasked):
        return torch.ops.sparselottery.masked_conv2d(
            x, weight, words, bias, stride, padding, dilation, groups, premasked
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, words, _, *ctx.arguments = inputs
        ctx.save_for_backward(x, weight, words)

    @staticmethod
    def backward(ctx, grad):
        x, weight, words = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = torch.ops.sparselottery.masked_conv2d_backward(grad, x, weight, words, *ctx.arguments, need)
        dx, dw, db = (g if n else None for g, n in zip(gradients, need, strict=True))
        return dx, dw, None, db, None, None, None, None, None


# ---- the public function ----


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    premasked: bool = False,
) -> Tensor:
    """Apply a 2-D convolution whose weight is masked by bits; the arguments are those of `torch.nn.functional.conv2d`.

    Args:
        x: `[N, C, H, W]` or `[C, H, W]`, floating point, any strides.
        weight: `[out, C / groups, kH, kW]`, the dtype and device of `x`.
        words: int32 `[out, ceil(C / groups * kH * kW / 32)]`; bit i of word w in a row keeps that row's column
            32 w + i, columns in the order `[C / groups, kH, kW]`.
        bias: `[out]` or None.
        stride, dilation: pixels, one number or a pair (rows, columns).
        padding: pixels of zeros on each side, one number or a pair, or "valid" (none) or "same" (as many as keep the
            size; needs stride 1).
        groups: blocks of channels that do not see each other.
        premasked: the caller's promise that `weight` is already 0 wherever the mask is, which saves a multiply.

    Returns:
        `[N, out, H', W']` (`[out, H', W']` for an unbatched `x`), channels_last if `x` or `weight` is. The gradient of
        `weight` is zero wherever the mask is. Under autocast `x`, `weight` and `bias` are cast as for conv2d.

    Raises:
        TypeError: a dtype that is not floating point, or that differs between arguments.
        ValueError: a shape, a device or a number that does not fit; the message names the argument.
    """
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, words, bias, groups)
    unbatched = x.ndim == 3
    if unbatched:
        x = x.unsqueeze(0)
    x, padding = _pad(x, weight, stride, padding, dilation)
    if min(_output_size(x.shape, weight.shape, stride, padding, dilation)) < 1:
        raise ValueError(
            f"x: expected height and width of at least {[_extent(weight, dilation, i) for i in (0, 1)]} with padding"
            f" {list(padding)} on each side for weight {list(weight.shape)}, got {list(x.shape)}"
        )
    arguments = (x, weight, words, bias, stride, padding, dilation, groups, premasked)
    differentiable = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        y = _MaskedConv2d.apply(*arguments)
    else:
        y = torch.ops.sparselottery.masked_conv2d(*arguments)
    return y.squeeze(0) if unbatched else y


def _pair(name, value, least):
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return tuple(pair)


def _extent(weight, dilation, i):
    """How many input pixels a filter spans along rows (i = 0) or columns (1)."""
    return dilation[i] * (weight.shape[i + 2] - 1) + 1


def _pad(x, weight, stride, padding, dilation):
    """The padding as a pair, and x with the odd row and column that "same" puts at its end only (torch's rule)."""
    if not isinstance(padding, str):
        return x, _pair("padding", padding, 0)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f'padding: expected an int, a pair of ints, "same" or "valid", got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'padding: "same" needs stride 1, got stride {list(stride)}')
    total = [_extent(weight, dilation, i) - 1 for i in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        x = torch.nn.functional.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)


def _autocast(x, weight, bias):
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t):  # float64 stays, as under torch's own autocast rule
        return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

    return cast(x), cast(weight), cast(bias)


def _check(x, weight, words, bias, groups):
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    if weight.ndim != 4:
        raise ValueError(f"weight: expected [out, C / groups, kH, kW], got {list(weight.shape)}")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups!r}")
    channels = weight.shape[1] * groups
    if x.ndim not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"x: expected [N, {channels}, H, W] or [{channels}, H, W] for weight {list(weight.shape)} and"
            f" groups {groups}, got {list(x.shape)}"
        )
    expected = reference.words_shape(weight.shape)
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise ValueError(f"words: expected int32 {list(expected)}, got {words.dtype} {list(words.shape)}")
    for name, t in (("weight", weight), ("words", words), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {t.device}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {t.dtype}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
