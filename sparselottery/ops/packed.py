"""Packed parameters: the survivors' values as one vector, the dense weight only while a layer computes with it.

`values` `[count]` holds the weights that a mask keeps, in the row-major order of the mask; `expand` and `gather` go there
and back, and are each other's gradient. `packed_linear` and `packed_conv2d` expand the weight, call the library and let
the weight go; their backward expands it once more and gathers dW at the survivors, so that nothing dense lives between
forward and backward. Backends: cpu (csrc/cpu/packed.cpp), cuda (csrc/cuda/packed.cu), plain torch elsewhere.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _ext
from .._ext import extension
from . import bitmask, derived, reference
from .library import LIBRARY, check_tensors, transformed

LIBRARY.define("packed_expand(Tensor values, Tensor words, SymInt[] shape) -> Tensor")
LIBRARY.define("packed_gather(Tensor dense, Tensor words, SymInt count) -> Tensor")
LIBRARY.define(
    "packed_linear(Tensor x, Tensor values, Tensor words, Tensor? bias, SymInt[] shape, bool transposed) -> Tensor"
)
LIBRARY.define(
    "packed_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor words, SymInt[] shape, bool transposed,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "packed_conv2d(Tensor x, Tensor values, Tensor words, Tensor? bias, SymInt[] shape, int[2] stride, int[2] padding,"
    " int[2] dilation, int groups) -> Tensor"
)
LIBRARY.define(
    "packed_conv2d_backward(Tensor grad, Tensor x, Tensor values, Tensor words, SymInt[] shape, int[2] stride,"
    " int[2] padding, int[2] dilation, int groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)


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
    values, words = values.contiguous(), words.contiguous()
    offsets, count = _offsets(words)
    _check_count(values.numel(), count)
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
    sizes, strides = bitmask.rows_and_strides(dense)
    if len(sizes) > 8:  # more than the kernel takes
        return _checked(reference.packed_gather(dense, words), count)
    words = words.contiguous()
    offsets, kept = _offsets(words)
    _check_count(count, kept)
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


def _check_count(got, kept):
    if got != kept:
        raise ValueError(f"packed: the mask keeps {kept} weights, got {got} values")


LIBRARY.impl("packed_expand", _expand, "CompositeExplicitAutograd")
LIBRARY.impl("packed_gather", _gather, "CompositeExplicitAutograd")
if hasattr(_ext._C, "cuda_packed_expand"):
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
    _check_values(values, words, shape)
    if transformed():
        return _plain_expand(values, words, shape)
    if torch.is_grad_enabled() and values.requires_grad:
        return _Expand.apply(values, words, tuple(shape))
    return torch.ops.sparselottery.packed_expand(values, words, list(shape))


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
    bitmask.check_words(words, dense.shape)
    if words.device != dense.device:
        raise ValueError(f"words: expected device {dense.device} like dense, got {words.device}")
    if count is None:
        count = bitmask.count(words)
    if transformed():
        return dense.reshape(-1)[_places(words, dense.shape)]
    if torch.is_grad_enabled() and dense.requires_grad:
        return _Gather.apply(dense, words, count)
    return torch.ops.sparselottery.packed_gather(dense, words, count)


def _places(words, shape):
    """int64: the flat indices of the survivors."""
    return bitmask.unpack(words, shape).flatten().nonzero().squeeze(1)


def _plain_expand(values, words, shape):
    """`expand` in operations that every transform of torch.func knows."""
    dense = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    return dense.index_copy(0, _places(words, shape), values).view(tuple(shape))


def _check_values(values, words, shape):
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a tensor, got {type(values).__name__}")
    if values.dtype not in bitmask.FLOATS:
        raise TypeError(f"values: expected float32, float64, float16 or bfloat16, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"values: expected [count], got {list(values.shape)}")
    bitmask.check_words(words, shape)
    if words.device != values.device:
        raise ValueError(f"words: expected device {values.device} like values, got {words.device}")


# ---- layers ----


def _none(like):
    """What an undefined gradient is in the ops' schemas: a tensor without elements."""
    return like.new_empty(0)


