"""Run folders: whole files or none, one owner at a time, and a manifest that tells."""

import json
import os
import subprocess
import sys

import pytest

from sparselottery.tickets.store import Job, Store

OUTCOME = {
    "density": 0.5,
    "seconds": 1.0,
    "history": {"records": [{"iteration": i, "train_loss": None, "validation_loss": 0.1 * i} for i in (10, 20)]},
}


def test_metrics_have_one_line_per_evaluation_whatever_was_torn(tmp_path):
    store = Store(tmp_path)
    jobs = [Job(0, 0), Job(0, 1), Job(0, 1, "reinit"), Job(0, 1, "reinit", 1)]
    for job in jobs[:3]:
        store.finish(job, OUTCOME)
        store.append_metrics(job)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    assert [json.loads(line)["kind"] for line in whole.splitlines()] == ["ticket"] * 4 + ["reinit"] * 2
    assert json.loads(whole.splitlines()[0]) == {
        "seed": 0, "level": 0, "density": 0.5, "kind": "ticket", "repeat": 0, **OUTCOME["history"]["records"][0],
    }  # fmt: skip
    path.write_text(whole + whole[:17])  # killed in the middle of a line, the job not marked as done
    store.write_metrics(jobs)
    assert path.read_text() == whole


def test_a_folder_belongs_to_one_configuration(tmp_path):
    store = Store(tmp_path / "run")
    store.claim({"rounds": 3, "rates": (1, 2)}, {"python": "3"})
    store.claim({"rounds": 3, "rates": [1, 2]}, {"python": "4"})
    assert store.read("environment.json") == {"python": "4"}
    store.finish(Job(0, 0), OUTCOME)
    with pytest.raises(ValueError, match=r"out: .*run holds a run with rounds = 3 \(asked: 5\); choose another folder"):
        store.claim({"rounds": 5, "rates": [1, 2]}, {})
    (tmp_path / "run" / "config.json").write_text('{"rounds": ')
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got a damaged file"):
        store.claim({"rounds": 3}, {})


def test_a_folder_in_which_nothing_was_finished_can_be_asked_for_something_else(tmp_path):
    """A first training that fails, by a mistake in `fit` say, must not cost the folder's name."""
    store = Store(tmp_path)
    store.claim({"lr": -1}, {})
    store.ticket(0, 0).write_bytes(b"of the training that failed")
    store.claim({"lr": 1}, {})
    assert store.read("config.json") == {"lr": 1} and not store.ticket(0, 0).exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ValueError, match=r"out: .*run cannot be a run folder"):
        Store(tmp_path / "run")


def test_the_manifest_tells_what_was_changed(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"manifest.json: no such file"):
        store.verify()
    store.claim({"rounds": 3}, {})
    store.finish(Job(0, 0), OUTCOME)
    store.write_result({"levels": []})
    store.verify()
    assert "jobs/seed0-level00-ticket.json" in store.read("manifest.json")["sha256"]
    path = tmp_path / "jobs" / "seed0-level00-ticket.json"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"seed0-level00-ticket.json: expected the SHA-256 of the manifest"):
        store.verify()
    path.unlink()
    with pytest.raises(ValueError, match=r"seed0-level00-ticket.json: no such file, though the manifest lists it"):
        store.verify()


HOLDER = """
import sys, time
from sparselottery.tickets.store import Store
with Store(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_waits_until_the_first_is_dead(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        (tmp_path / "tickets" / ".seed0-level00.safetensors.a1_b2c3d").write_text("left by a killed process")
        waited = []
        with Store(tmp_path).lock(lambda: (waited.append(True), first.kill())):
            assert waited == [True] and first.wait() == -9
            assert os.listdir(tmp_path / "tickets") == []
    finally:
        first.kill()
        first.wait()
        first.stdin.close()
        first.stdout.close()


def test_files_of_somebody_else_are_left_alone(tmp_path):
    """A run folder may be a home or a project: dotfiles stay, and nobody's files are hashed."""
    theirs = [".bashrc", ".env.json", "notes.txt", "sub/.secret.json.abcdefgh", ".lock.json"]
    (tmp_path / "sub").mkdir()
    for name in theirs:
        (tmp_path / name).write_text("mine")
    store = Store(tmp_path)
    with store.lock():
        store.claim({"rounds": 3}, {})
        store.write_result({"levels": []})
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)
    assert sorted(store.read("manifest.json")["sha256"]) == ["config.json", "environment.json", "result.json"]


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"history": 3, "density": 1}', "", '{"density": 0.5, "his'])
def test_a_damaged_job_is_named(tmp_path, content):
    store = Store(tmp_path)
    (tmp_path / "jobs" / "seed0-level00-ticket.json").write_text(content)
    with pytest.raises(ValueError, match=r"seed0-level00-ticket.json: expected .*; delete it to have it made again"):
        store.job(Job(0, 0))
