"""Tickets of whole neurons by mutual information, beside other ways to choose neurons, at the same density.

Every method chooses the same number of neurons (and channels); each ticket is then rewound to θ0, the initial values of its
seed, and trained for the whole budget with the same batches:

    mutual-information  after `fraction` of the budget: the neurons that say most about the label on the validation examples
    early-bird          once the mask of neurons has settled from epoch to epoch (You et al., arXiv 1909.11957): by BatchNorm |γ|,
                        with its L1 penalty, where a layer has one, else by the size of the incoming weights
    imp                 in rounds of training, pruning by size and rewinding (Frankle & Carbin, arXiv 1803.03635)
    magnitude           after the whole budget, by size at once
    random              without training

The size of a neuron is the L2 norm of its incoming weights.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import analysis
from ..analysis.mutual_information import verdict
from ..masks import Mask
from ..nn.convert import sparsify
from ..ops import dispatch
from ..pruning.neurons import kept_neurons, magnitudes, prune_neurons
from ..pruning.wiring import wiring
from ..report import command_of
from ..tickets import driver
from ..tickets.controls import derived_seed
from ..tickets.execute import execute
from ..tickets.mutual_information import mutual_information
from ..tickets.pool import check_guarded, run_all
from ..tickets.result import figures, interval
from ..tickets.store import Job, Store, sha256
from ..tickets.ticket import Ticket
from ..training.history import History
from .hparams import METHODS, MutualInformation
from .runs import Fit, name

TITLE = "mutual-information"
DENSE = "ticket"  # the kind of a seed's level 0, as in other runs
NEEDS_DENSE = ("imp", "magnitude")  # begin with the trained dense network


@dataclass(frozen=True)
class Search:
    """What a method found: the network at θ0 with its neurons pruned, and what that took."""

    model: nn.Module
    iterations: int = 0
    compute: float = 0.0  # iterations, each counted with the density of the weights it trained
    about: Mapping = ()


@dataclass(frozen=True)
class Comparison:
    """Everything a job needs to know; it pickles as its hyperparameters."""

    hparams: MutualInformation
    fit: Fit
    folder: Path

    def jobs(self) -> list[Job]:
        """All of them: a dense training for each seed, then its methods."""
        kinds = [DENSE, *self.hparams.methods]
        return [Job(seed, int(kind != DENSE), kind) for seed in range(self.hparams.seeds) for kind in kinds]

    def needs(self, job: Job) -> Job | None:
        return Job(job.seed, 0, DENSE) if job.kind in NEEDS_DENSE else None

    def build(self, seed: int) -> nn.Module:
        """The dense network at θ0 of a seed, with masked layers."""
        return sparsify(self.fit.make_model()(seed=seed))

    def ticket(self, job: Job) -> Path:
        kind = "dense" if job.kind == DENSE else job.kind
        return self.folder / "tickets" / f"seed{job.seed}-{kind}.safetensors"

    @functools.cached_property
    def layers(self) -> list[str]:
        """The layers whose neurons are pruned: all but the output layer."""
        model = self.build(0)
        outputs = wiring(model).outputs
        found = [layer for layer in magnitudes(model) if layer not in outputs]
        if not found:
            raise ValueError(f"model: expected hidden layers to prune neurons of, {self.hparams.model} has none")
        return found

    def prune(self, model: nn.Module, scores: Mapping[str, Tensor], density: float | None = None) -> nn.Module:
        """`model` with the neurons of highest score left."""
        density = self.hparams.density if density is None else density
        prune_neurons(model, scores, density=density, scope=self.hparams.scope)
        return model


def run_mutual_information(
    hparams: MutualInformation,
    out: str | os.PathLike = "runs",
    *,
    data_root: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """The comparison that `hparams` describe, in its folder under `out`; called again it goes on, or returns what is there.

    Args:
        workers: processes, one CPU thread each (the results do not depend on it); None is one per core.
        progress: see `sl.imp`.

    Returns:
        {"run", "density", "dense": {"test_accuracy": {"mean", "ci95", "values"}, ...}, "methods": {method: {"test_accuracy":
        {...}, "final_test_accuracy": {...}, "weight_density": {...}, "cost": {...}, ...}}, "overlap": {method: {method: {"mean",
        ..}}}, "chance_overlap": {...}, "information": {layer: {...}}, "verdict": sentence}. `cost`: iterations of search and
        retraining, "relative" to one dense training, "compute" likewise with every iteration weighed by the density of what it
        trained, and the seconds. `overlap`: the fraction of the kept neurons that two methods share, `chance_overlap` what two
        random choices of as many neurons in each layer would.

    Raises:
        TypeError, ValueError: a hyperparameter is not as described. FileNotFoundError, ValueError: data missing or damaged.
    """
    fit = Fit(hparams, data_root)
    _check(hparams, fit)
    plan = Comparison(hparams, fit, Path(out) / name(TITLE, hparams))
    fit.check(plan.build(0))
    plan.prune(plan.build(0), {layer: torch.rand(len(v)) for layer, v in magnitudes(plan.build(0)).items()})
    workers = driver.cores() if workers is None else workers
    if workers > 1:
        check_guarded()
    config = {"driver": TITLE, "hparams": asdict(hparams), "fit": fit.config()}

    def run(store, todo, done):
        todo = sorted(todo, key=lambda job: (job.level, job.kind not in NEEDS_DENSE))
        return run_all(todo, plan.needs, done, run_job, (plan,), workers, 1)

    def summarize(store):
        found = {"driver": TITLE, **_summary(plan, store)}
        analysis.save(store.folder, TITLE, found, command_of(store.read("config.json")))
        return found

    folder, found, _ = execute(
        plan.jobs(),
        plan.folder,
        config,
        progress,
        is_done=lambda store, job: _is_done(plan, store, job),
        run=run,
        summarize=summarize,
    )
    return {"run": str(folder), **found}


def _check(hparams: MutualInformation, fit: Fit) -> None:
    for field, low, high in (("density", 0, 1), ("fraction", 0, 1), ("rate", 0, 1), ("threshold", 0, None)):
        value = getattr(hparams, field)
        if not value > low or (high is not None and not value < high):
            bound = f"above {low}" + ("" if high is None else f" and below {high}")
            raise ValueError(f"{field}: expected a number {bound}, got {value:g}")
    if not 1 <= hparams.seeds <= driver.MOST_SEEDS:
        raise ValueError(f"seeds: expected 1 to {driver.MOST_SEEDS} trials, got {hparams.seeds}")
    if hparams.validation < 2:
        raise ValueError(
            f"validation: expected examples to probe the network with, two or more of them, got {hparams.validation}"
        )
    if hparams.bins < 0 or hparams.bins == 1:
        raise ValueError(f"bins: expected at least 2, or 0 for as many as the probe set allows, got {hparams.bins}")
    unknown = [method for method in hparams.methods if method not in METHODS]
    if unknown or not hparams.methods or len(set(hparams.methods)) < len(hparams.methods):
        raise ValueError(f"methods: expected any of {', '.join(METHODS)}, each once, got {','.join(hparams.methods)!r}")
    if "early-bird" in hparams.methods:
        if hparams.window < 2:
            raise ValueError(f"window: expected at least 2 epochs, got {hparams.window}")
        if hparams.window > fit.epochs():
            raise ValueError(
                f"window: expected at most the {fit.epochs()} whole epochs of the budget, got {hparams.window}"
            )


def _is_done(plan: Comparison, store: Store, job: Job) -> bool:
    outcome, ticket = store.job(job), plan.ticket(job)
    return outcome is not None and ticket.is_file() and sha256(ticket) == outcome.get("ticket")


def run_job(plan: Comparison, job: Job) -> None:
    """The dense training of a seed, or one method from its search to the retrained ticket. The job's file is written last."""
    store = Store(plan.folder)
    plan.fit.check(plan.build(job.seed))  # reads the data and loads what torch loads late: no method's cost
    plan.layers  # noqa: B018 - likewise
    with dispatch.reproducible(), driver.seeded(job.seed):
        begin = time.perf_counter()
        search = SEARCHES[job.kind](plan, job.seed)
        searched = time.perf_counter()
        ticket = _ticket(plan, job.seed, search.model)
        history = plan.fit(search.model, seed=job.seed)
        retrained = time.perf_counter()
        # The dense network's file holds what the training left: methods go on from there.
        (Ticket.of(search.model, search.model) if job.kind == DENSE else ticket).save(plan.ticket(job))
    retraining = plan.fit.trainer.iterations
    outcome = {
        "density": ticket.density,
        "kept": ticket.count,
        "total": ticket.total,
        "seconds": round(retrained - begin, 3),
        "search_seconds": round(searched - begin, 3),
        "search_iterations": search.iterations,
        "retrain_iterations": retraining,
        "compute": search.compute + retraining * ticket.density,
        "about": dict(search.about),
        "ticket": sha256(plan.ticket(job)),
    }
    store.finish(job, {**outcome, "history": history.to_json()})


