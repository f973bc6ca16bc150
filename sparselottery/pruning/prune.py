"""prune: scores -> exactly the asked number of survivors -> masks."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.convert import Exclude, as_tuple, excluded_names, masked_modules, sparsify, unpacked
from ..ops import bitmask
from . import criteria, sensitivity, structures
from .criteria import Criterion
from .scope import Group, by_rate, groups, to_density


@dataclass(frozen=True)
class LayerReport:
    """What a layer keeps: `kept` of `total` weights."""

    kept: int
    total: int

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class PruneReport:
    """What survived: in all, and {layer name: LayerReport}. `threshold`: the smallest surviving score, None where there
    is none for all layers together."""

    kept: int
    total: int
    layers: dict[str, LayerReport]
    threshold: float | None = None

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    def __str__(self) -> str:
        rows = [("layer", "kept", "of", "density")]
        rows += [(name, str(r.kept), str(r.total), f"{r.density:.2%}") for name, r in self.layers.items()]
        rows.append(("all", str(self.kept), str(self.total), f"{self.density:.2%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _packed_layers_too(prune):
    """Packed layers are masked ones while `prune` runs."""

    @functools.wraps(prune)
    def wrapper(model, *, optimizer=None, **arguments):
        with unpacked(model, optimizer if isinstance(optimizer, Optimizer) else None):
            return prune(model, optimizer=optimizer, **arguments)

    return wrapper


@_packed_layers_too
def prune(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] | None = None,
    sparsity: float | None = None,
    rate: float | None = None,
    scope: str = "global",
    criterion: Criterion = "magnitude",
    structure: str = "unstructured",
    rates: Mapping[str, float] | None = None,
    exclude: Exclude = (),
    optimizer: Optimizer | None = None,
    generator: torch.Generator | None = None,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    rounds: int | None = None,
) -> PruneReport:
    """Prune a model in place: masks change, pruned weights become 0 and never come back.

    Plain layers are turned into masked ones first (`sparsify`). The weights that count are those of all masked layers
    that are not excluded, pruned or not; biases, norms and embeddings never count.

    How many survive is exact, and ties go to the lowest index in the order of the model's layers. Give one of:

    - `density`: `round(density * total)` survive (ties of the rounding to even). A mapping {layer name: density} gives
      single layers their own, each rounded by itself, and leaves the others alone.
    - `sparsity`: the same as density = 1 - sparsity.
    - `rate`: the fraction of the weights left now that goes, as in a round of iterative pruning: 0.2 three times gives
      51.2 %.

    Where the sum is rounded, layers get the floor of their share and the largest remainders one more.

    Args:
        scope: "global": the weights of all layers are ranked together. "layer": each layer is ranked by itself; every
            layer gets the density asked for, or loses the rate.
        criterion: "magnitude"; "random"; "large-final", "small-final", "large-init", "small-init",
            "large-init-large-final", "small-init-small-final", "magnitude-increase" or "movement", each also with
            "-same-sign" or "-diff-sign" (Zhou et al. 2019; formulas in criteria.py); "snip", "grasp" or "synflow"
            (sensitivity.py); a callable `(name, layer) -> scores` or {name: scores}, of which the largest survive.
        structure: "unstructured"; "block:RxC" (R outputs by C inputs; of a convolution, for each tap) and "channel" (an
            output of a layer, so exclude the last one) prune groups of weights, of which a density or rate then speaks:
            `round(density * groups)` of them survive, and one that an edge cuts off counts like the others. "N:M" keeps
            N of every M neighbouring inputs and takes neither density nor rate. GPUs gain from blocks of at least 16x16
            and from "2:4". See `structures`.
        rates: factors on the pruning rate of some layers: {"output": 0.5} prunes the last layer half as fast as the
            others, {"conv": 0.5} every convolution. Keys: "output" (the last prunable layer of the model), "conv",
            "linear" (all that are not conv), or a layer's name or pattern; a name beats "output", which beats "conv"
            and "linear". 0 freezes. With `rate`, a layer loses rate * factor of its survivors: Frankle & Carbin's LeNet
            is rate=0.2, scope="layer", rates={"output": 0.5}; their Conv-4 is rate=0.2, rates={"conv": 0.5, "output":
            0.5}. With `density`, survivors are shared as after many small rounds at such rates. In global scope, layers
            of equal factor are ranked together.
        exclude: names, patterns or classes of modules that are neither pruned nor counted.
        optimizer: its state (momentum and the like) and the gradients are zeroed at pruned weights too. Without it the
            weights stay zero all the same, but state left over from before would act again if a weight were given back.
            With packed layers, whose `values` get fewer, an optimizer that has begun must be handed over.
        generator: for criterion "random"; None: torch's default one.
        initial: the state_dict (or model) of before training, for criteria that compare with it.
        batch: (x `[N, *]`, y `[N]`) for "snip" and "grasp"; "synflow" looks at the shape of x alone, y may be None.
        loss: `loss(output, y) -> scalar` for "snip" and "grasp"; None is cross-entropy (grasp: at its authors' temperature).
        rounds: for these three: score anew and prune so many times, each time the same fraction of what is left. None
            is 100 for "synflow" and 1 for the others, as their authors have it.

    Returns:
        What survived, in all and per layer.

    Raises:
        TypeError, ValueError: an argument is not as described; a density above the present one; NaN in a weight or a
            score (the message names the layer). Nothing has been pruned then.

    Warns:
        UserWarning: layers that are ranked together leave one of them without any weight. The count is still exact, but
            the output of the network may no longer depend on its input (SNIP and GraSP are known for that).
    """
    structure = structures.parse(structure)
    criteria.check(criterion)
    rounds = _rounds(rounds, criterion, structure)
    given = [
        name for name, value in (("density", density), ("sparsity", sparsity), ("rate", rate)) if value is not None
    ]
    if isinstance(structure, structures.NofM):
        if given or rates is not None:
            raise ValueError(
                f"structure: {structure.n}:{structure.m} says how many survive; expected no {given or 'rates'}"
            )
    elif len(given) != 1:
        raise ValueError(f"density, sparsity, rate: expected exactly one of them, got {', '.join(given) or 'none'}")
    if isinstance(density, Mapping):
        density = {name: _fraction(f"density[{name!r}]", value) for name, value in density.items()}
    elif density is not None:
        density = _fraction("density", density)
    elif sparsity is not None:
        density = 1 - _fraction("sparsity", sparsity)
    elif rate is not None:
        rate = _fraction("rate", rate)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    exclude = as_tuple(exclude)
    sparsify(model, exclude=exclude)
    excluded = excluded_names(model, exclude)
    layers = {name: layer for name, layer in masked_modules(model) if name not in excluded}
    if not layers:
        raise ValueError("model: expected a linear or convolutional layer that is not excluded, found none")
    if isinstance(density, dict):
        unknown = [name for name in density if name not in layers]
        if unknown:
            raise ValueError(f"density: no prunable layer is called {', '.join(map(repr, unknown))}")
        if rates is not None:
            raise ValueError("rates: expected None with a density per layer")

    before = {name: layer.mask for name, layer in layers.items()}
    scorer = criteria.scorer(criterion, model, layers, criteria.Evidence(initial, batch, loss, generator))
    if isinstance(structure, structures.NofM):
        values, by = scorer(before)
        after = {
            name: structures.n_of_m(structure, layer, before[name], score, by, name)
            for (name, layer), score in zip(layers.items(), values, strict=True)
        }
        threshold = None
    else:
        after, threshold = _select(structure, layers, before, scorer, rounds, density, rate, scope, rates)

    for name, mask in after.items():
        layers[name].set_mask(mask)
        gradient = layers[name].weight.grad
        if gradient is not None and not gradient.is_sparse:
            bitmask.apply_(gradient, layers[name].weight_mask)
    if optimizer is not None:
        _clear_state(optimizer, layers)
    report = {name: LayerReport(layer.mask.count, layer.weight.numel()) for name, layer in layers.items()}
    return PruneReport(sum(r.kept for r in report.values()), sum(r.total for r in report.values()), report, threshold)


def _select(structure, layers, before, scorer, rounds, density, rate, scope, rates):
    """The masks after, in one round or several, and the smallest surviving score."""
    current, found = before, None
    for done in range(1, rounds + 1):
        values, by = scorer(current)
        selector = structures.Selector(structure, layers, current, dict(zip(layers, values, strict=True)), by)
        if found is None:
            found = _groups(selector, density, rate, scope, rates)
            ends = [(group.count, group.keep) for group in found]
        for group, (count, keep) in zip(found, ends, strict=True):
            group.keep = keep if done == rounds else round(count * (keep / count) ** (done / rounds)) if count else 0
        after, threshold = selector.solve(found)
        current = {**current, **after}
    for group in found:
        emptied = [n for n in group.names if len(group.names) > 1 and before[n].count and not current[n].count]
        if emptied and group.keep:
            warnings.warn(
                f"prune: nothing is left in {', '.join(emptied)}; with scope='layer' every layer keeps its share",
                stacklevel=4,
            )
    return {name: current[name] for group in found for name in group.names}, threshold


def _rounds(rounds, criterion, structure) -> int:
    if rounds is None:
        at_once = isinstance(structure, structures.NofM) or not isinstance(criterion, str)
        return 1 if at_once else sensitivity.ROUNDS.get(criterion, 1)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds: expected an int, got {type(rounds).__name__}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if rounds > 1 and not criteria.needs_batch(criterion):
        raise ValueError(
            f"rounds: expected 1 but for {', '.join(sensitivity.NAMES)}: other scores are the same every time, got {rounds}"
        )
    if rounds > 1 and isinstance(structure, structures.NofM):
        raise ValueError(f"rounds: expected 1 with structure {structure.n}:{structure.m}, got {rounds}")
    return rounds


def _groups(selector, density, rate, scope, rates):
    """The groups of layers that compete, each with the number of its survivors."""
    totals, counts = selector.totals, selector.counts
    if isinstance(density, dict):
        found = [Group([name], 1.0, totals[name], counts[name]) for name in selector.layers if name in density]
        for group in found:
            to_density([group], density[group.names[0]], rated=False)
        return found
    found = groups(selector.layers, totals, counts, scope, rates)
    if rate is None:
        to_density(found, density, rated=rates is not None)
    else:
        by_rate(found, rate)
    return found


def _fraction(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {type(value).__name__}")
    if not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return float(value)


def _clear_state(optimizer, layers):
    for layer in layers.values():
        for value in optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == layer.weight.shape and value.dtype in bitmask.FLOATS:
                bitmask.apply_(value, layer.weight_mask)
