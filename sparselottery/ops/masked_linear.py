"""Masked linear layer as an op: y = x (W∘M)ᵀ + b, with dX = dY (W∘M), dW∘M and db.

Source: the subnetwork f(x; m∘θ) of Frankle & Carbin 2019, section 1. Backends: reference; dense (the library's matmul, the
mask applied to dW in place); cpu (csrc/cpu/masked_linear.cpp, unstructured sparse; float32, and bfloat16 computed in float32);
triton; bf16x6 (fp32_linear.py, where it is allowed); cuda (sparse_linear.py, masks of high sparsity). `dispatch` chooses.

With `activation="relu"` max(y, 0) comes out: on the CPU from the sparse kernel itself, elsewhere from one more pass over y.

A weight off the mask counts as +0 whatever it holds, NaN and inf too. Where x or dY holds inf or NaN, a sparse backend
leaves out the products with dead weights that a dense one turns into NaN.
"""

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _ext
from . import bitmask, dispatch, fp32_linear, reference, sparse_linear
from .library import LIBRARY, autocasts, check_tensors, is_plain, transformed
from .masked_linear_index import INDEXES, index_of, plan_of

OP = "masked_linear"

# Where no sparse backend has ever won: not worth a measurement.
_SMALLEST = 4096  # weights
CPU_DTYPES = (torch.float32, torch.bfloat16)
_MOST = 2**32  # weights that the CPU index can number

LIBRARY.define(
    "masked_linear(Tensor x, Tensor weight, Tensor words, Tensor? bias, bool premasked, bool relu=False) -> Tensor"
)
LIBRARY.define(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, bool premasked, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)"
)


def _rows(t):
    """`[*, n]` -> `[rows, n]`; spelled out because reshape(-1, 0) is ambiguous."""
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _none(like):
    """What an undefined gradient is in the op's schema: a tensor without elements."""
    return like.new_empty(0)


def _defined(gradients, like):
    return tuple(_none(like) if g is None else g for g in gradients)


# ---- reference and dense ----


def _reference_backward(grad, x, weight, words, output_mask):
    inputs = x if output_mask[1] else grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    gradients = reference.masked_linear_backward(grad, inputs, weight, words)
    return tuple(g if wanted else _none(grad) for g, wanted in zip(gradients, output_mask, strict=True))


def _masked(weight, words, premasked):
    return weight if premasked else bitmask.apply_(weight.clone(memory_format=torch.contiguous_format), words)


def _dense(x, weight, words, bias, premasked):
    return F.linear(x, _masked(weight, words, premasked), bias)


def dense_backward(grad, x, weight, words, premasked, output_mask):
    dx = grad @ _masked(weight, words, premasked) if output_mask[0] else _none(grad)
    dw = bitmask.zero_dead_(_rows(grad).t() @ _rows(x), words) if output_mask[1] else _none(grad)
    return dx, dw, _rows(grad).sum(0) if output_mask[2] else _none(grad)


def _emulated_backward(grad, x, weight, words, premasked, output_mask):
    weight = _masked(weight, words, premasked) if output_mask[0] else None
    dx, dw = fp32_linear.backward(grad, x if output_mask[1] else None, weight)
    if dw is not None:
        bitmask.zero_dead_(dw, words)
    db = _rows(grad).sum(0) if output_mask[2] else None
    return _defined((dx, dw, db), grad)


def _sparse_backward(grad, x, weight, words, output_mask):
    rest = dense_backward(grad, x, weight, words, True, (False, *output_mask[1:]))
    dx = sparse_linear.backward_input(grad, weight, words) if output_mask[0] else _none(grad)
    return dx, *rest[1:]


# ---- cpu ----


def _unit_rows(t):
    """`[*, n]` -> `[rows, n]` with neighbours in a row next to each other, copied only where they are not."""
    t = _rows(t)
    return t if t.stride(1) == 1 and not t.is_neg() else t.resolve_neg().contiguous()


def cpu(x, weight, words, bias, relu=False, trains=False, anew=False, held=None):
    """`trains`: the weight changes between calls. `anew`: as if it had, since the last one. `held`: `plan_of` these tensors."""
    if not weight.is_contiguous() or weight.is_neg():
        weight, held = weight.resolve_neg().contiguous(), None
    shape = weight.shape
    dtype = x.dtype
    if dtype is not torch.float32:
        x, bias = x.float(), None if bias is None else bias.float()
    rows = _unit_rows(x)
    batch = rows.shape[0]
    y = rows.new_empty(batch, shape[0])
    if bias is not None and (bias.is_neg() or not bias.is_contiguous()):
        bias = bias.resolve_neg().contiguous()
    plan, values = held or plan_of(words, weight, shape)
    if anew:
        values = (*values[:3], False)
    plan.forward(
        *values,
        rows.data_ptr(),
        rows.stride(0),
        batch,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0,
        relu,
        trains,
    )
    if dtype is not torch.float32:
        y = y.to(dtype)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], shape[0])


