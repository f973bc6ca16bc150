"""What every driver does with its jobs: those that the run folder does not hold yet, in an order, and the sum of all."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .. import _ext
from ..training.history import History
from .store import Job, Store


def execute(
    jobs: list[Job],
    out,
    config: Mapping,
    progress: Callable[[dict], None] | None,
    *,
    is_done: Callable[[Store, Job], bool],
    run: Callable[[Store, list[Job], set[Job]], Iterable[Job]],
    summarize: Callable[[Store], Mapping],
    claimed: Callable[[Store], None] = lambda store: None,
) -> tuple[Path, dict, tempfile.TemporaryDirectory | None]:
    """Do the jobs of a run, or go on with it.

    Args:
        jobs: all of them, in the order of metrics.jsonl. out: the run folder; None: a temporary one that lives as long as the
            result. config: what the run is, for config.json; a folder of another run is refused.
        is_done: whether a job left all that it should.
        run: called with the jobs to do and the set of those done, does them, and yields each as it is finished.
        summarize: what result.json says in the end, beside what was added to it before.
        claimed: called once the folder is this run's, before anything is done.

    Returns:
        The arguments of `Result`: the folder, what result.json holds, and the temporary folder if it is one.
    """
    progress = progress or (lambda event: None)
    temporary = tempfile.TemporaryDirectory(prefix="sparselottery-") if out is None else None
    store = Store(temporary.name if temporary else out)
    with store.lock(lambda: progress({"event": "waiting", "run": str(store.folder)})):
        store.claim(config, _ext.env_report())
        claimed(store)
        done = {job for job in jobs if is_done(store, job)}
        store.write_metrics(jobs)
        progress({"event": "start", "run": str(store.folder), "done": len(done), "total": len(jobs)})
        for job in run(store, [job for job in jobs if job not in done], done):
            store.append_metrics(job)
            progress({"event": "job", "done": len(done), "total": len(jobs), **_event(store, job)})
        store.write_metrics(jobs)
        found = {**_before(store), **summarize(store)}
        store.write_result(found)
    return store.folder, found, temporary


def _before(store: Store) -> dict:
    """What result.json says already: what was added to it later stays. A damaged one is made anew from the jobs."""
    try:
        return store.read("result.json") or {}
    except ValueError:
        return {}


def _event(store: Store, job: Job) -> dict:
    """What a driver tells of a finished job."""
    outcome = store.job(job)
    history = History.from_json(outcome["history"])
    names = ("seed", "level", "kind", "repeat", "density", "seconds")
    return {
        **{name: outcome[name] for name in names},
        "early_stop_iteration": history.early_stop_iteration,
        "test_accuracy": history.test_accuracy,
    }
