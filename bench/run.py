"""Runs cases and writes one CSV.

    python bench/run.py [topk linear conv step optim bitmask packed replicas resident] [--device cpu|cuda] [--full] [--repeats 2]
        [--out FILE]

On the CPU everything runs on one pinned thread. A row compares one backend of ours with one baseline, both timed in the
same interleaved rounds; `speedup` is empty where the parity gate is red. Rows are written case by case: whatever ends the
run, what was measured is there. What is to be learnt first (registry.FIRST) is measured and repeated before the rest.
"""

import argparse
import csv
import datetime
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparselottery import _ext
from sparselottery.bench import registry, report, timing, verify

COLUMNS = [
    *("op", "case", "direction", "dtype", "batch", "density", "backend", "baseline"),
    *("ours_us_p20", "ours_us", "ours_us_p80", "baseline_us_p20", "baseline_us", "baseline_us_p80", "speedup"),
    *("parity", "error", "roofline_us", "roofline_share", "peak_bytes", "peak_operations", "run", "rounds", "seed"),
    *("device", "threads", "core", "isa"),
    *("python", "torch", "triton", "cuda", "sparselottery", "date"),
]
SEED = 0


def device_name(device: str) -> str:
    """The processor or GPU that is measured."""
    return torch.cuda.get_device_name() if device == "cuda" else _ext.cpu_model()


