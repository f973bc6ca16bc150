"""Masked convolution as an op: y = conv2d(x, W∘M) + b, with dX, dW∘M and db.

Source: the subnetwork f(x; m∘θ) of Frankle & Carbin 2019, section 1. Backends: reference, dense (the library's
convolution, the mask applied to dW in place), cpu (csrc/cpu/masked_conv2d.cpp, survivors only; float32, and bfloat16
computed in float32), triton (kernels/masked_conv2d.py, live tiles only), chosen per call by `dispatch`.

A weight off the mask counts as +0 whatever it holds, NaN and inf too. Where x or dY holds inf or NaN, the sparse
backends leave out products with dead weights that a dense one turns into NaN.
"""

import torch
from torch import Tensor

from .. import _ext
from . import bitmask, derived, dispatch, reference
from .library import LIBRARY, autocasts, check_tensors, is_plain, transformed

OP = "masked_conv2d"
CPU_DTYPES = (torch.float32, torch.bfloat16)
_ARGUMENTS = "int[2] stride, int[2] padding, int[2] dilation, int groups, bool premasked"
LIBRARY.define(f"masked_conv2d(Tensor x, Tensor weight, Tensor words, Tensor? bias, {_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, {_ARGUMENTS}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)"
)


# ---- dense: the library's convolution ----


def _masked(weight, words, premasked):
    return weight if premasked else bitmask.apply_(weight.clone(), words)


def _dense(x, weight, words, bias, stride, padding, dilation, groups, premasked):
    weight = _masked(weight, words, premasked)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _dense_backward(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    if output_mask[0]:
        weight = _masked(weight, words, premasked)
    dx, dw, db = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, output_mask
    )
    if output_mask[1]:
        bitmask.apply_(dw, words)
    return dx, dw, db


# ---- cpu: survivors only ----


def _cpu_plan(x, weight, words, stride, padding, dilation, groups):
    """The extension's index structure for this mask and size of image."""
    key = ("cpu", x.shape[1:], weight.shape, stride, padding, dilation)
    kept = derived.of(words)
    if key not in kept:
        rows, columns = ((x.shape[i + 2], weight.shape[i + 2], stride[i], padding[i], dilation[i]) for i in (0, 1))
        kept[key] = _ext.extension().CpuMaskedConv2dPlan(
            words.contiguous().data_ptr(), weight.shape[0], x.shape[1], groups, rows, columns
        )
    return kept[key]


def _cpu(x, weight, words, bias, stride, padding, dilation, groups):
    plan = _cpu_plan(x, weight, words, stride, padding, dilation, groups)
    dtype = x.dtype
    # C++ reads x where and as it lies: no copy has applied the sign of a negative view (z.conj().imag).
    x = x.float().resolve_neg()
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    y = x.new_empty(_output_shape(x, weight, stride, padding, dilation))
    _ext.extension().cpu_masked_conv2d_forward(
        plan, x.shape[0], x.data_ptr(), x.stride(), weight.data_ptr(), _address(bias), y.data_ptr()
    )
    return y.to(dtype)


def _cpu_backward(grad, x, weight, words, stride, padding, dilation, groups, output_mask):
    plan = _cpu_plan(x, weight, words, stride, padding, dilation, groups)
    dtype = x.dtype
    grad, x, weight = grad.float().resolve_neg(), x.float().resolve_neg(), weight.float().contiguous()
    shapes = (x.shape, weight.shape, weight.shape[:1])
    gradients = [x.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, output_mask, strict=True)]
    _ext.extension().cpu_masked_conv2d_backward(
        plan, x.shape[0], grad.data_ptr(), grad.stride(), x.data_ptr(), x.stride(), weight.data_ptr(),
        *map(_address, gradients),
    )  # fmt: skip
    return [g if g is None else g.to(dtype) for g in gradients]


def _address(t):
    return 0 if t is None else t.data_ptr()


def _cpu_can(x, weight):
    """Its dtypes, and images whose planes the extension can address (its distances are 32-bit numbers of bytes)."""
    if x.device.type != "cpu" or x.dtype not in CPU_DTYPES or _ext.WHY_NOT is not None:
        return False
    edges = [x.shape[i + 2] + 4 * weight.shape[i + 2] for i in (0, 1)]
    return (x.shape[1] + weight.shape[0]) * edges[0] * edges[1] < 2**28


# ---- triton: live tiles only ----


def _triton():
    """kernels/masked_conv2d.py, or None where there is no Triton."""
    from .. import kernels

    if not kernels.AVAILABLE:
        return None
    from ..kernels import masked_conv2d as module

    return module


