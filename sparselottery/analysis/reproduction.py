"""A paper's figure redone: its curves against the weights kept, and what became of its claims."""

from __future__ import annotations

from collections.abc import Mapping

from .figure import COLOURS, MARKERS, WIDTH, Figure, panels, render


def figures(numbers: Mapping) -> list[Figure]:
    """One figure: a panel for each quantity, one below the other, and the claims as its table.

    Args:
        numbers: {"figure": name, "title": .., "claims": as `reproduce` gives them, "panels": [{"label": of the axis, "series":
            [{"name": .., "points": [[density, mean, half width of the interval or None], ..]}]}]}.
    """
    shown = [panel for panel in numbers["panels"] if any(series["points"] for series in panel["series"])]

    def draw(canvas):
        if not shown:
            canvas.text(0.5, 0.5, "nothing was measured", ha="center")
            return
        for axes, panel in zip(panels(canvas, len(shown)), shown, strict=True):
            _panel(axes, panel)

    rows = [
        [
            c["claim"],
            f"{c['measured']:.3g}",
            f"{c['expected']:.3g}",
            f"{c['tolerance']:.3g}",
            "yes" if c["holds"] else "NO",
        ]
        for c in numbers["claims"]
    ]
    return [
        Figure(
            numbers["figure"],
            numbers["title"],
            "Means over seeds, bars: 95 % confidence; the table judges each of the paper's claims.",
            render(draw, (WIDTH, 2.9 * max(1, len(shown)))),
            ["claim", "measured", "paper", "tolerance", "holds"],
            rows,
        )
    ]


def _panel(axes, panel: Mapping) -> None:
    densities = []
    for i, series in enumerate(panel["series"]):
        if series["points"]:
            x, mean, half = zip(*series["points"], strict=True)
            densities += x
            axes.errorbar(
                [100 * d for d in x], mean, [h or 0 for h in half], label=series["name"], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], ms=4, capsize=2, lw=1.5,
            )  # fmt: skip
    axes.set_xscale("log")
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= 60 * min(densities)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("weights kept, %")
    axes.set_ylabel(panel["label"])
    axes.legend(frameon=False)
