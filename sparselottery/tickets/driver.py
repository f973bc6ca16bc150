"""What iterative and one-shot pruning share: jobs, their order, their results in a run folder."""

import hashlib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..nn.convert import masked_modules, sparsify
from ..ops import dispatch
from ..training.history import History, check_seed, parse_step
from . import actions, controls, masking
from .batches import batches, fit_many_of, how_many
from .execute import execute
from .pool import check_guarded, run_all, torch_threads
from .result import Result, summary
from .seeding import seeded
from .store import Job, Store, sha256
from .ticket import Ticket

MOST_SEEDS = 10_000  # as a number of trials; who types more than that meant a seed


@dataclass(frozen=True)
class Plan:
    """Everything a job needs to know. It pickles if `make_model` and `fit` do.

    Level i + 1 is what `prune(**steps[i])` leaves of the trained network of level `parents[i]`; `steps` fall in density.
    `title` is the driver's. `schedule` "gradual" prunes to it while another dense network trains, `at_start` before training.
    """

    title: str
    make_model: Callable[..., nn.Module]
    fit: Callable
    seeds: tuple[int, ...]
    steps: tuple[dict, ...]
    parents: tuple[int, ...]
    rewind: str | int = "init"
    controls: tuple[str, ...] = controls.CONTROLS
    control_levels: tuple[int, ...] = ()
    repeats: int = 1
    budget: int | str | None = None
    exclude: tuple = ()
    threads: int | None = None
    replicas: int | None = 1
    batch: tuple | None = None
    schedule: str = "once"
    at_start: bool = False

    @property
    def rewind_step(self) -> str | int | None:
        """The step of the dense training that is rewound to, if that is what `rewind` says."""
        return None if self.rewind in ("init", "lr") else self.rewind

    def jobs(self) -> list[Job]:
        """All of them, in the order of metrics.jsonl."""
        jobs = []
        for seed in self.seeds:
            for level in range(len(self.steps) + 1):
                jobs.append(Job(seed, level))
                if level in self.control_levels:
                    jobs += [Job(seed, level, kind, r) for kind in self.controls for r in range(self.repeats)]
        return jobs

    def needs(self, job: Job) -> Job | None:
        """The job that must be done before this one."""
        return Job(job.seed, self.parents[job.level - 1]) if job.level else None

    def tickets(self, job: Job) -> list[int]:
        """The levels of its seed whose tickets come of this job."""
        if job.kind != "ticket":
            return []
        return [0] * (job.level == 0) + [i + 1 for i, parent in enumerate(self.parents) if parent == job.level]

    def build(self, seed: int) -> nn.Module:
        """A new model with masked layers, its values a function of `seed`.

        Raises:
            TypeError, ValueError: `make_model` returned no model, or one with nothing to prune.
        """
        return sparsify(build(self.make_model, seed), exclude=self.exclude)

    def config(self) -> dict:
        """What decides the outcome, as far as it can be told of somebody's functions."""
        fit = self.fit.config() if hasattr(self.fit, "config") else name_of(self.fit)
        return {
            "driver": self.title,
            "steps": [_described(step) for step in self.steps],
            "make_model": name_of(self.make_model),
            "fit": fit,
            "seeds": list(self.seeds),
            "rewind": self.rewind,
            "controls": list(self.controls),
            "control_levels": list(self.control_levels),
            "repeats": self.repeats,
            "budget": self.budget,
            **({"replicas": self.replicas} if self.replicas > 1 else {}),
            **({"schedule": self.schedule} if self.schedule != "once" else {}),
            **({"batch": masking.digest_of(self.batch)} if self.batch is not None else {}),
        }


_PLANNING: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def planning() -> Iterator[None]:
    """Inside, drivers check their arguments and return their `Plan` in place of doing it: nothing is trained or written."""
    token = _PLANNING.set(True)
    try:
        yield
    finally:
        _PLANNING.reset(token)


