"""The supermask experiment from hyperparameters."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from .. import analysis
from ..report import command_of
from ..tickets.driver import cores
from ..tickets.result import Result
from ..tickets.supermask_driver import supermask
from .hparams import Supermask
from .runs import Fit, name

TITLE = "supermask"


def run_supermask(
    hparams: Supermask,
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """Learn masks over untrained weights as `hparams` say and compare, in its folder under `out`; called again it goes on, or
    returns what is there. The arguments are those of `run_imp`, the result and the errors those of `sl.supermask`.
    """
    fit = Fit(hparams, data_root)
    scores = {"lr": hparams.mask_lr, "budget": hparams.mask_budget, "optimizer": "adam"}
    plain = {"momentum": 0.0, "weight_decay": 0.0, "warmup": "0it", "milestones": ()}
    result = supermask(
        fit.make_model(),
        fit,
        fit_masks=Fit(replace(hparams, **scores, **plain), data_root),
        method=hparams.method,
        weights=hparams.weights,
        density=hparams.density,
        rescale=hparams.rescale,
        criterion=hparams.criterion,
        densities=hparams.densities,
        seeds=hparams.seeds,
        out=Path(out) / name(TITLE, hparams),
        workers=cores() if workers is None else workers,
        threads=1,
        progress=progress,
        config={"hparams": asdict(hparams)},
    )
    numbers = {key: value for key, value in result.to_json().items() if key not in ("run", "ticket")}
    analysis.save(result.run, TITLE, numbers, command_of({"driver": TITLE, "hparams": asdict(hparams)}))
    return result
