"""Which backend runs a call: measured once per (op, key), cached, and dense is always a candidate.

A key is a tuple `(direction, shape, dtype, density bucket, batch bucket, threads, device, *extra)`: whatever changes which
backend is fastest, rounded so that near calls share one measurement. The decision, in this order:

1. `SPARSELOTTERY_BACKEND` (dense, cpu, triton, cuda, reference) forces one; an error where the call cannot run it. The
   ops that are not layers (global_topk, the optimizers') ignore a backend they lack; no op accepts an unknown name.
2. Inside `with reproducible():` the op's own fixed rule decides. No stopwatch, so a rerun takes the same path bit for bit.
3. A measurement already in memory, or in the JSON file of this machine under `SPARSELOTTERY_CACHE` (default
   `~/.cache/sparselottery`).
4. A measurement now: every candidate, interleaved, medians. A sparse backend must beat dense by `MARGIN`.

A masked layer may go past its op straight to the library (`goes_to_library`), where what the sparse kernels of its forward and
backward pass save together is less than the op's own calls cost (`CALL`).
"""

import ast
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator
from pathlib import Path

import torch

from .. import _ext

MARGIN = 0.03  # how much faster than dense a sparse backend must be to be chosen, as a fraction of dense's time
# Seconds that a call costs besides its kernel when it is not the library's own: autograd functions in Python, with the caches
# that a training step leaves behind. Layers that go to the library are spared it, so sparse kernels must earn it.
CALL = {"forward": 10e-6, "backward": 15e-6}
BACKENDS = ("dense", "cpu", "triton", "cuda", "reference")
KEY_FIELDS = ("direction", "shape", "dtype", "density_bucket", "batch", "threads", "device")

_ROUNDS = 5  # timed runs per candidate, after one that warms up
_MORE_ROUNDS = 25  # of runs so short that they all end within _SHORT seconds: those of microseconds vary most
_SHORT = 0.01
_BUDGET = 0.3  # seconds that one measurement may take; a candidate's first run always ends
_LOG = logging.getLogger(__name__)

_decisions: dict[str, dict[Hashable, str]] = {}  # op -> key -> backend: all that the hot path reads
_records: dict[tuple[str, str], dict] = {}  # (op, repr(key)) -> a row of table()
_lock = threading.RLock()
_loaded = False
_reproducible = 0
_generation = 0  # grows when decisions are forgotten


def density_bucket(density: float) -> int:
    """Four buckets per halving of the density: 0 is dense, 4 is 0.5, 13 is 0.1, 23 is 0.02; 99 stands for an empty mask."""
    return round(-4 * math.log2(density)) if density > 0 else 99


def bucket_density(bucket: int) -> float:
    """The density in the middle of a bucket."""
    return 0.0 if bucket == 99 else 2.0 ** (-bucket / 4)


