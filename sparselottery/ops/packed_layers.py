"""Layers whose weight is packed: `packed_linear` and `packed_conv2d`.

They expand the weight (ops/packed.py), call the library and let the weight go; their backward expands it once more and
gathers dW at the survivors, so that nothing dense lives between forward and backward. On a CPU `dispatch` may also choose
the sparse kernels of masked_linear for `packed_linear`, where they were measured faster.
"""

import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _ext
from .._ext import extension
from . import bitmask, derived, dispatch, masked_linear
from .library import LIBRARY, autocasts, check_tensors, transformed
from .masked_conv2d import _pair
from .packed import check_count, check_values, expand, gather, plain_expand

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


def _none(like):
    """What an undefined gradient is in the ops' schemas: a tensor without elements."""
    return like.new_empty(0)


def _weight(values, words, shape, transposed=False):
    weight = torch.ops.sparselottery.packed_expand(values, words, shape)
    return weight.t() if transposed else weight


def _survivors(dw, words, values):
    return torch.ops.sparselottery.packed_gather(dw, words, values.shape[0])


def _linear(x, values, words, bias, shape, transposed):
    def dense():
        return F.linear(x, _weight(values, words, shape, transposed), bias)

    def cpu():
        return _linear_cpu(x, values, words, bias, shape)

    return _run("forward", x, values, shape, transposed, dense, cpu)


def _linear_backward(grad, x, values, words, shape, transposed, output_mask):
    def dense():
        return _linear_backward_dense(grad, x, values, words, shape, transposed, output_mask)

    def cpu():
        return _linear_backward_cpu(grad, x, values, words, shape, output_mask)

    if not (output_mask[0] or output_mask[1]):
        return dense()
    return _run("backward", grad, values, shape, transposed, dense, cpu, *output_mask)


def _linear_backward_dense(grad, x, values, words, shape, transposed, output_mask):
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    dx = grad @ _weight(values, words, shape, transposed) if output_mask[0] else _none(grad)  # gone before dW comes
    dvalues = _none(grad)
    if output_mask[1]:
        inputs = x.reshape(rows.shape[0], x.shape[-1])
        dvalues = _survivors(inputs.t() @ rows if transposed else rows.t() @ inputs, words, values)
    return dx, dvalues, rows.sum(0) if output_mask[2] else _none(grad)


# The survivors' index of masked_linear's cpu backend, fed with values instead of a dense weight: nothing dense is made. It
# holds about 24 bytes a survivor as long as the mask lives.


def _linear_plan(values, words, shape):
    """The plan of a mask, and the arguments that name these contiguous values."""
    if words.is_inference() or values.is_inference():  # no version counter: nothing may outlive the call
        plan = extension().CpuMaskedLinearPlan(words.data_ptr(), *shape, True)
        check_count(values.numel(), plan.count())
        return plan, (values.data_ptr(), False, 0, False)
    kept = derived.of(words)
    plan, last = kept.get(("packed plan", shape), (None, None))
    same = last is not None and last() is values
    if plan is None or not plan.same_words(words.data_ptr()):
        plan, same = extension().CpuMaskedLinearPlan(words.data_ptr(), *shape, True), False
    check_count(values.numel(), plan.count())
    if not same:
        kept["packed plan", shape] = plan, weakref.ref(values)
    return plan, (values.data_ptr(), False, values._version, same)


def _unit_rows(t):
    """`[*, n]` -> `[rows, n]` with neighbours in a row next to each other, copied only where they are not."""
    t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _linear_cpu(x, values, words, bias, shape):
    values, words = values.contiguous(), words.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = _unit_rows(x)
    y = rows.new_empty(rows.shape[0], shape[0])
    plan, weight = _linear_plan(values, words, tuple(shape))
    plan.forward(
        *weight,
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0,
        False,
        False,
    )
    return y.view(*x.shape[:-1], shape[0])