def cpu_backward(grad, x, weight, words, output_mask, watched=False, held=None, anew=False):
    """None for a gradient that is not asked for.

    `watched`: dW's reader is eager torch, whose writes move version counters; compiled code's need not. `held`, `anew`: as for
    `cpu`.
    """
    if not (output_mask[0] or output_mask[1]) or weight.numel() == 0:
        return dense_backward(grad, x, weight, words, True, output_mask)
    if not weight.is_contiguous() or weight.is_neg():
        weight, held = weight.resolve_neg().contiguous(), None
    shape = weight.shape
    dtype = grad.dtype
    if dtype is not torch.float32:
        grad, x = grad.float(), x.float() if output_mask[1] else x
    plan, values = held or plan_of(words, weight, shape)
    if anew:
        values = (*values[:3], False)
    rows = _unit_rows(grad)
    inputs = _unit_rows(x) if output_mask[1] else None
    dx = None
    if output_mask[0]:  # a tuple of lengths costs 1 us
        dx = rows.new_empty(rows.shape[0], shape[1]) if grad.ndim == 2 else rows.new_empty((*grad.shape[:-1], shape[1]))
    memory, is_zero = None, False
    if not output_mask[1]:
        dw = None
    elif dtype is not torch.float32 or words.is_inference() or weight.is_inference():  # the plan may go with this call
        dw = torch.empty(shape, dtype=dtype, device="cpu")
    else:
        memory = INDEXES[id(words)].gradient
        dw, is_zero = memory.lend(shape, plan)
    db = rows.new_empty(shape[0]) if output_mask[2] else None
    plan.backward(
        *values,
        rows.data_ptr(),
        rows.stride(0),
        0 if inputs is None else inputs.data_ptr(),
        0 if inputs is None else inputs.stride(0),
        rows.shape[0],
        dx.data_ptr() if output_mask[0] else 0,
        dw.data_ptr() if output_mask[1] else 0,
        db.data_ptr() if output_mask[2] else 0,
        0,
        is_zero,
    )
    if watched and memory is not None:
        memory.written(dw, plan)
    if dtype is not torch.float32:
        dx, dw, db = (None if g is None else g.to(dtype) for g in (dx, dw, db))
    return dx, dw, db


# ---- triton ----


def _triton():
    from ..kernels import masked_linear

    return masked_linear


def _triton_backward(grad, x, weight, words, output_mask):
    rows = _rows(grad)
    dx = dw = None
    if output_mask[0]:
        dx = _triton().backward_input(rows, weight, words).view(*grad.shape[:-1], weight.shape[1])
    if output_mask[1]:
        dw = _triton().backward_weight(rows, _rows(x), words)
    db = rows.sum(0) if output_mask[2] else None
    return _defined((dx, dw, db), grad)


# ---- the choice ----


def _key(direction, t, weight, words, *extra):
    """dispatch's key for a call whose batch is `t`'s leading dimensions; None where only dense can win."""
    numel = weight.numel()
    if numel < _SMALLEST or numel >= _MOST:
        return None
    if t.is_cpu:
        if t.dtype not in CPU_DTYPES or _ext.WHY_NOT is not None or not weight.is_contiguous():
            return None
    elif not t.is_cuda:
        return None
    shape = tuple(weight.shape)
    try:
        index = index_of(words, shape)
        _ = weight._version
    except RuntimeError:  # inference tensors keep no version counter: nothing about them can be cached
        return None
    emulated = fp32_linear.takes(t)
    if index.bucket < 2 and not emulated:
        return None
    batch = t.numel() // t.shape[-1]
    if batch == 0:
        return None
    dtype = "float32" if t.dtype is torch.float32 else str(t.dtype)[6:]
    batch = dispatch.batch_bucket(batch)
    extra += (fp32_linear.NAME,) if emulated else ()  # there is one candidate more
    return (direction, shape, dtype, index.bucket, batch, torch.get_num_threads(), t.device.type, *extra)


