"""Stability: error barriers between children of one rewind point, and how much tickets of different seeds have in common.

Linear mode connectivity (Frankle et al. 2020, arXiv 1912.05611, section 2): two copies of one network, trained from the same
weights on different orders of the same data, are stable when the error does not rise along the line between them,

    barrier = max over a of E(a W1 + (1 - a) W2)  -  (E(W1) + E(W2)) / 2,

and a ticket trains to full accuracy where its network is stable. Below about two points they call it stable; here the
threshold is a number of the report, not of the code. Running statistics of BatchNorm do not interpolate: they are taken anew
from training examples at every point of the line, its two ends included.

Overlap: two masks that keep n1 and n2 of a layer's n weights have n1 n2 / n in common by chance, with the standard deviation of
the hypergeometric distribution. Units of hidden layers have no order that seeds share, so there chance is what is expected; more
than chance says which inputs matter, or how weights are distributed over units.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..masks import Mask
from ..nn.convert import densify
from ..ops import bitmask
from ..tickets.result import interval
from .figure import BLUE, GREEN, ORANGE, WIDTH, Figure, number, panels, render
from .figure import interval as cell
from .points import MEMORY, Points

STEPS = 21  # points of the line
STATISTICS_EXAMPLES = 2000  # training examples that BatchNorm statistics are taken anew from
STATISTICS_BATCH = 200
ALL = "all layers"
STABLE = 0.02  # of error: the paper's bound


def line(
    first: nn.Module,
    second: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = STEPS,
    statistics: Tensor | None = None,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Loss and error along the line between two networks.

    Args:
        first, second: of one architecture, trained; neither is changed. x [N, *], y [N]: the examples to judge on.
        steps: points, the two networks included.
        statistics: training inputs [N, *] that running statistics of BatchNorm are taken anew from; needed where there are any.
        memory, progress: see `Points`.

    Returns:
        {"at": [0..1], "loss": [...], "error": [...] (fractions), "barrier_error", "barrier_loss"}; a barrier is None where the
        line has a loss that is not finite.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 3:
        raise ValueError(f"steps: expected at least 3 points, got {steps}")
    states = [{k: v.detach() for k, v in densify(copy.deepcopy(m)).state_dict().items()} for m in (first, second)]
    shapes = [{k: v.shape for k, v in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        raise ValueError("second: expected the architecture of the first network")
    at = torch.linspace(0, 1, steps, dtype=torch.float64)
    moving = [k for k, v in states[0].items() if v.is_floating_point()]

    def between(coordinates: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in moving:
            a = coordinates.to(states[0][name]).view(-1, *[1] * states[0][name].ndim)
            found[name] = (1 - a) * states[0][name] + a * states[1][name]
        return found

    if _normalizes(first):
        if statistics is None or not len(statistics):
            raise ValueError("statistics: expected training examples, the networks have running statistics")
        losses, accuracies = _one_by_one(first, between, at, x, y, statistics, memory, progress)
    else:
        losses, accuracies = Points(first, x, y, memory=memory)(between, at[:, None], progress)
    errors = 1 - accuracies
    return {
        "at": at.tolist(),
        "loss": losses.tolist(),
        "error": errors.tolist(),
        "barrier_error": _barrier(errors) if bool(torch.isfinite(losses).all()) else None,
        "barrier_loss": _barrier(losses),
    }


def _normalizes(model) -> bool:
    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())


def _one_by_one(model, between, at, x, y, statistics, memory, progress):
    """Points whose BatchNorm statistics are taken anew: each is a network of its own."""
    losses, accuracies = [], []
    network = densify(copy.deepcopy(model))
    for i, a in enumerate(at):
        with torch.no_grad():
            network.load_state_dict({**network.state_dict(), **{k: v[0] for k, v in between(a[None]).items()}})
        renew_statistics(network, statistics)
        loss, accuracy = Points(network, x, y, memory=memory, at_once=1)(lambda c: {}, torch.zeros(1, 0))
        losses.append(loss)
        accuracies.append(accuracy)
        if progress is not None:
            progress(i + 1, len(at))
    return torch.cat(losses), torch.cat(accuracies)


def renew_statistics(model: nn.Module, x: Tensor) -> None:
    """Take the running statistics of BatchNorm anew, in place: the plain mean over minibatches of x [N, *]; modes are kept."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next((p.device for p in model.parameters()), x.device)
    model.eval()  # dropout stays out
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.training = True
    chosen = x[:STATISTICS_EXAMPLES]
    with torch.no_grad():
        for batch in chosen.split(STATISTICS_BATCH):
            if len(batch) > 1 or len(chosen) == 1:  # a batch of one has no variance
                model(batch.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode


def _barrier(values: Tensor) -> float | None:
    found = (values.max() - (values[0] + values[-1]) / 2).item()
    return found if math.isfinite(found) else None


# ---- overlap ----


def overlap(tickets: Sequence[Mapping[str, Mask]]) -> dict | None:
    """What the masks of different seeds have in common, over all pairs of them; None for fewer than two.

    Args:
        tickets: layer -> mask, of each seed.

    Returns:
        layer -> {"distance", "jaccard": statistics over the pairs, "distance_by_chance", "jaccard_by_chance": means, "z": how
        many standard deviations the common weights lie above chance, mean over the pairs}; "all layers" too. Pairs share seeds,
        so these statistics have no interval, only means and values. None where nothing is defined: no weights; "z" where whole
        units are kept, whose weights are no independent draws.

    Raises:
        ValueError: masks of different layers or shapes.
    """
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in tickets]
    if any(s != shapes[0] for s in shapes):
        raise ValueError("tickets: expected masks of the same layers and shapes for every seed")
    if len(tickets) < 2:
        return None
    found: dict = {name: [] for name in (*tickets[0], ALL)}
    for a, b in itertools.combinations(tickets, 2):
        total = dict.fromkeys(("n", "n1", "n2", "common", "expected", "variance"), 0.0)
        for name in a:
            layer = _pair(a[name].to("cpu"), b[name].to("cpu"))
            found[name].append(_measures(layer))
            total = {key: total[key] + value for key, value in layer.items()}
        found[ALL].append(_measures(total))
    return {name: {key: _spread([p[key] for p in pairs]) for key in pairs[0]} for name, pairs in found.items()}


