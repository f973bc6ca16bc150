"""The report of a run: one self-contained HTML page with its figures, tables and the commands that made them.

Reads only what the run folder holds (`result.json`, `metrics.jsonl`, `config.json`, `environment.json`, `analysis/*.json`), so a
report can be made again at any time, also from a folder that was copied from another machine.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

from .. import analysis
from ..tickets.store import Store
from ..tickets.ticket import write_atomic
from . import levels as of_levels
from . import summary
from .command import command_of
from .levels import kinds_of, read_metrics, speed_sentence, summary_rows, text_table, verdict
from .page import Section, page, table

__all__ = [
    "command_of",
    "kinds_of",
    "read_metrics",
    "speed_sentence",
    "summary_rows",
    "text_table",
    "verdict",
    "write_report",
]

LEVELS_NOTE = "Mean ± half width of the 95 % confidence interval over seeds (Student t)."


def write_report(run: str | Path) -> Path:
    """Write `report.html` and its figures as PNG into a run folder: those of its levels there, those of `analysis/` in there.

    Args:
        run: the folder of a finished run of any command, or of one that left analyses.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: the folder is not there, or holds neither `result.json` nor an analysis (the run has not finished).
        ValueError: one of its files is damaged; the message names it.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    store = Store(run, create=False)
    result, found = _read_result(run), analysis.load(run)
    if result is None and not found:
        raise FileNotFoundError(
            f"{run / 'result.json'}: not there; the run has not finished (start it again, it resumes)"
        )
    config, environment = store.read("config.json") or {}, store.read("environment.json") or {}
    result = result or {}
    made = f"{command_of(config)}\nsparselottery report {run.name}" if config.get("hparams") else None
    sections, pictures = [], {}
    if "levels" in result:
        for figure in of_levels.figures(result["levels"], read_metrics(run)):
            pictures[run / f"{figure.name}.png"] = figure.png
            sections.append(Section(figure, made))
    notes = []
    for name, entry in found.items():
        if name not in analysis.ANALYSES:
            notes.append(f"analysis/{name}.json is not known to this version of sparselottery and not shown.")
            continue
        for figure in analysis.figures(name, entry["numbers"]):
            pictures[run / analysis.FOLDER / f"{figure.name}.png"] = figure.png
            sections.append(Section(figure, entry["command"]))
    text = page(
        title=summary.title(config),
        lead=summary.lead(result, found),
        facts=summary.facts(config, result),
        summary=_summary(result, found),
        sections=sections,
        notes=notes,
        made=command_of(config) if config.get("hparams") else None,
        appendix={"Configuration": config, "Environment": environment},
    )
    path = run / "report.html"
    with store.lock():
        for place, png in pictures.items():
            write_atomic(place, png)
        write_atomic(path, text.encode())
    return path


def _summary(result: dict, found: dict) -> str:
    """The run's own table, as HTML."""
    if "levels" in result:
        header, rows = summary_rows(result["levels"])
        return f"<h2>All levels</h2>{table(header, rows, 'All levels')}<p class='soft'>{html.escape(LEVELS_NOTE)}</p>"
    header, rows = summary.statistics(result)
    if not rows:
        return ""
    inside = f"{table(header, rows, 'All results')}<p class='soft'>{html.escape(LEVELS_NOTE)}</p>"
    if any(name in analysis.ANALYSES for name in found):  # whose tables say the same better
        return f"<details><summary>all results as numbers</summary>{inside}</details>"
    return f"<h2>Results</h2>{inside}"


def _read_result(run: Path) -> dict | None:
    path = run / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict):
            raise TypeError(f"an object was expected, it holds {type(result).__name__}")
        if "levels" in result:
            for level in result["levels"]:
                float(level["density"]), level["ticket"].get("test_accuracy")
            result["levels"][result.get("found", {}).get("level", 0)]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the result of a finished run, it is damaged ({error})") from None
    return result