def _ticket(plan: Comparison, seed: int, model: nn.Module) -> Ticket:
    """The masks of a network at θ0 that was pruned; the weights that went keep their initial values in the file."""
    initial = model.state_dict()
    whole = plan.build(seed).state_dict()
    return Ticket.of(model, initial | {key: value for key, value in whole.items() if key.endswith(".weight")})


# ---- how each method searches ----


def _by_mutual_information(plan: Comparison, seed: int) -> Search:
    model = plan.build(seed)
    iterations = max(1, round(plan.hparams.fraction * plan.fit.trainer.iterations))
    plan.fit(model, seed=seed, budget=iterations)
    bits = mutual_information(model, *plan.fit.trainer.data["validation"], bins=plan.hparams.bins or None)
    bits = {layer: values for layer, values in bits.items() if layer in plan.layers}
    about = {"bits": {layer: [round(b, 5) for b in values.tolist()] for layer, values in bits.items()}}
    return Search(plan.prune(plan.build(seed), bits), iterations, iterations, about)


def _by_early_bird(plan: Comparison, seed: int) -> Search:
    model = plan.build(seed)
    watch = NeuronWatch(plan, model)
    plan.fit(model, seed=seed, penalty=watch.penalty if watch.norms else None, on_epoch=watch)
    iterations = watch.epochs * plan.fit.trainer.steps_per_epoch if watch.drawn else plan.fit.trainer.iterations
    about = {"drawn_epoch": watch.epochs if watch.drawn else None, "distance": watch.distance}
    return Search(plan.prune(plan.build(seed), watch.scores(model)), iterations, iterations, about)


