"""The benchmark's own machinery: parity gate, registry, CSV, tables. Speeds are not tested."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparselottery.bench import memory, registry, report, run, setups, setups_layers, setups_masks, timing, verify

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("got", "want", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], True),
        ([1.0, 2.0], [1.0, 2.001], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, INF], [1.0, 2.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1e-3, 0.0], [0.0, 0.0], False),
        ([], [], True),
    ],
)
def test_compare(got, want, ok):
    assert verify.compare([torch.tensor(got)], [torch.tensor(want, dtype=torch.float64)], 1e-5).ok is ok


def test_compare_wants_the_same_shapes_and_counts():
    one = torch.ones(3)
    assert not verify.compare([one], [one, one], 1.0).ok
    assert not verify.compare([one], [torch.ones(1, 3)], 1.0).ok
    assert not verify.compare([one.bool()], [torch.tensor([True, True, False])], 1.0).ok


def exact(values, kept, threshold, keep):
    return setups_masks.is_exact_topk(
        [torch.tensor(v) for v in values], [torch.tensor(k) for k in kept], threshold, keep
    )


def test_proof_of_an_exact_selection():
    values = [[3.0, -1.0, 1.0], [1.0, -2.0]]
    T, F = True, False
    assert exact(values, [[T, T, F], [F, T]], 1.0, 3).all()
    assert not exact(values, [[T, F, T], [F, T]], 1.0, 3).all()  # a tie went to the higher index
    assert not exact(values, [[T, F, F], [T, T]], 1.0, 3).all()  # ... to a later tensor
    assert not exact(values, [[T, T, F], [F, F]], 1.0, 2).all()  # a larger weight was dropped
    assert not exact(values, [[T, T, F], [F, T]], 2.0, 3).all()  # the threshold is not that of the survivors
    assert not exact(values, [[T, F, F], [F, T]], 1.0, 2).all()  # nothing survives at the threshold
    assert exact(values, [[F, F, F], [F, F]], INF, 0).all()
    assert exact(values, [[T, T, T], [T, T]], 1.0, 5).all()


def test_registry_selects_by_op_device_and_length():
    assert {case.op for case in registry.select()} == set(registry.OPS) == set(setups.SETUPS)
    assert {case.op for case in registry.select(device="cuda")} == set(registry.OPS) - set(registry.CPU_ONLY)
    quick, full = registry.select(["topk"]), registry.select(["topk"], full=True)
    assert set(quick) < set(full) and {case.op for case in full} == {"topk"}
    for device in ("cpu", "cuda"):
        names = [(c.op, c.name, c.density) for c in registry.select(device=device, full=True)]
        assert len(names) == len(set(names)), "two cases share a name"
    with pytest.raises(ValueError, match=r"op: expected one of topk, linear.*got 'lineer'"):
        registry.select(["lineer"])
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got 'tpu'"):
        registry.select(device="tpu")


SMALL = registry.small_cases()


@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c.op} {c.name}")
def test_every_kind_of_case_passes_its_parity_gate(case):
    work = case.prepare()
    parities = verify.verify(work)
    assert "auto" in parities and all(p.ok for p in parities.values()), parities
    assert any(not c.ours for c in work.candidates.values())
    assert work.bytes > 0


def test_decode_kernels_are_candidates_where_they_run(monkeypatch):
    """As on a GPU, with the product of the unpacked weight in place of the kernel."""
    from torch.nn import functional as F

    from sparselottery.ops import decode_linear

    cases = [case for case in SMALL if case.op == "linear" and case.dtype != "float32"]
    monkeypatch.setattr(decode_linear, "why_dense", lambda *_: None)
    candidates = decode_linear.candidates
    monkeypatch.setattr(decode_linear, "candidates", lambda *arguments: candidates(*arguments[:4], "cuda"))

    def dense(x, starts, codes, values, bias, *shape):
        return F.linear(x, decode_linear._unpack(starts, codes, values, *shape), bias)

    monkeypatch.setattr(decode_linear, "_cuda", dense)
    for case, names in zip(cases, ({"gap4", "gap8"}, {"gap4", "gap8", "tiles"}), strict=True):
        work = case.prepare()
        assert {name for name in work.candidates if name.startswith("decode")} == {f"decode {n}" for n in names}
        parities = verify.verify(work)
        assert all(p.ok for p in parities.values()), parities
        assert all(f"decode {n}" in parities and work.candidates[f"decode {n}"].ours for n in names)


def test_packed_forms_are_candidates_on_a_cpu():
    """Forward, small batches, float32 and bfloat16; test_every_kind_of_case_passes_its_parity_gate compares them."""
    for case in SMALL:
        if case.op == "linear" and not case.structure:
            takes = case.direction == "forward" and case.batch <= 8 and case.dtype != "float16"
            expected = {"decode slots", "decode windows", "decode bitmask"} if takes else set()
            work = case.prepare()
            assert {name for name in work.candidates if name.startswith("decode")} == expected
            assert all(work.candidates[name].ours for name in expected)


def test_same_seed_same_inputs():
    first, second, third = (SMALL[1].prepare(seed).expected() for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(first[0], third[0])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(registry, "cpu_cases", lambda: [SMALL[2], registry.Case("bitmask", ("count", 8, 32), 0.3)])
    monkeypatch.setattr(timing, "ceilings", lambda device: {"bytes": 1e10, "float32": 1e11})


def test_run_gives_the_rows_that_scripts_rely_on(small, tmp_path):
    lines = []
    result = json.loads(json.dumps(run.run(full=True, seconds=0.01, repeats=2, progress=lines.append)))
    assert {"device", "versions", "rows", "failures"} <= result.keys() and result["failures"] == []
    for row in result["rows"]:
        assert set(row) == set(run.COLUMNS)
        assert row["parity"] is True and row["speedup"] == pytest.approx(row["baseline_us"] / row["ours_us"])
    assert {row["run"] for row in result["rows"]} == {1, 2} and len(lines) == len(result["rows"])
    path = run.write_csv(result, tmp_path / "new" / "x.csv")
    rows = report.read(path)
    assert len(rows) == len(result["rows"]) and rows[0]["speedup"] == pytest.approx(
        result["rows"][0]["speedup"], rel=1e-4
    )


def test_a_result_that_is_not_finite_is_red_and_still_json(small, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "compare", lambda *_: verify.Parity(False, INF))
    lines = []
    result = run.run(["linear"], full=True, seconds=0.01, progress=lines.append)
    json.dumps(result, allow_nan=False)
    assert result["rows"] and all("RED" in line and "not finite" in line for line in lines)
    assert not any(row["parity"] for row in report.read(run.write_csv(result, tmp_path / "red.csv")))


@pytest.mark.parametrize("option", [["--repeats", "0"], ["--seconds", "nan"], ["--seconds", "0"], ["--device", "tpu"]])
def test_a_run_that_would_measure_nothing_is_a_mistake(option, capsys):
    assert run.main(["linear", *option]) == 2
    assert capsys.readouterr().err.startswith(f"bench: error: {option[0][2:]}: expected")


def test_a_csv_that_cannot_be_written_is_told_in_one_line(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(["linear", "--full", "--seconds", "0.01", "--out", str(tmp_path / "file" / "x.csv")]) == 2
    assert "file" in capsys.readouterr().err


def test_no_speedup_is_told_for_a_red_case(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setups_layers, "TOLERANCE", dict.fromkeys(setups_layers.TOLERANCE, -1.0))
    result = run.run(["linear"], full=True, seconds=0.01, progress=print)
    assert result["rows"] and all(row["speedup"] is None and row["parity"] is False for row in result["rows"])
    said = capsys.readouterr().out
    assert "RED" in said and "x dense" not in said
    path = run.write_csv(result, tmp_path / "red.csv")
    assert report.main([str(path)]) == 0
    assert "RED" in capsys.readouterr().out
    assert run.main(["linear", "--full", "--seconds", "0.01", "--out", str(path)]) == 1


def test_a_broken_case_is_told_and_the_others_go_on(small, monkeypatch, tmp_path):
    def broken(case, seed):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setitem(setups.SETUPS, "linear", broken)
    result = run.run(full=True, seconds=0.01)
    assert [f["error"] for f in result["failures"]] == ["RuntimeError: no such kernel"]
    assert {row["op"] for row in result["rows"]} == {"bitmask"}
    assert run.main(["linear", "--full", "--out", str(tmp_path / "x.csv")]) == 1


@pytest.mark.parametrize("arguments", [["lineer"], ["--device", "tpu"]])
def test_a_users_mistake_is_one_line_and_status_2(arguments, capsys):
    assert run.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("bench: error: ") and "\n" not in said


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected a machine with a CUDA device"):
        run.run(["topk"], device="cuda")


def test_cases_by_a_part_of_their_name():
    everything, chosen = registry.select(full=True), registry.select(["linear"], full=True, match="1024x1024 batch 16 ")
    assert chosen and set(chosen) < set(everything)
    assert {(case.sizes, case.batch, case.op) for case in chosen} == {((1024, 1024), 16, "linear")}
    assert registry.select(match="no such case") == []


def test_rows_are_added_to_a_csv(small, tmp_path, capsys):
    path = tmp_path / "x.csv"
    for options, runs in ((["--append"], 1), (["--append"], 2), ([], 1)):
        assert run.main(["bitmask", "--full", "--seconds", "0.01", "--out", str(path), *options]) == 0
        assert len({row["case"] for row in report.read(path)}) == 1
        assert len([row for row in report.read(path) if row["baseline"] == "bool mask"]) == runs
        assert "worst cell of what the package chooses by itself: none" in capsys.readouterr().out


def test_the_worst_cell_is_over_the_fastest_dense_form():
    def entry(case, backend, **speedups):
        return {"op": "conv", "case": case, "density": 0.5, "backend": backend, "speedups": speedups}

    entries = [
        entry("a", "auto", **{"dense": 1.2, "dense channels_last": 0.9, "prune-style": 0.1}),
        entry("b", "auto", **{"dense": 0.95, "dense channels_last": 2.0}),
        entry("c", "cpu", dense=0.5),
        entry("d", "auto", dense=None),
    ]
    assert report.worst(entries) == "conv a density 0.5: 0.90x dense"
    assert report.worst(entries[2:]) is None


def rows_for_report():
    common = dict.fromkeys(run.COLUMNS, "")
    common |= {"device": "Machine", "isa": "avx2", "threads": 1, "core": 1, "torch": "2.13", "python": "3.11"}
    common |= {"op": "linear", "case": "4x4 batch 2 forward", "density": 0.1, "roofline_share": 0.5, "parity": True}
    for attempt, ours in ((1, 10.0), (2, 12.0), (3, 11.0)):
        for baseline, theirs in (("dense", 22.0), ("prune-style", 1100.0)):
            for name in ("auto", "cpu"):
                row = {"backend": name, "baseline": baseline, "ours_us": ours, "baseline_us": theirs, "run": attempt}
                yield common | row | {"speedup": theirs / ours}


def test_report_tables(tmp_path, capsys):
    path = run.write_csv({"rows": list(rows_for_report())}, tmp_path / "x.csv")
    (entry,) = report.summarize(report.read(path), backends=("auto",))
    assert entry["ours_us"] == 11.0 and entry["spread"] == pytest.approx(1.2)
    assert entry["speedups"]["dense"] == pytest.approx(2.0, rel=1e-5)
    assert report.main([str(path)]) == 0
    assert "2.00x" in capsys.readouterr().out


MARKED = (
    "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbetween\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n"
)


@pytest.fixture
def source_tree(tmp_path, monkeypatch):
    """A folder that report.py takes for the source tree, and the CSV of a CPU."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "bench" / "report.py"))
    (tmp_path / "README.md").write_text(MARKED)
    return tmp_path, run.write_csv({"rows": list(rows_for_report())}, tmp_path / "x.csv")


