"""Structured tickets from the unstructured ones of a run: refilled channels or regrouped blocks, retrained, beside the run's own.

Chen et al., arXiv 2202.04736: the trained ticket of each seed ranks its channels (refill) or shows its blocks (regroup); the new
ticket starts from the same initial values, and is trained as the old one was. What is finished is kept seed by seed in
`RUN/<how>-level<NN>/` and used again.
"""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from .. import analysis
from ..ops import dispatch
from ..pruning.regroup import StructureReport, refill, regroup
from ..tickets.pool import run_all
from ..tickets.result import Result, interval
from ..tickets.seeding import seeded
from ..tickets.store import Store, sha256, to_json
from ..tickets.ticket import Ticket, write_atomic
from .networks import Network, Networks
from .run_kinds import networks_of

HOW = ("refill", "regroup")


def restructure(
    run: str | os.PathLike,
    how: str,
    *,
    structure: str = "block:16x16",
    exclude: tuple[str, ...] | None = None,
    level: int | None = None,
    data_root: str | os.PathLike | None = None,
    workers: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> dict:
    """Refill or regroup the tickets of a level of a finished run, and train what comes of it.

    Args:
        run: the folder of an `imp` or `one-shot` run. how: "refill" (channels) or "regroup" (blocks of `structure`).
        exclude: layers that stay as they are; None is the output layer.
        level: which tickets; None is the level that the run has found.
        workers: trainings at the same time, one CPU thread each; the results do not depend on it.
        tell: called with lines for people, among them how long it will take.

    Returns:
        {"run", "ticket": the first seed's, "tickets": [paths], "structure", "level", "density": mean, "covered": fraction of the
        old survivors still there, "by_chance": the same of survivors that stand anywhere, "test_accuracy": {"mean", "ci95",
        "values"} of the new tickets, "unstructured": {"density", "test_accuracy": {...}} of the old ones, "dense":
        {"test_accuracy": {...}}}; also written to `RUN/<how>-level<NN>/result.json`, beside the tickets, and for the report to
        `RUN/analysis/<how>.json`, with what was found of other levels.

    Raises:
        ValueError: no such level, a run whose tickets are not single weights or are not trained, or nothing to find
            (`sl.regroup`).
    """
    if how not in HOW:
        raise ValueError(f"how: expected one of {', '.join(HOW)}, got {how!r}")
    networks = networks_of(run, data_root)
    if networks.config.get("driver") not in ("imp", "one-shot"):
        raise ValueError(f"run: expected one of imp or one-shot, whose tickets are single weights, got {run}")
    level = networks.level(level)
    structure = "channel" if how == "refill" else structure
    folder = Path(run) / f"{how}-level{level:02d}"
    levels = Result.load(run).levels
    settings = {
        "structure": structure,
        "exclude": None if exclude is None else list(exclude),
        "tickets": networks.digest(level),
    }
    todo = [seed for seed in networks.seeds if _finished(folder, seed, settings) is None]
    if todo:
        wanted = [Network(seed, level) for seed in todo]
        _tell_cost(networks, wanted, workers, how, tell)
        networks.train(wanted, workers)
        made = {seed: _structured(networks, Network(seed, level), how, structure, exclude) for seed in todo}
        folder.mkdir(exist_ok=True)  # once something was found
        about = {}
        for seed, (ticket, report) in made.items():
            path = ticket.save(_place(folder, seed))
            about[seed] = {"settings": settings, "sha256": sha256(path), "density": ticket.density}
            about[seed] |= {"covered": report.covered, "by_chance": report.by_chance}
            tell(f"seed {seed}: {report.covered:.1%} of the survivors stay, {report.by_chance:.1%} would by chance")
        for seed in run_all(
            todo, lambda seed: None, set(), _train, (Path(run), data_root, folder, about), workers, threads=1
        ):
            tell(f"seed {seed}: trained")
    else:
        tell(f"{how}: there already")
    finished = [_finished(folder, seed, settings) for seed in networks.seeds]
    found = {
        "run": str(run),
        "ticket": str(_place(folder, networks.seeds[0])),
        "tickets": [str(_place(folder, seed)) for seed in networks.seeds],
        "structure": structure,
        "level": level,
        **{name: sum(one[name] for one in finished) / len(finished) for name in ("density", "covered", "by_chance")},
        "test_accuracy": interval([one["test_accuracy"] for one in finished]),
        "unstructured": {
            "density": networks.density(level),
            "test_accuracy": levels[level]["ticket"]["test_accuracy"],
        },
        "dense": {"test_accuracy": levels[0]["ticket"]["test_accuracy"]},
    }
    write_atomic(folder / "result.json", to_json(found))
    command = ["sparselottery", how, str(run), "--level", str(level)]
    command += ["--structure", structure] if how == "regroup" else []
    command += ["--exclude", ",".join(exclude)] if exclude is not None else []
    command += ["--data-root", str(data_root)] if data_root is not None else []
    analysis.save(run, how, {"how": how, "tickets": _of_all_levels(run, how)}, shlex.join(command))
    return found


def _tell_cost(networks: Networks, wanted: list[Network], workers: int, how: str, tell) -> None:
    again = networks.missing(wanted)
    seconds = networks.seconds([*again, *wanted])
    cost = "" if seconds is None else f", about {seconds / min(workers, len(wanted)):.0f} s"
    first = f"{len(again)} networks of the run again, then " if again else ""
    tell(f"{how}: training {first}{len(wanted)} tickets{cost}")


def _structured(networks: Networks, network: Network, how, structure, exclude) -> tuple[Ticket, StructureReport]:
    model = networks.load(network)
    initial = networks.ticket(network.seed, 0).initial  # of all weights: some that were pruned come back
    if how == "refill":
        report = refill(model, weights=initial, exclude=exclude)
    else:
        report = regroup(model, structure=structure, weights=initial, exclude=exclude)
    return Ticket.of(model, initial), report


def _train(run: Path, data_root, folder: Path, about: dict[int, dict], seed: int) -> None:
    """One training in a worker process; the file that tells of it is written last."""
    networks = networks_of(run, data_root)
    start = {} if networks.rewind in ("init", "lr") else {"start_at": networks.rewind}
    with dispatch.reproducible(), seeded(seed):
        model = Ticket.load(_place(folder, seed)).apply(networks.initial(seed))
        history = networks.fit(model, seed=seed, **start)
    found = {**about[seed], "test_accuracy": history.test_accuracy}
    write_atomic(_place(folder, seed).with_suffix(".json"), to_json(found))


def _place(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}.safetensors"


def _finished(folder: Path, seed: int, settings: dict) -> dict | None:
    """What is known of a ticket that was trained with these settings, if it is there and whole."""
    try:
        found = json.loads(_place(folder, seed).with_suffix(".json").read_text())
        return found if found["settings"] == settings and found["sha256"] == sha256(_place(folder, seed)) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _of_all_levels(run, how: str) -> list[dict]:
    """What was found of each level, densest first; a damaged file is as good as none."""
    found = []
    for path in sorted(Path(run).glob(f"{how}-level*/result.json")):
        try:
            one = Store(path.parent, create=False).read(path.name)
        except ValueError:
            continue
        names = ("structure", "level", "density", "covered", "by_chance", "test_accuracy", "unstructured", "dense")
        if all(name in one for name in names):
            found.append({name: one[name] for name in names})
    return found
