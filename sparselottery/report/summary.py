"""What a report says before its figures, for runs of every command."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from .. import analysis
from ..tickets.early_bird_driver import warnings_of
from .levels import pair, speed_sentence, verdict

DEEPEST = 4  # levels of nesting that the table of results looks into
LONG = 24  # entries of a list that are no table of results


def title(config: Mapping) -> str:
    """Such as "imp: lenet-300-100 on digits"."""
    hparams = config.get("hparams") or {}
    name = config.get("driver") or "run"
    what = " on ".join(str(hparams[key]) for key in ("model", "data") if hparams.get(key))
    return f"{name}: {what}" if what else f"Lottery ticket run: {name}" if name != "run" else "Lottery ticket run"


def lead(result: Mapping, found: Mapping[str, Mapping]) -> list[str]:
    """The sentences at the top: which ticket was found and what it is worth."""
    sentences = []
    if "levels" in result:
        sentences.append(verdict(result))
    elif isinstance(result.get("verdict"), str):
        sentences.append(result["verdict"])
    for name, entry in found.items():
        says = _verdict_of(name)
        if says is not None:
            sentences.append(_of_its_own(says, name, entry["numbers"]))
    if not sentences and "drawn_epoch" in result:
        drawn, epochs = result["drawn_epoch"], result.get("epochs")
        drawn = drawn.get("mean") if isinstance(drawn, Mapping) else drawn
        sentences.append(
            "No ticket was drawn." if drawn is None else f"The ticket was drawn after epoch {drawn:g} of {epochs}."
        )
    if "collapsed" in result and "guarded" in result:
        sentences += [f"Note: {warning}." for warning in warnings_of(result)]
    speed = speed_sentence(result.get("speed"))
    return [*dict.fromkeys(sentences), *([speed] if speed else [])]


def _verdict_of(name):
    if name not in analysis.ANALYSES:
        return None
    return getattr(importlib.import_module(f"{analysis.__name__}.{analysis.ANALYSES[name]}"), "verdict", None)


def _of_its_own(says, name, numbers) -> str:
    try:
        return says(numbers)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"analysis/{name}.json: expected the numbers of this analysis, got others ({error!r})"
        ) from error


def facts(config: Mapping, result: Mapping) -> list[tuple[str, str]]:
    """A few pairs of what and how much."""
    hparams = config.get("hparams") or {}
    shown = [("data", "data set"), ("model", "network"), ("optimizer", "optimizer"), ("lr", "learning rate"),
             ("budget", "training"), ("seeds", "seeds"), ("rewind", "rewinds to")]  # fmt: skip
    found = [(label, str(hparams[key])) for key, label in shown if hparams.get(key) is not None]
    if "levels" in result:
        found.append(("sparsest level", f"{100 * result['levels'][-1]['density']:.1f} %"))
    return found


def statistics(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """The numbers of a result as a table: single ones, and means with their intervals, by the path to them."""
    rows: list[list[str]] = []
    _walk(result, (), rows)
    return ["what", "value"], rows


def _walk(value, path: tuple[str, ...], rows: list[list[str]]) -> None:
    name = " / ".join(part.replace("_", " ") for part in path)
    percent = bool(path) and ("accuracy" in path[-1] or path[-1].endswith("density"))
    if isinstance(value, Mapping) and "mean" in value and "values" in value:
        if value["mean"] is not None:
            rows.append([name + (", %" if percent else ""), pair(value, 100 if percent else 1)])
    elif isinstance(value, Mapping):
        if len(path) < DEEPEST:
            for key, item in value.items():
                _walk(item, (*path, str(key)), rows)
    elif isinstance(value, bool):
        rows.append([name, "yes" if value else "no"])
    elif isinstance(value, int | float):
        text = f"{100 * value:.2f}" if percent else f"{value:.6g}"
        rows.append([name + (", %" if percent else ""), text])
    elif isinstance(value, list) and value and len(value) <= LONG and all(isinstance(v, int | float) for v in value):
        rows.append([name, ", ".join(f"{v:.6g}" for v in value)])
