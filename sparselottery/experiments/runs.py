"""From hyperparameters to a finished run folder."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .. import analysis
from ..analysis import early_bird as figures_of_early_bird
from ..report import command_of
from ..tickets.driver import cores
from ..tickets.early_bird_driver import early_bird
from ..tickets.imp import imp
from ..tickets.one_shot import one_shot
from ..tickets.result import Result
from ..tickets.store import Store
from ..tickets.ticket import write_atomic
from ..training.augment import AUGMENTATIONS
from ..training.history import History, check_seed
from ..training.trainer import Trainer
from . import data, models
from .hparams import EarlyBird, Imp, OneShot, Training, changed


class Fit:
    """The training that hyperparameters describe. It pickles as these alone; data are read where it is first called."""

    def __init__(self, hparams: Training, data_root: str | os.PathLike | None = None):
        self.hparams, self.data_root = hparams, data_root

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        return data.load(self.hparams.data, self.data_root)

    @functools.cached_property
    def trainer(self) -> Trainer:
        h = self.hparams
        train, validation = self.dataset.split(h.validation, check_seed(h.split_seed, "split_seed"))
        options = {"weight_decay": h.weight_decay} | ({"momentum": h.momentum} if h.optimizer == "sgd" else {})
        if h.momentum and h.optimizer != "sgd":
            raise ValueError(f"momentum: expected 0 for {h.optimizer}, which has betas, got {h.momentum}")
        return Trainer(
            train,
            validation if h.validation else None,
            self.dataset.first_of_test(h.test),
            batch_size=h.batch_size,
            optimizer=h.optimizer,
            lr=h.lr,
            optimizer_options=options,
            budget=h.budget,
            warmup=h.warmup,
            milestones=h.milestones,
            evaluate_every=h.evaluate_every,
            evaluate_test=h.evaluate_test,
            augment=AUGMENTATIONS[h.augment],
        )

    def __call__(
        self, model, *, seed, budget=None, snapshot_at=None, start_at=0, penalty=None, on_epoch=None, schedule=None
    ) -> History:
        steps = {"budget": budget, "snapshot_at": snapshot_at, "start_at": start_at}
        return self.trainer(model, seed=seed, **steps, penalty=penalty, on_epoch=on_epoch, schedule=schedule)

    def fit_many(self, models, *, seeds, budget=None, snapshot_at=None, start_at=0) -> list[History]:
        steps = {"budget": budget, "snapshot_at": snapshot_at, "start_at": start_at}
        return self.trainer.fit_many(models, seeds=seeds, **steps)

    def why_not_many(self, model) -> str | None:
        return self.trainer.why_not_many(model)

    def epochs(self, budget=None) -> int:
        return self.trainer.epochs(budget)

    def example(self, count: int = 2):
        return self.trainer.example(count)

    def check(self, model, *, budget=None, snapshot_at=None) -> None:
        self.trainer.check(model, budget=budget, snapshot_at=snapshot_at)

    def make_model(self) -> Callable:
        """`make(seed=...) -> nn.Module`."""
        h = self.hparams
        return functools.partial(
            models.make, h.model, self.dataset.input_shape, self.dataset.classes, dropout=h.dropout
        )

    def config(self) -> dict:
        return self.trainer.config()

    def __reduce__(self):
        return Fit, (self.hparams, self.data_root)


def name(driver: str, hparams: Training) -> str:
    """The folder of a run: the driver and a hash of what differs from the defaults."""
    text = json.dumps(changed(hparams), sort_keys=True)
    return f"{driver}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def run_imp(
    hparams: Imp,
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    replicas: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """Iterative magnitude pruning as `hparams` say, in its folder under `out`; called again it goes on, or returns what is there.

    Args:
        workers: processes, one CPU thread each (the results do not depend on it); None is one per core,
            with replicas one.
        replicas, progress: see `sl.imp`.
    """
    return _run(imp, "imp", hparams, out, data_root, workers, replicas, progress, **hparams.pace())


def run_one_shot(
    hparams: OneShot,
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    replicas: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """One-shot pruning; the arguments are those of `run_imp`."""
    return _run(
        one_shot,
        "one-shot",
        hparams,
        out,
        data_root,
        workers,
        replicas,
        progress,
        density=hparams.densities,
        schedule=hparams.schedule,
    )


def _run(driver, title, hparams, out, data_root, workers, replicas, progress, **pace) -> Result:
    fit = Fit(hparams, data_root)
    if workers is None:  # replicas share one process
        workers = 1 if (replicas or 1) > 1 else cores()
    return driver(
        fit.make_model(),
        fit,
        **pace,
        criterion=hparams.criterion,
        rewind=hparams.rewind,
        controls=hparams.controls,
        control_levels=hparams.control_levels,
        repeats=hparams.repeats,
        seeds=hparams.seeds,
        scope=hparams.scope,
        rates=hparams.rates(),
        out=Path(out) / name(title, hparams),
        workers=workers,
        replicas=replicas,
        threads=1,
        progress=progress,
        config={"hparams": asdict(hparams)},
    )


def run_early_bird(
    hparams: EarlyBird,
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Result:
    """Early-Bird tickets as `hparams` say; the arguments are those of `run_imp`, the result that of `sl.early_bird`.

    The distances between the masks of all epochs of the first seed are also in the run folder as a picture,
    `early-bird-distances.png`, and as a table, `early-bird-distances.csv`.
    """
    fit = Fit(hparams, data_root)
    names = ("density", "structure", "window", "threshold", "l1", "start", "round_to", "controls", "seeds", "heatmap")
    result = early_bird(
        fit.make_model(),
        fit,
        **{key: getattr(hparams, key) for key in names},
        out=Path(out) / name("early-bird", hparams),
        workers=cores() if workers is None else workers,
        threads=1,
        progress=progress,
        config={"hparams": asdict(hparams)},
    )
    shown = result.to_json()
    numbers = {key: shown.get(key) for key in figures_of_early_bird.NUMBERS}
    command = command_of({"driver": "early-bird", "hparams": asdict(hparams)})
    store = Store(result.run)
    with store.lock():
        analysis.save(result.run, "early-bird", numbers, command)
        picture = analysis.figures("early-bird", numbers)[0]
        write_atomic(result.run / f"{picture.name}.png", picture.png)
        table = figures_of_early_bird.csv(numbers["distances"]).encode()
        write_atomic(result.run / f"{picture.name}.csv", table)
    return result
