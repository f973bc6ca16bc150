"""Finished jobs summed up: one entry per level, with confidence intervals over the seeds."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..training.history import History
from .store import KINDS, Job, Store
from .ticket import Ticket

FIGURES = (
    "test_accuracy",  # at the early stop; at the end where nothing was validated
    "test_accuracy_at_early_stop",
    "final_test_accuracy",
    "early_stop_iteration",
    "validation_loss",  # its minimum
    "validation_accuracy",  # at the early stop
)


def interval(values: Sequence[float], repeats: int = 1) -> dict:
    """Mean and the half width of its 95 % confidence interval over the seeds (Student's t; None for a single seed).

    values: `repeats` neighbours belong to one seed. They share its ticket, so they are no independent trials: the interval
    is that of the seeds' means.
    """
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    trials = [math.fsum(values[i : i + repeats]) / repeats for i in range(0, len(values), repeats)]
    if len(trials) < 2:
        return {"mean": mean, "ci95": None, "values": values}
    from scipy.special import stdtrit  # comes with scikit-learn; only here, as it takes a while to import

    variance = math.fsum((v - mean) ** 2 for v in trials) / (len(trials) - 1)
    half = float(stdtrit(len(trials) - 1, 0.975)) * math.sqrt(variance / len(trials))
    return {"mean": mean, "ci95": half, "values": values}


def summary(store: Store, jobs: Sequence[Job]) -> dict:
    """result.json of finished jobs: the levels, and which ticket was found."""
    outcomes = [store.job(job) for job in jobs]
    levels = []
    for level in sorted({job.level for job in jobs}):
        here = [o for o in outcomes if o["level"] == level]
        entry = {"level": level, "density": interval([o["density"] for o in here if o["kind"] == "ticket"])["mean"]}
        for kind in KINDS:
            histories = [History.from_json(o["history"]) for o in here if o["kind"] == kind]
            if histories:
                repeats = len({o["repeat"] for o in here if o["kind"] == kind})
                entry[kind] = figures(histories, repeats)
        levels.append(entry)
    level = found_level(levels)
    seeds = [job.seed for job in jobs if job.level == level and job.kind == "ticket"]
    return {"found": {"level": level, "seed": seeds[0], "density": levels[level]["density"]}, "levels": levels}


def figures(histories: Sequence[History], repeats: int = 1) -> dict:
    """What was measured in every one of them, seed by seed."""
    measured = {figure: [getattr(h, figure) for h in histories] for figure in FIGURES}
    return {figure: interval(values, repeats) for figure, values in measured.items() if None not in values}


def found_level(levels: Sequence[dict]) -> int:
    """The sparsest level not measurably worse than the dense network: the mean is within the dense mean's interval or above.

    Judged by validation accuracy, so that test accuracy stays untouched by the choice; by test accuracy only where nothing was
    validated, and level 0 where nothing was measured at all or nothing pruned is as good.
    """
    for figure in ("validation_accuracy", "test_accuracy"):
        dense = levels[0]["ticket"].get(figure)
        if dense is not None:
            bar = dense["mean"] - (dense["ci95"] or 0)
            good = [e["level"] for e in levels if figure in e["ticket"] and e["ticket"][figure]["mean"] >= bar]
            return max(good)
    return 0


class Result:
    """What a driver returns. `levels` is a list of plain dictionaries, level 0 the dense network under "ticket":

        {"level": 3, "density": 0.512, "ticket": {"test_accuracy": {"mean": .., "ci95": .., "values": [..]},
         "early_stop_iteration": {...}, "validation_loss": {...}, ...}, "reinit": {...}, ...}

    Attributes:
        run: the run folder; of a run without `out`, a temporary one that goes with this object.
        levels: as above. found: {"level", "seed", "density"} of the ticket that `ticket()` gives.
        seeds: the seeds, in order.
    """

    def __init__(self, folder: Path, summed: dict, temporary=None):
        self.run, self._temporary = Path(folder), temporary
        self.levels, self.found = summed["levels"], summed["found"]
        self._summed = summed
        names = (path.stem for path in sorted((self.run / "tickets").glob("*.safetensors")))
        self._tickets = [tuple(int(part) for part in name.removeprefix("seed").split("-level")) for name in names]
        self.seeds = sorted({seed for seed, _ in self._tickets})

    @property
    def tickets(self) -> dict[tuple[int, int], Path]:
        """Every ticket's file by (level, seed)."""
        store = Store(self.run, create=False)
        return {(level, seed): store.ticket(seed, level) for seed, level in self._tickets}

    def ticket(self, level: int | None = None, seed: int | None = None) -> Ticket:
        """A ticket; without arguments the found one: the sparsest as good as the dense network on validation data.

        Raises:
            ValueError: there is none of that level and seed.
        """
        key = (self.found["level"] if level is None else level, self.found["seed"] if seed is None else seed)
        if key not in self.tickets:
            raise ValueError(
                f"level, seed: expected levels 0 to {len(self.levels) - 1} and seeds {self.seeds}, got {key}"
            )
        return Ticket.load(self.tickets[key])

    def to_json(self) -> dict:
        """The object that `--json` prints: result.json and the paths of the run and of the ticket found (None if not kept)."""
        kept = self._temporary is None
        ticket = self.tickets[self.found["level"], self.found["seed"]]
        return {"run": str(self.run) if kept else None, "ticket": str(ticket) if kept else None, **self._summed}

    def extend(self, **more) -> None:
        """Add keys to result.json (and to `to_json`), such as speed=..., and write the manifest anew."""
        self._summed = {**self._summed, **more}
        store = Store(self.run)
        with store.lock():
            store.write_result(self._summed)

    @classmethod
    def load(cls, folder) -> "Result":
        """The result of a finished run folder.

        Raises:
            ValueError: there is no finished run.
        """
        summed = Store(folder, create=False).read("result.json")
        if summed is None:
            raise ValueError(f"{folder}: expected a finished run (no result.json there)")
        return cls(Path(folder), summed)

    def __repr__(self) -> str:
        return f"Result({str(self.run)!r}, {len(self.levels)} levels down to density {self.levels[-1]['density']:.3g})"
