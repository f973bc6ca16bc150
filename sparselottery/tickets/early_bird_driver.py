"""Early-Bird tickets over seeds: search, retrain, and what that costs against dense training and iterative pruning."""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..masks import Mask
from ..nn.convert import as_tuple, masked_modules
from ..ops import dispatch
from ..training.energy import Meter
from ..training.history import History
from . import channels, controls, driver, masking
from .early_bird import EarlyBird
from .execute import execute
from .pool import check_guarded, run_all
from .result import Result, interval, summary
from .store import Job, Store, sha256
from .ticket import Ticket

STARTS = ("init", "drawn")
CONTROLS = ("random-mask",)
IMP_RATE = 0.2  # of the remaining weights, in each round of the iterative pruning that costs are compared with


@dataclass(frozen=True)
class Plan:
    """Everything a job needs to know. Level 0 is the dense network, level 1 the ticket; kind "search" finds it."""

    make_model: Callable[..., nn.Module]
    fit: Callable
    seeds: tuple[int, ...]
    bird: Mapping
    start: str
    round_to: int | None
    controls: tuple[str, ...]
    budget: int | str | None
    example: object
    heatmap: bool
    energy: bool
    threads: int | None

    @property
    def by_channel(self) -> bool:
        return self.bird["structure"] == "channel"

    def jobs(self) -> list[Job]:
        jobs = []
        for seed in self.seeds:
            jobs += [Job(seed, 0), Job(seed, 1, "search"), Job(seed, 1)]
            jobs += [Job(seed, 1, kind) for kind in self.controls]
        return jobs

    def needs(self, job: Job) -> Job | None:
        return Job(job.seed, 1, "search") if job.level and job.kind != "search" else None

    def build(self, seed: int) -> nn.Module:
        return driver.build(self.make_model, seed)

    def config(self) -> dict:
        fit = self.fit.config() if hasattr(self.fit, "config") else driver.name_of(self.fit)
        return {
            "driver": "early-bird",
            "make_model": driver.name_of(self.make_model),
            "fit": fit,
            "seeds": list(self.seeds),
            "bird": {**self.bird, "exclude": [str(e) for e in self.bird["exclude"]]},
            "start": self.start,
            "round_to": self.round_to,
            "controls": list(self.controls),
            "budget": self.budget,
            "heatmap": self.heatmap,
        }


