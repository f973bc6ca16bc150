"""Supermasks over seeds: how far masks alone bring an untrained network, beside masks by criterion and beside chance."""

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..nn.convert import as_tuple, masked_modules, sparsify
from ..ops import dispatch
from ..pruning import criteria, prune
from ..training.history import History
from . import controls, driver, masking
from . import supermask as learning
from .execute import execute
from .pool import check_guarded, run_all
from .result import Result, interval, summary
from .seeding import seeded
from .store import Job, Store, sha256
from .ticket import Ticket

SAMPLES = 10  # masks drawn where the learned probabilities are asked, as in the paper
LEARNED, CRITERION = 1, 2  # levels of the tickets; 0 is all weights at their initial values


@dataclass(frozen=True)
class Plan:
    """Everything a job needs to know. Of each seed one job trains the dense network, for the masks by criterion, one learns."""

    make_model: Callable[..., nn.Module]
    fit: Callable
    fit_masks: Callable
    seeds: tuple[int, ...]
    method: str
    weights: str
    density: float | None
    rescale: bool
    criterion: str | Callable
    densities: tuple[float, ...]
    exclude: tuple
    threads: int | None

    def jobs(self) -> list[Job]:
        return [Job(seed, level) for seed in self.seeds for level in (0, LEARNED)]

    def build(self, seed: int) -> nn.Module:
        return sparsify(driver.build(self.make_model, seed), exclude=self.exclude)

    def config(self) -> dict:
        fits = {"fit": self.fit, "fit_masks": self.fit_masks}
        names = ("method", "weights", "density", "rescale", "densities")
        return {
            "driver": "supermask",
            "make_model": driver.name_of(self.make_model),
            **{name: f.config() if hasattr(f, "config") else driver.name_of(f) for name, f in fits.items()},
            "seeds": list(self.seeds),
            **{name: getattr(self, name) for name in names},
            "criterion": self.criterion if isinstance(self.criterion, str) else driver.name_of(self.criterion),
            "exclude": [str(e) for e in self.exclude],
        }


def supermask(
    make_model: Callable[..., nn.Module],
    fit: Callable,
    *,
    fit_masks: Callable | None = None,
    method: str = "bernoulli",
    weights: str = "constant",
    density: float | None = None,
    rescale: bool = False,
    criterion: str | Callable = "large-final-same-sign",
    densities: Sequence[float] = (0.8, 0.5, 0.3, 0.2, 0.1),
    seeds: int | Sequence[int] = 5,
    exclude: Sequence = (),
    out: str | os.PathLike | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: Callable[[dict], None] | None = None,
    config: Mapping | None = None,
) -> Result:
    """Learn masks over weights that are never trained (Zhou et al. 2019, arXiv 1905.01067, section 5), and compare.

    For each seed: the masks are learned over the frozen initial weights; the dense network is trained, and masks by criterion
    from it are put on the same untrained weights; so are random masks of as many weights as the learned ones keep.

    Args:
        make_model, seeds, exclude, out, workers, threads, progress, config: as for `sl.imp`.
        fit: `fit(model, *, seed, budget) -> History` trains the dense network (a `sl.Trainer`, or any loop). With budget=0 it
            must do nothing but evaluate.
        fit_masks: likewise, to learn masks: the parameters that require gradients are their scores, which want a larger learning
            rate (Adam: 0.1). None is `fit`.
        method, weights, density, rescale: see `supermask.learn_masks`.
        criterion, densities: of the masks from the trained network. Each density is tried, layer by layer with the output layer
            at half the rate; the one of the best validation accuracy is told.

    Returns:
        A Result with level 0 (the dense network, trained) and 1 (the untrained network under the learned masks), whose
        result.json and `to_json` also hold

            "test_accuracy": of the untrained network under the learned masks, {"mean", "ci95", "values"};
            "methods": {"learned", "sampled" (the mean over 10 masks drawn from the probabilities; bernoulli alone), "criterion",
            "random-mask", "untrained" (all initial weights), "dense" (trained): {"test_accuracy": {...}, "density": {...}}};
            "chance": one over the number of classes, None where `fit` is no sl.Trainer.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    chosen = driver.check(make_model, fit, seeds, "init", (), 1, workers, threads)
    fit_masks = fit if fit_masks is None else fit_masks
    driver.check(make_model, fit_masks, list(chosen), "init", (), 1, workers, threads)
    learning.check(method, weights, density)
    masking.check(fit, criterion, None, "init")
    listed = list(densities) if isinstance(densities, Sequence) and not isinstance(densities, str) else None
    if not listed or not all(isinstance(d, int | float) and 0 < d < 1 for d in listed):
        raise ValueError(f"densities: expected fractions between 0 and 1, got {densities!r}")
    plan = Plan(
        make_model, fit, fit_masks, chosen, method, weights, density, bool(rescale), criterion, tuple(listed),
        as_tuple(exclude), threads,
    )  # fmt: skip
    model = driver.probe(make_model, chosen[0], plan.exclude, ())
    for share in plan.densities:
        masking.try_out(copy.deepcopy(model), _step(plan, share))
    for asked in (fit, fit_masks):
        if callable(getattr(asked, "check", None)):
            asked.check(model)
    if workers > 1:
        check_guarded()
    jobs = plan.jobs()

    def run(store, todo, done):
        todo = sorted(todo, key=lambda job: (-job.level, job.seed))
        return run_all(todo, lambda job: None, done, run_job, (plan, store.folder), workers, threads)

    ran = execute(
        jobs,
        out,
        {**plan.config(), **(config or {})},
        progress,
        is_done=_is_done,
        run=run,
        summarize=lambda store: _summary(plan, store, jobs),
    )
    return Result(*ran)


def _is_done(store: Store, job: Job) -> bool:
    outcome = store.job(job)
    if outcome is None:
        return False
    paths = {level: store.ticket(job.seed, int(level)) for level in outcome["tickets"]}
    return all(p.is_file() and sha256(p) == outcome["tickets"][level] for level, p in paths.items())


# ---- jobs ----


def run_job(plan: Plan, folder: Path, job: Job) -> None:
    """One training and what it leaves; the job's file is written last."""
    store, begin = Store(folder), time.perf_counter()
    with dispatch.reproducible():
        outcome = _learn(plan, store, job) if job.level else _compare(plan, store, job)
    store.finish(job, {**outcome, "seconds": round(time.perf_counter() - begin, 3)})


