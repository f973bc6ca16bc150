"""Tables and figures of runs that prune level by level: imp and one-shot."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

from ..analysis.figure import AMBER, BLUE, GREEN, ORANGE, PURPLE, SKY, Figure, panels, render

KINDS = ("ticket", "reinit", "random-mask", "shuffle", "constant", "frozen")
LABELS = {
    "ticket": "winning ticket",
    "reinit": "random reinit",
    "random-mask": "random mask",
    "shuffle": "shuffled init",
    "constant": "signed constant",
    "frozen": "pruned at init",
}
COLOURS = dict(zip(KINDS, (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY), strict=True))
MARKERS = dict(zip(KINDS, "os^DvP", strict=True))
CURVE_LEVELS = 4  # learning curves of the dense network and this many levels at most: more lines hide each other


def read_metrics(run: str | Path) -> list[dict]:
    """The records of `metrics.jsonl`; a line that a kill has torn is left out."""
    path = Path(run) / "metrics.jsonl"
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "iteration" in record:
            records.append(record)
    return records


# ---- tables ----


def pair(statistic: dict | None, scale: float = 1.0, digits: int = 2) -> str:
    """A cell: mean ± half width of the interval, a dash where nothing was measured."""
    if not statistic or statistic.get("mean") is None:
        return "–"
    mean, half = statistic["mean"] * scale, statistic.get("ci95")
    spread = f" ± {half * scale:.{digits}f}" if half is not None and math.isfinite(half) else ""
    return f"{mean:.{digits}f}{spread}"


def kinds_of(levels: list[dict]) -> list[str]:
    """Which of ticket, reinit, random-mask and shuffle a result holds, in that order."""
    return [kind for kind in KINDS if any(kind in level for level in levels)]


def summary_rows(levels: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the run's table: accuracies in percent (mean ± 95 % confidence), early stops in iterations."""
    kinds = kinds_of(levels)
    header = ["density %", *(f"{LABELS[k]}: test acc. %" for k in kinds), *(f"{LABELS[k]}: early stop" for k in kinds)]
    rows = []
    for level in levels:
        row = [f"{100 * level['density']:.1f}"]
        row += [pair(level.get(k, {}).get("test_accuracy"), 100) for k in kinds]
        row += [pair(level.get(k, {}).get("early_stop_iteration"), 1, 0) for k in kinds]
        rows.append(row)
    return header, rows


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal, columns aligned."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


# ---- figures ----


def figures(levels: list[dict], records: list[dict]) -> list[Figure]:
    """Every figure the data allow."""
    found = []
    kinds = kinds_of(levels)
    seeds = max((len(v["ticket"].get("test_accuracy", {}).get("values", ())) for v in levels), default=0)
    over = f" over {seeds} seeds" if seeds > 1 else ""
    for key, name, title, label, scale, digits, what in (
        ("test_accuracy", "accuracy", "Test accuracy against density", "test accuracy, %", 100, 2,
         "Test accuracy at the early stop (the end, where nothing was validated)"),
        ("early_stop_iteration", "early_stop", "Early stop against density", "early-stop iteration", 1, 0,
         "Iteration of minimum validation loss: how fast the network learns"),
    ):  # fmt: skip
        if any(key in level.get(k, {}) for level in levels for k in kinds):
            header = ["density %", *(LABELS[k] for k in kinds)]
            rows = [
                [f"{100 * v['density']:.1f}", *(pair(v.get(k, {}).get(key), scale, digits) for k in kinds)]
                for v in levels
            ]
            caption = f"{what}, against the weights kept: mean{over}, bars are 95 % confidence intervals."

            def draw(canvas, key=key, label=label, scale=scale):
                _against_density(*panels(canvas), levels, key, label, scale)

            found.append(Figure(name, title, caption, render(draw), header, rows))
    if records:
        curves = _learning_curves(levels, records)
        found += [] if curves is None else [curves]
    return found


def _against_density(axes, levels: list[dict], key: str, label: str, scale: float) -> None:
    """One quantity against the weights kept: log axis, dense at the left, as in the papers."""
    for kind in kinds_of(levels):
        points = [(100 * v["density"], v[kind][key]) for v in levels if v.get(kind, {}).get(key)]
        if points:
            x = [p[0] for p in points]
            mean = [p[1]["mean"] * scale for p in points]
            half = [(p[1].get("ci95") or 0.0) * scale for p in points]
            style = {"color": COLOURS[kind], "marker": MARKERS[kind], "ms": 4, "capsize": 2, "lw": 1.5}
            axes.errorbar(x, mean, half, label=LABELS[kind], **style)
    dense = levels[0].get("ticket", {}).get(key)
    if dense:
        axes.axhline(dense["mean"] * scale, color="0.4", ls="--", lw=1, label="dense")
    axes.set_xscale("log")
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= 60 * min(v["density"] for v in levels)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("weights kept, % (bars: 95 % confidence over seeds)")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)


