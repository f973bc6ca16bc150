"""resident: a Sequential whose activations stay in the layout of the sparse kernels from one layer to the next."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _ext
from ..ops import dispatch
from . import network, resident_choice
from .compiled_mlp import has_global_hooks
from .dead_units import has_hook
from .invariant import MaskedWeight

_MOST_SHAPES = 4  # of images, for which a run is kept in C++
_MOST_CHOICES = 64  # of inputs, for which is remembered which way they go


def resident(model: nn.Sequential) -> Resident:
    """A module with the layers of an nn.Sequential that runs neighbouring layers as one call into C++, forward and backward.

    The kernels for unstructured sparsity want the batch last. A layer alone converts its input and output; here that happens
    at the edges only. Known are Linear and Conv2d, masked or not, ReLU, MaxPool2d, AvgPool2d, BatchNorm, Flatten and, in eval
    mode, Dropout, in float32 on the CPU. Whatever else is among them runs by itself; `repr` and `sl.explain` say why.

    So do layers that are faster one by one, with the kernels of their modules: measured at the first call with a batch of about
    that size, with gradients or without, and kept (`ops.dispatch`). SPARSELOTTERY_BACKEND=cpu puts all in C++.

    Args:
        model: stays as it is; the new module has the same layers, Parameters and state_dict keys, so optimizers, `sl.prune`
            and checkpoints go on.

    Raises:
        TypeError: not an nn.Sequential, or one with a `forward` of its own.
        ValueError: the model has hooks, which the new module would not have.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward not in (nn.Sequential.forward, Resident.forward):
        hint = "; its Sequentials can be resident" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model: expected an nn.Sequential, got {type(model).__name__}{hint}")
    if has_hook(model):
        raise ValueError("model: expected no hooks and no forward of its own, which the new module would not have")
    made = Resident(OrderedDict(model._modules))
    made.training = model.training  # of the container alone: a layer may be in another mode
    return made


class Resident(nn.Sequential):
    """An nn.Sequential that runs in C++ what can be (see `resident`), with the results of its layers up to rounding.

    As its layers run: other dtypes and devices, autocast, what torch.compile, torch.export and torch.jit.trace look at,
    `torch.func`'s transforms and forward-mode AD, and everything while there are global module hooks.

    Before each call the copies of the parameters in C++ are brought up to date: by the parameters' versions, after any step of
    an optimizer; biases and BatchNorm's values in full; and by one survivor of each weight: a write to a weight through `.data`
    that leaves that one alone goes unnoticed.

    Twice differentiable: with `create_graph=True` the backward pass goes through the layers.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._parts: _Parts | None = None
        network.watch()

    def forward(self, input: Tensor) -> Tensor:
        if not _may_run(input):
            return super().forward(input)
        for part in self._current().steps:
            input = part(input)
        return input

    def _current(self) -> _Parts:
        if self._parts is None or not self._parts.is_current():
            self._parts = _Parts(self)
        return self._parts

    def where(self) -> dict[str, str | None]:
        """{name of a module: why it runs by itself, or None: in C++ with its neighbours}, as things are now.

        Where layers by themselves were faster, that was so in the last call.
        """
        parts = self._current()
        if _ext.WHY_NOT is not None:
            return dict.fromkeys(parts.names, _ext.WHY_NOT)
        alone = {i: why for run in parts.runs if (why := run.why_alone()) for i in range(run.first, run.last + 1)}
        return {name: alone.get(i, parts.reasons.get(i)) for i, name in enumerate(parts.names)}

    def extra_repr(self) -> str:
        alone = [f"{name} runs by itself: {why}" for name, why in self.where().items() if why]
        return "\n".join(alone or ["all in C++"])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_parts": None}  # also what copy.deepcopy goes by

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        network.watch()


def _may_run(x) -> bool:
    """Whether `x` is what C++ takes, and nobody is watching the ops."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype is torch.float32
        and x.is_cpu
        and x.layout is torch.strided
        and x.ndim >= 2
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and _ext.WHY_NOT is None
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not has_global_hooks()
        and not x.is_neg()
        and dispatch.forced() in (None, "cpu")
    )