def run(
    plan: Plan, out, workers: int, progress: Callable[[dict], None] | None, config: Mapping | None = None
) -> Result:
    """Do every job of the plan that the run folder does not hold yet, and sum them up.

    `config`: what config.json says besides. Without `out` the run lives in a temporary folder as long as its result.
    """
    asked = getattr(plan.fit, "check", None)
    if callable(asked) and accepts(asked, "budget", "snapshot_at"):  # before a mistake can leave anything behind
        rewinding = {"snapshot_at": plan.rewind} if plan.rewind_step is not None else {}
        asked(plan.build(plan.seeds[0]), budget=plan.budget, **rewinding)
    if _PLANNING.get():
        return plan
    many = how_many(plan.replicas, plan.fit, lambda: plan.build(plan.seeds[0]), workers)
    plan = replace(plan, replicas=many)
    if workers > 1:
        check_guarded()
    jobs = plan.jobs()
    ran = execute(
        jobs,
        out,
        {**plan.config(), **(config or {})},
        progress,
        is_done=lambda store, job: _is_done(plan, store, job),
        run=lambda store, todo, done: _done(plan, store, todo, done, workers),
        summarize=lambda store: summary(store, jobs),
        claimed=lambda store: _check_initial(plan, store),
    )
    return Result(*ran)


def _is_done(plan: Plan, store: Store, job: Job) -> bool:
    """Its file is there and so are its tickets, as it left them (a lost or damaged one is made again)."""
    outcome = store.job(job)
    if outcome is None:
        return False
    left = outcome.get("tickets", {})
    return all(_is_whole(store.ticket(job.seed, level), left.get(str(level))) for level in plan.tickets(job))


def _is_whole(path: Path, digest: str | None) -> bool:
    return path.is_file() and sha256(path) == digest


def _done(plan: Plan, store: Store, todo: list[Job], done: set[Job], workers: int) -> Iterator[Job]:
    """Run jobs as they become ready and yield each as it is finished; tickets first, since the others wait for them."""
    if plan.replicas > 1:
        for batch in batches(plan.jobs(), plan.replicas):
            wanted = [job for job in batch if job in todo]
            if wanted:
                with torch_threads(plan.threads):
                    run_jobs(plan, store.folder, batch, wanted)
            for job in wanted:
                done.add(job)
                yield job
        return
    todo = sorted(todo, key=lambda job: (job.kind != "ticket", job.level, job.seed, job.kind, job.repeat))
    yield from run_all(todo, plan.needs, done, run_job, (plan, store.folder), workers, plan.threads)


def run_job(plan: Plan, folder: Path, job: Job) -> None:
    """One training, from the ticket it starts with to the tickets that come of it. The job's file is written last."""
    run_jobs(plan, folder, [job], [job])


def run_jobs(plan: Plan, folder: Path, jobs: Sequence[Job], wanted: Sequence[Job]) -> None:
    """Trainings of one level, several of them at once; only those that are `wanted` leave something."""
    store = Store(folder)
    begin = time.perf_counter()
    dense, rewinding = jobs[0].level == 0, plan.rewind_step is not None
    steps = {"snapshot_at" if dense else "start_at": plan.rewind} if rewinding else {}
    with dispatch.reproducible():
        models, starts = [], []
        for job in jobs:
            model = plan.build(job.seed)
            starts.append(Ticket.of(model, model) if dense else _start(plan, store, job))
            if job.kind == "frozen":
                models.append(actions.freeze_pruned(model, starts[-1]))
            else:
                models.append(model if dense else starts[-1].apply(model))
        histories = _fit(plan, models, jobs, **steps)
        seconds = (time.perf_counter() - begin) / len(jobs)
        for job, model, start, history in zip(jobs, models, starts, histories, strict=True):
            if job in wanted:
                _finish(plan, store, job, model, start, history, seconds)


