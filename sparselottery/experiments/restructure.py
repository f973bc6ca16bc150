"""Structured tickets from the unstructured ones of a run: refilled channels or regrouped blocks, retrained, beside the run's own.

Chen et al., arXiv 2202.04736: the trained ticket of each seed ranks its channels (refill) or shows its blocks (regroup); the new
ticket starts from the same initial values, and is trained as the old one was.
"""

import os
from collections.abc import Callable
from pathlib import Path

from ..ops import dispatch
from ..pruning.regroup import refill, regroup
from ..tickets.result import Result, interval
from ..tickets.seeding import seeded
from ..tickets.store import to_json
from ..tickets.ticket import Ticket, write_atomic
from .networks import Network
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
        workers: processes for networks that must be trained again to be ranked.

    Returns:
        {"run", "ticket": the first seed's, "tickets": [paths], "structure", "level", "density": mean, "covered": fraction of the
        old survivors still there, "test_accuracy": {"mean", "ci95", "values"} of the new tickets, "unstructured": {"density",
        "test_accuracy": {...}} of the old ones}; also written to `RUN/<how>-level<NN>/result.json`, beside the tickets.

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
    wanted = [Network(seed, level) for seed in networks.seeds]
    if networks.missing(wanted):
        tell(f"training {len(networks.missing(wanted))} networks of the run again")
    networks.train(wanted, workers)
    folder = Path(run) / f"{how}-level{level:02d}"
    start = {} if networks.rewind in ("init", "lr") else {"start_at": networks.rewind}
    paths, accuracies, densities, covered = [], [], [], []
    for network in wanted:
        model = networks.load(network)
        initial = networks.ticket(network.seed, 0).initial  # of all weights: some that were pruned come back
        report = (
            refill(model, weights=initial, exclude=exclude)
            if how == "refill"
            else regroup(model, structure=structure, weights=initial, exclude=exclude)
        )
        ticket = Ticket.of(model, initial)
        folder.mkdir(exist_ok=True)  # once something was found
        paths.append(str(ticket.save(folder / f"seed{network.seed}.safetensors")))
        tell(f"seed {network.seed}: {report.covered:.1%} of the survivors stay; training")
        with dispatch.reproducible(), seeded(network.seed):
            fresh = ticket.apply(networks.initial(network.seed))
            history = networks.fit(fresh, seed=network.seed, **start)
        accuracies.append(history.test_accuracy)
        densities.append(ticket.density)
        covered.append(report.covered)
    old = Result.load(run).levels[level]["ticket"]["test_accuracy"]
    found = {
        "run": str(run),
        "ticket": paths[0],
        "tickets": paths,
        "structure": "channel" if how == "refill" else structure,
        "level": level,
        "density": sum(densities) / len(densities),
        "covered": sum(covered) / len(covered),
        "test_accuracy": interval(accuracies),
        "unstructured": {"density": networks.density(level), "test_accuracy": old},
    }
    write_atomic(folder / "result.json", to_json(found))
    return found