def _triton_backward(module, grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    arguments, plans = (stride, padding, dilation, groups), derived.of(words)
    dx = dw = None
    if output_mask[0]:
        dx = module.backward_input(grad, weight, words, x.shape, *arguments, premasked=premasked, plans=plans)
    if output_mask[1]:
        dw = module.backward_weight(grad, x, words, weight.shape, *arguments, plans=plans)
    return dx, dw, grad.sum((0, 2, 3)) if output_mask[2] else None


# ---- choice of the backend ----


def _density(words, weight):
    kept = derived.of(words)
    if "density" not in kept:
        kept["density"] = bitmask.count(words) / max(1, weight.numel())
    return kept["density"]


def live_bucket(words: Tensor, weight: Tensor) -> int:
    """dispatch's bucket for the part of the tiles of 64 outputs by a tap by 16 inputs that hold survivors.

    It tells masks of one density apart for the kernels that skip dead tiles. Asked once per mask: it waits for the device.
    """
    kept = derived.of(words)
    if "live tiles" not in kept:
        keep = bitmask.unpack(words, weight.shape).flatten(2)
        keep = torch.nn.functional.pad(keep, (0, 0, 0, -keep.shape[1] % 16, 0, -keep.shape[0] % 64))
        live = keep.view(keep.shape[0] // 64, 64, keep.shape[1] // 16, 16, keep.shape[2]).any(3).any(1)
        kept["live tiles"] = dispatch.density_bucket(float(live.double().mean()) if live.numel() else 1.0)
    return kept["live tiles"]


def _key(direction, x, weight, words, arguments, extra):
    density = _density(words, weight)
    return (
        direction,
        (*weight.shape, *x.shape[2:], *arguments[0], *arguments[1], *arguments[2], arguments[3]),
        str(x.dtype),
        dispatch.density_bucket(density),
        dispatch.batch_bucket(x.shape[0]),
        torch.get_num_threads() if x.device.type == "cpu" else 0,
        x.device.type,
        _format(x) is torch.channels_last,
        *((live_bucket(words, weight),) if x.is_cuda else ()),
        *extra,
    )


def _choose(direction, x, weight, words, arguments, candidates, extra):
    key = _key(direction, x, weight, words, arguments, extra)
    name = dispatch.lookup(OP, key)
    if name not in candidates:
        name = dispatch.choose(OP, key, candidates, rule=lambda: _rule(x, weight, _density(words, weight)))
    return candidates[name]()


def runs_dense(x, weight, words, stride, padding, dilation, groups, wanted) -> bool | None:
    """Whether a caller with a masked weight does best to call the library directly; None: not known yet.

    The arguments are those of `masked_conv2d`, x `[N, C, H, W]`, pairs of ints; `wanted`: which gradients (x, weight, bias)
    will be asked for, None: no backward.
    """
    if x.ndim != 4 or x.dtype is not weight.dtype or x.device != weight.device or isinstance(padding, str):
        return None
    if (not x.is_cuda and not _cpu_can(x, weight)) or _density(words, weight) > _WORTH_TRYING:
        return dispatch.forced() is None or None
    arguments = stride, padding, dilation, groups
    keys = [_key("forward", x, weight, words, arguments, (True,))]
    if wanted is not None:
        keys.append(_key("backward", x, weight, words, arguments, (True, wanted)))
    return dispatch.goes_to_library(OP, [(key, lambda: _rule(x, weight, _density(words, weight))) for key in keys])


_RULE_DENSITY = 0.12
_WORTH_TRYING = 0.6  # above this density no sparse kernel has won: none is even measured


def _rule(x, weight, density):
    """Without a stopwatch: the survivors' kernel where it beat dense by a clear margin on every shape measured."""
    sparse = (
        density <= _RULE_DENSITY
        and x.dtype is torch.float32
        and _cpu_can(x, weight)
        and _format(x, weight) is torch.contiguous_format
    )
    return "cpu" if sparse else "dense"


# ---- the ops: every backend's results leave in the layout that the fakes promise ----


def _forward(x, weight, words, bias, stride, padding, dilation, groups, premasked):
    arguments = stride, padding, dilation, groups = tuple(stride), tuple(padding), tuple(dilation), groups

    def finish(y):
        return y.contiguous(memory_format=_format(x, weight))

    candidates = {
        "dense": lambda: finish(_dense(x, weight, words, bias, *arguments, premasked)),
        "reference": lambda: finish(reference.masked_conv2d(x, weight, words, bias, *arguments)),
    }
    if _wanted("cpu", words, weight) and _cpu_can(x, weight):
        candidates["cpu"] = lambda: finish(_cpu(x, weight, words, bias, *arguments))
    if x.is_cuda and _wanted("triton", words, weight) and (module := _triton()) and x.dtype in module.DTYPES:
        candidates["triton"] = lambda: finish(
            module.forward(x, weight, words, bias, *arguments, premasked=premasked, plans=derived.of(words))
        )
    return _choose("forward", x, weight, words, arguments, candidates, (premasked,))


def _backward(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    arguments = stride, padding, dilation, groups = tuple(stride), tuple(padding), tuple(dilation), groups
    output_mask = tuple(output_mask)

    def finish(gradients):
        formats = (_format(x, weight), _format(weight), torch.contiguous_format)
        return tuple(
            g.contiguous(memory_format=f) if wanted else x.new_empty(0)
            for g, f, wanted in zip(gradients, formats, output_mask, strict=True)
        )

    candidates = {
        "dense": lambda: finish(_dense_backward(grad, x, weight, words, *arguments, premasked, output_mask)),
        "reference": lambda: finish(reference.masked_conv2d_backward(grad, x, weight, words, *arguments)),
    }
    if _wanted("cpu", words, weight) and _cpu_can(x, weight):
        candidates["cpu"] = lambda: finish(_cpu_backward(grad, x, weight, words, *arguments, output_mask))
    if x.is_cuda and _wanted("triton", words, weight) and (module := _triton()) and x.dtype in module.DTYPES:
        candidates["triton"] = lambda: finish(
            _triton_backward(module, grad, x, weight, words, *arguments, premasked, output_mask)
        )
    return _choose("backward", x, weight, words, arguments, candidates, (premasked, output_mask))


def _wanted(backend, words, weight):
    """Whether a sparse backend has a chance here, or is asked for by name."""
    return _density(words, weight) <= _WORTH_TRYING or dispatch.forced() == backend


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
    return x.new_empty(_output_shape(x, weight, stride, padding, dilation)).to(memory_format=_format(x, weight))


@torch.library.register_fake("sparselottery::masked_conv2d_backward", lib=LIBRARY)
def _(grad, x, weight, words, stride, padding, dilation, groups, premasked, output_mask):
    return (
        x.new_empty(x.shape).to(memory_format=_format(x, weight)) if output_mask[0] else x.new_empty(0),
        weight.new_empty(weight.shape).to(memory_format=_format(weight)) if output_mask[1] else x.new_empty(0),
        x.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


def _output_shape(x, weight, stride, padding, dilation):
    height, width = (
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return x.shape[0], weight.shape[0], height, width


class _MaskedConv2d(torch.autograd.Function):
    # forward takes ctx: with a setup_context apart, `apply` inspects forward's signature on each call (20 us).
    @staticmethod
    def forward(ctx, x, weight, words, bias, stride, padding, dilation, groups, premasked):
        ctx.arguments = stride, padding, dilation, groups, premasked
        ctx.save_for_backward(x, weight, words)
        op = _forward if is_plain(x, weight) else torch.ops.sparselottery.masked_conv2d
        return op(x, weight, words, bias, stride, padding, dilation, groups, premasked)

    @staticmethod
    def backward(ctx, grad):
        x, weight, words = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            gradients = reference.masked_conv2d_backward(grad, x, weight, words, *ctx.arguments[:4])
        else:
            op = _backward if is_plain(grad, weight) else torch.ops.sparselottery.masked_conv2d_backward
            gradients = op(grad, x, weight, words, *ctx.arguments, wanted)
        dx, dw, db = (g if asked else None for g, asked in zip(gradients, wanted, strict=True))
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
        Differentiable twice; in forward mode and under `torch.func`'s transforms too, where it is computed in plain torch.

    Raises:
        TypeError: not a tensor; a dtype that is not floating point, or that differs between arguments.
        ValueError: a shape, a device or a number that does not fit; the message names the argument.
    """
    check_tensors(x, weight, words, bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, words, bias, groups)
    unbatched = x.ndim == 3
    if unbatched:
        x = x.unsqueeze(0)
    x, padding = _pad(x, weight, stride, padding, dilation)
    if min(_output_shape(x, weight, stride, padding, dilation)[2:]) < 1:
        raise ValueError(
            f"x: expected height and width of at least {[_extent(weight, dilation, i) for i in (0, 1)]} with padding"
            f" {list(padding)} on each side for weight {list(weight.shape)}, got {list(x.shape)}"
        )
    arguments = (x, weight, words, bias, stride, padding, dilation, groups, premasked)
    differentiable = (x, weight) if bias is None else (x, weight, bias)
    if transformed():
        y = reference.masked_conv2d(*arguments[:-1])
    elif torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
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
    if not autocasts(x.device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

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
