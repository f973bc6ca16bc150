"""The command line: results as JSON, errors in one line, the same run again, and what the README promises."""

import json
import os
import re
import subprocess
import sys

import pytest

from sparselottery import cli

TINY = ["--rounds", "2", "--seeds", "2", "--budget", "40it", "--evaluate-every", "20", "--workers", "1"]


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The JSON object and folder of a small finished run."""
    out = tmp_path_factory.mktemp("runs")
    process = subprocess.run(
        [sys.executable, "-m", "sparselottery", "imp", *TINY, "--out", out, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1]), out, process


def test_imp_gives_the_promised_json(finished):
    result, out, process = finished
    assert process.stdout.count("\n") == 1, "with --json nothing else goes to standard output"
    assert result["run"].startswith(str(out)) and os.path.exists(result["ticket"]) and os.path.exists(result["report"])
    assert len(result["levels"]) == 3
    densities = [level["density"] for level in result["levels"]]
    assert densities[0] == 1 and densities == sorted(densities, reverse=True)
    assert set(result["levels"][0]) >= {"density", "ticket"} and "reinit" not in result["levels"][0]
    for level in result["levels"][1:]:
        for kind in ("ticket", "reinit", "random-mask"):
            for figure in ("test_accuracy", "early_stop_iteration", "validation_loss"):
                found = level[kind][figure]
                assert len(found["values"]) == 2 and found["ci95"] >= 0
                assert found["mean"] == pytest.approx(sum(found["values"]) / 2)
    if result["speed"] is not None:
        assert result["speed"]["train_step"] > 0 and result["speed"]["inference"] > 0


def test_the_same_command_resumes_and_gives_the_same(finished, capsys):
    result, out, _ = finished
    status, text, progress = run(capsys, "imp", *TINY, "--out", out, "--json", "--no-speed", "--no-report")
    again = json.loads(text.splitlines()[-1])
    assert status == 0 and "14 of them done before" in progress
    assert again["levels"] == result["levels"] and again["ticket"] == result["ticket"]


def test_replicas_train_the_same_networks_at_once(finished, tmp_path, capsys):
    result, _, _ = finished
    options = [*TINY[: TINY.index("--workers")], "--replicas", "4", "--no-speed", "--no-report"]
    status, text, _ = run(capsys, "imp", *options, "--out", tmp_path, "--json")
    together = json.loads(text.splitlines()[-1])
    assert status == 0 and "replicas" in (tmp_path / os.path.basename(together["run"]) / "config.json").read_text()
    for ours, theirs in zip(together["levels"], result["levels"], strict=True):
        for kind in ("ticket", "reinit"):
            if kind in theirs:
                losses = [level[kind]["validation_loss"]["values"] for level in (ours, theirs)]
                assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_table_is_for_people(finished, capsys):
    _, out, _ = finished
    status, text, _ = run(capsys, "imp", *TINY, "--out", out, "--no-speed", "--no-report")
    assert status == 0
    for words in ("density %", "random reinit: test acc. %", "random mask: early stop", "100.0", "ticket: ", "±"):
        assert words in text


def test_one_shot(tmp_path, capsys):
    options = ["--densities", "0.5,0.1", "--seeds", "1", "--budget", "20it", "--controls", "shuffle", "--workers", "1"]
    status, text, _ = run(capsys, "one-shot", *options, "--out", tmp_path, "--json", "--no-speed")
    result = json.loads(text.splitlines()[-1])
    assert status == 0
    assert [round(level["density"], 3) for level in result["levels"]] == [1, 0.5, 0.1]
    assert all("shuffle" in level and "reinit" not in level for level in result["levels"][1:])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["imp", "--rate", "1.5"], "rate"),
        (["imp", "--rounds", "-1"], "rounds"),
        (["imp", "--budget", "soon"], 'budget: expected iterations or a string such as "500it" or "2ep", got \'soon\''),
        (["imp", "--split-seed", str(10**30)], "split_seed: expected a seed from 0 to 2**64 - 1"),
        (["imp", "--split-seed", "-1"], "split_seed: expected a seed from 0 to 2**64 - 1"),
        (["imp", "--seeds", str(10**12)], "seeds: expected 1 to 10000 trials"),
        (["imp", "--data", "mnist"], "mnist"),
        (["imp", "--data", "mnist", "--data-root", "/nonexistent"], "/nonexistent"),
        (["imp", "--rewind", "3 weeks"], "rewind"),
        (["imp", "--controls", "placebo"], "placebo"),
        (["imp", "--out", "/dev/null/x"], "out"),
        (["one-shot", "--densities", "0"], "density"),
        (["one-shot", "--densities", "much"], "densities"),
        (["report", "/nonexistent/run"], "/nonexistent/run"),
        (["bench", "sorcery"], "sorcery"),
        (["reproduce", "lenet", "--scale", "smoke"], "data"),
        (["reproduce", "mona-lisa"], "mona-lisa"),
        (["imp", "--workers", "0"], "workers"),
        (["imp", "--replicas", "0"], "replicas"),
        (["imp", "--replicas", "2", "--workers", "2"], "replicas: expected 1 with 2 workers"),
        (["imp", "--replicas", "2", "--model", "conv-2", "--dropout", "0.5"], "replicas: "),
        (["imp", "--lr", "nan"], "lr"),
        (["imp", "--scope", "global", "--output-factor", "0.3"], "output_factor"),
        (["imp", "--scope", "global", "--conv-factor", "0.5"], "conv_factor"),
        (["imp", "--control-levels", "1,x"], "--control-levels: invalid list of int value: '1,x'"),
        (["one-shot", "--densities", "0.5,inf"], "densities"),
        (["imp", "--controls", "reinit,reinit"], "controls"),
        (["frobnicate"], "frobnicate"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELOTTERY_DATA", raising=False)  # a data root by default
    try:
        status = cli.main(argv)
    except SystemExit as stop:  # argparse's own way
        status = stop.code
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line]
    assert status == 2, captured.err
    assert len(error) == 1 and "error:" in error[0] and says in error[0], captured.err
    assert captured.out == ""


def test_interruption_is_told_and_has_its_status(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselottery.experiments.runs.run_imp", interrupt)
    status, _, error = run(capsys, "imp")
    assert status == 130 and "resumes" in error and "Traceback" not in error


# Ctrl-C as it arrives while Python is busy with an import.
IMPORTING = """
import sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == "{}":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("module", ["torch", "sparselottery.tickets.imp", "sparselottery.experiments.hparams"])
@pytest.mark.parametrize("script", [False, True], ids=["-m", "script"])
def test_interruption_during_the_imports(module, script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(IMPORTING.format(module))
    (tmp_path / "sparselottery").write_text("import sys\nfrom sparselottery.cli import main\nsys.exit(main())\n")
    command = [tmp_path / "sparselottery"] if script else ["-m", "sparselottery"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command, "imp", "--help"], env=environment, cwd="/", capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "sparselottery: interrupted\n", "")
    other = subprocess.run(
        [sys.executable, "-c", "import sparselottery.experiments.hparams"],
        env=environment, cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert "KeyboardInterrupt" in other.stderr and other.returncode != 0


def test_a_mistake_seen_by_a_worker_is_one_line_too(tmp_path, capsys):
    status, text, error = run(capsys, "imp", *TINY, "--lr", "-1", "--workers", "2", "--out", tmp_path)
    lines = [line for line in error.splitlines() if not line.endswith("14 trainings")]
    assert status == 2 and text == "" and len(lines) == 1
    assert lines[0].startswith("sparselottery imp: error: lr: expected")


@pytest.mark.parametrize("command", ["env --json", "env", "--help", "imp --help"])
def test_a_reader_that_has_gone_is_no_error(command):
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "sparselottery", *command.split()]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == int("--help" not in command)
    assert "Traceback" not in done.stderr and "BrokenPipeError" not in done.stderr


def test_nobody_needs_to_read_the_progress(tmp_path):
    argv = ["imp", "--rounds", "1", "--seeds", "1", "--budget", "4it", "--controls", "", "--workers", "1", "--no-speed"]
    command = [sys.executable, "-m", "sparselottery", *argv, "--no-report", "--json", "--out"]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run([*command, tmp_path / "a"], stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    shell = ["sh", "-c", '"$@" 2>&-', "sh", *command, tmp_path / "b"]
    closed = subprocess.run(shell, stdout=subprocess.PIPE, text=True)
    for done in (gone, closed):
        assert done.returncode == 0 and done.stdout.count("\n") == 1
        assert len(json.loads(done.stdout)["levels"]) == 2


def test_every_command_has_help_with_examples(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert f"sparselottery {command}" in text.split("examples:")[1] and "--json" in text


def test_env(capsys):
    status, text, _ = run(capsys, "env", "--json")
    report = json.loads(text.splitlines()[-1])
    assert status == 0 and report["versions"]["sparselottery"]
    status, text, _ = run(capsys, "env")
    assert status == 0 and re.search(r"torch\s+\d", text)
