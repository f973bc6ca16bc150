"""Tables from a CSV of run.py.

    python bench/report.py FILE.csv [...]                 every case, one line each
    python bench/report.py FILE.csv [...] --readme        rewrites the table of README.md between its two markers

No speed-up is printed for a row whose parity check was red. Where a case was run several times the middle run is shown
and `spread` is the largest time over the smallest.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
DENSE = {
    "linear": ("dense",),
    "conv": ("dense", "dense channels_last"),
    "step": ("dense, Adam(fused)", "dense, Adam", "dense, Adam(fused), CUDA graph"),
    "optim": ("Adam(fused)", "Adam"),
    "topk": ("torch.topk",),
    "bitmask": ("float mask", "bool mask", "torch"),
    "packed": ("dense", "masked_scatter", "dense[mask]"),
    "replicas": ("dense, one by one",),
    "resident": ("dense",),
}


def read(path) -> list[dict]:
    """The rows of a CSV with numbers as numbers.

    Raises:
        ValueError: the file is no CSV of run.py.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"op", "case", "density", "backend", "baseline", "ours_us", "baseline_us", "speedup", "parity"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(f"{path}: expected a CSV written by bench/run.py")
    for row in rows:
        for name in ("density", "ours_us", "baseline_us", "roofline_share"):
            row[name] = float(row[name])
        row["speedup"] = float(row["speedup"]) if row["speedup"] else None
        row["parity"] = row["parity"] == "True"
    return rows


def summarize(rows: list[dict], backends=None) -> list[dict]:
    """One entry per (op, case, density, backend): our time, the spread, and the speed-up over each baseline.

    `speedups` is {baseline: ratio or None where red}; ratios and times are medians over the runs.
    """
    groups = {}
    for row in rows:
        if backends is None or row["backend"] in backends:
            groups.setdefault((row["op"], row["case"], row["density"], row["backend"]), []).append(row)
    entries = []
    for (op, case, density, name), members in groups.items():
        times = [row["ours_us"] for row in members]
        speedups = {}
        for baseline in dict.fromkeys(row["baseline"] for row in members):
            ratios = [row["speedup"] for row in members if row["baseline"] == baseline]
            speedups[baseline] = None if None in ratios else statistics.median(ratios)
        entries.append(
            {
                "op": op,
                "case": case,
                "density": density,
                "backend": name,
                "ours_us": statistics.median(times),
                "spread": max(times) / min(times),
                "roofline_share": statistics.median(row["roofline_share"] for row in members),
                "speedups": speedups,
                "parity": all(row["parity"] for row in members),
            }
        )
    return entries


def microseconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    for limit, unit, scale in ((1e3, "us", 1), (1e6, "ms", 1e3), (float("inf"), "s", 1e6)):
        if value < limit:
            return f"{value / scale:.3g} {unit}"
    raise ValueError(f"value: expected a time in microseconds, got {value}")


def ratio(value: float | None) -> str:
    return "RED" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def columns(entries) -> list[dict]:
    """The cells of the tables, as text."""
    cells = []
    for entry in entries:
        dense = [name for name in DENSE[entry["op"]] if name in entry["speedups"]]
        others = {name: ratio(value) for name, value in entry["speedups"].items() if name not in dense}
        # Against the fastest dense one: what a user would lose by not using it.
        against = {entry["speedups"][name]: f" ({name})" if len(DENSE[entry["op"]]) > 1 else "" for name in dense}
        best = None if None in against or not against else min(against)
        cells.append(
            {
                "op": entry["op"],
                "case": entry["case"],
                "density": f"{entry['density']:g}",
                "backend": entry["backend"],
                "time": microseconds(entry["ours_us"]),
                "spread": f"{entry['spread']:.2f}",
                "of roofline": f"{entry['roofline_share']:.0%}",
                "over dense": ratio(best) + against.get(best, ""),
                "over others": ", ".join(f"{v} {k}" for k, v in others.items()),
            }
        )
    return cells


def markdown(cells: list[dict], names) -> str:
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join(lines + [f"| {' | '.join(row[name] for name in names)} |" for row in cells])


def text(cells: list[dict], names) -> str:
    """The same for a terminal."""
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in names}
    rows = [{name: name for name in names}, *cells]
    return "\n".join("  ".join(f"{row[name]:<{widths[name]}}" for name in names).rstrip() for row in rows)


def machine(rows: list[dict]) -> str:
    """What was measured on what, in one line."""
    row = rows[0]
    threads = f" ({row['isa']}), {row['threads']} thread" if row["core"] else ""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "python", "sparselottery"))
    return f"{row['device']}{threads}; {versions}; {row['date']}"


def rewrite(path: Path, table: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the file lacks them.
    """
    before, found, rest = path.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{path}: expected the markers {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Tables from the CSV files of bench/run.py.")
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args(argv)
    try:
        if arguments.readme:
            names = ("op", "case", "density", "backend", "time", "over dense", "over others")
            tables = []
            for path in arguments.csv:
                rows = read(path)
                cells = columns(summarize(rows, backends=("auto", "Trainer")))
                tables.append(f"Measured on: {machine(rows)}.\n\n{markdown(cells, names)}")
            rewrite(Path(__file__).resolve().parents[1] / "README.md", "\n\n".join(tables))
            return 0
        for path in arguments.csv:
            rows = read(path)
            names = ("op", "case", "density", "backend", "time", "spread", "of roofline", "over dense", "over others")
            print(machine(rows))
            print((markdown if arguments.markdown else text)(columns(summarize(rows)), names))
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