def _by_imp(plan: Comparison, seed: int) -> Search:
    """Rounds of `rate`, the last one as much as is missing."""
    density, whole = plan.hparams.density, plan.fit.trainer.iterations
    rounds = max(1, math.ceil(math.log(density) / math.log(1 - plan.hparams.rate) - 1e-9))
    trained = Ticket.load(plan.ticket(Job(seed, 0, DENSE))).apply(plan.build(seed))
    rewound, iterations, compute = plan.build(seed), whole, float(whole)
    for i in range(1, rounds + 1):
        scores = _hidden(plan, magnitudes(trained))
        plan.prune(rewound, scores, density if i == rounds else (1 - plan.hparams.rate) ** i)
        if i < rounds:
            ticket = Ticket.of(rewound, rewound)
            trained = ticket.apply(plan.build(seed))
            plan.fit(trained, seed=seed)
            iterations, compute = iterations + whole, compute + whole * ticket.density
    return Search(rewound, iterations, compute, {"rounds": rounds})


def _by_magnitude(plan: Comparison, seed: int) -> Search:
    trained = Ticket.load(plan.ticket(Job(seed, 0, DENSE))).apply(plan.build(seed))
    whole = plan.fit.trainer.iterations
    return Search(plan.prune(plan.build(seed), _hidden(plan, magnitudes(trained))), whole, whole)


def _at_random(plan: Comparison, seed: int) -> Search:
    model = plan.build(seed)
    generator = torch.Generator().manual_seed(derived_seed("random-neurons", seed))
    scores = {layer: torch.rand(len(v), generator=generator) for layer, v in _hidden(plan, magnitudes(model)).items()}
    return Search(plan.prune(model, scores))


SEARCHES: dict[str, Callable[[Comparison, int], Search]] = {
    DENSE: lambda plan, seed: Search(plan.build(seed)),
    "mutual-information": _by_mutual_information,
    "early-bird": _by_early_bird,
    "imp": _by_imp,
    "magnitude": _by_magnitude,
    "random": _at_random,
}


def _hidden(plan: Comparison, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer: scores[layer] for layer in plan.layers}


class NeuronWatch:
    """Early-Bird on masks of neurons: after every epoch, the mask that pruning would give now against those before it.

    The rule is that of `sl.EarlyBird`; the neurons are those of the comparison, so that every method has as many.
    """

    def __init__(self, plan: Comparison, model: nn.Module):
        self.plan, self.window, self.threshold = plan, plan.hparams.window, plan.hparams.threshold
        self.layers = plan.layers
        after = wiring(model).after
        self.norms = {
            layer: after[layer][0]
            for layer in self.layers
            if after.get(layer)
            and isinstance(after[layer][0], nn.modules.batchnorm._BatchNorm)
            and after[layer][0].affine
        }
        self.masks: list[dict[str, Mask]] = []
        self.epochs, self.drawn, self.distance = 0, False, None

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        sizes = magnitudes(model)
        return {
            layer: self.norms[layer].weight.detach().abs().double().cpu() if layer in self.norms else sizes[layer]
            for layer in self.layers
        }

    def penalty(self, model: nn.Module) -> Tensor:
        return self.plan.hparams.l1 * torch.stack([norm.weight.abs().sum() for norm in self.norms.values()]).sum()

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """Whether the ticket is drawn."""
        pruned = self.plan.prune(self.plan.build(0), self.scores(model))
        masks = {layer: Mask.from_dense(kept) for layer, kept in kept_neurons(pruned, self.layers).items()}
        self.masks = [*self.masks[1 - self.window :], masks]
        self.epochs = epoch
        if len(self.masks) == self.window:
            self.distance = max(_distance(masks, other) for other in self.masks[:-1])
            self.drawn = self.distance < self.threshold
        return self.drawn


