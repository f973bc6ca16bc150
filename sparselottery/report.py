"""The report of a run: one self-contained HTML page with its figures, tables and the command that made it.

Reads only what the run folder holds (`result.json`, `metrics.jsonl`, `config.json`, `environment.json`), so a report can be
made again at any time, also from a folder that was copied from another machine.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shlex
import textwrap
from collections import defaultdict
from pathlib import Path

from .tickets.store import Store
from .tickets.ticket import write_atomic

KINDS = ("ticket", "reinit", "random-mask", "shuffle", "constant", "frozen")
LABELS = {
    "ticket": "winning ticket",
    "reinit": "random reinit",
    "random-mask": "random mask",
    "shuffle": "shuffled init",
    "constant": "signed constant",
    "frozen": "pruned at init",
}
# Okabe-Ito colours with distinct markers: readable without colour vision and in grey print.
COLOURS = {
    "ticket": "#0072B2",
    "reinit": "#D55E00",
    "random-mask": "#009E73",
    "shuffle": "#CC79A7",
    "constant": "#E69F00",
    "frozen": "#56B4E9",
}
MARKERS = {"ticket": "o", "reinit": "s", "random-mask": "^", "shuffle": "D", "constant": "v", "frozen": "P"}
CURVE_LEVELS = 4  # learning curves of the dense network and this many levels at most: more lines hide each other


def write_report(run: str | Path) -> Path:
    """Write `report.html` and its figures as PNG into a run folder.

    Args:
        run: the folder of a finished `imp` or `one-shot` run.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: the folder, or `result.json` in it, is not there (the run has not finished).
        ValueError: `result.json` is damaged.
    """
    run = Path(run)
    result = _read_result(run)
    records = read_metrics(run)
    figures = _figures(result["levels"], records)
    path = run / "report.html"
    page = _page(run, result, figures).encode()
    with Store(run, create=False).lock():
        for name, _, figure, _ in figures:
            write_atomic(run / f"{name}.png", figure)
        write_atomic(path, page)
    return path


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


def _read_result(run: Path) -> dict:
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    path = run / "result.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; the run has not finished (start it again, it resumes)")
    try:
        result = json.loads(path.read_text())
        for level in result["levels"]:
            float(level["density"]), level["ticket"].get("test_accuracy")
        result["levels"][result.get("found", {}).get("level", 0)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the result of a finished run, it is damaged ({error})") from None
    return result


# ---- tables ----


def _pair(statistic: dict | None, scale: float = 1.0, digits: int = 2) -> str:
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
        row += [_pair(level.get(k, {}).get("test_accuracy"), 100) for k in kinds]
        row += [_pair(level.get(k, {}).get("early_stop_iteration"), 1, 0) for k in kinds]
        rows.append(row)
    return header, rows


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal, columns aligned."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- figures ----


def _figures(levels: list[dict], records: list[dict]) -> list[tuple[str, str, bytes, str]]:
    """(file name, title, PNG bytes, table as HTML) of every figure the data allow."""
    figures = []
    kinds = kinds_of(levels)
    for key, name, title, label, scale, digits in (
        ("test_accuracy", "accuracy", "Test accuracy against density", "test accuracy, %", 100, 2),
        ("early_stop_iteration", "early_stop", "Early-stop iteration against density", "early-stop iteration", 1, 0),
    ):
        if any(key in level.get(k, {}) for level in levels for k in kinds):
            header = ["density %", *(LABELS[k] for k in kinds)]
            rows = [
                [f"{100 * v['density']:.1f}", *(_pair(v.get(k, {}).get(key), scale, digits) for k in kinds)]
                for v in levels
            ]
            figures.append((name, title, density_figure(levels, [(key, label, scale)]), _html_table(header, rows)))
    if records:
        figures.append(_learning_curves(levels, records))
    return figures


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _new_figure(panels=1, width=7.0, height=4.2):
    from matplotlib.figure import Figure  # no pyplot: no global state, no display, safe beside a user's own plots

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


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


def density_figure(levels: list[dict], panels: list[tuple[str, str, float]], title: str | None = None) -> bytes:
    """PNG with one panel per (figure of a level, axis label, factor on its values), each against density."""
    figure, all_axes = _new_figure(len(panels))
    for axes, (key, label, scale) in zip(all_axes, panels, strict=True):
        _against_density(axes, levels, key, label, scale)
    if title:
        figure.suptitle(title)
    return _png(figure)


def _learning_curves(levels: list[dict], records: list[dict]) -> tuple[str, str, bytes, str]:
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
    from matplotlib import colormaps

    figure, (axes,) = _new_figure()
    shades = colormaps["viridis"]
    for (level, kind), points in sorted(curves.items()):
        at = sorted(points)
        colour = shades(chosen.index(level) / max(1, len(chosen)))
        name = "dense" if level == 0 else f"{100 * levels[level]['density']:.1f} % {kind}"
        mean = [sum(points[i]) / len(points[i]) for i in at]
        axes.plot(at, mean, color=colour, ls="-" if kind == "ticket" else ":", lw=1.5, label=name)
    values = sorted(v for points in curves.values() for p in points.values() for v in p)
    if values:  # the first evaluations start at chance; the interesting part is the top
        low = values[len(values) // 10]
        axes.set_ylim(max(0.0, low - 0.1 * (100 - low)), min(100.5, values[-1] + 1))
    axes.set_xlabel("iteration")
    axes.set_ylabel(key.replace("_", " ") + ", %")
    if curves:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    header = ["network", "first evaluation", "half way", "last"]
    rows = []
    for (level, kind), points in sorted(curves.items()):
        at = sorted(points)
        name = "dense" if level == 0 else f"{100 * levels[level]['density']:.1f} % {LABELS[kind]}"
        rows.append(
            [name, *(f"{sum(points[i]) / len(points[i]):.2f} at {i}" for i in (at[0], at[len(at) // 2], at[-1]))]
        )
    return "learning_curves", "Learning curves", _png(figure), _html_table(header, rows)


# ---- page ----

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.lead { font-size: 1.1rem; } .soft { color: var(--soft); }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { vertical-align: bottom; font-weight: 600; }
pre { background: #f6f8fa; padding: .75rem; overflow-x: auto; border-radius: 6px; font-size: .8125rem; }
"""


