"""Supermasks: what they say in a sentence, their table and their figure.

numbers: result.json of `sl.supermask`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .figure import BLACK, BLUE, COLOURS, WIDTH, Figure, interval, number, render

LABELS = {
    "learned": "learned",
    "sampled": "drawn as learned",
    "criterion": "by criterion",
    "random-mask": "random",
    "untrained": "none",
    "dense": "none, trained",
}


def _label(name: str, numbers: Mapping) -> str:
    return numbers["criterion"] if name == "criterion" else LABELS[name]


def _cell(statistic: Mapping) -> str:
    return interval(statistic["mean"], statistic["ci95"], 2, 100)


def rows(numbers: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison; accuracies and densities in percent."""
    header = ["weights", "mask", "density, %", "test accuracy, %"]
    table = []
    for name, found in numbers["methods"].items():
        weights = {"dense": "trained", "untrained": "initial"}.get(name, f"untrained, {numbers['weights']}")
        cells = [number(found["density"]["mean"], 1, 100), _cell(found["test_accuracy"])]
        table.append([weights, _label(name, numbers) if name != "dense" else "none", *cells])
    if numbers["chance"] is not None:
        table.append(["-", "chance: one over the classes", "-", number(numbers["chance"], 2, 100)])
    return header, table


def verdict(numbers: Mapping) -> str:
    """One sentence: what masks alone reach."""
    methods = numbers["methods"]
    if "learned" not in methods:
        return "No test accuracy was measured."
    text = f"Untrained weights under a learned mask reach {_cell(methods['learned']['test_accuracy'])} % test accuracy"
    others = [
        f"{_cell(methods[name]['test_accuracy'])} % {words}"
        for name, words in (
            ("criterion", f"under the best mask by {numbers['criterion']}"),
            ("random-mask", "under a random mask of as many weights"),
            ("dense", "with all weights trained"),
        )
        if name in methods
    ]
    return f"{text}; {', '.join(others)}." if others else f"{text}."


def figures(numbers: Mapping) -> list[Figure]:
    """Accuracy of every kind of mask, chance as a line."""
    methods = numbers["methods"]
    names = list(methods)

    def draw(canvas):
        axes = canvas.subplots()
        for place, name in enumerate(names):
            statistic = methods[name]["test_accuracy"]
            half = 100 * statistic["ci95"] if statistic["ci95"] is not None else None
            colour = BLUE if name in ("learned", "sampled") else BLACK if name == "dense" else COLOURS[2]
            axes.errorbar(100 * statistic["mean"], place, xerr=half, fmt="o", color=colour, capsize=3)
        if numbers["chance"] is not None:
            axes.axvline(100 * numbers["chance"], ls="--", lw=1, color="0.4")
        axes.set_yticks(range(len(names)), [_label(name, numbers) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 101)
        axes.set_xlabel("test accuracy, %")

    header, table = rows(numbers)
    caption = f"{verdict(numbers)} Bars: 95 % confidence over seeds; dashed: chance."
    return [
        Figure(
            "supermask",
            "Masks alone, on untrained weights",
            caption,
            render(draw, (WIDTH, 3.2)),
            header,
            table,
        )
    ]