def _finish(
    plan: Plan, store: Store, job: Job, model: nn.Module, start: Ticket, history: History, before: float
) -> None:
    """Write what a training leaves; `before`: the seconds that it took."""
    begin = time.perf_counter()
    saved, rewound = {}, start
    if job.level == 0:
        if plan.rewind_step is not None:
            rewound = _snapshot(plan, start, history)
        elif plan.rewind == "lr":
            rewound = Ticket.of(model, model)
        saved[0] = rewound.save(store.ticket(job.seed, 0))
    levels = [level for level in plan.tickets(job) if level]
    for level, found in masking.masked_models(plan, job.seed, levels, model, start, rewound):
        ticket = Ticket.of(found, found if plan.rewind == "lr" else rewound.initial)
        saved[level] = ticket.save(store.ticket(job.seed, level))
    outcome = {
        "density": start.density,
        "kept": start.count,
        "total": start.total,
        "seconds": round(before + time.perf_counter() - begin, 3),
        **({"initial": digest(start)} if job.level == 0 else {}),
        **({"tickets": {level: sha256(path) for level, path in saved.items()}} if saved else {}),
    }
    store.finish(job, {**outcome, "history": history.to_json()})


def _start(plan: Plan, store: Store, job: Job) -> Ticket:
    """The ticket a job trains: the level's own, or a control of it."""
    ticket = Ticket.load(store.ticket(job.seed, job.level))
    if job.kind in ("ticket", "frozen"):
        return ticket
    if job.kind == "constant":
        return actions.kept_weights(ticket, "constant")
    seed = controls.derived_seed(job.kind, job.seed, job.level, job.repeat)
    if job.kind == "reinit":
        fresh = plan.build(seed)
        return controls.reinit(ticket, Ticket.of(fresh, fresh).initial)
    initial = Ticket.load(store.ticket(job.seed, 0)).initial
    if job.kind == "random-mask":
        return controls.random_mask(ticket, initial, seed)
    return controls.shuffle(ticket, ticket.initial, seed)


def _fit(plan: Plan, models: Sequence[nn.Module], jobs: Sequence[Job], **steps) -> list[History]:
    with seeded(jobs[0].seed):
        if plan.replicas > 1 and jobs[0].kind != "frozen":
            returned = fit_many_of(plan.fit)(models, seeds=[job.seed for job in jobs], budget=plan.budget, **steps)
        else:
            returned = [plan.fit(models[0], seed=jobs[0].seed, budget=plan.budget, **steps)]
    return [History.of(value, name_of(plan.fit)) for value in returned]


def _snapshot(plan: Plan, start: Ticket, history: History) -> Ticket:
    """What a dense training rewinds to."""
    if not isinstance(history.snapshot, Mapping):
        raise TypeError(
            f"fit: {name_of(plan.fit)} took snapshot_at but returned no snapshot (the model's state_dict at that step)"
        )
    found = {key: history.snapshot[key] for key in start.initial if key in history.snapshot}
    if len(found) < len(start.initial):
        raise ValueError(f"fit: the snapshot of {name_of(plan.fit)} lacks {sorted(set(start.initial) - set(found))[0]}")
    return Ticket(start.masks, {key: value.detach().to("cpu", copy=True) for key, value in found.items()})


def _check_initial(plan: Plan, store: Store) -> None:
    """A resumed run whose `make_model` has changed meanwhile would mix two networks."""
    first = store.job(Job(plan.seeds[0], 0))
    if first is not None:
        model = plan.build(plan.seeds[0])
        if first["initial"] != digest(Ticket.of(model, model)):
            raise ValueError(
                f"make_model: gives other initial weights than the run in {store.folder} began with; choose another folder"
            )