def _pair(a: Mask, b: Mask) -> dict:
    n, n1, n2 = a.numel, a.count, b.count
    common = (n1 + n2 - bitmask.hamming(a.words, b.words)) // 2
    return {
        "n": n,
        "n1": n1,
        "n2": n2,
        "common": common,
        "expected": n1 * n2 / n if n else 0.0,
        "variance": math.nan if _of_units(a) and _of_units(b) else _variance(n, n1, n2),
    }


def _variance(n: int, n1: int, n2: int) -> float:
    return n1 * n2 * (n - n1) * (n - n2) / (n * n * (n - 1)) if n > 1 else 0.0


def _of_units(mask: Mask) -> bool:
    """Whether it keeps all weights between some outputs and some inputs: then they do not come and go one by one."""
    rows = mask.to_dense().flatten(1) if len(mask.shape) > 1 else mask.to_dense()[None]
    kept = rows.any(1)
    return min(rows.shape) > 1 and 0 < mask.count < mask.numel and bool((rows == kept[:, None] & rows.any(0)).all())


def _measures(pair: Mapping) -> dict:
    n, kept, common, expected = pair["n"], pair["n1"] + pair["n2"], pair["common"], pair["expected"]
    return {
        "distance": (kept - 2 * common) / n if n else None,
        "distance_by_chance": (kept - 2 * expected) / n if n else None,
        "jaccard": common / (kept - common) if kept else None,
        "jaccard_by_chance": expected / (kept - expected) if kept else None,
        "z": (common - expected) / math.sqrt(pair["variance"]) if pair["variance"] > 0 else None,
    }


def _spread(values) -> dict | None:
    values = [v for v in values if v is not None]
    return {"mean": math.fsum(values) / len(values), "ci95": None, "values": values} if values else None


def numbers(lines: Mapping[str, Sequence[dict]], tickets: Sequence[Mapping[str, Mask]], about: Mapping) -> dict:
    """What `figures` draws.

    lines: "dense" and "ticket" -> `line` of each seed. tickets: the masks of each seed. about: further entries.
    """
    children = {}
    for name, found in lines.items():
        children[name] = {"lines": list(found)}
        for key in ("barrier_error", "barrier_loss"):
            values = [one[key] for one in found if one[key] is not None]
            children[name][key] = interval(values) if values else None
    return {**about, "children": children, "overlap": overlap(tickets)}


# ---- figures ----


def figures(numbers: Mapping) -> list[Figure]:
    found = [_barriers(numbers)]
    return found if numbers["overlap"] is None else [*found, _overlaps(numbers)]


