"""Structured tickets beside the unstructured ones that they come from: a sentence, a table and a figure.

numbers: {"how": "refill" or "regroup", "tickets": [of each level, as `sparselottery refill RUN --json` tells it]}.
"""

from __future__ import annotations

from collections.abc import Mapping

from .figure import BLACK, BLUE, ORANGE, WIDTH, Figure, interval, number, render

TITLES = {"refill": "Tickets refilled to whole channels", "regroup": "Tickets regrouped to dense blocks"}


def _named(structure: str) -> str:
    return "channels" if structure == "channel" else f"blocks of {structure.removeprefix('block:')}"


def _accuracy(figures: Mapping) -> str:
    return interval(figures["test_accuracy"]["mean"], figures["test_accuracy"]["ci95"], 2, 100)


def verdict(numbers: Mapping) -> str:
    """One sentence for each level: what its structured tickets reach, and whether their structure is that of the mask."""
    sentences = []
    for one in numbers["tickets"]:
        sentences.append(
            f"{_named(one['structure']).capitalize()} with {number(one['density'], 1, 100)} % of the weights reach "
            f"{_accuracy(one)} % test accuracy; the single weights that they come from, {_accuracy(one['unstructured'])} %. "
            f"They hold {number(one['covered'], 1, 100)} % of these, {number(one['by_chance'], 1, 100)} % by chance."
        )
    return " ".join(sentences)


def figures(numbers: Mapping) -> list[Figure]:
    """Accuracy of the dense network, and of each level before and after."""
    how, tickets = numbers["how"], numbers["tickets"]
    shown = [("dense", 1.0, tickets[0]["dense"], None, BLACK)]
    for one in tickets:
        old = one["unstructured"]
        shown.append((f"level {one['level']}, single weights", old["density"], old, None, BLUE))
        shown.append((f"level {one['level']}, {_named(one['structure'])}", one["density"], one, one, ORANGE))

    def draw(canvas):
        axes = canvas.subplots()
        for place, (_, _, statistic, _, colour) in enumerate(shown):
            accuracy = statistic["test_accuracy"]
            half = None if accuracy["ci95"] is None else 100 * accuracy["ci95"]
            axes.errorbar(100 * accuracy["mean"], place, xerr=half, fmt="o", color=colour, capsize=3)
        axes.set_yticks(range(len(shown)), [f"{name}, {100 * density:.1f} %" for name, density, *_ in shown])
        axes.invert_yaxis()
        axes.margins(y=0.15)
        axes.grid(True, axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("test accuracy, %")

    header = ["network", "weights, %", "test accuracy, %", "old survivors held, %", "by chance, %"]
    rows = [
        [
            name,
            number(density, 1, 100),
            _accuracy(statistic),
            number(one and one["covered"], 1, 100),
            number(one and one["by_chance"], 1, 100),
        ]
        for name, density, statistic, one, _ in shown
    ]
    caption = (
        "Test accuracy at the early stop, mean and 95 % confidence interval over seeds (Chen et al. 2022). A structure that "
        "holds no more of the survivors than chance would is not one that pruning has found."
    )
    return [Figure(how, TITLES[how], caption, render(draw, (WIDTH, 1.4 + 0.35 * len(shown))), header, rows)]
