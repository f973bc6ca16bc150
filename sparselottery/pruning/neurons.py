"""Pruning whole neurons and channels by a score for each: the same number everywhere, and the pruned ones really out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks import Mask
from ..nn.convert import masked_modules, sparsify_named, unpacked
from ..ops import bitmask
from ..ops.global_topk import global_topk
from . import structures
from .scope import SCOPES, Group, to_density
from .wiring import is_convolution, unit_count, wiring


@dataclass(frozen=True)
class NeuronReport:
    """What `prune_neurons` left.

    Attributes:
        kept: layer name -> bool `[units]` on the CPU, of the layers whose neurons were pruned.
        outputs: layers that were scored but left whole, since their units are the outputs of the network.
        weight_density: the fraction of the weights of all masked layers that is left.
    """

    kept: dict[str, Tensor]
    outputs: tuple[str, ...]
    weight_density: float

    @property
    def count(self) -> int:
        """How many neurons are left, of `total`."""
        return sum(int(kept.sum()) for kept in self.kept.values())

    @property
    def total(self) -> int:
        return sum(len(kept) for kept in self.kept.values())

    @property
    def density(self) -> float:
        """The fraction of the neurons that is left."""
        return self.count / self.total


def prune_neurons(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    density: float,
    scope: str = "layer",
    optimizer: Optimizer | None = None,
) -> NeuronReport:
    """Keep the neurons and channels of highest score, in place: `prune_neurons(model, sl.mutual_information(...), density=0.5)`.

    `max(round(density * neurons), layers)` of them survive, ties to the lowest index; every layer keeps at least one. A pruned
    neuron is out: its incoming weights are masked and its bias is set to 0, so that it gives the same for every input (0
    after a ReLU). Where the layers that read it are known (`wiring`: a forward that torch.fx can trace, with activations,
    BatchNorm, dropout, pooling and flattening in between), their weights for it are masked as well: nothing reads it, it gets
    no gradient, and the network without it gives the same outputs. Elsewhere, behind a sum with a shortcut for one, the
    constant that BatchNorm or a trained bias makes of it is still read.

    Plain layers are turned into masked ones first. Neurons that are already out (no incoming weight left) never come back;
    they count in `density`.

    Args:
        scores: layer name -> floating point `[units]`. Layers whose units are outputs of the network are left whole; so are
            layers without scores. Of a model that cannot be traced the last layer is taken for the output.
        density: the fraction of the scored neurons that is left, above 0 and at most 1.
        scope: "layer": each layer keeps this fraction (rounded so that the sum is exact). "global": all are ranked together.
        optimizer: its state at pruned weights and biases is zeroed too.

    Raises:
        TypeError, ValueError: an argument is not as described; NaN in a score (the message names the layer); more asked for
            than is left. Nothing has been pruned then.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    density = _density(density)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
    with unpacked(model, optimizer):
        return _prune(model, _checked(model, scores), density, scope, optimizer)


def _prune(model, scores, density, scope, optimizer) -> NeuronReport:
    known = wiring(model)
    outputs = tuple(name for name in scores if name in known.outputs)
    scores = {name: values for name, values in scores.items() if name not in known.outputs}
    if not scores:
        raise ValueError("scores: expected those of a layer whose units are not the outputs of the network, got none")
    modules = dict(model.named_modules())
    alive = {name: _alive(modules[name]) for name in scores}
    kept = _choose(scores, alive, density, scope)

    readers = {reader for name in scores for reader in known.readers.get(name, ())}
    sparsify_named(model, [*scores, *(name for name in readers if name not in scores)])
    keep = {name: modules[name].mask.to_dense() for name in {*scores, *readers}}
    for name, units in kept.items():
        here = units.to(keep[name].device)
        structures.as_matrix(modules[name], keep[name])[~here] = False  # a view, as the tensor is contiguous
        for reader in known.readers.get(name, ()):
            _columns(modules[reader], keep[reader], len(units))[:, ~here] = False
    for name, dense in keep.items():
        _set_mask(modules[name], Mask.from_dense(dense), optimizer)
    for name, units in kept.items():
        _zero_bias(modules[name], ~units, optimizer)
    masks = [layer.mask for _, layer in masked_modules(model)]
    total = sum(mask.numel for mask in masks)
    return NeuronReport(kept, outputs, sum(mask.count for mask in masks) / total)


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of each unit's incoming weights, float64 `[units]` on the CPU, of every layer that can be masked.

    Usual initializations give units of wide and narrow layers about the same norm, so that they compare.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) or structures.is_transposed_linear(layer):
            matrix = structures.as_matrix(layer, layer.weight.detach()).double().cpu()
            found[name] = matrix.norm(dim=1)
    return found


