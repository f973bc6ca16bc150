"""Tables from a CSV of run.py.

    python bench/report.py FILE.csv [...]                 every case, one line each
    python bench/report.py --readme                       rewrites the tables of README.md, CPU and GPU, between their markers,
                                                          from results/cpu.csv and results/gpu.csv or from files named

Where there is no CSV of a GPU, README.md says that none was measured. No speed-up is printed for a row whose parity check
was red. Where a case was run several times the middle run is shown and `spread` is the largest time over the smallest.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

MARKERS = {part: (f"<!-- {part}:begin -->", f"<!-- {part}:end -->") for part in ("bench", "gpu")}
NO_GPU = """\
GPU: not yet measured. The kernels compile for sm_80 and sm_90 without spills and are executed in the tests (Triton's interpreter,
CUDA C++ on host threads); `bench/gpu.sh` is the command that measures them, `bench/report.py --readme` puts the table here."""
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


def worst(entries) -> str | None:
    """The case in which the package's own choice does worst against the fastest dense form; None where there is no such row."""
    found = []
    for entry in entries:
        if entry["backend"] != "auto" or entry["op"] not in ("linear", "conv", "step"):
            continue
        ratios = [entry["speedups"][name] for name in DENSE[entry["op"]] if name in entry["speedups"]]
        if ratios and None not in ratios:
            found.append((min(ratios), f"{entry['op']} {entry['case']} density {entry['density']:g}"))
    return "{1}: {0:.2f}x dense".format(*min(found)) if found else None


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


def on_gpu(rows: list[dict]) -> bool:
    """Whether these rows were measured on a GPU: only a CPU's are pinned to a core."""
    return not rows[0]["core"]


def readme_table(rows: list[dict], every: bool = True) -> str:
    """What README.md shows of one CSV: what a user gets, without the backends nobody asked for.

    `every=False` leaves out the cases of the full run on a GPU, of which there are too many to read.
    """
    from sparselottery.bench import registry

    quick = {(case.op, case.name, case.density) for case in registry.select(device="cuda")}
    shown = [row for row in rows if every or (row["op"], row["case"], row["density"]) in quick] or rows
    backends = {
        row["backend"] for row in shown if row["backend"] in ("auto", "Trainer") or row["backend"][:6] == "decode"
    }
    names = ("op", "case", "density", "backend", "time", "over dense", "over others")
    return f"Measured on: {machine(rows)}.\n\n{markdown(columns(summarize(shown, backends)), names)}"


def readme(csvs: list[Path], root: Path) -> None:
    """Rewrites both parts of `root`/README.md: from `csvs`, and from bench/results/ where they hold none of a part.

    Raises:
        ValueError: a file that is no CSV of run.py, or markers that README.md lacks; it is then left as it was.
    """
    parts = {"bench": [], "gpu": []}
    for path in csvs:
        rows = read(path)
        parts["gpu" if on_gpu(rows) else "bench"].append(rows)
    for part, name in (("bench", "cpu.csv"), ("gpu", "gpu.csv")):
        path = root / "bench" / "results" / name
        if not parts[part] and path.exists():
            parts[part].append(read(path))
    if not parts["bench"]:
        raise ValueError(f"csv: expected a CSV measured on a CPU, here or as {root / 'bench' / 'results' / 'cpu.csv'}")
    tables = {
        "bench": "\n\n".join(readme_table(rows) for rows in parts["bench"]),
        "gpu": "\n\n".join(readme_table(rows, every=False) for rows in parts["gpu"]) or NO_GPU,
    }
    path = root / "README.md"
    content = path.read_text()
    for part, table in tables.items():
        content = rewritten(content, MARKERS[part], table, path)
    path.write_text(content)


def rewritten(content: str, markers: tuple[str, str], table: str, path: Path) -> str:
    """`content` with `table` between the markers.

    Raises:
        ValueError: it lacks them; `path` is for this message.
    """
    begin, end = markers
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: expected the markers {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Tables from the CSV files of bench/run.py.")
    parser.add_argument("csv", nargs="*", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args(argv)
    if not arguments.csv and not arguments.readme:
        parser.error("expected a CSV of bench/run.py")
    try:
        if arguments.readme:
            readme(arguments.csv, Path(__file__).resolve().parents[1])
            return 0
        for path in arguments.csv:
            rows = read(path)
            names = ("op", "case", "density", "backend", "time", "spread", "of roofline", "over dense", "over others")
            print(machine(rows))
            print((markdown if arguments.markdown else text)(columns(summarize(rows)), names))
            print(f"worst cell of what the package chooses by itself: {worst(summarize(rows)) or 'none'}")
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