def _distance(masks: Mapping[str, Mask], others: Mapping[str, Mask]) -> float:
    """Normalized Hamming distance over all layers together."""
    total = sum(mask.numel for mask in masks.values())
    return sum(mask.distance(others[layer]) * mask.numel for layer, mask in masks.items()) / total


# ---- what came of it ----


def _summary(plan: Comparison, store: Store) -> dict:
    outcomes = {job: store.job(job) for job in plan.jobs()}
    seeds, whole = range(plan.hparams.seeds), plan.fit.trainer.iterations
    dense = [outcomes[Job(seed, 0, DENSE)] for seed in seeds]
    methods, kept = {}, {}
    for method in plan.hparams.methods:
        mine = [outcomes[Job(seed, 1, method)] for seed in seeds]
        kept[method] = [_kept(plan, Job(seed, 1, method)) for seed in seeds]
        searched = [
            o["search_seconds"] + (first["seconds"] if method in NEEDS_DENSE else 0)
            for o, first in zip(mine, dense, strict=True)
        ]
        iterations = [o["search_iterations"] + o["retrain_iterations"] for o in mine]
        cost = {
            "search_iterations": interval([o["search_iterations"] for o in mine]),
            "retrain_iterations": interval([o["retrain_iterations"] for o in mine]),
            "relative": interval([i / whole for i in iterations]),
            "compute": interval([o["compute"] / whole for o in mine]),
            "seconds": interval([s + o["seconds"] - o["search_seconds"] for s, o in zip(searched, mine, strict=True)]),
        }
        units = [sum(int(k.sum()) for k in found.values()) / sum(map(len, found.values())) for found in kept[method]]
        methods[method] = {
            **figures([History.from_json(o["history"]) for o in mine]),
            "density": interval(units),
            "weight_density": interval([o["density"] for o in mine]),
            "cost": cost,
        }
        if method == "early-bird":
            methods[method]["drawn_epoch"] = [o["about"]["drawn_epoch"] for o in mine]
        if method == "imp":
            methods[method]["rounds"] = mine[0]["about"]["rounds"]
    reference = {
        **figures([History.from_json(o["history"]) for o in dense]),
        "cost": {"iterations": whole, "seconds": interval([o["seconds"] for o in dense])},
    }
    found = {
        "density": plan.hparams.density,
        "neurons": {layer: len(units) for layer, units in next(iter(kept.values()))[0].items()},
        "dense": reference,
        "methods": methods,
        "overlap": {a: {b: interval(_each(_shared, kept[a], kept[b])) for b in kept} for a in kept},
        "chance_overlap": {a: {b: interval(_each(_by_chance, kept[a], kept[b])) for b in kept} for a in kept},
        "information": _information([outcomes[Job(s, 1, TITLE)] for s in seeds]) if TITLE in methods else {},
    }
    return {**found, "verdict": verdict(found)}


def _kept(plan: Comparison, job: Job) -> dict[str, Tensor]:
    """layer -> which of its neurons a ticket keeps."""
    ticket = Ticket.load(plan.ticket(job))
    return {layer: ticket.masks[layer].to_dense().flatten(1).any(1) for layer in plan.layers}


def _each(function, ours: list, theirs: list) -> list[float]:
    return [function(a, b) for a, b in zip(ours, theirs, strict=True)]


def _shared(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The fraction of the kept neurons that two choices share; both keep as many in all."""
    return sum(int((ours[n] & theirs[n]).sum()) for n in ours) / sum(int(kept.sum()) for kept in ours.values())


def _by_chance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """What `_shared` is on average if the neurons of each layer are drawn at random, as many as here."""
    both = sum(int(ours[n].sum()) * int(theirs[n].sum()) / len(ours[n]) for n in ours)
    return both / sum(int(kept.sum()) for kept in ours.values())


def _information(outcomes: list[Mapping]) -> dict:
    """Per layer the sorted bits, from the most to the least telling neuron: mean, least and most over the seeds."""
    found = {}
    for layer in outcomes[0]["about"]["bits"]:
        bits = torch.tensor([sorted(o["about"]["bits"][layer], reverse=True) for o in outcomes], dtype=torch.float64)
        curves = {"mean": bits.mean(0), "least": bits.amin(0), "most": bits.amax(0)}
        found[layer] = {key: [round(b, 5) for b in curve.tolist()] for key, curve in curves.items()}
    return found