class _Parts:
    """How the modules of a Sequential are run, as long as they are what they were."""

    def __init__(self, model: Resident):
        self.names, self.modules = zip(*network.flat(model), strict=True) if len(model) else ((), ())
        runs, self.reasons = network.plan(self.modules)
        self.runs = [_Run(run, self.modules[run.first : run.last + 1]) for run in runs]
        starts = {run.first: run for run in self.runs}
        covered = {i for run in self.runs for i in range(run.first, run.last + 1)}
        self.steps = [starts.get(i, m) for i, m in enumerate(self.modules) if i in starts or i not in covered]
        inside = [m for m in model.modules() if m is model or type(m) is nn.Sequential]
        self.children = [(m._modules, [*m._modules.values()]) for m in inside]
        self.modes = [(m, m.training, _is_hooked(m)) for m in (*inside[1:], *self.modules)]
        self.settings = [(m, network.settings(m)) for m in self.modules]
        self.tensors = [
            (holder, name, t, _look(t))
            for module in self.modules
            for holder in (module._parameters, module._buffers)
            for name, t in holder.items()
        ]

    def is_current(self) -> bool:
        return (
            all([*modules.values()] == before for modules, before in self.children)
            and all(m.training is mode and _is_hooked(m) == hooked for m, mode, hooked in self.modes)
            and all(network.settings(m) == before for m, before in self.settings)
            and all(holder.get(name) is t and _look(t) == seen for holder, name, t, seen in self.tensors)
        )


def _look(t):
    """What changes when a tensor becomes another one and stays the same object."""
    if t is None or not t.is_cpu or t.is_meta:
        return None if t is None else (t.dtype, t.device)
    return (t.data_ptr(), t.dtype, t.requires_grad)


def _is_hooked(m) -> bool:
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks) or "forward" in m.__dict__


