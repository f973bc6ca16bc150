"""How far the weights that will win, and the others, move from their initial values (Frankle & Carbin, 1803.03635, appendix F).

The paper's appendix on the structure of winning tickets takes the dense network and splits its weights by the mask that pruning
arrives at: winning weights move further from their initial values than the others, and more often away from zero. Per layer,
with w0 before and w after training:

    moved      |w - w0|
    outward    |w| - |w0|: above 0 away from zero, below 0 toward it; what flips its sign goes through zero first
    flipped    w and w0 on different sides of zero

The mask keeps what is large after training, so part of the difference is the choice itself and no discovery about training; the
numbers describe, as the paper's do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..masks import Mask
from ..tickets.result import interval
from .figure import BLUE, ORANGE, WIDTH, Figure, number, panels, render
from .figure import interval as cell

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
COVERED = (
    0.995  # of all weights of a layer lie within the histograms' outermost edges; the rest is counted in the last bins
)
GROUPS = ("winning", "other")
MEASURES = ("moved", "outward")
ALL = "all layers"
MOST_PANELS = 12  # layers drawn one by one
BEYOND = " The outermost bins hold what lies beyond."


def weight_motion(
    initial: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    masks: Mapping[str, Mask],
    edges: Mapping | None = None,
) -> dict:
    """The motion of one network's weights.

    Args:
        initial, trained: the state before and after training (state_dict keys), without a mask on them.
        masks: layer name -> the mask of the ticket found later.
        edges: layer -> measure -> histogram edges; None takes them from these weights (`edges_of`).

    Returns:
        layer -> group ("winning", "other") -> {"count", "moved", "outward": {"mean", "quantiles", "histogram"}, "away": fraction
        with |w| > |w0|, "flipped": fraction}, and "ks" (two-sample Kolmogorov-Smirnov distance of `moved` between the groups).
        "all layers" pools them. What a group without weights has no value for is None.

    Raises:
        ValueError: a layer's weight is missing, has another shape, or is not finite.
    """
    pairs = _pairs(initial, trained, masks)
    edges = edges_of([(initial, trained, masks)]) if edges is None else edges
    return {layer: _layer(*pair, edges[layer]) for layer, pair in pairs.items()}


def edges_of(networks: Sequence[tuple]) -> dict:
    """Histogram edges that fit several networks: layer -> measure -> `BINS` + 1 numbers.

    networks: (initial, trained, masks) of each.
    """
    found: dict = {}
    for network in networks:
        for layer, (before, after, _) in _pairs(*network).items():
            moved = _quantile((after - before).abs(), COVERED)
            outward = (after.abs() - before.abs()).abs()
            bounds = found.setdefault(layer, dict.fromkeys(MEASURES, 0.0))
            bounds["moved"] = max(bounds["moved"], moved)
            bounds["outward"] = max(bounds["outward"], _quantile(outward, COVERED))
    edges = {}
    for layer, bounds in found.items():
        bounds = {measure: value or 1e-6 for measure, value in bounds.items()}  # nothing moved: any width does
        edges[layer] = {
            "moved": torch.linspace(0, bounds["moved"], BINS + 1, dtype=torch.float64).tolist(),
            "outward": torch.linspace(-bounds["outward"], bounds["outward"], BINS + 1, dtype=torch.float64).tolist(),
        }
    return edges


def numbers(networks: Sequence[tuple], about: Mapping) -> dict:
    """What `figures` draws, from one network a seed: means and 95 % intervals over the seeds.

    networks: (initial, trained, masks) of each seed. about: further entries (density, level, seeds, ...).
    """
    edges = edges_of(networks)
    found = [weight_motion(*network, edges) for network in networks]
    layers = {}
    for layer in found[0]:
        entry: dict = {"edges": edges[layer], "ks": _over([f[layer]["ks"] for f in found])}
        for group in GROUPS:
            here = [f[layer][group] for f in found]
            entry[group] = {
                "count": interval([h["count"] for h in here])["mean"],
                "away": _over([h["away"] for h in here]),
                "flipped": _over([h["flipped"] for h in here]),
            }
            for measure in MEASURES:
                values = [h[measure] for h in here]
                filled = [v["histogram"] for v in values if v["histogram"] is not None]
                entry[group][measure] = {
                    "mean": _over([v["mean"] for v in values]),
                    "quantiles": [_over([v["quantiles"][i] for v in values]) for i in range(len(QUANTILES))],
                    "histogram": [math.fsum(c) / len(filled) for c in zip(*filled, strict=True)] if filled else None,
                }
        layers[layer] = entry
    return {**about, "quantiles": list(QUANTILES), "layers": layers}


def _pairs(initial, trained, masks) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """layer -> (before, after, winning) as flat float64 and bool tensors on the CPU; last all of them."""
    found = {}
    for layer, mask in masks.items():
        key = f"{layer}.weight" if layer else "weight"
        flat = []
        for name, state in (("initial", initial), ("trained", trained)):
            if key not in state:
                raise ValueError(f"{name}: no {key} for the mask of {layer or 'the model'}")
            value = state[key].detach()
            if value.shape != mask.shape:
                raise ValueError(f"{name}: {key}: expected {list(mask.shape)} like its mask, got {list(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: {key}: expected finite values, got NaN or infinity")
            flat.append(value.cpu().double().flatten())
        found[layer] = (*flat, mask.to("cpu").to_dense().flatten())
    if not found:
        raise ValueError("masks: expected at least one, got none")
    found[ALL] = tuple(torch.cat(parts) for parts in zip(*found.values(), strict=True))
    return found


def _layer(before: Tensor, after: Tensor, winning: Tensor, edges: Mapping) -> dict:
    moved, outward = (after - before).abs(), after.abs() - before.abs()
    flipped = before * after < 0
    found: dict = {}
    for group, chosen in (("winning", winning), ("other", ~winning)):
        count = int(chosen.sum())
        found[group] = {"count": count, "away": None, "flipped": None}
        for measure, values in (("moved", moved[chosen]), ("outward", outward[chosen])):
            found[group][measure] = {"mean": None, "quantiles": [None] * len(QUANTILES), "histogram": None}
            if count:
                found[group][measure] = {
                    "mean": values.mean().item(),
                    "quantiles": [_quantile(values, q) for q in QUANTILES],
                    "histogram": _fractions(values, edges[measure]),
                }
        if count:
            found[group]["away"] = (outward[chosen] > 0).double().mean().item()
            found[group]["flipped"] = flipped[chosen].double().mean().item()
    found["ks"] = kolmogorov_smirnov(moved[winning], moved[~winning])
    return found


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float | None:
    """The largest difference between two samples' cumulative distributions, 0..1; None where one is empty."""
    if not len(a) or not len(b):
        return None
    a, b = a.sort().values, b.sort().values
    both = torch.cat([a, b])
    below = [torch.searchsorted(s, both, right=True).double() / len(s) for s in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def _quantile(values: Tensor, q: float) -> float:
    """The value at least q of them do not exceed (torch.quantile refuses more than 16 million)."""
    return values.kthvalue(max(1, math.ceil(q * len(values)))).values.item() if len(values) else 0.0


def _fractions(values: Tensor, edges: Sequence[float]) -> list[float]:
    inside = values.clamp(edges[0], edges[-1])
    return (torch.histc(inside, BINS, edges[0], edges[-1]) / len(values)).tolist()


def _over(values: Sequence[float | None]) -> dict | None:
    """Mean and interval over the seeds; None where no seed has one."""
    measured = [v for v in values if v is not None]
    return interval(measured) if measured else None


# ---- figures ----


def figures(numbers: Mapping) -> list[Figure]:
    layers, density, seeds = numbers["layers"], 100 * numbers["density"], numbers["seeds"]
    drawn = [name for name in layers if name != ALL]
    shown = drawn if len(drawn) <= MOST_PANELS else [
        drawn[round(i * (len(drawn) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)
    ]  # fmt: skip
    texts = {
        "moved": (
            "How far weights move",
            "Distance |w - w0| between the first and the last iteration of the dense network, for the weights that the "
            f"ticket with {density:.1f} % keeps and for the others (Frankle & Carbin, appendix F)",
            "distance from the initial value",
        ),
        "outward": (
            "Away from zero or toward it",
            "Change |w| - |w0| of the magnitude while the dense network trains: right of 0 a weight has moved away from zero. "
            "The mask keeps what is large at the end, so part of the difference is the choice itself",
            "change of magnitude",
        ),
    }
    found = []
    for measure in MEASURES:
        title, caption, label = texts[measure]
        rest = (
            "" if len(shown) == len(drawn) else f" {len(shown)} of {len(drawn)} layers are drawn, all are in the table."
        )
        over = f"; mean of {len(seeds)} seeds." if len(seeds) > 1 else f"; seed {seeds[0]}."
        names = [ALL, *shown]

        def draw(canvas, names=names, measure=measure, label=label):
            all_axes = panels(canvas, math.ceil(len(names) / 2), 2)
            for axes, name in zip(all_axes, names, strict=False):
                _histogram(axes, layers[name], measure)
                axes.set_title(name or "the model")
                axes.set_yticklabels([])
            for axes in all_axes[len(names) :]:
                axes.set_visible(False)
            handles, labels = all_axes[0].get_legend_handles_labels()
            canvas.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
            canvas.supxlabel(f"{label} (height: share of the group)", fontsize=9)

        png = render(draw, (WIDTH, 0.8 + 1.5 * math.ceil(len(names) / 2)))
        found.append(Figure(f"weight_{measure}", title, caption + over + BEYOND + rest, png, *_table(layers, measure)))
    return found


def _histogram(axes, entry, measure) -> None:
    edges = entry["edges"][measure]
    for group, colour, style in (("other", ORANGE, "--"), ("winning", BLUE, "-")):
        heights = entry[group][measure]["histogram"]
        if heights is not None:
            axes.stairs(heights, edges, color=colour, ls=style, lw=1.4, label=f"{group} weights")
            axes.stairs(heights, edges, color=colour, fill=True, alpha=0.15)
    if measure == "outward":
        axes.axvline(0, color="0.4", lw=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.locator_params(axis="x", nbins=4)


def _table(layers, measure) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "weights", "count", "mean", "5 %", "median", "95 %"]
    header += ["KS distance"] if measure == "moved" else ["away from zero %", "sign flipped %"]
    rows = []
    for name, entry in layers.items():
        for group in GROUPS:
            values = entry[group][measure]
            quantiles = [values["quantiles"][i] for i in (0, 2, 4)]
            row = [name or "the model", group, f"{entry[group]['count']:.0f}", _cell(values["mean"], 4)]
            row += [number(None if q is None else q["mean"], 4) for q in quantiles]
            if measure == "moved":
                row.append(_cell(entry["ks"], 3))
            else:
                row += [_cell(entry[group][key], 1, 100) for key in ("away", "flipped")]
            rows.append(row)
    return header, rows


def _cell(statistic, digits, scale=1.0) -> str:
    return "–" if statistic is None else cell(statistic["mean"], statistic["ci95"], digits, scale)