def _barriers(numbers) -> Figure:
    children, density = numbers["children"], 100 * numbers["density"]
    heading = {"dense": "dense", "ticket": f"ticket, {density:.1f} %"}
    styles = {"dense": {"color": BLUE, "ls": "-"}, "ticket": {"color": ORANGE, "ls": "--"}}

    def draw(canvas):
        (axes,) = panels(canvas)
        for name, entry in children.items():
            at = entry["lines"][0]["at"]
            errors = [[100 * e for e in one["error"]] for one in entry["lines"]]
            for error in errors:
                axes.plot(at, error, lw=0.7, alpha=0.35, **styles[name])
            mean = [math.fsum(column) / len(column) for column in zip(*errors, strict=True)]
            axes.plot(at, mean, lw=2, label=heading[name], **styles[name])
        axes.set(xlabel="place on the line between two children", ylabel="test error, %")
        axes.legend(frameon=False)

    header = ["seed", "network", "error, child 1 %", "child 2 %", "highest %", "barrier, points", "barrier in loss"]
    rows = []
    for name, entry in children.items():
        for seed, one in zip(numbers["seeds"], entry["lines"], strict=True):
            error = one["error"]
            values = [number(v, 2, 100) for v in (error[0], error[-1], max(error), one["barrier_error"])]
            rows.append([str(seed), heading[name], *values, number(one["barrier_loss"], 4)])
        statistics = entry["barrier_error"], entry["barrier_loss"]
        cells = [
            "–" if s is None else cell(s["mean"], s["ci95"], d, f)
            for s, d, f in zip(statistics, (2, 4), (100, 1), strict=True)
        ]
        rows.append(["mean", heading[name], "", "", "", *cells])
    places = {
        "init": "their initial values",
        "drawn": "the weights with which the ticket was drawn",
        "lr": "where they start (the ticket from trained weights)",
    }
    where = places.get(numbers["rewind"], f"the weights of step {numbers['rewind']}")
    caption = (
        f"Test error along the line between two networks trained from {where} on two orders of the data (linear mode "
        f"connectivity, Frankle et al. 2020); thin lines are seeds. They call a barrier below {100 * STABLE:.0f} points stable."
    )
    if numbers.get("batchnorm"):
        caption += " BatchNorm statistics are taken anew from training examples at every point."
    barriers = [
        f"{heading[name]} " + cell(entry["barrier_error"]["mean"], entry["barrier_error"]["ci95"], 2, 100)
        for name, entry in children.items()
        if entry["barrier_error"] is not None
    ]
    caption += f" Barrier in points: {', '.join(barriers)}." if barriers else " The losses are not finite: no barrier."
    return Figure(
        "barrier", "Error barrier between two children of one rewind point", caption, render(draw), header, rows
    )


def _overlaps(numbers) -> Figure:
    layers = {name: entry for name, entry in numbers["overlap"].items() if entry["jaccard"] is not None}
    names = [ALL, *(name for name in layers if name != ALL)]

    def draw(canvas):
        (axes,) = panels(canvas)
        for i, name in enumerate(names):
            entry = layers[name]
            axes.barh(i, entry["jaccard"]["mean"], 0.6, color=BLUE, label="tickets of two seeds" if i == 0 else None)
            chance = entry["jaccard_by_chance"]["mean"]
            label = "by chance" if i == 0 else None
            axes.plot([chance, chance], [i - 0.42, i + 0.42], color=GREEN, lw=2.5, label=label)
        axes.set_yticks(range(len(names)), [name or "the model" for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("weights kept by both / kept by either (Jaccard)")
        axes.set_xlim(0, None)
        canvas.legend(loc="outside upper center", ncols=2, frameon=False)

    header = ["layer", "Jaccard", "by chance", "deviations above chance", "Hamming distance", "by chance"]
    rows = []
    for name in names:
        entry = layers[name]
        keys = (("jaccard", 3), ("jaccard_by_chance", 3), ("z", 1), ("distance", 4), ("distance_by_chance", 4))
        rows.append([name or "the model", *(number(entry[k] and entry[k]["mean"], d) for k, d in keys)])
    pairs = len(layers[ALL]["jaccard"]["values"])
    caption = (
        f"What the tickets of two seeds keep in common at {100 * numbers['density']:.1f} % density: mean of {pairs} pair"
        f"{'s' * (pairs > 1)} of seeds. Chance: random masks with as many weights in every layer."
    )
    if layers[ALL]["z"] is None:
        caption += " No deviations are given of tickets that keep whole units."
    size = (WIDTH, max(2.2, 1.1 + 0.3 * len(names)))
    return Figure("mask_overlap", "Mask overlap across seeds", caption, render(draw, size), header, rows)
