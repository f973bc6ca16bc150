"""Networks of linear layers and ReLU that run as one call into C++ (csrc/network.h), for inference."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import _ext
from ..ops import bitmask, dispatch
from ..ops.masked_optim import increment_version
from .linear import MaskedLinear

# LeNet-300-100, batch 60, one thread of an EPYC (Zen 4): survivors take 759 us a step at 0.5, dense 824; 939 at 0.6.
DENSEST = 0.5


def layers_of(model: nn.Module) -> list[tuple[nn.Linear, bool]] | str:
    """[(linear layer, whether a ReLU follows)] of an nn.Sequential, or what is in it that the C++ code does not know."""
    if type(model) is not nn.Sequential:
        return f"a {type(model).__name__}, not an nn.Sequential"
    if _has_hook(model):
        return "a hook on the model"
    layers: list[tuple[nn.Linear, bool]] = []
    for module in _flat(model):
        kind = type(module)
        if _has_hook(module):
            return f"a hook on a {kind.__name__}"
        if kind is nn.Flatten and not layers and (module.start_dim, module.end_dim) == (1, -1):
            continue
        if kind is nn.Identity:
            continue
        if kind is nn.ReLU and layers:
            layers[-1] = (layers[-1][0], True)
        elif kind in (nn.Linear, MaskedLinear):
            layers.append((module, False))
        else:
            return f"a {kind.__name__} among the layers"
    if not layers:
        return "no linear layer"
    for (a, _), (b, _) in itertools.pairwise(layers):
        if a.out_features != b.in_features:
            return "layers that do not fit together"
    for linear, _ in layers:
        if not _has_its_shapes(linear):
            return "a layer whose weight, bias or mask is not of the shape that it names"
        for p in linear._parameters.values():
            if p is None:
                continue
            if type(p) is not nn.Parameter or p.dtype is not torch.float32 or not p.is_cpu or not p.is_contiguous():
                return "a parameter that is no contiguous float32 tensor on the CPU"
            if p.is_inference() or p.numel() == 0 or p.is_neg():
                return "a parameter that is empty, a negative view or made in inference mode"
    return layers


def _flat(model: nn.Sequential):
    """The modules in order, those of a Sequential inside too; a Sequential that has a hook as itself."""
    for module in model:
        if type(module) is nn.Sequential and not _has_hook(module):
            yield from _flat(module)
        else:
            yield module


def _has_hook(module: nn.Module) -> bool:
    """Whether its call does more than its class says: by a hook, or by a `forward` of its own."""
    return any(value for name, value in vars(module).items() if name.endswith("_hooks") or name == "forward")


def _has_its_shapes(linear: nn.Linear) -> bool:
    """Modules go by the parameters alone, C++ would read and write as far as out_features and in_features say."""
    weight, bias = linear._parameters.get("weight"), getattr(linear, "bias", None)
    shape = (linear.out_features, linear.in_features)
    if weight is None or tuple(weight.shape) != shape:
        return False
    if bias is not None and (bias is not linear._parameters.get("bias") or tuple(bias.shape) != shape[:1]):
        return False
    if not isinstance(linear, MaskedLinear):
        return True
    words = linear.weight_mask
    return words.is_cpu and words.dtype is torch.int32 and tuple(words.shape) == bitmask.words_shape(shape)


def has_global_hooks() -> bool:
    """Whether somebody wants to hear of every module's call."""
    m = nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def make_network(layers: list[tuple[nn.Linear, bool]]):
    """The layers of `layers_of` as a network in C++ with copies of their weights."""
    fields, keep = [], []
    for linear, relu in layers:
        weight, words = linear.weight, 0
        if isinstance(linear, MaskedLinear):
            if not linear._premasked():  # lent by functional_call: as it comes, and not to be written to
                weight = torch.where(bitmask.unpack(linear.weight_mask, weight.shape), weight.detach(), 0.0)
            keep += [weight, linear.weight_mask.contiguous()]
            words = keep[-1].data_ptr()
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        layer = {"kind": "linear", "outputs": linear.out_features, "weight": weight.data_ptr(), "words": words}
        fields.append(layer | {"bias": bias})
        if relu:
            fields.append({"kind": "relu"})
    shape = (layers[0][0].in_features, 1, 1)
    return _ext.extension().CpuNetwork(shape, fields, linear_densest=DENSEST, conv_densest=0.0)