def _linear_backward_cpu(grad, x, values, words, shape, output_mask):
    values, words = values.contiguous(), words.contiguous()
    rows = _unit_rows(grad)
    inputs = _unit_rows(x) if output_mask[1] else None
    dx = grad.new_empty(*grad.shape[:-1], shape[1]) if output_mask[0] else _none(grad)
    dvalues = torch.empty_like(values) if output_mask[1] else _none(grad)
    db = grad.new_empty(shape[0]) if output_mask[2] else _none(grad)
    plan, weight = _linear_plan(values, words, tuple(shape))
    plan.backward(
        *weight,
        rows.data_ptr(),
        rows.stride(0),
        0 if inputs is None else inputs.data_ptr(),
        0 if inputs is None else inputs.stride(0),
        rows.shape[0],
        dx.data_ptr() if output_mask[0] else 0,
        dvalues.data_ptr() if output_mask[1] else 0,
        db.data_ptr() if output_mask[2] else 0,
        0,
        False,
    )
    return dx, dvalues, db


def _run(direction, t, values, shape, transposed, dense, cpu, *extra):
    """One of the two, as dispatch decides; only float32 on the CPU has a choice."""
    total, batch = shape[0] * shape[1], t.shape[:-1].numel()
    possible = not transposed and t.is_cpu and t.dtype is torch.float32 and _ext.WHY_NOT is None
    if not possible or total >= masked_linear._MOST or total == 0 or batch == 0:
        return dense()
    if dispatch.forced() == "cpu":
        return cpu()
    bucket = dispatch.density_bucket(values.numel() / total)
    if total < masked_linear._SMALLEST or bucket < 2 or type(t) is not Tensor:
        return dense()
    threads, batch = torch.get_num_threads(), dispatch.batch_bucket(batch)
    key = (direction, tuple(shape), "float32", bucket, batch, threads, "cpu", *extra)
    name = dispatch.lookup("packed_linear", key)
    if name is None:
        candidates = {"dense": dense, "cpu": cpu, "reference": dense}
        name = dispatch.choose("packed_linear", key, candidates, rule=lambda: masked_linear.rule(key))
    return cpu() if name == "cpu" else dense()


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
        weight = plain_expand(values, words, shape)
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
        values, words, bias: as for `packed_linear`. stride, padding, dilation: an int or a pair (rows, columns).

    Returns:
        `[N, out, H', W']`; gradients as in `packed_linear`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    shape = _start(x, values, words, bias, shape, 4)
    x, values, bias = _autocast(x, values, bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    padding = _pair("padding", padding, 0)
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {shape[0]} output channels, got {groups!r}")
    if x.ndim != 4 or x.shape[1] != shape[1] * groups:
        raise ValueError(f"x: expected [N, {shape[1] * groups}, H, W] for weight {list(shape)}, got {list(x.shape)}")
    _check(x, values, bias, shape[0])
    least = [dilation[i] * (shape[i + 2] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
    if any(x.shape[i + 2] < least[i] for i in (0, 1)):
        raise ValueError(
            f"x: expected height and width of at least {least} for weight {list(shape)}, got {list(x.shape)}"
        )
    arguments = (x, values, words, bias, shape, stride, padding, dilation, groups)
    if transformed():
        return F.conv2d(x, plain_expand(values, words, shape), bias, *arguments[5:])
    if _differentiable(x, values, bias):
        return _PackedConv2d.apply(*arguments)
    return torch.ops.sparselottery.packed_conv2d(*arguments)


def _start(x, values, words, bias, shape, dims):
    shape = bitmask.check_shape(shape)
    if len(shape) != dims:
        raise ValueError(f"shape: expected {dims} sizes, got {list(shape)}")
    check_tensors(x, values, words, bias, weight_name="values")
    check_values(values, words, shape)
    return shape


def _autocast(x, *others):
    """What autocast does to the library's arguments: floating-point ones to its dtype, float64 untouched."""
    if not autocasts(x.device):
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