def _weight(values, words, shape, transposed=False):
    weight = torch.ops.sparselottery.packed_expand(values, words, shape)
    return weight.t() if transposed else weight


def _survivors(dw, words, values):
    return torch.ops.sparselottery.packed_gather(dw, words, values.shape[0])


def _linear(x, values, words, bias, shape, transposed):
    return F.linear(x, _weight(values, words, shape, transposed), bias)


def _linear_backward(grad, x, values, words, shape, transposed, output_mask):
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    dx = grad @ _weight(values, words, shape, transposed) if output_mask[0] else _none(grad)  # gone before dW comes
    dvalues = _none(grad)
    if output_mask[1]:
        inputs = x.reshape(rows.shape[0], x.shape[-1])
        dvalues = _survivors(inputs.t() @ rows if transposed else rows.t() @ inputs, words, values)
    return dx, dvalues, rows.sum(0) if output_mask[2] else _none(grad)


def _conv2d(x, values, words, bias, shape, stride, padding, dilation, groups):
    return F.conv2d(x, _weight(values, words, shape), bias, stride, padding, dilation, groups)


def _convolution_backward(grad, x, weight, stride, padding, dilation, groups, output_mask):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, output_mask
    )


def _conv2d_backward(grad, x, values, words, shape, stride, padding, dilation, groups, output_mask):
    arguments = (stride, padding, dilation, groups)
    weight = _weight(values, words, shape)
    dx, dw, db = _convolution_backward(grad, x, weight, *arguments, output_mask)
    del weight
    return (
        dx if output_mask[0] else _none(grad),
        _survivors(dw, words, values) if output_mask[1] else _none(grad),
        db if output_mask[2] else _none(grad),
    )


for _name, _function in (
    ("packed_linear", _linear),
    ("packed_linear_backward", _linear_backward),
    ("packed_conv2d", _conv2d),
    ("packed_conv2d_backward", _conv2d_backward),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::packed_linear")
def _(x, values, words, bias, shape, transposed):
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


@torch.library.register_fake("sparselottery::packed_linear_backward")
def _(grad, x, values, words, shape, transposed, output_mask):
    shapes = ((*grad.shape[:-1], shape[0] if transposed else shape[1]), values.shape, (grad.shape[-1],))
    return tuple(grad.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, output_mask, strict=True))


@torch.library.register_fake("sparselottery::packed_conv2d")
def _(x, values, words, bias, shape, stride, padding, dilation, groups):
    return F.conv2d(x, values.new_empty(shape), bias, stride, padding, dilation, groups)


@torch.library.register_fake("sparselottery::packed_conv2d_backward")
def _(grad, x, values, words, shape, stride, padding, dilation, groups, output_mask):
    dx, _, db = _convolution_backward(
        grad, x, values.new_empty(shape), stride, padding, dilation, groups, [output_mask[0], False, output_mask[2]]
    )
    return (
        dx if output_mask[0] else _none(grad),
        grad.new_empty(values.shape if output_mask[1] else (0,)),
        db if output_mask[2] else _none(grad),
    )