class CompiledMLP(nn.Module):
    """A network of linear layers and ReLU for inference, run as one call into C++ where that is possible.

    Where it is not (another dtype or device, gradients, tracing, hooks), `network` runs through its modules. The weights in
    C++ are copies, made anew when a parameter or the network itself changed; a write through `.data` is not noticed.
    `state_dict` holds those of `network` under "network."; pickling keeps the modules alone.

    Args:
        network: an nn.Sequential of nn.Flatten, nn.Linear, MaskedLinear and nn.ReLU, on the CPU in float32.

    Shapes: [*, in_features] (with nn.Flatten: [N, *]) -> what `network` returns.

    Raises:
        ValueError: `network` is something else.
    """

    def __init__(self, network: nn.Sequential):
        super().__init__()
        layers = layers_of(network)
        if isinstance(layers, str):
            raise ValueError(f"network: expected linear layers and ReLU alone, got {layers}")
        self.network = network
        self._compiled = None
        _watch()

    def forward(self, input: Tensor) -> Tensor:  # the name that it has in nn.Sequential
        x = input
        if not self._may_compile(x):
            return self.network(x)
        if self._compiled is None or not self._compiled.is_current(self.network):
            layers = layers_of(self.network)
            if isinstance(layers, str):
                return self.network(x)
            self._compiled = _Compiled(self.network, layers)
        compiled = self._compiled
        if compiled.stamp is None or (torch.is_grad_enabled() and (x.requires_grad or compiled.wants_gradients())):
            return self.network(x)
        rows = x.flatten(1) if compiled.flattens else x.reshape(-1, x.shape[-1])
        if rows.shape[1] != compiled.features:
            return self.network(x)  # which says what is wrong
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = x.new_empty(rows.shape[0], compiled.outputs)
        compiled.network.forward(rows.data_ptr(), rows.stride(0), rows.shape[0], y.data_ptr())
        return y if compiled.flattens or x.ndim == 2 else y.view(*x.shape[:-1], compiled.outputs)

    def _may_compile(self, x) -> bool:
        """Whether `x` is what C++ takes, and nobody is watching the ops."""
        return (
            type(x) is Tensor
            and x.dtype is torch.float32
            and x.is_cpu
            and x.layout is torch.strided
            and x.ndim >= 2
            and x.numel() > 0
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and not has_global_hooks()
            and not x.is_neg()  # not before is_compiling: dynamo cannot trace it
            and not x._is_zerotensor()
            and dispatch.forced() in (None, "cpu")
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_compiled": None}  # also what copy.deepcopy goes by

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        _watch()


class _Compiled:
    """The network in C++, and what its weights were when it was made."""

    def __init__(self, model, layers):
        self.model, self.layers = model, layers
        self.network = make_network(layers)
        self.stamp, self.tensors = _stamp(layers), _tensors(layers)  # kept: their ids are nobody else's meanwhile
        self.modules = list(model.modules())
        self.children = [(m._modules, [*m._modules.values()]) for m in self.modules if m._modules]
        self.flattens = any(isinstance(module, nn.Flatten) for module in model.modules())
        self.features, self.outputs = layers[0][0].in_features, layers[-1][0].out_features

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model still is what it was made from: its modules, weights and masks, and no hook has come."""
        return (
            model is self.model
            and all([*modules.values()] == before for modules, before in self.children)
            and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self.modules)
            and self.stamp == _stamp(self.layers)
        )

    def wants_gradients(self) -> bool:
        return any(p is not None and p.requires_grad for linear, _ in self.layers for p in linear._parameters.values())


def _tensors(layers) -> list[Tensor]:
    return [
        t for linear, _ in layers for t in (*linear._parameters.values(), *linear._buffers.values()) if t is not None
    ]


def _stamp(layers) -> list[tuple[int, int, int]] | None:
    """Changes whenever a weight, bias or mask does; None where tensors have no version (inference mode)."""
    try:
        return [(id(t), t._version, t.data_ptr()) for t in _tensors(layers)]
    except RuntimeError:
        return None


_watching = False


def _watch() -> None:
    """Torch's fused optimizers write without a new version: give their parameters one. Once per process."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _after_step(optimizer: Optimizer, args, kwargs) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.is_cpu and not p.is_inference()])