def batch_bucket(batch: int) -> int:
    """`batch` rounded up to one of four steps per doubling (1..8 exactly, then 10, 12, 14, 16, 20, ...)."""
    if batch <= 8:
        return batch
    shift = (batch - 1).bit_length() - 3
    return (((batch - 1) >> shift) + 1) << shift


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Within it no call is decided by a stopwatch, but by its op's fixed rule.

    It holds for the whole process, because a backward pass on a GPU runs in autograd's own threads.
    """
    global _reproducible
    with _lock:
        _reproducible += 1
    try:
        yield
    finally:
        with _lock:
            _reproducible -= 1


def is_reproducible() -> bool:
    """Whether a `reproducible()` block is active."""
    return _reproducible > 0


# os.environ without its layers, since every call of every layer asks.
_ENVIRONMENT, _BACKEND = getattr(os.environ, "_data", None), os.environ.encodekey("SPARSELOTTERY_BACKEND")


def wish() -> str | None:
    """What `SPARSELOTTERY_BACKEND` holds now, None where it is unset."""
    if _ENVIRONMENT is None:
        return os.environ.get("SPARSELOTTERY_BACKEND")
    value = _ENVIRONMENT.get(_BACKEND)
    return value if value is None else os.environ.decodevalue(value)


def forced() -> str | None:
    """The backend that `SPARSELOTTERY_BACKEND` names, None where it is unset or empty.

    Raises:
        ValueError: there is no backend of that name.
    """
    name = wish()
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f"SPARSELOTTERY_BACKEND={name}: expected one of {', '.join(BACKENDS)}")
    return name


def lookup(op: str, key: Hashable | None) -> str | None:
    """The cached decision; None when there is none, or where the environment or `reproducible()` has a say: then `choose`.

    A key of None says that only dense can win: "dense", unless the environment has a say.
    """
    if forced():
        return None
    if key is None:
        return "dense"
    if _reproducible:
        return None
    known = _decisions.get(op)
    return known.get(key) if known is not None else None


def recall(op: str, key: Hashable, names: Collection[str]) -> str | None:
    """What `choose` would answer from memory or this machine's file; None where it would measure, or ask somebody else.

    For ops whose candidates cost something to make. `names`: of the candidates that are measured.
    """
    if forced() or _reproducible:
        return None
    with _lock:
        _load()
        return _decisions.setdefault(op, {}).get(key) or _recall(op, key, names)


def state() -> tuple:
    """What decisions depend on besides their keys: a decision remembered together with this holds while it is equal."""
    return (_reproducible > 0, wish(), torch.get_num_threads(), _generation)


def decided(op: str, key: Hashable, rule: Callable[[], str]) -> str | None:
    """What `choose` is certain to answer without running anything, else None. `key` None: only dense can win."""
    if forced():
        return None
    if key is None:
        return "dense"
    return rule() if _reproducible else _decisions.get(op, {}).get(key)


def choose(op: str, key: tuple, candidates: dict[str, Callable[[], object]], *, rule: Callable[[], str]) -> str:
    """Name the candidate to run.

    Args:
        op: the op's name.
        key: see the module's docstring; its entries are strings, numbers, booleans or tuples of them.
        candidates: name -> a call without arguments that runs it and changes nothing; "dense" must be there. "reference" is
            never measured: it runs only by the environment's wish.
        rule: the fixed choice for `reproducible()`: a function of the key and the machine's instruction set only.

    Raises:
        ValueError: `SPARSELOTTERY_BACKEND` names no backend, or one that cannot run this call.
    """
    wish = forced()
    if wish:
        if wish not in candidates:
            possible = ", ".join(name for name in BACKENDS if name in candidates)
            raise ValueError(f"SPARSELOTTERY_BACKEND={wish}: {op} for {_words(key)} can run on: {possible}")
        return wish
    if _reproducible:
        name = rule()
        return name if name in candidates else "dense"
    measured = {name: run for name, run in candidates.items() if name != "reference"}
    if len(measured) == 1:
        return "dense"
    with _lock:
        _load()
        name = _decisions.setdefault(op, {}).get(key)
        if name is None:
            name = _recall(op, key, measured)
        if name is None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "dense"  # a stopwatch would end the capture; a call before the capture will have been measured
        if name is None:
            seconds = measure(measured)
            name = fastest(seconds)
            record = {"op": op, "key": repr(key), "backend": name, "source": "measured"}
            record["us"] = {candidate: round(s * 1e6, 3) for candidate, s in seconds.items()}
            _records[op, repr(key)] = record
            _decisions[op][key] = name
            _save()
    return name


def measured(op: str, key: Hashable) -> dict[str, float] | None:
    """The microseconds of each candidate, where a stopwatch has decided this call."""
    with _lock:
        record = _records.get((op, repr(key)))
    return record and record["us"]


def goes_to_library(op: str, calls: list[tuple[Hashable, Callable[[], str]]]) -> bool | None:
    """Whether a layer should leave a forward pass, or a forward and a backward pass, to the library's own dense layer.

    It then pays for dense products alone. If it calls the op, it pays CALL for each pass and gets the backend chosen for each.

    Args:
        calls: (key, rule) of each pass, as `choose` takes them.

    Returns:
        None where that is not known: something has not been measured yet, or the environment has a say.
    """
    names = [decided(op, key, rule) for key, rule in calls]
    if None in names:
        return None
    if _reproducible or set(names) == {"dense"}:
        return "dense" in names
    times = [measured(op, key) for key, _ in calls]
    if None in times:
        return None
    dense = sum(us["dense"] for us in times)
    ours = sum(us[name] for us, name in zip(times, names, strict=True))
    return ours + sum(CALL[key[0]] for key, _ in calls) * 1e6 >= dense * (1 - MARGIN)


def fastest(seconds: dict[str, float]) -> str:
    """Dense, unless the fastest of the others beats it by MARGIN."""
    best = min(seconds, key=seconds.get)
    return best if seconds[best] < seconds["dense"] * (1 - MARGIN) else "dense"


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each candidate: one run each to warm up, then up to 5 rounds of one run each, in turn, 25 of short ones.

    One that this GPU is not made for (Triton cannot compile it, it asks for more memory than there is) is left out, with a
    warning.
    """
    start = time.perf_counter()
    times = {name: [] for name in candidates}
    for name, run in candidates.items():
        try:
            times[name].append(_seconds(run))
        except Exception as error:
            if name == "dense" or not _unfit(error):
                raise
            del times[name]
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"sparselottery: the {name} backend failed and is not used here ({why})", stacklevel=2)
            continue
        if (
            times[name][0] > _BUDGET / 10
        ):  # long runs vary little and need no warming up: the second one would only cost
            times[name].append(times[name][0])
    for turn in range(_MORE_ROUNDS):
        if time.perf_counter() - start > (_BUDGET if turn < _ROUNDS else _SHORT):
            break
        for name, runs in times.items():
            runs.append(_seconds(candidates[name]))
    return {name: statistics.median(runs[1:] or runs) for name, runs in times.items()}


