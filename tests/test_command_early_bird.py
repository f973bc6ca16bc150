"""`sparselottery early-bird`: its JSON, its files, that it resumes, and its mistakes in one line."""

import json
from pathlib import Path

import pytest

from sparselottery import cli
from sparselottery.tickets.store import Store
from sparselottery.tickets.ticket import Ticket

TINY = [
    "early-bird",
    "--budget",
    "3ep",
    "--milestones",
    "",
    "--window",
    "2",
    "--threshold",
    "0.5",
    "--evaluate-every",
    "17",
]


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_run_from_the_command_line(capsys, tmp_path):
    arguments = [*TINY, "--seeds", "2", "--workers", "2", "--out", tmp_path, "--json"]
    status, out, err = run(capsys, *arguments)
    assert status == 0 and out.count("\n") == 1
    shown = json.loads(out)
    folder = Path(shown["run"])
    assert folder.parent == tmp_path and shown["ticket"] == str(folder / "tickets" / "seed0-level01.safetensors")
    assert set(Ticket.load(shown["ticket"]).masks) == {"bn1", "bn2", "bn3", "bn4"}
    assert shown["epochs"] == 3 and shown["drawn_epoch"] in (2, 3, None) and len(shown["distances"]) == 3
    assert len(shown["test_accuracy"]["values"]) == 2 and shown["cost"]["early-bird"]["seconds"]["mean"] > 0
    assert (
        shown["cost"]["dense"]["joules"] is None and "several trainings at once" in shown["cost"]["energy"]["why_not"]
    )
    assert "of 3 epochs" in err or "within 3 epochs" in err
    assert (folder / "early-bird-distances.png").read_bytes().startswith(b"\x89PNG")
    rows = (folder / "early-bird-distances.csv").read_text().splitlines()
    assert len(rows) == 4 and [float(v) for v in rows[1].split(",")[1:]] == pytest.approx(shown["distances"][0])
    page = Path(shown["report"]).read_text()
    assert "Distance between masks over the epochs" in page and "sparselottery early-bird" in page
    Store(folder, create=False).verify()

    status, out, err = run(capsys, *arguments, "--no-report")  # nothing is left to do
    again = json.loads(out)
    assert status == 0 and "8 of them done before" in err
    assert {k: again[k] for k in again} == {k: shown[k] for k in again}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model", "lenet-300-100"], "model: expected BatchNorm layers with a scale γ"),
        (["--window", "4"], "window: expected at most the 3 epochs of a training, got 4"),
        (["--density", "1"], "density: expected a fraction above 0 and below 1 to keep, got 1"),
        (["--density", "0"], "density: expected a fraction above 0 and below 1 to keep, got 0"),
        (["--threshold", "0"], "threshold: expected a distance above 0"),
        (["--structure", "rows"], "invalid choice: 'rows'"),
        (["--controls", "reinit"], "controls: expected any of random-mask"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, more, message):
    arguments = [*TINY, *more, "--out", tmp_path / "runs"]
    try:
        status, out, err = run(capsys, *arguments)
    except SystemExit as end:
        status, (out, err) = end.code, capsys.readouterr()
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_plan_of_it(capsys):
    status, out, _ = run(capsys, "plan", *TINY, "--seeds", "2", "--json")
    found = json.loads(out)
    assert status == 0 and found["trainings"] == 8 and found["seconds"] > 0


def test_unstructured_tickets_of_other_networks(capsys, tmp_path):
    more = [
        "--model",
        "lenet-300-100",
        "--structure",
        "unstructured",
        "--density",
        "0.1",
        "--lr",
        "0.1",
        "--seeds",
        "1",
    ]
    status, out, _ = run(
        capsys, *TINY, *more, "--no-heatmap", "--workers", "1", "--out", tmp_path, "--no-report", "--json"
    )
    shown = json.loads(out)
    assert status == 0 and shown["levels"][1]["density"] == pytest.approx(0.1, abs=1e-3)
    assert Ticket.load(shown["ticket"]).density == pytest.approx(0.1, abs=1e-3)