class _PackedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, values, words, bias, shape, transposed):
        return torch.ops.sparselottery.packed_linear(x, values, words, bias, shape, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, values, words, _, *ctx.arguments = inputs
        # As F.linear does, keep x only where dW will be asked for.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), values, words)

    @staticmethod
    def backward(ctx, grad):
        x, values, words = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            shape, transposed = ctx.arguments
            rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
            weight = expand(values, words, shape)
            dx = grad @ (weight.t() if transposed else weight)
            dvalues = None
            if wanted[1]:
                inputs = x.reshape(rows.shape[0], x.shape[-1])
                dw = inputs.t() @ rows if transposed else rows.t() @ inputs
                dvalues = gather(dw, words, values.shape[0])
            found = dx, dvalues, rows.sum(0)
        else:
            found = torch.ops.sparselottery.packed_linear_backward(grad, x, values, words, *ctx.arguments, wanted)
        dx, dvalues, db = (g if asked else None for g, asked in zip(found, wanted, strict=True))
        return dx, dvalues, None, db, None, None


class _PackedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, values, words, bias, shape, stride, padding, dilation, groups):
        return torch.ops.sparselottery.packed_conv2d(x, values, words, bias, shape, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, values, words, _, *ctx.arguments = inputs
        ctx.save_for_backward(x, values, words)

    @staticmethod
    def backward(ctx, grad):
        x, values, words = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if torch.is_grad_enabled():
            shape, *arguments = ctx.arguments
            weight = expand(values, words, shape)
            dx = torch.nn.grad.conv2d_input(x.shape, weight, grad, *arguments)
            dw = torch.nn.grad.conv2d_weight(x, shape, grad, *arguments) if wanted[1] else None
            found = dx, gather(dw, words, values.shape[0]) if wanted[1] else None, grad.sum((0, 2, 3))
        else:
            found = torch.ops.sparselottery.packed_conv2d_backward(grad, x, values, words, *ctx.arguments, wanted)
        dx, dvalues, db = (g if asked else None for g, asked in zip(found, wanted, strict=True))
        return dx, dvalues, None, db, None, None, None, None, None


def packed_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, shape, *, transposed: bool = False
) -> Tensor:
    """`F.linear` with the weight `[out, in]` that `values` and `words` stand for; `transposed`: its shape is `[in, out]`.

    Args:
        x: `[*, in]`, floating point; any strides.
        values: `[count]`, the dtype and device of `x` (under autocast: any that F.linear takes).
        words: int32 words of a mask of `shape` that keeps `count` weights.
        bias: `[out]` or None.

    Returns:
        `[*, out]`. The gradient of `values` has its shape. Between forward and backward only x, values and words are kept.
        Differentiable twice, in forward mode, and under `torch.func`'s transforms.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    shape = _start(x, values, words, bias, shape, 2)
    x, values, bias = _autocast(x, values, bias)
    outputs, inputs = shape[::-1] if transposed else shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x: expected [*, {inputs}] for weight {[outputs, inputs]}, got {list(x.shape)}")
    _check(x, values, bias, outputs)
    if transformed():
        weight = _plain_expand(values, words, shape)
        return F.linear(x, weight.t() if transposed else weight, bias)
    if _differentiable(x, values, bias):
        return _PackedLinear.apply(x, values, words, bias, shape, transposed)
    return torch.ops.sparselottery.packed_linear(x, values, words, bias, shape, transposed)


def packed_conv2d(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    shape,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` with the weight `[out, C / groups, kH, kW]` (`shape`) that `values` and `words` stand for.

    Args:
        x: `[N, C, H, W]`, floating point; any strides (channels_last stays so).
        values, words, bias: as for `packed_linear`. stride, padding, dilation: pairs (rows, columns).

    Returns:
        `[N, out, H', W']`; gradients as in `packed_linear`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    shape = _start(x, values, words, bias, shape, 4)
    x, values, bias = _autocast(x, values, bias)
    if x.ndim != 4 or x.shape[1] != shape[1] * groups:
        raise ValueError(f"x: expected [N, {shape[1] * groups}, H, W] for weight {list(shape)}, got {list(x.shape)}")
    _check(x, values, bias, shape[0])
    arguments = (x, values, words, bias, shape, tuple(stride), tuple(padding), tuple(dilation), groups)
    if transformed():
        return F.conv2d(x, _plain_expand(values, words, shape), bias, *arguments[5:])
    if _differentiable(x, values, bias):
        return _PackedConv2d.apply(*arguments)
    return torch.ops.sparselottery.packed_conv2d(*arguments)


def _start(x, values, words, bias, shape, dims):
    shape = tuple(shape)
    if len(shape) != dims:
        raise ValueError(f"shape: expected {dims} sizes, got {list(shape)}")
    _check_values(values, words, shape)
    check_tensors(x, values, words, bias)
    return shape


def _autocast(x, *others):
    """What autocast does to the library's arguments: floating-point ones to its dtype, float64 untouched."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def _check(x, values, bias, outputs):
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    for name, t in (("values", values), ("bias", bias)):
        if t is not None and t.dtype is not x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {t.device}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias: expected [{outputs}], got {list(bias.shape)}")


def _differentiable(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
