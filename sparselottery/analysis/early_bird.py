"""When an Early-Bird ticket settles: the distances between the masks of all epochs, and what it cost to find."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from .figure import BLUE, GREEN, ORANGE, WIDTH, Figure, interval, number, panels, render

NUMBERS = (
    "distances", "drawn_epoch", "drawn_epochs", "epochs", "density", "structure", "window", "threshold", "macs", "cost",
)  # fmt: skip
PARTS = {
    "dense": "dense training",
    "early-bird": "early-bird: search + retraining",
    "imp": "iterative pruning (computed)",
}


def figures(numbers: dict) -> list[Figure]:
    """The heatmap of distances, and the costs."""
    return [_heatmap(numbers), _costs(numbers)]


def csv(distances: Sequence[Sequence[float]]) -> str:
    """The epochs x epochs distances as a table: a header of epochs, and one row for each."""
    text = io.StringIO()
    text.write(",".join(["epoch", *map(str, range(1, len(distances) + 1))]) + "\n")
    for epoch, row in enumerate(distances, 1):
        text.write(",".join([str(epoch), *(f"{d:g}" for d in row)]) + "\n")
    return text.getvalue()


def sentence(numbers: Mapping) -> str:
    """When tickets were drawn, and what that saves."""
    drawn, epochs = numbers["drawn_epochs"], numbers["epochs"]
    found = [d for d in drawn["values"] if d is not None]
    if not found:
        return f"No ticket was drawn within {epochs} epochs; the masks of the last epoch were trained."
    text = f"Drawn after {interval(drawn['mean'], drawn['ci95'], 1)} of {epochs} epochs ({100 * drawn['mean'] / epochs:.0f} %)"
    never = len(drawn["values"]) - len(found)
    text += f"; {never} of {len(drawn['values'])} seeds never drew." if never else "."
    macs = numbers.get("macs")
    if macs:
        text += f" The ticket's network takes {macs['dense'] / macs['ticket']:.1f} times fewer multiply-adds."
    ratio = numbers["cost"]["ratio"]
    for unit, what in (("seconds", "time"), ("joules", "energy")):
        own, imp = (ratio[key][unit] for key in ("early-bird / dense", "imp / early-bird"))
        if own is not None:
            text += f" Search and retraining took {own:.2f} times the {what} of dense training; iterative pruning would take"
            text += f" {imp:.1f} times as much as they."
    return text


def _heatmap(numbers) -> Figure:
    distances, drawn = numbers["distances"], numbers["drawn_epoch"]
    window, threshold, count = numbers["window"], numbers["threshold"], len(numbers["distances"])

    def draw(canvas):
        (axes,) = panels(canvas)
        axes.grid(False)
        top = max(max(row) for row in distances) or 1.0
        # Reversed viridis: masks that agree are yellow, far ones dark, as in the paper's figure.
        edge = (0.5, count + 0.5, count + 0.5, 0.5)
        image = axes.imshow(distances, cmap="viridis_r", vmin=0, vmax=top, extent=edge, interpolation="nearest")
        if drawn is not None:
            begin = drawn - window + 0.5
            axes.plot(
                [begin, drawn + 0.5, drawn + 0.5, begin, begin],
                [begin, begin, drawn + 0.5, drawn + 0.5, begin],
                color=ORANGE, lw=1.8, label=f"drawn at epoch {drawn}",
            )  # fmt: skip
            canvas.legend(loc="outside upper center", frameon=False)
        axes.set_xlabel("epoch")
        axes.set_ylabel("epoch")
        canvas.colorbar(image, ax=axes, shrink=0.85, label="distance between masks")

    rows = []
    for epoch, row in enumerate(distances, 1):
        before = row[max(0, epoch - window) : epoch - 1]
        full = epoch >= window
        near = full and max(before) < threshold
        verdict = "drawn" if epoch == drawn else ("below" if near else ("above" if full else "queue not full"))
        rows.append(
            [
                str(epoch),
                number(row[epoch - 2] if epoch > 1 else None, 4),
                number(max(before, default=None), 4),
                verdict,
            ]
        )
    what = "channels" if numbers["structure"] == "channel" else "weights"
    caption = (
        f"Normalized Hamming distance between the masks of {100 * numbers['density']:g} % of the {what} after each two epochs of "
        f"one search (You et al. 2020). The ticket is drawn when the newest of {window} masks is nearer than {threshold:g} to "
        "the others"
    )
    caption += f", the square: epoch {drawn}." if drawn is not None else "; here it never was."
    header = ["epoch", "distance to the epoch before", f"farthest of the last {window}", f"threshold {threshold:g}"]
    size = (WIDTH, 0.82 * WIDTH)
    return Figure(
        "early-bird-distances", "Distance between masks over the epochs", caption, render(draw, size), header, rows
    )


def _costs(numbers) -> Figure:
    cost = numbers["cost"]
    unit, label, factor = ("joules", "energy, kJ", 1e-3) if cost["dense"]["joules"] else ("seconds", "time, s", 1.0)

    def draw(canvas):
        (axes,) = panels(canvas)
        for i, key in enumerate(PARTS):
            found = cost[key][unit]
            half = None if found["ci95"] is None else factor * found["ci95"]
            if key == "early-bird":
                search = factor * cost["search"][unit]["mean"]
                axes.barh(i, search, 0.6, color=ORANGE, label="search")
                axes.barh(i, factor * cost["retrain"][unit]["mean"], 0.6, left=search, color=BLUE, label="retraining")
                axes.errorbar(factor * found["mean"], i, xerr=half, color="0.2", capsize=3)
            else:
                hatch = {"hatch": "//", "fill": False, "edgecolor": GREEN} if key == "imp" else {"color": GREEN}
                axes.barh(i, factor * found["mean"], 0.6, xerr=half, capsize=3, **hatch)
        axes.set_yticks(range(len(PARTS)), ["dense", "early-bird", "iterative\n(computed)"])
        axes.invert_yaxis()
        axes.set_xlabel(f"{label} per seed (bars: 95 % confidence)")
        axes.set_xlim(0, None)
        axes.legend(frameon=False)

    rows = []
    parts = {"search": "of which search", "retrain": "of which retraining", "making": "making the ticket's network"}
    for key, name in {**PARTS, **parts}.items():
        found = [cost[key][unit] for unit in ("seconds", "joules")]
        rows.append([name, *("–" if f is None else interval(f["mean"], f["ci95"], 2) for f in found)])
    energy = cost["energy"]
    where = f"Energy: {energy['source']}." if energy["source"] else f"No energy was measured: {energy['why_not']}."
    caption = f"{cost['how'][0].upper()}{cost['how'][1:]}; evaluations included. {where}"
    size = (WIDTH, 2.6)
    return Figure(
        "early-bird-cost", "What the ticket cost", caption, render(draw, size), ["", "seconds", "joules"], rows
    )