def run(
    ops=(),
    *,
    device: str = "cpu",
    full: bool = False,
    seconds: float = 0.5,
    repeats: int = 1,
    limit: float | None = None,
    match: str = "",
    progress: Callable[[str], object] = lambda line: None,
    record: Callable[[list[dict]], object] = lambda rows: None,
) -> dict:
    """Times the cases of `ops` (all where empty).

    Args:
        device: "cpu" (one thread) or "cuda".
        full: the large cases too; without it the run takes under a minute on a CPU.
        seconds: about how long the rounds of one case may take.
        repeats: how often the whole is done, to show the spread.
        match: only cases whose name contains this.
        limit: no case is begun this many seconds after the start; those never run are told as failures.
        progress: called with a line of text after every case.
        record: called with the rows of every case as soon as there are any; once with none before the first.

    Returns:
        {"device", "versions", "ceilings", "rows", "failures"}; a row has op, case, density, backend, baseline, ours_us,
        baseline_us, speedup (None where parity is red), parity and the other COLUMNS; a failure is {"op", "case", "error"}.

    Raises:
        ValueError: an unknown op or device, no CUDA device for "cuda", or nothing to measure in `repeats` or `seconds`.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a time above 0, got {seconds}")
    cases = registry.select(ops, device=device, full=full, match=match)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a machine with a CUDA device for cuda, torch finds none")
    report = _ext.env_report()
    result = {"device": device_name(device), "versions": report["versions"], "rows": [], "failures": []}
    start = time.monotonic()
    with (
        timing.pinned(device) as core,
        timing.exact_float32(),
        torch.random.fork_rng(devices=[0] if device == "cuda" else []),
    ):
        result["ceilings"] = timing.ceilings(device)
        common = {
            "device": result["device"],
            "threads": torch.get_num_threads(),
            "core": core,
            "isa": report["cpu"]["isa"],
            "cuda": torch.version.cuda,
            "seed": SEED,
            "date": datetime.date.today().isoformat(),
        } | {name: report["versions"][name] for name in ("python", "torch", "triton", "sparselottery")}
        record([])
        planned = _plan(cases, repeats)
        for done, (repeat, case) in enumerate(planned):
            if limit is not None and time.monotonic() - start >= limit:
                reason = f"not run: the limit of {limit:g} s was reached"
                result["failures"] += [_failure(left, reason) for again, left in planned[done:] if again == 1]
                progress(f"{len(planned) - done} of {len(planned)} cases {reason}")
                break
            try:
                rows = run_case(case, seconds, result["ceilings"])
            except Exception as error:  # one broken kernel must not hide the figures of the others
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                result["failures"].append(_failure(case, text))
                progress(f"FAILED {case.op} {case.name} density {case.density:g}: {text}")
                continue
            finally:
                if device == "cuda":
                    torch.cuda.empty_cache()
            rows = [row | common | {"run": repeat} for row in rows]
            result["rows"] += rows
            record(rows)
            for row in rows:
                progress(line(row))
    return result


def _plan(cases, repeats):
    """[(repeat, case)]: what is to be learnt first (on a GPU) and its repeats, then the rest."""
    first = [case for case in cases if case.device == "cuda" and registry.urgency(case) < len(registry.FIRST)]
    rest = [case for case in cases if case not in first]
    return [(repeat, case) for part in (first, rest) for repeat in range(1, repeats + 1) for case in part]


def _failure(case, error: str) -> dict:
    return {"op": case.op, "case": case.name, "density": case.density, "error": error}


def run_case(case, seconds: float, ceilings: dict) -> list[dict]:
    """The rows of one case, every backend of ours against every baseline."""
    work = case.prepare(SEED)
    parities = verify.verify(work)
    runs = {name: (candidate.run, candidate.backend) for name, candidate in work.candidates.items()}
    times = timing.interleave(runs, device=case.device, seconds=seconds)
    peak = ceilings.get(case.dtype, ceilings["float32"])
    roofline = max(work.bytes / ceilings["bytes"], work.operations / peak) * 1e6
    rows = []
    for ours in (name for name, candidate in work.candidates.items() if candidate.ours):
        for baseline in (name for name, candidate in work.candidates.items() if not candidate.ours):
            checked = [parities[name] for name in (ours, baseline) if name in parities]
            parity = ours in parities and all(p.ok for p in checked)
            mine, theirs = times[ours], times[baseline]
            rows.append(
                {
                    "op": case.op,
                    "case": case.name,
                    "direction": case.direction,
                    "dtype": case.dtype,
                    "batch": case.batch,
                    "density": case.density,
                    "backend": ours,
                    "baseline": baseline,
                    "ours_us_p20": mine.p20,
                    "ours_us": mine.p50,
                    "ours_us_p80": mine.p80,
                    "baseline_us_p20": theirs.p20,
                    "baseline_us": theirs.p50,
                    "baseline_us_p80": theirs.p80,
                    "speedup": theirs.p50 / mine.p50 if parity else None,
                    "parity": parity,
                    "error": max((p.error for p in checked if math.isfinite(p.error)), default=None),
                    "roofline_us": roofline,
                    "roofline_share": roofline / mine.p50,
                    "peak_bytes": ceilings["bytes"],
                    "peak_operations": peak,
                    "rounds": mine.rounds,
                }
            )
    return rows


def line(row: dict) -> str:
    """One row as text for a terminal."""
    what = f"{row['op']} {row['case']} density {row['density']:g} {row['backend']}"
    if not row["parity"]:
        error = "of wrong shape or not finite" if row["error"] is None else f"error {row['error']:.2g}"
        return f"{what}: RED, results differ from the reference ({error})"
    return f"{what}: {row['ours_us']:.1f} us, {row['speedup']:.2f}x {row['baseline']} ({row['baseline_us']:.1f} us)"


class Rows:
    """A CSV that grows: `Rows(path)(rows)` appends rows of `run()`, all of one call in one write.

    Numbers have six significant digits; there is nothing where there is no value. The first call begins the file anew, unless
    rows are to be added to what it holds.
    """

    def __init__(self, path, append: bool = False):
        self.path = Path(path)
        self.begun = append and self.path.exists()

    def __call__(self, rows) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        if not self.begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.writeheader()
        writer.writerows({name: _cell(row[name]) for name in COLUMNS} for row in rows)
        with open(self.path, "ab" if self.begun else "wb", buffering=0) as file:
            file.write(text.getvalue().encode())
        self.begun = True


def _cell(value):
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def write_csv(result: dict, path) -> Path:
    """Writes the rows of `run()`."""
    Rows(path)(result["rows"])
    return Path(path)


def main(argv=None) -> int:
    """The command line; returns 0, 1 if a case is red or broken, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Times the package against what users have today.")
    parser.add_argument("op", nargs="*", metavar="OP", help=f"{', '.join(registry.OPS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--full", action="store_true", help="the large cases too")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the rounds of one case (default 0.5)")
    parser.add_argument("--repeats", type=int, default=1, help="do all of it so often, to show the spread")
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="only cases with this in their names, say 1024x1024"
    )
    parser.add_argument("--append", action="store_true", help="add rows to the CSV that is there")
    parser.add_argument("--out", metavar="FILE", help="the CSV (default: bench-DEVICE.csv)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    arguments = parser.parse_args(argv)

    def say(text):
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    options = {name: getattr(arguments, name) for name in ("device", "full", "seconds", "repeats", "limit", "match")}
    try:
        rows = Rows(arguments.out or f"bench-{arguments.device}.csv", arguments.append)
        result = run(arguments.op, **options, progress=say, record=rows)
    except (ValueError, OSError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    say(f"{result['device']}, {platform.platform()}: {rows.path}")
    say(f"worst cell of what the package chooses by itself: {report.worst(report.summarize(result['rows'])) or 'none'}")
    if arguments.json:
        print(json.dumps(result))
    return 1 if result["failures"] or not all(row["parity"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
