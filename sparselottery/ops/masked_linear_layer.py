"""`masked_linear` for a masked layer on a CPU, which calls it again and again: little is looked at, and nothing twice."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from .library import is_plain
from .masked_linear import OP, cpu, cpu_backward, dense_backward, differentiable_backward, keys_of, masked_linear, rule
from .masked_linear_index import plan_of

DENSE = ("dense", "dense")
_GATHER = (
    1.3e-3  # us a survivor: what the pass that comes first after an optimizer's step pays for all (AMD EPYC, Zen 4)
)


def takes(x: Tensor) -> bool:
    """Whether `prepared` is for inputs like this."""
    return x.is_cpu and not torch.is_autocast_enabled("cpu")


def backends(x: Tensor, weight: Tensor, words: Tensor, wanted: tuple[bool, bool, bool] | None) -> tuple | None:
    """(forward, backward or None) for `prepared`; None where they are not known yet, or where the op has to say what is wrong.

    The arguments are those of `masked_linear`; `wanted`: which gradients (x, weight, bias) will be asked for, None: no backward.
    """
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.dtype is not weight.dtype or not weight.is_cpu:
        return None
    keys = keys_of(x, weight, words, wanted)
    names = tuple(dispatch.decided(OP, key, lambda key=key: rule(key)) for key in keys)
    if not {"dense", "cpu"}.issuperset(names):
        return None
    if names == ("dense", "cpu") and not dispatch.is_reproducible():
        forward = dispatch.measured(OP, keys[0])
        survivors = dispatch.bucket_density(keys[1][3]) * weight.numel()
        if forward is not None and forward["cpu"] < forward["dense"] + _GATHER * survivors:
            return "cpu", "cpu"  # the values that its forward pass gathers serve its backward pass as well
    return (*names, None if wanted is None else "dense")[:2]


def prepared(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, names: tuple) -> Tensor:
    """`masked_linear` for a masked layer that asked `backends` for the names for just such a call: little is looked at again.

    The layer answers for the weight being masked, and for nothing being there that wants to see the op itself.
    """
    if bias is not None and (bias.dtype is not x.dtype or bias.shape[0] != weight.shape[0] or not bias.is_cpu):
        return masked_linear(x, weight, words, bias, premasked=True)  # which says what is wrong
    if names[1] is not None:
        return _apply_prepared(x, weight, bias, words, names)
    return cpu(x, weight, words, bias) if names[0] == "cpu" else F.linear(x, weight, bias)


class _Prepared(torch.autograd.Function):
    """What `prepared` calls: float32 or bfloat16 on a CPU, the backends known, every argument looked at before."""

    @staticmethod
    def forward(ctx, x, weight, bias, words, names):
        trains = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if trains else None, weight, words)
        held = None  # of both passes: what is saved is looked at again, and has not changed in between
        if "cpu" in names and weight.is_contiguous():
            held = plan_of(words, weight, weight.shape)
        ctx.backend = names[1], held
        if names[0] == "cpu":
            return cpu(x, weight, words, bias, False, trains, False, held)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, words = ctx.saved_tensors
        name, held = ctx.backend
        asked = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            dx, dw, db = differentiable_backward(grad, x, weight, words, asked)
        elif not is_plain(grad, weight):
            x = grad.new_empty(0) if x is None else x
            wanted = list(asked[:3])
            dx, dw, db = torch.ops.sparselottery.masked_linear_backward(grad, x, weight, words, True, wanted)
        elif name == "cpu":
            dx, dw, db = cpu_backward(grad, x, weight, words, asked, True, held)
        else:
            dx, dw, db = dense_backward(grad, x, weight, words, True, asked)
        return dx if asked[0] else None, dw if asked[1] else None, db if asked[2] else None, None, None


try:  # Function.apply without its questions about torch.func's transforms: a masked layer asks those itself
    _apply_prepared = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Prepared)
except (AttributeError, KeyError):
    _apply_prepared = _Prepared.apply