def _learning_curves(levels: list[dict], records: list[dict]) -> Figure | None:
    """Mean test (where absent: validation) accuracy over the iterations for the dense network and a few levels."""
    chosen = sorted({round(i * (len(levels) - 1) / CURVE_LEVELS) for i in range(CURVE_LEVELS + 1)})
    key = (
        "test_accuracy"
        if sum(r.get("test_accuracy") is not None for r in records) > len(records) / 2
        else "validation_accuracy"
    )
    curves: dict = defaultdict(lambda: defaultdict(list))
    for r in records:
        drawable = r["iteration"] is not None and r.get(key) is not None
        if drawable and r.get("level") in chosen and r.get("kind") in ("ticket", "reinit"):
            curves[r["level"], r["kind"]][r["iteration"]].append(100 * r[key])
    if not curves:
        return None
    lines = [(level, kind, points, sorted(points)) for (level, kind), points in sorted(curves.items())]

    def draw(canvas):
        from matplotlib import colormaps

        (axes,) = panels(canvas)
        shades = colormaps["viridis"]
        for level, kind, points, at in lines:
            colour = shades(chosen.index(level) / max(1, len(chosen)))
            name = "dense" if level == 0 else f"{100 * levels[level]['density']:.1f} % {kind}"
            mean = [sum(points[i]) / len(points[i]) for i in at]
            axes.plot(at, mean, color=colour, ls="-" if kind == "ticket" else ":", lw=1.5, label=name)
        values = sorted(v for points in curves.values() for p in points.values() for v in p)
        low = values[len(values) // 10]  # the first evaluations start at chance; the interesting part is the top
        axes.set_ylim(max(0.0, low - 0.1 * (100 - low)), min(100.5, values[-1] + 1))
        axes.set_xlabel("iteration")
        axes.set_ylabel(key.replace("_", " ") + ", %")
        axes.legend(frameon=False, ncols=2, fontsize=8)

    header = ["network", "first evaluation", "half way", "last"]
    rows = []
    for level, kind, points, at in lines:
        name = "dense" if level == 0 else f"{100 * levels[level]['density']:.1f} % {LABELS[kind]}"
        where = (at[0], at[len(at) // 2], at[-1])
        rows.append([name, *(f"{sum(points[i]) / len(points[i]):.2f} at {i}" for i in where)])
    caption = f"{key.replace('_', ' ').capitalize()} while training, mean over seeds; dotted lines are random reinits."
    return Figure("learning_curves", "Learning curves", caption, render(draw), header, rows)


def verdict(result: dict) -> str:
    """One sentence: which ticket was found and what it is worth."""
    levels = result["levels"]
    dense = levels[0]["ticket"].get("test_accuracy")
    level = result.get("found", {}).get("level", 0)
    if dense is None or "test_accuracy" not in levels[level]["ticket"]:
        return f"{len(levels)} levels down to {100 * levels[-1]['density']:.1f} % of the weights; no test accuracy was measured."
    if not level:
        return f"No ticket matched the dense network ({pair(dense, 100)} % test accuracy) at any density tried."
    found = levels[level]
    accuracy = pair(found["ticket"]["test_accuracy"], 100)
    text = f"A ticket with {100 * found['density']:.1f} % of the weights reaches {accuracy} % test accuracy; "
    text += f"the dense network {pair(dense, 100)} %."
    others = [f"{LABELS[k]} {pair(found[k].get('test_accuracy'), 100)} %" for k in KINDS[1:] if k in found]
    return text + (f" Its controls at the same density: {', '.join(others)}." if others else "")


def speed_sentence(speed: dict | None) -> str | None:
    """What the found ticket gains on this machine, or None where nothing was measured."""
    if not speed:
        return None
    parts = [f"{name.replace('_', ' ')} {speed[name]:.2f}x" for name in ("train_step", "inference") if speed.get(name)]
    return "Measured here against the dense network, one thread: " + ", ".join(parts) + "." if parts else None
