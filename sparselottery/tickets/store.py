"""A run folder: what a driver has finished so far, safe against being killed and against a second process.

    config.json        what was asked for; a run of something else is refused
    environment.json   where it ran
    jobs/*.json        one finished training each: its figures, its evaluations, the SHA-256 of the tickets it left; the truth
                       everything below is made from
    tickets/*.safetensors  the tickets by seed and level (level 0: all weights and the values to rewind to)
    metrics.jsonl      one line per evaluation of every finished job
    result.json        the levels, once all jobs are done
    claims.json        of `sparselottery reproduce`: which claims of the paper hold
    manifest.json      SHA-256 of every file above

Reports, figures and analyses stand beside them; they can be made again and are not in the manifest. Every file but
metrics.jsonl is written to a temporary name, flushed to the disk and renamed, so it is whole or absent. A job is done when
its file exists; what a killed process had begun is done again, to the same bits. metrics.jsonl grows by whole jobs and is
written anew from them at the start and at the end, so a torn line does not last and none comes twice. Files of somebody
else's in the folder are left alone: it may well be a home or a project.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .ticket import TEMPORARY, write_atomic

KINDS = ("ticket", "reinit", "random-mask", "shuffle", "constant", "frozen")
LOCK = ".lock"
_OURS = ("config.json", "environment.json", "jobs/*.json", "tickets/*.safetensors", "metrics.jsonl", "result.json",
         "claims.json")  # fmt: skip


@dataclass(frozen=True, order=True)
class Job:
    """One training: which seed, which level, the ticket itself or one of its controls, and which repetition of it."""

    seed: int
    level: int
    kind: str = "ticket"
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"seed{self.seed}-level{self.level:02d}-{self.kind}" + (f"-{self.repeat}" if self.repeat else "")


def to_json(value) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Store:
    """Reads and writes a run folder; with `create` it is made if it is not there."""

    def __init__(self, folder: str | os.PathLike, create: bool = True):
        self.folder = Path(folder)
        if not create:
            return
        try:
            for name in ("jobs", "tickets"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: {self.folder} cannot be a run folder ({error.strerror})") from None

    @contextmanager
    def lock(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the folder; a second process waits until the first is through (or dead), `waiting()` is called before it does."""
        with (self.folder / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            for place in (self.folder, *(self.folder / name for name in ("jobs", "tickets", "analysis"))):
                for left in place.glob(".*"):  # temporary files of a process killed in the middle of a write
                    if TEMPORARY.fullmatch(left.name) and left.is_file():
                        left.unlink(missing_ok=True)
            yield

    def claim(self, config: Mapping, environment: Mapping) -> None:
        """Make this the folder of `config`; one in which nothing was ever finished may have been another's.

        Raises:
            ValueError: it already is the folder of something else, or its config.json is damaged.
        """
        config = json.loads(to_json(config))
        path = self.folder / "config.json"
        found = self.read("config.json")
        if found is None or (found != config and not any((self.folder / "jobs").glob("*.json"))):
            for ticket in (self.folder / "tickets").glob("*.safetensors"):  # of a training that did not get to its end
                ticket.unlink()
            write_atomic(path, to_json(config))
        elif found != config:
            differing = sorted(k for k in {*found, *config} if found.get(k) != config.get(k))
            shown = ", ".join(f"{k} = {_short(found.get(k))} (asked: {_short(config.get(k))})" for k in differing)
            raise ValueError(f"out: {self.folder} holds a run with {shown}; choose another folder")
        write_atomic(self.folder / "environment.json", to_json(environment))

    def read(self, name: str) -> dict | None:
        """A JSON file of the folder, None where there is none."""
        path = self.folder / name
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError(f"an object was expected, it holds {type(found).__name__}")
            return found
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{path}: expected JSON, got a damaged file ({error}); delete it to have it made again"
            ) from None

    def ticket(self, seed: int, level: int) -> Path:
        return self.folder / "tickets" / f"seed{seed}-level{level:02d}.safetensors"

    def job(self, job: Job) -> dict | None:
        """What a finished job left, None if it is not done."""
        found = self.read(f"jobs/{job.name}.json")
        if found is not None and not ("density" in found and isinstance(found.get("history"), dict)):
            path = self.folder / "jobs" / f"{job.name}.json"
            raise ValueError(f"{path}: expected a finished job, got something else; delete it to have it made again")
        return found

    def finish(self, job: Job, outcome: Mapping) -> None:
        """Mark a job as done. `outcome`: JSON with at least "density" and "history"."""
        record = {"seed": job.seed, "level": job.level, "kind": job.kind, "repeat": job.repeat, **outcome}
        write_atomic(self.folder / "jobs" / f"{job.name}.json", to_json(record))

    def append_metrics(self, job: Job) -> None:
        """Add a finished job's evaluations to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(_lines(self.job(job)))

    def write_metrics(self, jobs: list[Job]) -> None:
        """metrics.jsonl from those of these jobs that are done, in this order."""
        done = (self.job(job) for job in jobs)
        lines = "".join(_lines(outcome) for outcome in done if outcome is not None)
        write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def write_result(self, result: Mapping) -> None:
        """result.json, and the manifest anew."""
        write_atomic(self.folder / "result.json", to_json(result))
        self.write_manifest()

    def write_manifest(self) -> None:
        """SHA-256 of every file of the run; call it after changing one."""
        files = sorted(
            p for name in _OURS for p in self.folder.glob(name) if p.is_file() and not p.name.startswith(".")
        )
        digests = {p.relative_to(self.folder).as_posix(): sha256(p) for p in files}
        write_atomic(self.folder / "manifest.json", to_json({"sha256": digests}))

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            ValueError: one is missing or differs, or there is no manifest; the message names it.
        """
        manifest = self.read("manifest.json")
        if manifest is None:
            raise ValueError(f"{self.folder / 'manifest.json'}: no such file; expected the manifest of a finished run")
        for name, digest in manifest["sha256"].items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path}: no such file, though the manifest lists it")
            if sha256(path) != digest:
                raise ValueError(f"{path}: expected the SHA-256 of the manifest, got another: the file was changed")


def _lines(outcome: Mapping) -> str:
    about = {name: outcome[name] for name in ("seed", "level", "density", "kind", "repeat")}
    return "".join(json.dumps({**about, **record}, allow_nan=False) + "\n" for record in outcome["history"]["records"])


def _short(value, limit=60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
