"""Whether neighbouring layers go to C++ as one or run one by one: measured as the kernels of a single layer are.

The layout of the sparse kernels pays where several layers share its conversion. A large layer alone, or one that keeps most of
its weights, may be faster with the kernels that its module chooses.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.masked_optim import increment_version
from . import network
from .invariant import MaskedWeight

OP = "resident"
IN_CPP, LAYERS = "cpu", "dense"  # the names of the two ways: a SPARSELOTTERY_BACKEND of cpu forces the first


def choose(run: network.Run, x: Tensor, shape: tuple[int, int, int], make: Callable[[], dict]) -> str:
    """IN_CPP or LAYERS for inputs like `x`.

    Args:
        shape: of one example, as C++ takes it.
        make: the candidates of `dispatch.choose`; called where something has to be measured.
    """
    key, rule = _key(run, x, shape), functools.partial(_rule, run)
    if dispatch.forced() or dispatch.is_reproducible():
        return dispatch.choose(OP, key, dict.fromkeys((IN_CPP, LAYERS)), rule=rule)
    return dispatch.recall(OP, key, (IN_CPP, LAYERS)) or dispatch.choose(OP, key, make(), rule=rule)


def gradients(run: network.Run, x: Tensor) -> list[bool]:
    """Of which a backward pass will be asked for: the input, and every parameter; empty where there will be none."""
    if not torch.is_grad_enabled():
        return []
    wanted = [x.requires_grad, *(p.requires_grad for module, _ in run.layers for p in module.parameters())]
    return wanted if any(wanted) else []


def candidates(
    modules: list[nn.Module], x: Tensor, in_cpp: Callable[[Tensor], Tensor], layers: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], None]]:
    """Both ways as calls without arguments: forward, and backward where `x` or the parameters say so.

    Args:
        modules: copies of the caller's, so that nothing of the caller's moves: statistics, gradients, hooks.
    """
    grad = torch.is_grad_enabled()
    x = x.detach().clone().requires_grad_(x.requires_grad and grad)
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    asked = [t for t in (x, *parameters) if t.requires_grad] if grad else []

    def run(way):
        if not asked:
            way(x)
            return
        _as_after_a_step(modules, parameters)
        # The caller's hooks on what autograd saves (checkpointing counts it) must not see this.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            y = way(x)
            torch.autograd.grad(y, asked, torch.ones_like(y))

    def outside_inference_mode(way):
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            run(way)

    ways = {IN_CPP: in_cpp, LAYERS: layers}
    calls = {name: functools.partial(outside_inference_mode, way) for name, way in ways.items()}
    for call in calls.values():
        call()  # masked layers measure their own kernels in their first call
    return calls


def _as_after_a_step(modules, parameters):
    """As a step of `sl.optim` leaves them: what is copied of the weights has to be copied anew."""
    increment_version(parameters)
    for module in modules:
        if isinstance(module, MaskedWeight):
            module._note_version(module.weight)


def copies(modules: list[nn.Module]) -> list[nn.Module]:
    """Of the modules as they are now, without the hooks of their parameters."""
    with torch.inference_mode(False):
        return copy.deepcopy(list(modules))


def _same(t):
    return t


def _key(run, x, shape):
    """As `dispatch` wants it; what it does not name is described in words."""
    weights = kept = 0
    layers = []
    for module, fields in run.layers:
        words = " ".join(str(value) for value in fields.values())
        if "outputs" in fields:
            density = module.density if isinstance(module, MaskedWeight) else 1.0
            weights += module.weight.numel()
            kept += density * module.weight.numel()
            words += f" ~{dispatch.density_bucket(density)}"
        layers.append(words)
    wanted = gradients(run, x)
    return (
        "forward+backward" if wanted else "forward",
        shape,
        str(x.dtype),
        dispatch.density_bucket(kept / weights),
        dispatch.batch_bucket(len(x)),
        torch.get_num_threads(),
        "cpu",
        "; ".join(layers),
        "".join("01"[want] for want in wanted),
        run.training,
    )


def _rule(run):
    """Without a stopwatch: C++ for several layers, most of whose weights are in those that it keeps as survivors alone."""
    layers = [(module, fields["kind"]) for module, fields in run.layers if "outputs" in fields]
    densest = {"linear": network.LINEAR_DENSEST, "conv2d": network.CONV_DENSEST}
    sparse = sum(m.weight.numel() for m, kind in layers if isinstance(m, MaskedWeight) and m.density <= densest[kind])
    return IN_CPP if len(layers) > 1 and 2 * sparse >= sum(m.weight.numel() for m, _ in layers) else LAYERS
