"""Runs on disk: killed anywhere and run again they end with the same bits; two processes do not disturb each other."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from sparselottery.experiments import hparams, runs
from sparselottery.tickets import store
from sparselottery.tickets.result import Result

SMALL = hparams.Imp(
    rounds=2, rate=0.5, seeds=2, budget="6it", evaluate_every=3, controls=("reinit", "random-mask"), control_levels=(2,)
)
JOBS = 2 * (3 + 2)


def contents(folder):
    """Everything that must not depend on how often a run was interrupted."""
    parts = [*sorted(folder.glob("tickets/*.safetensors")), folder / "metrics.jsonl", folder / "result.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in parts}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    result = runs.run_imp(SMALL, tmp_path_factory.mktemp("runs"), workers=1)
    return result, contents(result.run)


def test_what_a_run_folder_holds(uninterrupted):
    result, files = uninterrupted
    folder = result.run
    assert folder.name == runs.name("imp", SMALL)
    assert len(files) == 6 + 2
    config = json.loads((folder / "config.json").read_text())
    assert config["hparams"]["rounds"] == 2 and config["fit"]["trainer"]["iterations"] == 6
    assert json.loads((folder / "environment.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * JOBS
    assert {"seed", "level", "density", "kind", "iteration", "train_loss", "validation_loss"} <= set(lines[0])
    assert len({(e["seed"], e["level"], e["kind"], e["iteration"]) for e in lines}) == len(lines)
    store.Store(folder).verify()
    assert Result.load(folder).to_json() == result.to_json()
    with pytest.raises(ValueError, match="expected a finished run"):
        Result.load(folder / "nowhere")
    assert not (folder / "nowhere").exists()


def test_run_again_does_nothing_again(uninterrupted):
    result, files = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in (result.run / "jobs").iterdir()}
    events = []
    again = runs.run_imp(SMALL, result.run.parent, workers=2, progress=events.append)
    assert [e["event"] for e in events] == ["start"] and events[0]["done"] == JOBS
    assert {path: path.stat().st_mtime_ns for path in (result.run / "jobs").iterdir()} == before
    assert again.levels == result.levels and contents(result.run) == files
    again.extend(speed={"train_step": 2.0})
    store.Store(result.run).verify()
    assert runs.run_imp(SMALL, result.run.parent, workers=1).to_json()["speed"] == {"train_step": 2.0}
    (result.run / "result.json").write_bytes(files["result.json"])  # as the other tests expect it


def test_a_lost_ticket_is_made_again(uninterrupted):
    result, files = uninterrupted
    for name in ("seed1-level00.safetensors", "seed0-level02.safetensors"):
        (result.run / "tickets" / name).unlink()
    runs.run_imp(SMALL, result.run.parent, workers=1)
    assert contents(result.run) == files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "another's"])
def test_a_damaged_ticket_is_made_again(uninterrupted, how):
    result, files = uninterrupted
    path = result.run / "tickets" / "seed0-level01.safetensors"
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes(files["tickets/seed1-level01.safetensors"])
    events = []
    runs.run_imp(SMALL, result.run.parent, workers=1, progress=events.append)
    assert contents(result.run) == files and events[0]["done"] == JOBS - 1
    store.Store(result.run).verify()


@pytest.mark.parametrize("content", [b"", b'{"levels": [{"lev', b"\xff\x00", b"[]"])
def test_a_damaged_result_is_made_again(uninterrupted, content):
    result, files = uninterrupted
    (result.run / "result.json").write_bytes(content)
    again = runs.run_imp(SMALL, result.run.parent, workers=1)
    assert again.levels == result.levels and contents(result.run) == files


class Killed(BaseException):
    """As sudden as a signal: nobody catches it."""


def test_stopped_at_every_single_write(uninterrupted, tmp_path, monkeypatch):
    """Each start gets a file or a few further than the last one."""
    rename, left = os.replace, 0

    def counted(source, target):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", counted)
    starts = 0
    while True:
        starts += 1
        left = 2 + starts % 4  # two are written again at each start, and a job has up to three
        try:
            result = runs.run_imp(SMALL, tmp_path, workers=1)
            break
        except Killed:
            assert starts < 200
    assert starts > JOBS
    assert contents(result.run) == uninterrupted[1]


# One process with everything imported forks the children that are killed: a start costs milliseconds, not seconds.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from sparselottery.experiments import runs
from test_runs import SMALL
import sklearn.datasets
generator = random.Random(0)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        runs.run_imp(SMALL, sys.argv[1], workers=1)
        os._exit(0)
    deadline = time.monotonic() + generator.uniform(0.0, 0.1 + 0.05 * kills)
    ended = (0, 0)
    while ended == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.001)
        ended = os.waitpid(child, os.WNOHANG)
    if ended != (0, 0):
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
if ended[1]:
    sys.exit("a start failed by itself")
print(kills)
"""


