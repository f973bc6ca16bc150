"""What runs would cost on this machine, before they start: a few iterations measured, the rest multiplied."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..nn.convert import masked_modules, sparsify
from ..ops import dispatch
from ..pruning import prune
from ..tickets import driver
from ..tickets.driver import Plan, cores
from ..training.history import parse_step
from ..training.trainer import Trainer
from .any_run import run_any
from .hparams import EarlyBird, Imp, MutualInformation, OneShot, Supermask, Training
from .runs import Fit

EXAMPLES = 200  # evaluated while measuring: a test set whole would take as long as hundreds of iterations
ENOUGH = 0.5  # seconds of iterations that make a measurement
OFTEN = 20  # evaluations while measuring what one takes
PLACES = 3  # densities measured beside the dense network
IMPROVED = (
    0.5  # of evaluations are new minima of validation loss, where test waits for one: an assumption, on the high side
)
SEARCHED = 0.2  # of the epochs until an Early-Bird ticket is drawn: the high end of what the paper saw


@dataclass(frozen=True)
class Work:
    """Trainings alike: how many, at which density, how long; one of them waits for the one of the `chain` before."""

    count: int
    density: float
    iterations: int
    chain: bool  # one after the other within a seed: the most that workers cannot share


@dataclass(frozen=True)
class Speed:
    """Of a training on one CPU thread (or on the GPU), at one density. Seconds."""

    density: float
    iteration: float
    example: float  # evaluated
    start: float  # what a training costs beside both


def cost(hparams: Training, data_root=None, workers: int | None = None) -> dict:
    """What a run would cost here.

    Args:
        workers: as for `runs.run_imp`; None is one per core.

    Returns:
        {"trainings", "iterations": of all, "cpu_seconds", "seconds": with the workers, "disk_bytes": of the tickets,
        "measured": [{"density", "iteration_us", "example_us"}]}. Seconds are estimates: other work on the machine, and
        evaluations that `evaluate_test="improved"` saves or not, move them by tens of percent.

    Raises:
        ValueError, FileNotFoundError: hyperparameters or data are not as they should be.
    """
    fit = Fit(hparams, data_root)
    trainer = fit.trainer
    works, weights = WORKS[type(hparams)](hparams, fit, data_root)
    speeds = measure(fit, [work.density for work in works])
    workers = cores() if workers is None else workers

    def seconds(work: Work) -> float:
        return seconds_of(speeds, work.density, work.iterations, _examples(trainer, work.iterations))

    total = sum(work.count * seconds(work) for work in works)
    longest = sum(seconds(work) for work in works if work.chain)
    # A ticket holds θ0 whole once a seed, then survivors alone; both in float32, and the masks.
    disk = sum(w.count * weights * (4 * w.density + 1 / 8) for w in works if w.chain)
    return {
        "trainings": sum(work.count for work in works),
        "iterations": sum(work.count * work.iterations for work in works),
        "cpu_seconds": round(total, 3),
        "seconds": round(max(total / workers, longest), 3),
        "workers": workers,
        "disk_bytes": int(disk),
        "measured": [
            {"density": s.density, "iteration_us": round(1e6 * s.iteration, 1), "example_us": round(1e6 * s.example, 2)}
            for s in speeds
        ],
    }


def _examples(trainer: Trainer, iterations: int) -> int:
    """How many examples a training evaluates."""
    times = math.ceil(iterations / trainer.evaluate_every)
    validation, test = (len(trainer.data[part][1]) if part in trainer.data else 0 for part in ("validation", "test"))
    tested = times if trainer.evaluate_test == "always" or not validation else 1 + IMPROVED * (times - 1)
    return int(times * validation + tested * test)


# ---- which trainings ----


def _of_plan(hparams: Training, fit: Fit, data_root) -> tuple[list[Work], int]:
    """Those of iterative and one-shot pruning, one per seed and level, and how many weights the network has."""
    with driver.planning():
        plan: Plan = run_any(hparams, data_root=data_root)
    seeds = len(plan.seeds)
    densities, weights = _densities(plan)
    full = fit.trainer.steps(plan.budget) if plan.budget is not None else fit.trainer.iterations
    begin = 0 if plan.rewind in ("init", "lr") else parse_step(plan.rewind, fit.trainer.steps_per_epoch, "rewind")
    works = [Work(seeds, 1.0, full, True)]
    for level, density in enumerate(densities, 1):
        works.append(Work(seeds, density, full - begin, plan.parents[level - 1] == level - 1))
        if level in plan.control_levels and plan.controls:
            works.append(Work(seeds * len(plan.controls) * plan.repeats, density, full - begin, False))
        if plan.schedule == "gradual":  # another training for the mask, dense at first
            works.append(Work(seeds, (1 + density) / 2, full, False))
    return works, weights


def _densities(plan: Plan) -> tuple[list[float], int]:
    """Of each pruned level, found by pruning a fresh network by magnitude."""
    masks = [{name: layer.mask for name, layer in masked_modules(plan.build(plan.seeds[0]))}]
    found, total = [], 0
    for parent, step in zip(plan.parents, plan.steps, strict=True):
        model = plan.build(plan.seeds[0])
        for name, layer in masked_modules(model):
            layer.set_mask(masks[parent][name])
        report = prune(model, **{key: value for key, value in step.items() if key not in ("criterion", "batch")})
        masks.append({name: layer.mask for name, layer in masked_modules(model)})
        found.append(report.density)
        total = report.total
    return found, total or sum(mask.to_dense().numel() for mask in masks[0].values())


def _of_mutual_information(hparams: MutualInformation, fit: Fit, data_root) -> tuple[list[Work], int]:
    """Those of each method. Early-Bird is counted with a whole search, which it stops short where its masks settle."""
    seeds, density, full = hparams.seeds, hparams.density, fit.trainer.iterations
    rounds = max(1, math.ceil(math.log(density) / math.log(1 - hparams.rate) - 1e-9))
    searches = {
        "mutual-information": [(1.0, max(1, round(hparams.fraction * full)))],
        "early-bird": [(1.0, full)],
        "imp": [((1 - hparams.rate) ** i, full) for i in range(1, rounds)],
    }
    works = [Work(seeds, 1.0, full, True)]
    for method in hparams.methods:
        chain = method == "imp"  # the longest
        works += [Work(seeds, at, iterations, chain) for at, iterations in searches.get(method, [])]
        works.append(Work(seeds, density, full, chain))
    model = fit.make_model()(seed=0)
    return works, sum(p.numel() for p in model.parameters() if p.ndim > 1)


def _of_early_bird(hparams: EarlyBird, fit: Fit, data_root) -> tuple[list[Work], int]:
    """Searches that end after SEARCHED of the epochs; tickets as dear as dense networks: on the high side."""
    full, seeds = fit.trainer.iterations, hparams.seeds
    watched = int(hparams.heatmap and seeds > 0)
    works = [
        Work(seeds * (2 + len(hparams.controls)), 1.0, full, True),
        Work(seeds - watched, 1.0, int(SEARCHED * full), False),
        Work(watched, 1.0, full, False),
    ]
    weights = sum(p.numel() for p in fit.make_model()(seed=0).parameters() if p.ndim > 1)
    return [work for work in works if work.count], weights


def _of_supermask(hparams: Supermask, fit: Fit, data_root) -> tuple[list[Work], int]:
    """A dense training and one of masks for each seed; the latter goes through the modules, and is counted as two dense ones."""
    iterations = fit.trainer.steps(hparams.mask_budget)
    works = [Work(hparams.seeds, 1.0, fit.trainer.iterations, True), Work(hparams.seeds, 1.0, 2 * iterations, False)]
    model = fit.make_model()(seed=0)
    return works, sum(p.numel() for p in model.parameters() if p.ndim > 1)


WORKS: dict[type, Callable] = {
    Imp: _of_plan,
    OneShot: _of_plan,
    EarlyBird: _of_early_bird,
    MutualInformation: _of_mutual_information,
    Supermask: _of_supermask,
}


# ---- how fast ----


def measure(fit: Fit, densities: Sequence[float]) -> list[Speed]:
    """Train for moments on one CPU thread, dense and at up to `PLACES` of the densities: their speeds, densest first."""
    fit.check(fit.make_model()(seed=0))
    lower = sorted({d for d in densities if d < 1}, reverse=True)
    chosen = [1.0, *(lower[round(i * (len(lower) - 1) / (PLACES - 1))] for i in range(PLACES) if lower)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with dispatch.reproducible():
            return [_speed(fit, density) for density in dict.fromkeys(chosen)]
    finally:
        torch.set_num_threads(before)


def _speed(fit: Fit, density: float) -> Speed:
    whole = fit.trainer
    few = {name: (x[:EXAMPLES], y[:EXAMPLES]) for name, (x, y) in whole.data.items() if name != "train"}

    def seconds(iterations: int, evaluations: int) -> float:
        trainer = Trainer(
            whole.data["train"], few.get("validation"), few.get("test"), batch_size=whole.batch_size,
            optimizer=whole.optimizer, lr=whole.lr, optimizer_options=whole.optimizer_options, budget=iterations,
            evaluate_every=max(1, iterations // evaluations), augment=whole.augment, loss=whole.loss,
            whole_step=whole.whole_step,
        )  # fmt: skip
        model = sparsify(fit.make_model()(seed=0))
        if density < 1:
            prune(model, density=density)
        begin = time.perf_counter()
        trainer.fit(model, seed=0)
        return time.perf_counter() - begin

    seconds(1, 1)  # imports, plans and choices of backends
    count = 2
    while (long := seconds(count, 1)) < ENOUGH and count < 50_000:
        count *= 2 if long > ENOUGH / 4 else 4
    half = count // 2
    iteration = max(0.0, long - seconds(half, 1)) / (count - half)
    examples = sum(len(y) for _, y in few.values())
    times = min(count, OFTEN)
    evaluation = max(0.0, seconds(count, times) - long) / max(1, times - 1)
    return Speed(density, iteration, evaluation / max(1, examples), max(0.0, long - count * iteration - evaluation))


def seconds_of(speeds: Sequence[Speed], density: float, iterations: int, examples: int) -> float:
    """One training at `density`: on the straight line between the measured densities around it."""
    places = [-speed.density for speed in speeds]  # ascending
    right = min(max(bisect.bisect_left(places, -density), 1), len(speeds) - 1) if len(speeds) > 1 else 0
    near, far = (speeds[max(0, right - 1)], speeds[right])
    one, other = (s.start + iterations * s.iteration + examples * s.example for s in (near, far))
    if near.density == far.density:
        return one
    share = min(1.0, max(0.0, (near.density - density) / (near.density - far.density)))
    return one + share * (other - one)


def in_words(seconds: float) -> str:
    """12.3 -> "12 s", 4000 -> "1 h 07 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def sum_of(costs: Sequence[dict]) -> dict:
    """Runs one after the other."""
    keys = ("trainings", "iterations", "cpu_seconds", "seconds", "disk_bytes")
    return {key: round(sum(cost[key] for cost in costs), 3) for key in keys}