def _candidates(t, density, dense, cpu, triton, plain, emulated, cuda):
    """name -> call, of those that these tensors allow; density: a number, or None: whatever it is."""
    candidates = {"dense": dense, "reference": plain}
    if sparse_linear.takes(t, density or 0.0):
        candidates["cuda"] = cuda
    if fp32_linear.takes(t):
        candidates[fp32_linear.NAME] = emulated
    if t.is_cpu and t.dtype in CPU_DTYPES and _ext.WHY_NOT is None:
        candidates["cpu"] = cpu
    if t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from .. import kernels

        if kernels.AVAILABLE and t.dtype in _triton().DTYPES:
            candidates["triton"] = triton
    return candidates


def _choose(direction, key, candidates):
    measurable = candidates
    if key is None:  # forced by the environment
        key = (direction,)
    elif key[6] == "cpu":  # Triton's interpreter is for tests: it runs when it is asked for, not in a measurement
        measurable = {n: c for n, c in candidates.items() if n != "triton" or dispatch.forced()}
    return dispatch.choose(OP, key, measurable, rule=lambda: rule(key))


# Densities up to which the cpu backend is chosen without a stopwatch: about half of where it broke even, batch 16 to 128,
# 300x100 to 1024x1024, one thread, on an AMD EPYC (Zen 4): 1.5 times faster than dense or more at each of these points.
_RULE = {"avx512": 0.22, "avx2": 0.16, "portable": 0.09}
_RULE_SMALL_BATCH = 0.06  # below batch 16, from _RULE_WEIGHTS weights on
_RULE_WORK = 2**22  # multiply-adds of the dense product: below, the call itself costs what sparsity could save
_RULE_WEIGHTS = 100_000


def rule(key):
    """The choice of a reproducible run: a function of instruction set, shape, density and batch alone."""
    direction, shape, dtype, bucket, batch, _, device, *_ = key
    if device != "cpu" or dtype != "float32" or (batch >= 16 and shape[0] * shape[1] * batch < _RULE_WORK):
        return "dense"
    densest = _RULE[_ext.extension().cpu_isa()]
    if batch < 16:
        small = shape[0] * shape[1] < _RULE_WEIGHTS or (batch == 1 and direction == "backward")
        densest = 0 if small else min(densest, _RULE_SMALL_BATCH)
    return "cpu" if dispatch.bucket_density(bucket) <= densest else "dense"


def keys_of(x, weight, words, wanted):
    """dispatch's keys for the passes of one use of a masked weight: forward, and backward if it will be asked for x or weight."""
    keys = [_key("forward", x, weight, words, True, wanted is not None and wanted[1])]
    if wanted is not None and (wanted[0] or wanted[1]):  # grad has the batch, dtype and device of x
        keys.append(_key("backward", x, weight, words, True, *wanted))
    return keys


def runs_dense(x: Tensor, weight: Tensor, words: Tensor, wanted: tuple[bool, bool, bool] | None) -> bool | None:
    """Whether a caller with a masked weight does best to call the library directly; None: not known yet.

    The arguments are those of `masked_linear`; `wanted`: which gradients (x, weight, bias) will be asked for, None: no backward.
    """
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.dtype is not weight.dtype or x.device != weight.device:
        return None  # the op says what is wrong
    keys = keys_of(x, weight, words, wanted)
    return dispatch.goes_to_library(OP, [(key, lambda key=key: rule(key)) for key in keys])


# ---- the ops ----


def _forward(x, weight, words, bias, premasked, relu=False, trains=False):
    key = _key("forward", x, weight, words, premasked, trains)
    name = dispatch.lookup(OP, key)
    if name == "cpu":
        return cpu(x, weight, words, bias, relu, trains)
    if name == "dense":
        y = _dense(x, weight, words, bias, premasked)
    else:
        candidates = _candidates(
            x,
            key and dispatch.bucket_density(key[3]),
            lambda: _dense(x, weight, words, bias, premasked),
            lambda: cpu(x, weight, words, bias, False, trains, anew=trains),
            lambda: _triton().forward(_rows(x), weight, words, bias).view(*x.shape[:-1], weight.shape[0]),
            lambda: reference.masked_linear(x, weight, words, bias),
            lambda: fp32_linear.forward(x, _masked(weight, words, premasked), bias),
            lambda: sparse_linear.forward(x, weight, words, bias),
        )
        name = name or _choose("forward", key, candidates)
        if name == "cpu":
            return cpu(x, weight, words, bias, relu, trains)
        y = candidates[name]()
    return y.relu_() if relu else y