def early_bird(
    make_model: Callable[..., nn.Module],
    fit: Callable,
    *,
    density: float = 0.5,
    structure: str = "channel",
    window: int = 5,
    threshold: float = 0.1,
    l1: float = 1e-4,
    start: str = "init",
    round_to: int | None = None,
    controls: Sequence[str] = CONTROLS,
    seeds: int | Sequence[int] = 5,
    budget: int | str | None = None,
    example_input=None,
    heatmap: bool = True,
    exclude: Sequence = (),
    out: str | os.PathLike | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: Callable[[dict], None] | None = None,
    config: Mapping | None = None,
) -> Result:
    """Draw Early-Bird tickets and retrain them (You et al., arXiv 1909.11957).

    For each seed: the dense network is trained for comparison; another one is trained with the L1 penalty until its ticket is
    drawn; the ticket is trained, channel tickets as the smaller network that they are; and the controls. A search that comes to
    its end without a drawn ticket gives the mask of its last epoch, and `drawn_epoch` is None.

    All trainings go through the modules of the model, as the search must, so that their costs compare.

    Args:
        make_model, seeds, out, workers, threads, progress, config: as for `sl.imp`.
        fit: `fit(model, *, seed, budget, penalty=None, on_epoch=None) -> History`: a `sl.Trainer`, or any loop that adds
            `penalty(model)` to its loss where that is given and calls `on_epoch(model, epoch)` after every epoch, to end with
            it when that returns True.
        density, structure, window, threshold, l1, exclude: see `sl.EarlyBird`.
        start: the ticket starts from its values at "init", or from those at which it was "drawn".
        round_to: widths of channel tickets rounded up to multiples of it, see `sl.shrink`.
        controls: "random-mask": as many channels (weights) in each layer, chosen at random, with the same values.
        budget: handed to `fit`, for each training in full.
        example_input: for channel tickets, what `sl.shrink` needs; None asks `fit.example()`.
        heatmap: the first seed's search goes on to the end, so that distances cover all epochs. That is not counted as cost.

    Returns:
        A Result with level 0 (dense) and 1 (the ticket), whose result.json and `to_json` also hold

            "drawn_epoch": of the first seed, "drawn_epochs": {"mean", "ci95", "values"} over the seeds that drew, None for
            the others in "values"; "collapsed": {"dense", "search", "retrain": [seeds]} that came no further than the
            commonest label, with a warning; "epochs": of a whole training; "distances": epochs x epochs of the first seed;
            "test_accuracy": of the ticket; "channels" (weights): the fraction kept; "guarded": layers kept from being emptied;
            "macs": {"dense", "ticket"} multiply-adds of one example (channel tickets);
            "cost": {"dense", "search", "retrain", "making", "early-bird", "imp": {"seconds": {...}, "joules": {...} or None},
            "rounds", "ratio", "energy", "how"}, see `cost_of`.

        `density` of a level is the fraction of the dense network's weights (biases and BatchNorm not counted).

    Raises:
        TypeError, ValueError: an argument is not as described; `window` is longer than the training.
        RuntimeError: channel tickets without Torch-Pruning.
    """
    chosen = driver.check(make_model, fit, seeds, "init", (), 1, workers, threads)
    if not driver.accepts(fit, "penalty", "on_epoch"):
        raise TypeError(f"fit: expected {driver.name_of(fit)} to take penalty= and on_epoch= (sl.Trainer does)")
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    listed = isinstance(controls, Sequence) and not isinstance(controls, str)
    if not listed or any(c not in CONTROLS for c in controls) or len(set(controls)) != len(controls):
        raise ValueError(f"controls: expected any of {', '.join(CONTROLS)}, each once, got {controls!r}")
    bird = {"density": density, "structure": structure, "window": window, "threshold": threshold, "l1": l1}
    bird["exclude"] = as_tuple(exclude)
    plan = Plan(
        make_model, fit, chosen, bird, start, round_to, tuple(controls), budget, example_input, bool(heatmap), workers == 1,
        threads,
    )  # fmt: skip
    _check(plan)
    if workers > 1:
        check_guarded()
    jobs = plan.jobs()
    ran = execute(  # seed by seed: what is compared runs in the same minutes
        jobs,
        out,
        {**plan.config(), **(config or {})},
        progress,
        is_done=_is_done,
        run=lambda store, todo, done: run_all(todo, plan.needs, done, run_job, (plan, store.folder), workers, threads),
        summarize=lambda store: _summary(plan, store, jobs),
    )
    for warning in warnings_of(ran[1]):
        warnings.warn(f"early_bird: {warning}", stacklevel=2)
    return Result(*ran)


def warnings_of(found: Mapping) -> list[str]:
    """What somebody who uses the ticket must know: layers that it would have emptied, trainings that learned nothing."""
    said = []
    if found["guarded"]:
        said.append(
            f"density {found['density']:g} would have emptied {', '.join(found['guarded'])}; each kept its best"
        )
    parts = [f"{what} of seed {', '.join(map(str, seeds))}" for what, seeds in found["collapsed"].items() if seeds]
    if parts:
        said.append(
            f"no better than chance: {'; '.join(parts)}. A mask that settles while nothing is learned is no ticket; another "
            "learning rate or a warm-up may help"
        )
    return said


def _check(plan: Plan) -> None:
    """Complain about what can be known to fail, before anything is trained or written."""
    model = plan.build(plan.seeds[0])
    EarlyBird(**plan.bird).check(model)
    if plan.round_to is not None and not plan.by_channel:
        raise ValueError("round_to: expected none with unstructured tickets, which have no widths")
    if plan.by_channel:
        norms = {n: m for n, m in model.named_modules() if n in EarlyBird(**plan.bird).scores_of(model)}
        whole = Ticket({n: Mask.ones(m.weight.shape) for n, m in norms.items()}, model.state_dict())
        channels.groups_of(model, whole, _example(plan))
        if plan.round_to is not None:
            channels.rounded(whole, model, _example(plan), plan.round_to)
    asked = getattr(plan.fit, "check", None)
    if callable(asked) and driver.accepts(asked, "budget"):
        asked(model, budget=plan.budget)
    if callable(getattr(plan.fit, "epochs", None)):
        _check_window(plan, plan.fit.epochs(plan.budget))


def _check_window(plan, epochs) -> None:
    if plan.bird["window"] > epochs:
        raise ValueError(f"window: expected at most the {epochs} epochs of a training, got {plan.bird['window']}")


def _example(plan):
    if plan.example is not None:
        return plan.example
    example = getattr(plan.fit, "example", None)
    if not callable(example):
        raise TypeError(f"example_input: expected one, as {driver.name_of(plan.fit)} has no method example()")
    return example()


def _is_done(store: Store, job: Job) -> bool:
    outcome = store.job(job)
    if outcome is None or job.kind != "search":
        return outcome is not None
    path = store.ticket(job.seed, 1)
    return path.is_file() and sha256(path) == outcome["tickets"]["1"]