def test_killed_at_random_moments(uninterrupted, tmp_path):
    """SIGKILL, again and again, until a start gets through to the end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, Path(__file__).parent], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    result = runs.run_imp(SMALL, tmp_path, workers=1)
    assert contents(result.run) == uninterrupted[1]


RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from sparselottery.experiments import runs
from test_runs import SMALL
if __name__ == "__main__":
    runs.run_imp(SMALL, sys.argv[1], workers=1, progress=lambda event: print(event["event"], flush=True))
"""


def test_two_processes_on_one_folder(uninterrupted, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, script, tmp_path / "runs", Path(__file__).parent]
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: subprocess.run(command, capture_output=True, text=True, timeout=300), "ab"))
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    assert sum(process.stdout.count("job") for process in done) == JOBS  # each job was done by one of them only
    assert contents(next((tmp_path / "runs").iterdir())) == uninterrupted[1]


def test_a_changed_network_is_noticed(uninterrupted, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "xavier_normal_", torch.nn.init.kaiming_normal_)
    with pytest.raises(ValueError, match="make_model: gives other initial weights than the run in"):
        runs.run_imp(SMALL, uninterrupted[0].run.parent, workers=1)


def test_one_shot_runs_too(tmp_path):
    asked = hparams.OneShot(densities=(0.2,), seeds=1, budget="4it", evaluate_every=4, controls=())
    result = runs.run_one_shot(asked, tmp_path, workers=1)
    assert result.run.name == runs.name("one-shot", asked) and result.levels[1]["density"] == pytest.approx(
        0.2, abs=1e-5
    )


def test_names_leave_defaults_out():
    assert runs.name("imp", hparams.Imp()) == "imp-44136fa355"  # of {}: a field added later must not rename it
    assert runs.name("imp", replace(hparams.Imp(), rounds=3)) != runs.name("imp", hparams.Imp())
    assert hparams.changed(SMALL)["rounds"] == 2 and "lr" not in hparams.changed(SMALL)


def test_iterations_with_and_without_their_unit_are_one_run():
    one, other = hparams.Imp(budget="1200", rewind="50"), hparams.Imp(rewind="50it")
    assert one == other and runs.name("imp", one) == runs.name("imp", other)
    assert hparams.Imp(milestones=("600", "2ep")).milestones == ("600it", "2ep")


def test_every_field_says_what_it_is():
    for kind in (hparams.Imp, hparams.OneShot):
        for field in fields(kind):
            assert field.metadata["help"]
            chosen = field.default if isinstance(field.default, tuple) else (field.default,)
            assert all(c in field.metadata.get("choices", chosen) for c in chosen)


def test_presets_are_the_papers():
    lenet, conv6 = hparams.PRESETS["lenet"], hparams.PRESETS["conv6"]
    assert (lenet.data, lenet.budget, lenet.batch_size, lenet.lr) == ("mnist", "50000it", 60, 1.2e-3)
    assert (conv6.budget, conv6.lr, conv6.rate * conv6.conv_factor) == ("30000it", 3e-4, pytest.approx(0.15))
    assert lenet.rates() == {"output": 0.5} and conv6.rates() == {"output": 0.5, "conv": 0.75}
    assert hparams.PRESETS["resnet18"].rates() == {"output": 0.0}


def test_momentum_belongs_to_sgd(tmp_path):
    with pytest.raises(ValueError, match="momentum: expected 0 for adam"):
        runs.run_imp(replace(SMALL, momentum=0.9), tmp_path)