def parts_of_readme(tree):
    text = (tree / "README.md").read_text()
    assert text.startswith("before\n") and "\nbetween\n" in text and text.endswith("\nafter\n") and "old" not in text
    assert [text.count(marker) for pair in report.MARKERS.values() for marker in pair] == [1] * 4
    return text.split("\nbetween\n")


def test_readme_says_that_no_gpu_was_measured(source_tree):
    tree, path = source_tree
    for _ in range(2):  # a second time changes nothing
        assert report.main([str(path), "--readme"]) == 0
        cpu, gpu = parts_of_readme(tree)
        assert "| linear | 4x4 batch 2 forward | 0.1 | auto | 11 us | 2.00x | 100x prune-style |" in cpu
        assert cpu.count("Machine (avx2), 1 thread") == 1
        assert "GPU: not yet measured." in gpu and "|" not in gpu


def test_readme_shows_what_the_gpu_script_measured(source_tree):
    """A GPU's CSV goes into the part for GPUs, whether it is named or lies in bench/results/; of it the short run's cases."""
    tree, path = source_tree
    quick = next(case for case in registry.select(device="cuda") if case.op == "linear" and case.batch == 1)
    known = {"case": quick.name, "density": quick.density}
    rows = []
    for row in rows_for_report():
        row |= {"device": "NVIDIA GPU", "core": None}
        rows += [row, row | known, row | known | {"backend": "decode gap8"}]
    csv_path = run.write_csv({"rows": rows}, tree / "bench" / "results" / "gpu.csv")
    assert report.main([str(path), "--readme"]) == 0
    cpu, gpu = parts_of_readme(tree)
    assert "Measured on: NVIDIA GPU; torch 2.13" in gpu and "NVIDIA" not in cpu and "not yet measured" not in gpu
    for backend in ("auto", "decode gap8"):
        assert f"| linear | {quick.name} | {quick.density:g} | {backend} | 11 us | 2.00x | 100x prune-style |" in gpu
    assert "4x4" not in gpu and "| cpu |" not in gpu
    csv_path.rename(tree / "elsewhere.csv")
    assert report.main([str(path), str(tree / "elsewhere.csv"), "--readme"]) == 0
    assert parts_of_readme(tree) == [cpu, gpu]
    path.rename(tree / "bench" / "results" / "cpu.csv")
    assert report.main([str(tree / "elsewhere.csv"), "--readme"]) == 0
    assert parts_of_readme(tree) == [cpu, gpu]