# ---- jobs ----


def run_job(plan: Plan, folder: Path, job: Job) -> None:
    """One training and what it leaves; the job's file is written last."""
    store, model = Store(folder), plan.build(job.seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dense, about = weights_of(model), {}
    if job.level and job.kind != "search":
        ticket = Ticket.load(store.ticket(job.seed, 1))
        if job.kind == "random-mask":
            ticket = _random(plan, ticket, model, job.seed)
        begin, whole = time.perf_counter(), model
        model = ticketed(ticket, whole, _example(plan) if plan.by_channel else None)
        about = {"kept": ticket.count, "total": ticket.total, "making": time.perf_counter() - begin}
        about |= _macs(plan, whole, model)
    meter = Meter(device, plan.energy, "several trainings at once (--workers 1 measures one after the other)")
    with dispatch.reproducible(), meter:
        if job.kind == "search":
            outcome = _search(plan, store, job, model, meter)
        else:
            epochs = []
            history = _fit(plan, job, model, on_epoch=lambda model, epoch: epochs.append(epoch))
            outcome = {"density": weights_of(model) / dense, **about, "epochs": len(epochs), "cost": meter.read()}
            outcome["history"] = history.to_json()
    meters = {"source": meter.source, "why_not": meter.why_not}
    store.finish(job, {**outcome, "energy": meters, "seconds": round(outcome["cost"]["seconds"], 3)})


def _search(plan, store, job, model, meter) -> dict:
    bird = EarlyBird(**plan.bird, initial=model if plan.start == "init" else None)
    watch = plan.heatmap and job.seed == plan.seeds[0]
    cost, scores = None, None

    def on_epoch(model, epoch):
        nonlocal cost
        with warnings.catch_warnings():  # the result tells
            warnings.filterwarnings("ignore", "EarlyBird:", UserWarning)
            drawn = bird.update(model)
        if drawn and cost is None:
            cost = meter.read()
        return bird.drawn and not watch

    history = _fit(plan, job, model, penalty=bird.penalty, on_epoch=on_epoch)
    if bird.epochs == 0:
        raise ValueError(f"fit: {driver.name_of(plan.fit)} never called on_epoch")
    _check_window(plan, bird.epochs)
    ticket = bird.ticket if bird.drawn else bird.ticket_of(model)
    scores = bird.scores if bird.drawn else bird.scores_of(model)
    if plan.round_to is not None:
        ticket = channels.rounded(ticket, plan.build(job.seed), _example(plan), plan.round_to, scores)
    path = ticket.save(store.ticket(job.seed, 1))
    return {
        "density": 1.0,
        "kept": ticket.count,
        "total": ticket.total,
        "drawn_epoch": bird.epoch,
        "epochs": bird.epochs,
        "distances": [[round(d, 6) for d in row] for row in bird.distances.tolist()],
        "guarded": list(bird.guarded),
        "tickets": {"1": sha256(path)},
        "cost": meter.read() if cost is None else cost,
        "history": history.to_json(),
    }


def _fit(plan, job, model, **hooks) -> History:
    with driver.seeded(job.seed):
        returned = plan.fit(model, seed=job.seed, budget=plan.budget, **hooks)
    return History.of(returned, driver.name_of(plan.fit))


def _random(plan, ticket, model, seed) -> Ticket:
    if plan.by_channel:
        return channels.random_channels(ticket, model, _example(plan), seed)
    return controls.random_mask(ticket, ticket.initial, controls.derived_seed("random-mask", seed, 1, 0))


def ticketed(ticket: Ticket, model: nn.Module, example_input=None) -> nn.Module:
    """The network of a ticket: smaller where it drops channels (then with an example), masked where it drops weights."""
    return ticket.apply(model) if example_input is None else channels.shrink(model, ticket, example_input)


def weights_of(model: nn.Module) -> int:
    """How many weights a network keeps; biases and BatchNorm are not counted."""
    masked = {id(layer.weight): layer.mask.count for _, layer in masked_modules(model)}
    return sum(masked.get(id(p), p.numel()) for p in model.parameters() if p.ndim > 1)


def _macs(plan, dense, small) -> dict:
    if not plan.by_channel:
        return {}
    example = _example(plan)
    one = example[:1] if isinstance(example, torch.Tensor) else tuple(x[:1] for x in example)
    count = channels.torch_pruning().utils.count_ops_and_params
    return {"macs": {"dense": int(count(dense, one)[0]), "ticket": int(count(small, one)[0])}}


# ---- what came of it ----


def _summary(plan, store, jobs) -> dict:
    outcomes = {job: store.job(job) for job in jobs}
    summed = summary(store, [job for job in jobs if job.kind != "search"])
    ticket = summed["levels"][1]
    searches = [outcomes[Job(seed, 1, "search")] for seed in plan.seeds]
    retrained = [outcomes[Job(seed, 1)] for seed in plan.seeds]
    dense = [outcomes[Job(seed, 0)] for seed in plan.seeds]
    first = searches[0]
    drawn = [o["drawn_epoch"] for o in searches]
    statistics = interval([d for d in drawn if d is not None]) if any(drawn) else {"mean": None, "ci95": None}
    return {
        "found": {"level": 1, "seed": plan.seeds[0], "density": ticket["density"]},
        "levels": summed["levels"],
        "structure": plan.bird["structure"],
        "density": plan.bird["density"],
        "window": plan.bird["window"],
        "threshold": plan.bird["threshold"],
        "drawn_epoch": first["drawn_epoch"],
        "drawn_epochs": {**statistics, "values": drawn},
        "collapsed": {
            what: [seed for seed, o in zip(plan.seeds, found, strict=True) if _at_chance(plan, o)]
            for what, found in (("dense", dense), ("search", searches), ("retrain", retrained))
        },
        "epochs": outcomes[Job(plan.seeds[0], 0)]["epochs"],
        "distances": first["distances"],
        "guarded": sorted({name for o in searches for name in o["guarded"]}),
        "kept": interval([o["kept"] / o["total"] for o in searches]),
        **({"test_accuracy": ticket["ticket"]["test_accuracy"]} if "test_accuracy" in ticket["ticket"] else {}),
        **({"macs": retrained[0]["macs"]} if plan.by_channel else {}),
        "cost": cost_of(plan.bird["density"], dense, searches, retrained, first["energy"]),
    }


def _at_chance(plan, outcome) -> bool:
    """Whether a training (a search: until it drew) came no further than two standard errors above always giving the commonest
    label. Without a `sl.Trainer`, whose data tell, or an evaluation it is not said."""
    trainer = masking.trainer_of(plan.fit)
    if trainer is None:
        return False
    end = (outcome.get("drawn_epoch") or math.inf) * trainer.steps_per_epoch
    records = History.from_json(outcome["history"]).records
    accuracies = [r.test_accuracy for r in records if r.test_accuracy is not None and (r.iteration or 0) <= end]
    if not accuracies:
        return False
    labels = trainer.data["test"][1]
    chance = float(labels.unique(return_counts=True)[1].max()) / len(labels)
    return accuracies[-1] <= chance + 2 * math.sqrt(chance * (1 - chance) / len(labels))


def cost_of(density: float, dense: list[dict], searches: list[dict], retrained: list[dict], energy: dict) -> dict:
    """What the ticket cost, in seconds and joules (None without a meter), seed by seed.

    dense, search, retrain: measured, the trainings alone with their evaluations and, of the search, masks and distances.
    making: of the ticket's network from the ticket, seconds, beside these. early-bird: search + retrain.
    imp: computed, not measured: as many dense trainings as iterative pruning to the same density by 20 % a round takes,
    (rounds + 1), each at the cost of the dense training measured here (sparse rounds saving nothing).
    """
    rounds = math.ceil(math.log(density) / math.log(1 - IMP_RATE) - 1e-9)

    def both(*parts, factor=1):
        result = {}
        for unit in ("seconds", "joules"):
            values = [[o["cost"][unit] for o in part] for part in parts]
            known = all(v is not None for part in values for v in part)
            result[unit] = interval([factor * sum(v) for v in zip(*values, strict=True)]) if known else None
        return result

    parts = {"dense": both(dense), "search": both(searches), "retrain": both(retrained)}
    total, imp = both(searches, retrained), both(dense, factor=rounds + 1)

    def ratio(a, b):
        return {
            u: a[u]["mean"] / b[u]["mean"] if a[u] and b[u] and b[u]["mean"] else None for u in ("seconds", "joules")
        }

    return {
        **parts,
        "making": {"seconds": interval([o["making"] for o in retrained]), "joules": None},
        "early-bird": total,
        "imp": imp,
        "rounds": rounds,
        "ratio": {"early-bird / dense": ratio(total, parts["dense"]), "imp / early-bird": ratio(imp, total)},
        "energy": {"source": energy["source"], "why_not": energy["why_not"]},
        "how": "dense, search and retrain measured here; "
        f"imp computed as {rounds + 1} dense trainings ({rounds} rounds of 20 % to density {density:g})",
    }