def _backward(grad, x, weight, words, premasked, output_mask, watched=False):
    key = None
    if output_mask[0] or output_mask[1]:
        key = _key("backward", grad, weight, words, premasked, *output_mask)
    name = dispatch.lookup(OP, key)
    if name == "dense":
        return dense_backward(grad, x, weight, words, premasked, output_mask)
    if name == "cpu":
        return _defined(cpu_backward(grad, x, weight, words, output_mask, watched), grad)
    candidates = _candidates(
        grad,
        key and dispatch.bucket_density(key[3]),
        lambda: dense_backward(grad, x, weight, words, premasked, output_mask),
        lambda: _defined(cpu_backward(grad, x, weight, words, output_mask, watched, anew=output_mask[1]), grad),
        lambda: _triton_backward(grad, x, weight, words, output_mask),
        lambda: _reference_backward(grad, x, weight, words, output_mask),
        lambda: _emulated_backward(grad, x, weight, words, premasked, output_mask),
        lambda: _sparse_backward(grad, x, weight, words, output_mask),
    )
    name = name or _choose("backward", key, candidates)
    if name == "cpu":
        return _defined(cpu_backward(grad, x, weight, words, output_mask, watched), grad)
    return candidates[name]()


LIBRARY.impl("masked_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::masked_linear")
def _(x, weight, words, bias, premasked, relu=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("sparselottery::masked_linear_backward")
def _(grad, x, weight, words, premasked, output_mask):
    shapes = ((*grad.shape[:-1], weight.shape[1]), weight.shape, (weight.shape[0],))
    return tuple(grad.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, output_mask, strict=True))


class _MaskedLinear(torch.autograd.Function):
    # forward takes ctx: with a setup_context apart, `apply` inspects forward's signature on each call (20 of 28 us).
    @staticmethod
    def forward(ctx, x, weight, words, bias, premasked, relu):
        ctx.arguments = premasked, relu
        if is_plain(x, weight):  # the dispatcher costs 7 us
            y = _forward(x, weight, words, bias, premasked, relu, ctx.needs_input_grad[1])
        else:
            y = torch.ops.sparselottery.masked_linear(x, weight, words, bias, premasked, relu)
        # As F.linear does, keep x only where dW will be asked for.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, words, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, words, y = ctx.saved_tensors
        premasked, relu = ctx.arguments
        asked = ctx.needs_input_grad
        wanted = [asked[0], asked[1], asked[3]]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            if relu:
                grad = torch.where(y <= 0, 0, grad)
            dx, dw, db = differentiable_backward(grad, x, weight, words, wanted)
        else:
            if relu:
                grad = torch.ops.aten.threshold_backward(grad, y, 0)
            if is_plain(grad, weight):
                dx, dw, db = _backward(grad, x, weight, words, premasked, wanted, True)
            else:
                x = grad.new_empty(0) if x is None else x
                dx, dw, db = torch.ops.sparselottery.masked_linear_backward(grad, x, weight, words, premasked, wanted)
        return dx if asked[0] else None, dw if asked[1] else None, None, db if asked[3] else None, None, None


def differentiable_backward(grad, x, weight, words, wanted):
    keep = reference.bitmask_unpack(words, weight.shape)
    dx = grad @ torch.where(keep, weight, 0) if wanted[0] else None
    dw = torch.where(keep, _rows(grad).t() @ _rows(x), 0) if wanted[1] else None
    return dx, dw, _rows(grad).sum(0) if wanted[2] else None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None = None,
    *,
    premasked: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Apply a linear layer whose weight is masked by bits.

    Args:
        x: `[*, in_features]`, floating point; any strides.
        weight: `[out_features, in_features]`, the dtype and device of `x` (under autocast: any that F.linear takes).
        words: int32 `[out_features, ceil(in_features / 32)]`; bit i of word w keeps column 32 w + i.
        bias: `[out_features]` or None.
        premasked: the caller's promise that `weight` is 0 wherever the mask is; it spares the dense backend a masked copy.
        activation: None, or "relu": max(y, 0) comes out instead of y, without a pass of its own where the kernel can.

    Returns:
        `[*, out_features]`. The gradient of `weight` is zero wherever the mask is. Differentiable twice;
        in forward mode and under `torch.func`'s transforms too, where it is computed in plain torch.

    Raises:
        TypeError: not a tensor; a dtype that is not floating point, or that differs between arguments.
        ValueError: a shape or device that does not fit, an unknown activation; the message names the argument.
    """
    check_tensors(x, weight, words, bias)
    if activation is not None and activation != "relu":
        raise ValueError(f'activation: expected None or "relu", got {activation!r}')
    relu = activation is not None
    if autocasts(x.device):
        x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, words, bias)
    if transformed():
        y = reference.masked_linear(x, weight, words, bias)
        return y.relu() if relu else y
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _MaskedLinear.apply(x, weight, words, bias, premasked, relu)
    return torch.ops.sparselottery.masked_linear(x, weight, words, bias, premasked, relu)


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