@pytest.mark.parametrize("part", ["bench", "gpu"])
def test_a_readme_without_markers_stays_as_it_is(source_tree, part, capsys):
    tree, path = source_tree
    left = MARKED.replace(f"<!-- {part}:end -->", "")
    (tree / "README.md").write_text(left)
    assert report.main([str(path), "--readme"]) == 2
    assert (tree / "README.md").read_text() == left and f"{part}:end" in capsys.readouterr().err


def test_readme_needs_a_cpu_csv(source_tree, capsys):
    tree, _ = source_tree
    assert report.main(["--readme"]) == 2 and "cpu.csv" in capsys.readouterr().err
    assert (tree / "README.md").read_text() == MARKED


def test_report_refuses_other_files(tmp_path):
    other = tmp_path / "other.csv"
    with open(other, "w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], [1, 2]])
    assert report.main([str(other)]) == 2 and report.main([str(tmp_path / "missing.csv")]) == 2


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5 us"), (999, "999 us"), (1500, "1.5 ms"), (2.5e6, "2.5 s")])
def test_microseconds(value, text):
    assert report.microseconds(value) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_script_without_a_gpu_is_one_line_and_status_2(tmp_path):
    script = Path(run.__file__).resolve().parent / "gpu.sh"
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert len(done.stderr.strip().splitlines()) == 1 and "nothing was measured" in done.stderr


def test_a_limit_stops_before_the_next_case_and_says_so(small):
    lines = []
    result = run.run(full=True, seconds=0.01, repeats=2, limit=0, progress=lines.append)
    assert result["rows"] == [] and "4 of 4 cases not run" in lines[-1]
    assert [f["error"] for f in result["failures"]] == ["not run: the limit of 0 s was reached"] * 2, "each case once"


def test_what_was_measured_survives_a_run_that_is_killed(small, monkeypatch, tmp_path):
    """Rows are in the file before the next case begins; an older file is gone from the start."""
    path = tmp_path / "rows.csv"
    path.write_text("of another run\n")
    seen = []

    def dies(case, seed):
        seen.append(report.read(path))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setitem(setups.SETUPS, "bitmask", dies)
    child = os.fork()
    if child == 0:
        run.main(["--full", "--seconds", "0.01", "--out", str(path)])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    rows = report.read(path)
    assert {row["op"] for row in rows} == {"linear"} and all(row["roofline_share"] > 0 for row in rows)


def test_the_gpus_cases_come_in_the_order_of_what_is_to_be_learnt():
    cases = registry.cuda_cases()
    places = [registry.urgency(case) for case in cases]
    assert places == sorted(places) and set(range(len(registry.FIRST))) <= set(places), "each of FIRST has a case"
    planned = run._plan(cases, 2)
    assert len(planned) == 2 * len(cases) and len(set(planned)) == len(planned)
    first = sum(place < len(registry.FIRST) for place in places)
    assert [repeat for repeat, _ in planned[: 2 * first]] == [1] * first + [2] * first
    assert planned[0][1].op == "topk" and planned[2 * first][0] == 1


def test_slow_candidates_of_a_gpu_are_not_called_again(monkeypatch):
    """One that takes longer than all rounds may keeps its two samples; the others have their rounds."""
    calls = {"slow": 0, "fast": 0}

    def pretend(call, loops, first, device):
        call(first)
        return 3.0 if call is slow else 1e-2

    def slow(i):
        calls["slow"] += 1

    def fast(i):
        calls["fast"] += 1

    monkeypatch.setattr(timing, "sample", pretend)
    times = timing.interleave({"slow": (slow, None), "fast": (fast, None)}, device="cuda", seconds=0.3)
    assert calls["slow"] == 3 and times["slow"].rounds == 2 and times["slow"].p50 == 3e6
    assert times["fast"].rounds == 30 and calls["fast"] == 33


PRETENDED_PYTHON = """#!/bin/bash
# Stands for a Python with torch and a GPU: every command of gpu.sh ends at once, or never where MODE=hangs.
hang() { [ "$MODE" != hangs ] || { trap '' TERM; while :; do sleep 0.05; done; }; }
case "$*" in
  *get_device_capability*) echo 90 ;;
  *run.py*)
    while [ "$1" != --limit ]; do shift; done
    echo "limit,$2" >"$4"
    for i in 1 2 3; do echo "row,$i" >>"$4"; done
    hang ;;
  *pytest*) echo "$4 $5 $6 $7"; hang ;;
  *"-m pip"*) hang; [ "$MODE" != "no pip" ] || { echo "No module named pip"; exit 1; } ;;
  "setup.py build_ext"*) ls; hang ;;
  *) echo done; hang ;;
esac
"""


@pytest.mark.parametrize("mode", ["hangs", "works", "no pip"])
def test_gpu_script_shares_its_time_out(mode, tmp_path):
    """With every stage over its limit, deaf to SIGTERM, the benchmark still has its 150 of 480 seconds and its rows."""
    tools, out, budget = tmp_path / "tools", tmp_path / "out", 12
    tools.mkdir()
    for name in ("python", "compute-sanitizer"):
        (tools / name).write_text(PRETENDED_PYTHON)
        (tools / name).chmod(0o755)
    env = {**os.environ, "PYTHON": str(tools / "python"), "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out)}
    env |= {"MODE": mode, "BUDGET": str(budget)}
    script = Path(run.__file__).resolve().parent / "gpu.sh"
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=10 * budget)
    stages = [line.split()[0] for line in done.stdout.splitlines() if " exit " in line]
    assert stages == ["build", "env", "tests", "bench", "sanitizer", "table"], done.stdout + done.stderr
    names = sorted(path.name for path in out.iterdir())
    texts = [f"gpu-{name}.txt" for name in ("bench", "build", "env", "sanitizer", "table", "tests")]
    assert names == [*texts, "gpu.csv"] and len(names) <= 8
    limit, *rows = (out / "gpu.csv").read_text().split()
    assert rows == ["row,1", "row,2", "row,3"]
    share = float(limit.split(",")[1]) / 0.9 / budget * 480
    built = (out / "gpu-build.txt").read_text()
    assert ("once more, without pip\ncsrc\nsetup.py\n" in built) is (mode == "no pip"), built
    if mode != "hangs":
        assert done.returncode == 0 and done.stdout.endswith("all green\n")
        assert 150 < share < 480 - 88
    else:
        assert done.returncode == 1 and done.stdout.count("RED: ") == 6 and "bench (over " in done.stdout
        assert 100 < share < 480 - 88 - 220, "a loaded machine takes some of it"
        assert "without the extension" in built
        sanitizer = (out / "gpu-sanitizer.txt").read_text()
        assert "=== memcheck" in sanitizer and "=== racecheck" in sanitizer, "the first one leaves the second its half"
    parts = (out / "gpu-tests.txt").read_text().count("=== part")
    assert parts == max(1, min(8, (os.cpu_count() or 1) // 2))


def test_memory_is_what_was_predicted(capsys):
    """Bytes are exact: packed Adam at 90 % keeps 1.725 a dense weight, up to the rounding of the count of survivors."""
    row = memory.measure("packed", 0.9, size=128)
    assert row["total"] == pytest.approx(4 * 4 * 0.1 + 1 / 8, abs=1e-3) and row["total"] < 2
    for form in ("dense", "masked", "packed"):
        for optimizer in ("adam", "sgd"):
            row = memory.measure(form, 0.75, optimizer, size=128)
            assert row["total"] == row["predicted"]
    assert memory.main(["--sparsity", "0.9", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["form"] for r in rows] == ["dense", "masked", "packed"] and rows[2]["total"] < 1.73
    with pytest.raises(SystemExit):
        memory.main(["--sparsity", "1.5"])
