"""How times are taken: one pinned thread, candidates in turn, medians; CUDA events on a GPU."""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

SAMPLE = {"cpu": 1e-3, "cuda": 2e-3}  # seconds: a shorter call is repeated until one sample takes this long
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds for one call: 20th, 50th and 80th percentile over `rounds` samples of `loops` calls each."""

    p20: float
    p50: float
    p80: float
    rounds: int
    loops: int


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, linearly interpolated."""
    ordered = sorted(samples)

    def at(fraction):
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return at(0.2), statistics.median(ordered), at(0.8)


@contextlib.contextmanager
def pinned(device: str = "cpu") -> Iterator[int | None]:
    """One torch thread, no garbage collection, and for "cpu" one core; all is put back afterwards. Yields the core."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    cores = os.sched_getaffinity(0) if device == "cpu" and hasattr(os, "sched_getaffinity") else None
    core = max(cores) if cores else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {core})
    gc.collect()
    gc.disable()
    try:
        yield core
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, which convolutions use on a GPU by default: float32 is compared with float32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """SPARSELOTTERY_BACKEND=name within the block; None: the package chooses by measurement."""
    before = os.environ.pop("SPARSELOTTERY_BACKEND", None)
    if name is not None:
        os.environ["SPARSELOTTERY_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("SPARSELOTTERY_BACKEND", None)
        if before is not None:
            os.environ["SPARSELOTTERY_BACKEND"] = before


def sample(run: Callable[[int], object], loops: int, first: int, device: str) -> float:
    """Seconds for one of `loops` calls run(first), run(first + 1), ..."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(first, first + loops):
            run(i)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / loops
    begin = time.perf_counter()
    for i in range(first, first + loops):
        run(i)
    return (time.perf_counter() - begin) / loops


def interleave(
    runs: dict[str, tuple[Callable[[int], object], str | None]], *, device: str = "cpu", seconds: float = 1.0
) -> dict[str, Times]:
    """Times every candidate in turn, round after round, so that a disturbance of the machine meets all alike.

    Args:
        runs: name -> (function of a counter that picks the input set, backend to force or None).
        device: "cpu" or "cuda".
        seconds: about how long all rounds together may take; there are at least MIN_ROUNDS. On a GPU, whose time is
            scarce, a candidate of which a single call takes longer than that keeps the two calls that showed it.
    """
    loops, samples, names, spent = {}, {name: [] for name in runs}, [], 0.0
    for name, (run, forced) in runs.items():
        with backend(forced):
            sample(run, 1, 0, device)  # compiles, measures for dispatch, fills caches
            first = [sample(run, 1, i, device) for i in (1, 2)]
        once = max(min(first), 1e-7)
        loops[name] = max(1, round(SAMPLE[device] / once))
        if device == "cuda" and once > seconds:
            samples[name] = [taken * 1e6 for taken in first]
            continue
        names.append(name)
        spent += once * (loops[name] + (device == "cpu"))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / spent))) if names else 0
    for turn in range(rounds):
        start = turn % len(names)  # nobody always runs after the same neighbour's leftovers in the caches
        for name in names[start:] + names[:start]:
            run, forced = runs[name]
            with backend(forced):
                if device == "cpu":  # the caches are the last one's: what is timed is the loop that a user runs
                    sample(run, 1, turn * loops[name], device)
                samples[name].append(sample(run, loops[name], turn * loops[name], device) * 1e6)
    return {name: Times(*percentiles(taken), len(taken), loops[name]) for name, taken in samples.items()}


def ceilings(device: str = "cpu") -> dict[str, float]:
    """What this machine does at best, measured now: bytes (read + written) and matmul operations per second.

    float32 is the library's product with TF32 off: what bf16x6 does of it on a GPU's tensor cores may go beyond.
    """
    half = torch.bfloat16 if device == "cuda" else torch.float32
    count, side = (2**28, 8192) if device == "cuda" else (2**24, 1024)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device)
    b = a.to(half)
    times = interleave(
        {
            "copy": (lambda i: target.copy_(source), None),
            "float32": (lambda i: a @ a, None),
            "half": (lambda i: b @ b, None),
        },
        device=device,
        seconds=1.0,
    )
    half_rate = 2 * side**3 / times["half"].p50 * 1e6
    return {
        "bytes": 2 * 4 * count / times["copy"].p50 * 1e6,
        "float32": 2 * side**3 / times["float32"].p50 * 1e6,
        "bfloat16": half_rate,
        "float16": half_rate,
    }