def _learn(plan: Plan, store: Store, job: Job) -> dict:
    """Masks over untrained weights, and as many weights at random."""
    model = plan.build(job.seed)
    start = learning.untrained(model, plan.weights)
    options = {"method": plan.method, "weights": plan.weights, "density": plan.density, "rescale": plan.rescale}
    learning.learn_masks(model, **options)
    trained = _fit(plan.fit_masks, model, job.seed)
    ticket = learning.learned_ticket(model)
    records = trained.records
    iterations = records[-1].iteration if records else None
    sampled = None
    if plan.method == "bernoulli":
        learning.sampling(model, True)
        drawn = []
        for i in range(SAMPLES):
            seed = controls.derived_seed("supermask", job.seed, i)
            drawn.append(_fit(plan.fit_masks, model, seed, budget=0).final_test_accuracy)
        sampled = None if None in drawn else math.fsum(drawn) / SAMPLES
    random = controls.random_mask(ticket, start.initial, controls.derived_seed("random-mask", job.seed))
    random = learning.masked_untrained(start, random.masks, plan.rescale)
    history = _evaluate(plan, ticket, job.seed, iterations)
    return {
        "density": ticket.density,
        "kept": ticket.count,
        "total": ticket.total,
        "sampled": sampled,
        "random-mask": _evaluate(plan, random, job.seed).final_test_accuracy,
        "tickets": {str(LEARNED): sha256(ticket.save(store.ticket(job.seed, LEARNED)))},
        "learning": trained.to_json(),
        "history": history.to_json(),
    }