def _unfit(error):
    """Whether an error says that a kernel cannot run on this GPU, not that it is wrong."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or type(error).__module__.partition(".")[0] == "triton"


def table() -> list[dict]:
    """What was decided so far on this machine, one row per (op, key), measured now or read from the cache.

    A row has `op`, the fields of the key (`direction`, `shape`, `dtype`, `density` (the bucket's middle), `batch`, `threads`,
    `device`, `extra`), `backend`, `us` (backend -> median microseconds) and `source` ("measured" or "cached").
    """
    with _lock:
        _load()
        return [_row(record) for record in _records.values()]


def clear() -> None:
    """Forget what is in memory (the file stays): the next call reads the file again."""
    global _loaded, _generation
    with _lock:
        _generation += 1
        _decisions.clear()
        _records.clear()
        _loaded = False


def changed() -> None:
    """What may run has changed: decisions remembered outside of here, together with `state()`, are asked for anew."""
    global _generation
    with _lock:
        _generation += 1


def _seconds(run):
    device = torch.cuda.synchronize if torch.cuda.is_initialized() else None
    if device:
        device()
    start = time.perf_counter()
    run()
    if device:
        device()
    return time.perf_counter() - start


def _words(key):
    return ", ".join(f"{name} {value}" for name, value in zip(KEY_FIELDS, key, strict=False))


def _row(record):
    key = ast.literal_eval(record["key"])
    fields = dict(zip(KEY_FIELDS, key, strict=False))
    row = {"op": record["op"], **fields, "extra": key[len(KEY_FIELDS) :]}
    if "density_bucket" in row:
        row["density"] = bucket_density(row.pop("density_bucket"))
    return row | {name: record[name] for name in ("backend", "us", "source")}


# ---- the file ----


def fingerprint() -> dict[str, str | None]:
    """What a measurement depends on besides its key."""
    isa = _ext.extension().cpu_isa() if _ext.WHY_NOT is None else "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    version = _ext.package_version("sparselottery")  # None: imported from a source tree that was never installed
    about = {"cpu": _ext.cpu_model(), "isa": isa, "gpu": gpu, "torch": torch.__version__, "sparselottery": version}
    # A build of other kernels has other times, whatever its version. Format, of the records: 1 had decisions that counted CALL,
    # 2 left out what new weights in each step cost the pass back.
    return about | {"build": _ext.build_stamp(), "format": "3"}


def cache_file() -> Path:
    """The JSON file of this machine's measurements."""
    digest = hashlib.sha256(json.dumps(fingerprint(), sort_keys=True).encode()).hexdigest()[:16]
    return _ext.cache_dir() / f"dispatch-{digest}.json"


def _load():
    global _loaded
    if not _loaded:
        for record in _read(cache_file()):
            _records.setdefault((record["op"], record["key"]), record | {"source": "cached"})
        _loaded = True


def _recall(op, key, candidates):
    """The backend of a cached record, if it measured just these candidates."""
    record = _records.get((op, repr(key)))
    if record is None or set(record["us"]) != set(candidates):
        return None
    _decisions[op][key] = record["backend"]
    return record["backend"]


def _read(path):
    """The records in a file; none where there is no file or it is not what `_save` writes (then all is measured again)."""
    try:
        records = json.loads(path.read_text())["decisions"]
        return [r for r in records if _is_record(r)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_record(record):
    return (
        isinstance(record, dict)
        and isinstance(record.get("op"), str)
        and isinstance(record.get("key"), str)
        and _is_key(record["key"])
        and isinstance(record.get("us"), dict)
        and all(isinstance(us, (int, float)) for us in record["us"].values())
        and "dense" in record["us"]
        and record.get("backend") in record["us"]
    )


def _is_key(text):
    """Whether a key of a record is what `table` can take apart."""
    try:
        key = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(key, tuple) and (len(key) < 4 or isinstance(key[KEY_FIELDS.index("density_bucket")], int))


def _save():
    """Merge into the file under a lock; a reader sees the old file or the new one, never half of one."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = {(r["op"], r["key"]): r for r in _read(path)}
            for name, record in _records.items():
                if record["source"] == "measured":
                    records[name] = {field: record[field] for field in ("op", "key", "backend", "us")}
            text = json.dumps({"machine": fingerprint(), "decisions": list(records.values())}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, delete=False) as new:
                new.write(text)
            os.replace(new.name, path)
    except OSError as error:  # a read-only home must not stop a training run: the decision stays in memory
        _LOG.info("cannot keep measurements in %s: %s", path, error)