def kept_neurons(model: nn.Module, names) -> dict[str, Tensor]:
    """Which units of these layers have an incoming weight left: layer name -> bool `[units]` on the CPU."""
    modules = dict(model.named_modules())
    return {name: _alive(modules[name]) for name in names}


def _density(density) -> float:
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density: expected a number above 0 and at most 1, got {type(density).__name__}")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a number above 0 and at most 1, got {density}")
    return float(density)


def _checked(model, scores) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected a mapping {{layer name: [units]}}, got {type(scores).__name__}")
    modules = dict(model.named_modules())
    for name, values in scores.items():
        layer = modules.get(name)
        if not (isinstance(layer, nn.Linear | nn.Conv2d) or (layer and structures.is_transposed_linear(layer))):
            raise ValueError(f"scores: no linear or convolutional layer that can be masked is called {name!r}")
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"scores: expected floating-point scores for {name}, got {got}")
        if values.shape != (unit_count(layer),):
            raise ValueError(f"scores: expected [{unit_count(layer)}] for {name}, got {list(values.shape)}")
    return {name: values.detach().double().cpu() for name, values in scores.items()}


def _alive(layer) -> Tensor:
    mask = getattr(layer, "mask", None)
    if mask is None:
        return torch.ones(unit_count(layer), dtype=torch.bool)
    return structures.as_matrix(layer, mask.to_dense()).any(1).cpu()


def _choose(scores, alive, density, scope) -> dict[str, Tensor]:
    """The units that stay, at least one of each layer."""
    counts = {name: int(units.sum()) for name, units in alive.items()}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise ValueError(f"model: {empty[0]} has no neuron left to keep")
    total = sum(len(units) for units in alive.values())
    density = max(density, len(scores) / total)
    names = list(scores)
    # The best of each layer first; the others compete for the rest.
    best = {name: int(torch.where(alive[name], scores[name], -torch.inf).argmax()) for name in names}
    rivals = {name: units.clone() for name, units in alive.items()}
    for name, index in best.items():
        rivals[name][index] = False
    grouped = [names] if scope == "global" else [[name] for name in names]
    groups = [
        Group(group, 1.0, sum(len(alive[name]) for name in group), sum(counts[name] for name in group))
        for group in grouped
    ]
    for group in groups:
        if math.floor(density * group.total) > group.count:
            wanted = f"{round(density * group.total)} of {group.total} neurons in {', '.join(group.names)}"
            raise ValueError(f"density: {density:.6g} asks for {wanted}, but {group.count} are left")
    to_density(groups, density, rated=False)
    _at_least_one(groups)
    kept = {}
    for group in groups:
        masks, _ = global_topk(
            [scores[name] for name in group.names],
            group.keep - len(group.names),
            eligible=[rivals[name] for name in group.names],
            by="value",
            names=group.names,
        )
        kept.update({name: mask.to_dense() for name, mask in zip(group.names, masks, strict=True)})
    for name, index in best.items():
        kept[name][index] = True
    return kept


def _at_least_one(groups: list[Group]) -> None:
    """No group keeps fewer than its layers; what they get is taken from those that keep most."""
    for group in groups:
        while group.keep < len(group.names):
            richest = max(groups, key=lambda g: g.keep - len(g.names))
            if richest.keep > len(richest.names):
                richest.keep -= 1
            group.keep += 1


def _columns(layer, keep: Tensor, units: int) -> Tensor:
    """A reader's mask as a view `[outputs, units, *]`."""
    if is_convolution(layer):
        return keep
    return structures.as_matrix(layer, keep).unflatten(1, (units, -1))


def _set_mask(layer, mask, optimizer) -> None:
    layer.set_mask(mask)
    tensors = [layer.weight.grad] if layer.weight.grad is not None and not layer.weight.grad.is_sparse else []
    for value in _state(optimizer, layer.weight):
        if value.dtype in bitmask.FLOATS:
            tensors.append(value)
    for tensor in tensors:
        bitmask.apply_(tensor, layer.weight_mask)


def _zero_bias(layer, gone: Tensor, optimizer) -> None:
    if layer.bias is None:
        return
    gone = gone.to(layer.bias.device)
    tensors = [layer.bias, *([] if layer.bias.grad is None else [layer.bias.grad]), *_state(optimizer, layer.bias)]
    with torch.no_grad():
        for tensor in tensors:
            tensor[gone] = 0


def _state(optimizer, parameter) -> list[Tensor]:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
