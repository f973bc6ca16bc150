"""The comparison of ways to choose neurons: what it says in a sentence, and its figures.

numbers: the result of `experiments.mutual_information.run_mutual_information`, without the path of its run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figure import BLACK, BLUE, COLOURS, MARKERS, ORANGE, WIDTH, Figure, interval, number, panels, render

ACCURACIES = (("test_accuracy", "early stop"), ("final_test_accuracy", "end of training"))
NAME = "mutual-information"


def verdict(numbers: Mapping) -> str:
    """One sentence on the test accuracy of mutual information against the others; overlapping intervals are no difference."""
    methods = {method: m for method, m in numbers["methods"].items() if "test_accuracy" in m}
    share = f"With {100 * numbers['density']:.3g} % of the neurons"
    if NAME not in methods:
        return f"{share}, mutual information was not among the methods."
    mine = methods[NAME]["test_accuracy"]
    told = {method: f"{method} ({_worth(m)})" for method, m in methods.items()}
    subject = f"{share}, tickets by mutual information ({_worth(methods[NAME])})"
    if mine["ci95"] is None:
        return f"{subject}: one seed allows no comparison."
    relations: dict[str, list[str]] = {}
    for method, other in methods.items():
        if method != NAME:
            relations.setdefault(_compared(mine, other["test_accuracy"]), []).append(told[method])
    parts = [f"{relation} {_and(names)}" for relation, names in relations.items()]
    dense = numbers["dense"].get("test_accuracy")
    if dense is not None:
        parts.append(f"{_compared(mine, dense)} the dense network ({interval(**_of(dense))} %)")
    says = f" are in test accuracy {'; '.join(parts)}" if parts else " were compared with nothing"
    return f"{subject}{says}. Intervals of 95 % over {len(mine['values'])} seeds; where two overlap, no difference is claimed."


def rows(numbers: Mapping) -> tuple[list[str], list[list[str]]]:
    """The comparison as a table: header and rows."""
    header = ["method", "test accuracy, %", "at the end, %", "weights, %", "trainings", "weighed by density", "seconds",
              "neurons shared, %", "by chance, %"]  # fmt: skip
    dense = numbers["dense"]
    table = [["dense", *(_cell(dense.get(key), 100) for key, _ in ACCURACIES), "100", "1", "1",
              _cell(dense["cost"]["seconds"], digits=1), "–", "–"]]  # fmt: skip
    for method, found in numbers["methods"].items():
        shared = [numbers[key].get(NAME, {}).get(method) for key in ("overlap", "chance_overlap")]
        table.append(
            [
                method,
                *(_cell(found.get(key), 100) for key, _ in ACCURACIES),
                number(found["weight_density"]["mean"], 2, 100),
                number(found["cost"]["relative"]["mean"], 2),
                number(found["cost"]["compute"]["mean"], 2),
                _cell(found["cost"]["seconds"], digits=1),
                *(_cell(value, 100, 1) if method != NAME else "–" for value in shared),
            ]
        )
    return header, table


def figures(numbers: Mapping) -> list[Figure]:
    """Accuracy and cost by method, the neurons shared, and (where it was measured) the information of each layer's neurons."""
    found = [_accuracy_figure(numbers), _overlap_figure(numbers)]
    if numbers["information"]:
        found.append(_information_figure(numbers))
    return found


def _accuracy_figure(numbers) -> Figure:
    methods = numbers["methods"]
    names = list(methods)

    def draw(canvas):
        top, bottom = panels(canvas, 2, 1, height_ratios=(3, 2))
        for i, (key, label) in enumerate(ACCURACIES):
            places = [n + (i - 0.5) * 0.25 for n in range(len(names))]
            here = [(x, methods[name][key]) for x, name in zip(places, names, strict=True) if key in methods[name]]
            if not here:
                continue
            top.errorbar(
                [x for x, _ in here],
                [100 * v["mean"] for _, v in here],
                [100 * (v["ci95"] or 0) for _, v in here],
                fmt=MARKERS[i],
                color=COLOURS[i],
                capsize=3,
                label=label,
            )
            dense = numbers["dense"].get(key)
            if dense is not None:
                top.axhline(100 * dense["mean"], color=COLOURS[i], ls=(":", "--")[i], lw=1, label=f"dense, {label}")
        for axes in (top, bottom):
            axes.set_xlim(-0.5, len(names) - 0.5)
        top.set_ylabel("test accuracy, %")
        top.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
        top.set_xticks(range(len(names)), [""] * len(names))
        costs = [methods[name]["cost"] for name in names]
        for i, (key, label) in enumerate((("relative", "iterations"), ("compute", "weighed by density"))):
            places = [n + (i - 0.5) * 0.36 for n in range(len(names))]
            bars = bottom.bar(places, [c[key]["mean"] for c in costs], 0.34, color=(BLUE, ORANGE)[i], label=label)
            bottom.bar_label(bars, fmt="%.2g", fontsize=7.5)
        bottom.set_yscale("log")
        bottom.margins(y=0.2)
        bottom.set_ylabel("dense trainings")
        bottom.set_xticks(range(len(names)), [name.replace("-", "-\n") for name in names])
        bottom.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))

    header, table = rows(numbers)
    return Figure(
        "neuron_tickets",
        "Accuracy and cost by method",
        f"Tickets that keep {100 * numbers['density']:.3g} % of the neurons, with intervals of 95 %; dotted and dashed the dense "
        "network. Cost: search and retraining, in trainings of the dense network; the second bar counts an iteration by the "
        "density of the weights it trained.",
        render(draw, (WIDTH, 5.2)),
        header,
        table,
    )