def _compare(plan: Plan, store: Store, job: Job) -> dict:
    """The dense network, trained, and masks from it on the untrained weights."""
    model = plan.build(job.seed)
    initial = Ticket.of(model, model)
    start = learning.untrained(model, plan.weights)
    untrained = _evaluate(plan, initial, job.seed)
    history = _fit(plan.fit, model, job.seed)
    found, tickets = [], []
    for density in plan.densities:
        pruned = copy.deepcopy(model)
        evidence = {"initial": initial.initial} if criteria.needs_initial(plan.criterion) else {}
        prune(pruned, **_step(plan, density), criterion=plan.criterion, **evidence, **_drawn(plan, job, density))
        masks = {name: layer.mask.to("cpu") for name, layer in masked_modules(pruned)}
        tickets.append(learning.masked_untrained(start, masks, plan.rescale))
        measured = _evaluate(plan, tickets[-1], job.seed)
        found.append(
            {
                "density": tickets[-1].density,
                "validation_accuracy": measured.validation_accuracy,
                "test_accuracy": measured.final_test_accuracy,
            }
        )
    best = max(range(len(found)), key=lambda i: (found[i]["validation_accuracy"] or 0, -i))
    paths = {
        "0": initial.save(store.ticket(job.seed, 0)),
        str(CRITERION): tickets[best].save(store.ticket(job.seed, CRITERION)),
    }
    return {
        "density": 1.0,
        "kept": initial.count,
        "total": initial.total,
        "untrained": untrained.final_test_accuracy,
        "criterion": {"chosen": best, "tried": found},
        "tickets": {level: sha256(path) for level, path in paths.items()},
        "history": history.to_json(),
    }


def _step(plan: Plan, density: float) -> dict:
    return {"density": density, "scope": "layer", "rates": {"output": 0.5}, "exclude": plan.exclude}


def _drawn(plan: Plan, job: Job, density: float) -> dict:
    """What criteria ask for besides weights."""
    if plan.criterion == "random":
        return {"generator": torch.Generator().manual_seed(controls.derived_seed("criterion", job.seed, density))}
    if not criteria.needs_batch(plan.criterion):
        return {}
    return {"batch": masking.examples(masking.trainer_of(plan.fit), job.seed), **masking.loss_of(plan.fit)}


def _fit(fit: Callable, model: nn.Module, seed: int, **options) -> History:
    with seeded(seed):
        return History.of(fit(model, seed=seed, **{"budget": None, **options}), driver.name_of(fit))


def _evaluate(plan: Plan, ticket: Ticket, seed: int, iteration: int | None = None) -> History:
    """What the network of a ticket can do as it is: a history of one record, said to be of `iteration`."""
    history = _fit(plan.fit, ticket.apply(plan.build(seed)), seed, budget=0)
    last = history.to_json()["records"][-1:]
    return History.from_json({"records": [{**record, "iteration": iteration} for record in last]})


# ---- what came of it ----


def _summary(plan: Plan, store: Store, jobs: Sequence[Job]) -> dict:
    dense = [store.job(Job(seed, 0)) for seed in plan.seeds]
    learned = [store.job(Job(seed, LEARNED)) for seed in plan.seeds]
    by_criterion = [o["criterion"]["tried"][o["criterion"]["chosen"]] for o in dense]
    accuracies = {
        "learned": [History.from_json(o["history"]).final_test_accuracy for o in learned],
        "sampled": [o["sampled"] for o in learned],
        "criterion": [o["test_accuracy"] for o in by_criterion],
        "random-mask": [o["random-mask"] for o in learned],
        "untrained": [o["untrained"] for o in dense],
        "dense": [History.from_json(o["history"]).final_test_accuracy for o in dense],
    }
    kept = [o["density"] for o in learned]
    densities = dict.fromkeys(("learned", "sampled", "random-mask"), kept) | {
        "criterion": [o["density"] for o in by_criterion]
    }
    methods = {
        name: {"test_accuracy": interval(values), "density": interval(densities.get(name, [1.0] * len(values)))}
        for name, values in accuracies.items()
        if None not in values
    }
    found = summary(store, jobs)
    trainer = masking.trainer_of(plan.fit)
    classes = None if trainer is None else len(trainer.data["train"][1].unique())
    return {
        "found": {"level": LEARNED, "seed": plan.seeds[0], "density": found["levels"][1]["density"]},
        "levels": found["levels"],
        **({"test_accuracy": methods["learned"]["test_accuracy"]} if "learned" in methods else {}),
        "methods": methods,
        "chance": None if classes is None else 1 / classes,
        "method": plan.method,
        "weights": plan.weights,
        "criterion": plan.criterion if isinstance(plan.criterion, str) else driver.name_of(plan.criterion),
        "tried": _tried(dense),
    }


def _tried(dense: Sequence[Mapping]) -> list[dict]:
    """The criterion's masks at each density, over the seeds."""
    rows = zip(*(o["criterion"]["tried"] for o in dense), strict=True)
    return [
        {"density": row[0]["density"], "test_accuracy": interval([r["test_accuracy"] for r in row])}
        for row in rows
        if all(r["test_accuracy"] is not None for r in row)
    ]
