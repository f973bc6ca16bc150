"""The papers' figures redone: the protocol, the claims with their stored tolerances, pass or fail for each, and the figure.

Scales: `paper` is the published protocol, `short` the same cut to minutes, `smoke` a minute that exercises the whole path on
real data. A claim's expected value is the paper's; its tolerance says how far a scale may miss it on the wrong side.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .. import analysis
from ..analysis import reproduction
from ..tickets.store import Store, to_json
from ..tickets.ticket import write_atomic
from . import figures, figures_methods
from .any_run import as_json, run_any
from .figures import Figure

SCALES = ("smoke", "short", "paper")
FIGURES = {**figures.FIGURES, **figures_methods.FIGURES}


def reproduce(
    figure: str,
    scale: str = "smoke",
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """Run a figure's protocol (or go on with it), check its claims, write `<figure>.png` and `claims.json` in the run folder.

    Args:
        figure: a key of `FIGURES`. scale: one of `SCALES`.
        data_root, out, workers, progress: see `run_imp`.

    Returns:
        {"figure", "scale", "run": folder of the figure's first run, "runs": {label: folder}, "png",
        "claims": [{"claim", "measured", "expected", "tolerance", "side", "holds"}]}.

    Raises:
        ValueError: an unknown figure or scale. FileNotFoundError, ValueError: data missing or damaged.
    """
    spec = find(figure, scale)
    results = {  # kept until the end: a result may hold its folder
        label: run_any(hparams, out, data_root=data_root, workers=workers, progress=progress)
        for label, hparams in spec.runs[scale].items()
    }
    found = {label: as_json(result) for label, result in results.items()}
    claims = [claim.check(found) for claim in spec.claims[scale]]
    run = Path(next(iter(found.values()))["run"])
    command = f"sparselottery reproduce {figure} --scale {scale}"
    numbers = {
        "figure": figure,
        "title": f"{spec.title}, {scale}",
        "claims": claims,
        "panels": spec.panels(found),
    }
    png = run / f"{figure}.png"
    shown = {
        "figure": figure,
        "scale": scale,
        "run": str(run),
        "runs": {label: result["run"] for label, result in found.items()},
        "png": str(png),
        "claims": claims,
    }
    store = Store(run)
    with store.lock():
        analysis.save(run, "reproduction", numbers, command)
        write_atomic(png, reproduction.figures(numbers)[0].png)
        write_atomic(run / "claims.json", to_json(shown))
        store.write_manifest()
    return shown


def find(figure: str, scale: str) -> Figure:
    """What `figure` is made of, if there is such a figure and scale.

    Raises:
        ValueError: there is not.
    """
    if figure not in FIGURES:
        raise ValueError(f"figure: expected one of {', '.join(sorted(FIGURES))}, got {figure!r}")
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    return FIGURES[figure]