def _overlap_figure(numbers) -> Figure:
    overlap, chance = numbers["overlap"], numbers["chance_overlap"]
    names = list(overlap)
    values = [[100 * overlap[a][b]["mean"] for b in names] for a in names]

    def draw(canvas):
        axes = canvas.subplots()
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=BLACK if value > 60 else "white")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        canvas.colorbar(image, ax=axes, label="kept neurons shared, %", shrink=0.85)

    cells = [
        [a, *(f"{_cell(overlap[a][b], 100, 1)} (chance {number(chance[a][b]['mean'], 1, 100)})" for b in names)]
        for a in names
    ]
    return Figure(
        "neuron_overlap",
        "Which neurons the methods share",
        "Of the neurons that one method keeps, how many another keeps as well: mean over the seeds, each seed's networks "
        "starting from the same initial values. In the table beside it what two random choices of as many neurons would share.",
        render(draw, (WIDTH, 4.2)),
        ["", *names],
        cells,
    )


def _information_figure(numbers) -> Figure:
    layers = numbers["information"]

    def draw(canvas):
        (axes,) = panels(canvas)
        for i, (layer, curves) in enumerate(layers.items()):
            count = len(curves["mean"])
            rank = [100 * (k + 0.5) / count for k in range(count)]
            colour = COLOURS[i % len(COLOURS)]
            shown = layer if len(layers) <= 8 or i % (len(layers) // 8 + 1) == 0 else None
            axes.plot(rank, curves["mean"], color=colour, ls=("-", "--", ":")[i // len(COLOURS) % 3], label=shown)
            axes.fill_between(rank, curves["least"], curves["most"], color=colour, alpha=0.15, lw=0)
        axes.axvline(100 * numbers["density"], color=BLACK, lw=1, ls=":")
        axes.set_xlabel("neurons of the layer, most telling first, %")
        axes.set_ylabel("I(activation; label), bits")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, ncols=2)

    header = ["layer", "neurons", "most", "upper quartile", "median", "lower quartile", "least", "with none, %"]
    table = [[layer, str(len(c["mean"])), *_quantiles(c["mean"])] for layer, c in layers.items()]
    return Figure(
        "neuron_information",
        "What each neuron says about the label",
        "Mutual information of activation and label on the probe set, sorted within each layer: mean over the seeds and the "
        "range of them. The dotted line marks the density asked for.",
        render(draw),
        header,
        table,
    )


def _quantiles(values: Sequence[float]) -> list[str]:
    places = [round(q * (len(values) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)]
    silent = sum(value < 0.0005 for value in values) / len(values)
    return [number(values[place]) for place in places] + [number(silent, 1, 100)]


def _compared(mine: Mapping, other: Mapping) -> str:
    if mine["mean"] - mine["ci95"] > other["mean"] + other["ci95"]:
        return "above"
    return "below" if mine["mean"] + mine["ci95"] < other["mean"] - other["ci95"] else "not measurably different from"


def _worth(method: Mapping) -> str:
    cost = method["cost"]["relative"]["mean"]
    return f"{_cell(method['test_accuracy'], 100)} %, {cost:.3g} times the dense training"


def _of(value: Mapping, scale: float = 100.0) -> dict:
    return {"mean": value["mean"], "half": value["ci95"], "scale": scale}


def _cell(value: Mapping | None, scale: float = 1.0, digits: int = 2) -> str:
    return "–" if value is None else interval(**_of(value, scale), digits=digits)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