def verdict(result: dict) -> str:
    """One sentence: which ticket was found and what it is worth."""
    levels = result["levels"]
    dense = levels[0]["ticket"].get("test_accuracy")
    level = result.get("found", {}).get("level", 0)
    if dense is None or "test_accuracy" not in levels[level]["ticket"]:
        return f"{len(levels)} levels down to {100 * levels[-1]['density']:.1f} % of the weights; no test accuracy was measured."
    if not level:
        return f"No ticket matched the dense network ({_pair(dense, 100)} % test accuracy) at any density tried."
    found = levels[level]
    accuracy = _pair(found["ticket"]["test_accuracy"], 100)
    text = f"A ticket with {100 * found['density']:.1f} % of the weights reaches {accuracy} % test accuracy; "
    text += f"the dense network {_pair(dense, 100)} %."
    others = [f"{LABELS[k]} {_pair(found[k].get('test_accuracy'), 100)} %" for k in KINDS[1:] if k in found]
    return text + (f" Its controls at the same density: {', '.join(others)}." if others else "")


def speed_sentence(speed: dict | None) -> str | None:
    """What the found ticket gains on this machine, or None where nothing was measured."""
    if not speed:
        return None
    parts = [f"{name.replace('_', ' ')} {speed[name]:.2f}x" for name in ("train_step", "inference") if speed.get(name)]
    return "Measured here against the dense network, one thread: " + ", ".join(parts) + "." if parts else None


def command_of(config: dict) -> str:
    """The command that makes the run of a `config.json`, every setting spelled out so that later defaults change nothing."""
    words = ["sparselottery", config["driver"]]
    for name, value in config["hparams"].items():
        if value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    text = textwrap.fill(" ".join(words), 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return text.replace("\n", " \\\n")


def _page(run: Path, result: dict, figures: list[tuple[str, str, bytes, str]]) -> str:
    def read(name):
        return Store(run, create=False).read(name) or {}

    config, environment = read("config.json"), read("environment.json")
    title = "Lottery ticket run"
    parts = [f"<h1>{title}</h1>", f'<p class="lead">{html.escape(verdict(result))}</p>']
    speed = speed_sentence(result.get("speed"))
    if speed:
        parts.append(f"<p>{html.escape(speed)}</p>")
    header, rows = summary_rows(result["levels"])
    parts += ["<h2>All levels</h2>", _html_table(header, rows)]
    parts.append('<p class="soft">Mean ± half width of the 95 % confidence interval over seeds (Student t).</p>')
    for name, heading, png, table in figures:
        data = base64.b64encode(png).decode()
        parts.append(
            f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        )
        parts.append(f'<details><summary class="soft">the numbers ({name}.png)</summary>{table}</details>')
    if config.get("hparams"):
        parts.append(f"<h2>Made by</h2><pre>{html.escape(command_of(config))}</pre>")
    for heading, content in (("Configuration", config), ("Environment", environment)):
        if content:
            text = html.escape(json.dumps(content, indent=2, sort_keys=True))
            parts.append(f"<details><summary>{heading}</summary><pre>{text}</pre></details>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
