"""Questions asked of a run: their numbers as JSON in its folder, and the figures that are drawn from them.

Every analysis has a name and a module of this package in `ANALYSES`. Whoever has its numbers writes them with `save` to
`RUN/analysis/<name>.json`; the module's `figures(numbers) -> list[Figure]` draws them. The numbers are all a figure may read, so
that a report can be made again anywhere, and an analysis that is there already need not be computed again.

    {"analysis": "weight-motion", "command": "sparselottery analyze runs/demo weight-motion", "numbers": {...}}
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..tickets.store import to_json
from ..tickets.ticket import write_atomic
from .figure import Figure

# name -> module of this package that has `figures(numbers: dict) -> list[Figure]`; reports show them in this order
ANALYSES: dict[str, str] = {
    "early-bird": "early_bird",
    "weight-motion": "weight_motion",
    "class-damage": "class_damage",
    "landscape": "landscape",
    "stability": "stability",
    "reproduction": "reproduction",
    "mutual-information": "mutual_information",
    "supermask": "supermask",
    "refill": "restructured",
    "regroup": "restructured",
}

FOLDER = "analysis"


def save(run: str | os.PathLike, name: str, numbers: Mapping, command: str) -> Path:
    """Write the numbers of an analysis to `RUN/analysis/<name>.json`, whole or not at all.

    Args:
        run: a run folder. name: a key of `ANALYSES`.
        numbers: JSON with string keys; numpy and 0-d torch numbers become plain ones, NaN and infinity null (JSON has neither).
        command: what a user types to have them computed again.

    Returns:
        The path written.

    Raises:
        ValueError: no such analysis. FileNotFoundError: no such folder. TypeError: `numbers` holds what JSON cannot.
    """
    check(name)
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    if not isinstance(numbers, Mapping):
        raise TypeError(f"numbers: expected a mapping, got {type(numbers).__name__}")
    (run / FOLDER).mkdir(exist_ok=True)
    path = run / FOLDER / f"{name}.json"
    write_atomic(path, to_json({"analysis": name, "command": str(command), "numbers": plain(numbers, "numbers")}))
    return path


def load(run: str | os.PathLike) -> dict[str, dict]:
    """Every analysis of a run folder: name -> {"analysis", "command", "numbers"}, in the order of `ANALYSES`, unknown ones last.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    found = {}
    for path in sorted((Path(run) / FOLDER).glob("[!.]*.json")):
        found[path.stem] = _read(path)
    order = {name: i for i, name in enumerate(ANALYSES)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def read(run: str | os.PathLike, name: str) -> dict | None:
    """One analysis of a run folder as `load` gives it, None where there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = Path(run) / FOLDER / f"{name}.json"
    return _read(path) if path.is_file() else None


def figures(name: str, numbers: Mapping) -> list[Figure]:
    """The figures of an analysis, drawn from its numbers.

    Raises:
        ValueError: no such analysis, or numbers that are not its own.
    """
    module = importlib.import_module(f"{__name__}.{ANALYSES[check(name)]}")
    try:
        return module.figures(numbers)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{FOLDER}/{name}.json: expected the numbers of this analysis, got others ({what})") from error


def check(name: str) -> str:
    """`name`, if there is such an analysis.

    Raises:
        ValueError: there is none.
    """
    if name not in ANALYSES:
        raise ValueError(f"analysis: expected one of {', '.join(ANALYSES)}, got {name!r}")
    return name


def plain(value, where: str = "value"):
    """A value of plain JSON types: numpy and torch numbers and arrays too, tuples as lists, NaN and infinity as None.

    Raises:
        TypeError: something else; the message says where it stands.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected keys that are strings, got {key!r}")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy, torch
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{where}: expected what JSON can hold, got {type(value).__name__}")


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if found["analysis"] != path.stem or not isinstance(found["numbers"], dict):
            raise ValueError("it holds something else")
        return {"analysis": path.stem, "command": str(found["command"]), "numbers": found["numbers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the numbers of an analysis, got a damaged file ({error}); delete it to have it made again"
        ) from None