def digest(ticket: Ticket) -> str:
    """SHA-256 of the weights a ticket starts from."""
    found = hashlib.sha256()
    for name, value in ticket.initial.items():
        found.update(f"{name}{tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _described(step: Mapping) -> dict:
    """The arguments of `prune`, as JSON."""
    found = {**step, "exclude": [str(e) for e in step["exclude"]]}
    if callable(found.get("criterion")):
        found["criterion"] = name_of(found["criterion"])
    return found


# ---- what users hand in ----


def build(make_model: Callable, seed: int) -> nn.Module:
    """A new model, its values a function of `seed`.

    Raises:
        TypeError: `make_model` returned no model.
    """
    with seeded(seed):
        model = _call_make_model(make_model, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model: expected it to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _call_make_model(make_model, seed):
    """`make_model(seed=...)`, `make_model(seed)` or `make_model()`, as its signature has it."""
    try:
        parameters = inspect.signature(make_model).parameters.values()
    except ValueError:  # some built-in callables have no signature
        return make_model()
    if accepts(make_model, "seed"):
        return make_model(seed=seed)
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise TypeError(
            f"make_model: expected to call it with a seed or nothing, but it needs {[p.name for p in required]}"
        )
    return make_model(seed) if required else make_model()


def accepts(function: Callable, *names: str) -> bool:
    """Whether it can be called with these keywords."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    return all(n in parameters and parameters[n].kind is not parameters[n].POSITIONAL_ONLY for n in names)


def name_of(function) -> str:
    if hasattr(function, "func"):  # functools.partial
        return name_of(function.func)
    module = getattr(function, "__module__", None)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def check(make_model, fit, seeds, rewind, names, repeats, workers, threads) -> tuple[int, ...]:
    """The arguments both drivers take, checked. Returns the seeds as a tuple."""
    for name, value in (("make_model", make_model), ("fit", fit)):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    if not accepts(fit, "seed", "budget"):
        raise TypeError(f"fit: expected {name_of(fit)} to take (model, *, seed, budget)")
    for name, value in (("repeats", repeats), ("workers", workers), ("threads", 1 if threads is None else threads)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or any(n not in controls.ALL for n in names):
        raise ValueError(f"controls: expected any of {', '.join(controls.ALL)}, got {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"controls: expected each once (`repeats` trains it several times), got {names!r}")
    if rewind == "lr" and {"constant", "frozen"} & set(names):
        raise ValueError(
            f"controls: expected none of constant, frozen with rewind 'lr', which leaves no initial values, got {names!r}"
        )
    if rewind not in ("init", "lr"):
        parse_step(rewind, steps_per_epoch=1, name="rewind")
        if not accepts(fit, "snapshot_at", "start_at"):
            raise TypeError(
                f"rewind: {rewind!r} needs a fit that takes snapshot_at= and start_at= (sl.Trainer does), {name_of(fit)} does not"
            )
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if not 1 <= seeds <= MOST_SEEDS:
            raise ValueError(f"seeds: expected 1 to {MOST_SEEDS} trials, or a list of seeds, got {seeds}")
        return tuple(range(seeds))
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise TypeError(f"seeds: expected how many, or a list of ints from 0 on, got {seeds!r}")
    for i, seed in enumerate(seeds):
        check_seed(seed, f"seeds[{i}]")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected at least one and each once, got {list(seeds)}")
    return tuple(seeds)


def as_rates(rates) -> dict:
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected a mapping such as {{'output': 0.5}}, got {type(rates).__name__}")
    return dict(rates)


def check_control_levels(levels, count: int) -> tuple[int, ...]:
    """Which of the levels 1..count get controls; None means all."""
    if levels is None:
        return tuple(range(1, count + 1))
    listed = isinstance(levels, Sequence) and not isinstance(levels, str)
    if not listed or not all(isinstance(level, int) and 1 <= level <= count for level in levels):
        raise ValueError(f"control_levels: expected levels from 1 to {count}, got {levels!r}")
    return tuple(sorted(set(levels)))


def probe(make_model, seed, exclude, names) -> nn.Module:
    """A model to try pruning on before anything is trained. `names`: of the controls.

    Raises:
        ValueError: there is nothing to prune, or models are not new ones each time.
    """
    plan = Plan("", make_model, print, (seed,), (), (), exclude=exclude)
    reinit = "reinit" in names  # only then is it asked for seeds that the user did not name
    model, other = plan.build(seed), plan.build(controls.derived_seed("probe", seed) if reinit else seed)
    layers, others = (dict(masked_modules(m)) for m in (model, other))
    if not layers:
        raise ValueError("make_model: expected a model with Linear or Conv2d layers to prune, got none")
    if any(layers[name].weight is others[name].weight for name in layers.keys() & others.keys()):
        raise ValueError("make_model: expected a new model at every call, got the same weights twice")
    if reinit and digest(Ticket.of(model, model)) == digest(Ticket.of(other, other)):
        raise ValueError(
            "make_model: gives the same initial values for every seed, so control reinit would be the ticket itself; "
            "draw them from the seed, or leave that control out"
        )
    return model


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
