"""Every kind of run by its hyperparameters."""

import importlib
import os

from .hparams import EarlyBird, Imp, MutualInformation, OneShot, Supermask, Training

# kind of hyperparameters -> module of this package and its function (imported when one is run)
RUNS = {
    Imp: ("runs", "run_imp"),
    OneShot: ("runs", "run_one_shot"),
    EarlyBird: ("runs", "run_early_bird"),
    MutualInformation: ("mutual_information", "run_mutual_information"),
    Supermask: ("supermask", "run_supermask"),
}


def run_any(hparams: Training, out: str | os.PathLike = "runs", **arguments):
    """The run that hyperparameters of this kind describe; see `runs.run_imp`. Returns what its function returns."""
    module, function = RUNS[type(hparams)]
    return getattr(importlib.import_module(f".{module}", __package__), function)(hparams, out, **arguments)


def as_json(result) -> dict:
    """The JSON object of what `run_any` returned."""
    return result if isinstance(result, dict) else result.to_json()
