"""What a plan says before anything runs: which trainings, how long, and that nothing is left behind."""

import json

import pytest

from sparselottery import cli
from sparselottery.experiments import any_run, cost, runs
from sparselottery.experiments.hparams import Imp, MutualInformation, OneShot

TINY = {"budget": "30it", "evaluate_every": 10, "seeds": 2}
FLAGS = ["--budget", "30it", "--evaluate-every", "10", "--seeds", "2"]


def works(hparams):
    return cost.WORKS[type(hparams)](hparams, runs.Fit(hparams), None)


@pytest.mark.parametrize(
    "hparams",
    [
        Imp(rounds=3, controls=("reinit", "shuffle"), repeats=2, control_levels=(1, 3), **TINY),
        Imp(rounds=2, rewind="10it", controls=(), **TINY),
        OneShot(densities=(0.5, 0.1), **TINY),
    ],
)
def test_the_trainings_are_those_of_the_run(hparams, tmp_path):
    planned, weights = works(hparams)
    result = any_run.run_any(hparams, tmp_path, workers=1)
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    trained = {tuple(json.loads(line)[k] for k in ("seed", "level", "kind")) for line in lines}
    jobs = list((result.run / "jobs").glob("*.json"))
    assert sum(work.count for work in planned) == len(jobs) >= len(trained)
    densities = sorted({round(work.density, 9) for work in planned}, reverse=True)
    assert densities == [pytest.approx(level["density"]) for level in result.levels]
    assert weights == sum(mask.to_dense().numel() for mask in result.ticket(0, 0).masks.values())
    begins = 10 if hparams.rewind == "10it" else 0
    assert {work.iterations for work in planned if work.density < 1} == {30 - begins}


def test_the_trainings_of_mutual_information(tmp_path, monkeypatch):
    hparams = MutualInformation(
        density=0.3, rate=0.4, budget="80it", evaluate_every=40, seeds=2, window=2, threshold=1e-9
    )
    planned, _ = works(hparams)
    seen, train = [], runs.Fit.__call__

    def counted(self, model, *, budget=None, **arguments):
        seen.append(self.trainer.iterations if budget is None else budget)
        return train(self, model, budget=budget, **arguments)

    monkeypatch.setattr(runs.Fit, "__call__", counted)
    any_run.run_any(hparams, tmp_path, workers=1)
    assert sorted(seen) == sorted(work.iterations for work in planned for _ in range(work.count))


def test_time_between_measured_densities():
    speeds = [cost.Speed(1.0, 4e-3, 1e-5, 0.5), cost.Speed(0.5, 2e-3, 1e-5, 0.5), cost.Speed(0.1, 1e-3, 1e-5, 0.5)]
    seconds = lambda density: cost.seconds_of(speeds, density, 1000, 100_000)  # noqa: E731
    assert seconds(1.0) == pytest.approx(0.5 + 4 + 1)
    assert seconds(0.5) == pytest.approx(3.5) and seconds(0.1) == pytest.approx(2.5)
    assert seconds(0.75) == pytest.approx(4.5) and seconds(0.3) == pytest.approx(3.0)
    assert seconds(0.01) == pytest.approx(2.5), "sparser than anything measured: no promise of more speed"
    assert cost.seconds_of(speeds[:1], 0.2, 1000, 0) == pytest.approx(4.5)


def test_cost_adds_up_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cost.cost(Imp(rounds=2, controls=("reinit",), **TINY), workers=2)
    assert found["trainings"] == 2 * (3 + 2) and found["iterations"] == 30 * 10
    assert 0 < found["seconds"] <= found["cpu_seconds"] and found["disk_bytes"] > 4 * 50_000
    assert [m["density"] for m in found["measured"]] == sorted((m["density"] for m in found["measured"]), reverse=True)
    assert all(m["iteration_us"] > 0 for m in found["measured"])
    assert cost.sum_of([found, found])["trainings"] == 20
    assert not list(tmp_path.iterdir())


def run(capsys, *argv):
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "plan", "one-shot", "--densities", "0.2", *FLAGS, "--controls", "reinit", "--json")
    found = json.loads(out)
    assert status == 0 and found["trainings"] == 2 * 3 and found["runs"]["one-shot"]["trainings"] == 6
    assert found["command"] == "one-shot --densities 0.2 --budget 30it --evaluate-every 10 --seeds 2 --controls reinit"
    status, out, _ = run(capsys, "plan", "one-shot", "--densities", "0.2", *FLAGS)
    assert status == 0 and out.startswith("one-shot: 8 trainings, 240 iterations: about ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["imp", "--nope", "3"], "imp: no such argument: --nope 3"),
        (["imp", "--rounds", "x"], "argument --rounds: invalid int value: 'x'"),
        (["imp", "--rate", "2"], "rate: expected a fraction between 0 and 1, got 2.0"),
        (["reproduce", "guernica"], "argument figure: invalid choice: 'guernica'"),
    ],
)
def test_mistakes_in_the_planned_command(capsys, argv, message):
    status, out, err = run(capsys, "plan", *argv)
    assert status == 2 and not out
    assert message in err.splitlines()[-1]


def test_words():
    assert [cost.in_words(s) for s in (3.2, 600, 9000, 400_000)] == ["3 s", "10 min", "2 h 30 min", "4.6 days"]