class _Run:
    """A run of layers, and what C++ has of it for each shape of images."""

    def __init__(self, run: network.Run, modules):
        self.run, self.modules, self.first, self.last = run, modules, run.first, run.last
        self.masked = [m for m, _ in run.layers if isinstance(m, MaskedWeight)]
        self.made: dict[tuple, network.Compiled] = {}
        self.refused: dict[tuple, str] = {}  # shape -> what C++ said
        self.choices: dict[tuple, str] = {}
        self.masks: list[int] | None = None  # the versions that the choices are for
        self.alone: str | None = None  # why the last call went to the layers, where C++ would have been possible
        places = [(m, name) for m, _ in run.layers for name in ("weight", "bias")]
        self.parameters = [m._parameters[name] for m, name in places if m._parameters.get(name) is not None]
        self.trains = any(p.requires_grad for p in self.parameters)

    def __call__(self, x: Tensor) -> Tensor:
        shape = self.shape(x)
        if shape is None or self.choice(x, shape) == resident_choice.LAYERS:
            return self.layers(x)
        return self.in_cpp(x, shape)

    def shape(self, x) -> tuple[int, int, int] | None:
        """Of an example of `x` as C++ takes it; None where the layers have to run."""
        if self.run.takes == "image":
            shape = tuple(x.shape[1:]) if x.ndim == 4 else None
        elif self.run.takes == "features":
            shape = (x.shape[1], 1, 1) if x.ndim == 2 else None
        else:
            shape = (math.prod(x.shape[1:]), 1, 1)
        if shape in self.refused or (self.run.training and len(x) == 1):  # a variance of one: torch objects
            return None
        return shape if all(layer._premasked() for layer in self.masked) else None  # else lent by functional_call

    def choice(self, x, shape) -> str:
        masks = [m.weight_mask._version for m in self.masked]
        if masks != self.masks or len(self.choices) == _MOST_CHOICES:
            self.masks, self.choices = masks, {}
        asked = (tuple(x.shape), torch.is_grad_enabled(), x.requires_grad, dispatch.state())
        found = self.choices.get(asked)
        if found is None:
            found = resident_choice.choose(self.run, x, shape, lambda: self.candidates(x))
            self.choices[asked] = found
        self.alone = None
        if found == resident_choice.LAYERS:
            passes = "forward and backward" if resident_choice.gradients(self.run, x) else "forward"
            self.alone = f"the layers by themselves are faster ({passes}, batch {len(x)})"
        return found

    def candidates(self, x):
        modules = resident_choice.copies(self.modules)
        (run,), _ = network.plan(modules)
        copied = _Run(run, modules)
        found = resident_choice.candidates(modules, x, lambda x: copied.in_cpp(x, copied.shape(x)), copied.layers)
        self.refused |= copied.refused
        return found

    def why_alone(self) -> str | None:
        """Why the layers run by themselves, as far as calls so far tell."""
        return next(iter(self.refused.values()), self.alone)

    def layers(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x

    def in_cpp(self, x: Tensor, shape) -> Tensor:
        compiled = self.compiled(shape)
        if compiled is None:
            return self.layers(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.trains):
            y = _Apply.apply(x, self, compiled, *self.parameters)
        else:
            y, _ = _forward(x, compiled, tape=False)
        if self.run.training:
            compiled.take_statistics()
        return y

    def compiled(self, shape) -> network.Compiled | None:
        """What C++ has for inputs of this shape, brought up to date; None where the layers themselves have to run."""
        found = self.made.get(shape)
        if found is not None:
            found.refresh()
            return found
        try:
            found = network.Compiled(self.run, shape)
        except ValueError as error:  # the layers say what is wrong with the input, if it is the input
            self.refused[shape] = str(error)
            return None
        if len(self.made) == _MOST_SHAPES:
            del self.made[next(iter(self.made))]
        self.made[shape] = found
        return found


def _forward(x, compiled, tape):
    x = x.detach().contiguous()
    y = x.new_empty(x.shape[0], *compiled.output)
    size = x.numel() // x.shape[0]
    if tape or compiled.run.training:
        return y, compiled.network.record(x.data_ptr(), size, x.shape[0], compiled.run.training, y.data_ptr())
    compiled.network.forward(x.data_ptr(), size, x.shape[0], y.data_ptr())
    return y, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run, compiled, *parameters):
        y, ctx.tape = _forward(x, compiled, tape=True)
        ctx.run, ctx.network, ctx.places, ctx.memory = run, compiled.network, compiled.places, compiled.memory
        ctx.save_for_backward(x, *parameters)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors  # says so if one has been changed since
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            dx, *gradients = _differentiable_backward(ctx.run, grad, [x, *parameters], wanted)
            return dx, None, None, *gradients
        grad = grad.contiguous()
        dx = grad.new_empty(x.shape) if wanted[0] else None
        targets, gradients, clean = [[0, 0, 0, 0] for _ in ctx.run.run.layers], [], []
        for i, ((layer, which), p, asked) in enumerate(zip(ctx.places, parameters, wanted[1:], strict=True)):
            gradient, same = ctx.memory[i].lend(p.shape) if asked else (None, False)
            if asked:
                targets[layer][which] = gradient.data_ptr()
            if same:
                clean.append(layer)
            gradients.append(gradient)
        ctx.network.backward(ctx.tape, grad.data_ptr(), 0 if dx is None else dx.data_ptr(), targets, clean)
        for memory, gradient in zip(ctx.memory, gradients, strict=True):
            if gradient is not None:
                memory.written(gradient)
        if not _keeps_graph():
            ctx.tape = None  # its memory serves the next forward pass, whoever still holds this output
        return dx, None, None, *gradients


def _differentiable_backward(run, grad, inputs, wanted):
    norms = [m for m, _ in run.run.layers if m.training and isinstance(m, network.NORMS)]
    statistics = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:  # these have moved on already
            norm._buffers.update({name: t.clone() for name, t in norm._buffers.items()})
        y = run.layers(inputs[0])
    finally:
        for norm, buffers in zip(norms, statistics, strict=True):
            norm._buffers.update(buffers)
    asked = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _keeps_graph() -> bool:
    """Whether the backward pass that runs was called with retain_graph=True, as far as torch tells."""
    tells = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tells is None else tells()
