"""Analyses of a run folder: what they leave, that it is used again, and one-line errors for what cannot be done."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sparselottery import analysis, cli
from sparselottery.experiments import analyses, hparams, runs
from sparselottery.experiments.networks import Network, Networks
from sparselottery.tickets.driver import seeded
from sparselottery.tickets.store import Store

SMALL = hparams.Imp(rounds=2, rate=0.5, seeds=2, budget="30it", evaluate_every=15, controls=())
FAST = analyses.Settings(resolution=5, examples=50)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.run_imp(SMALL, tmp_path_factory.mktemp("runs"), workers=1).run


@pytest.fixture(scope="module")
def analyzed(made):
    """The run with all analyses, what analyze returned, and what it told."""
    told = []
    return made, analyses.analyze(made, settings=FAST, tell=told.append), told


@pytest.fixture
def copy(analyzed, tmp_path):
    return shutil.copytree(analyzed[0], tmp_path / "run")


def test_networks_trained_again_are_those_of_the_run(analyzed):
    run, found, _ = analyzed
    assert found["as_recorded"] is True
    networks = Networks(run)
    assert networks.seeds == [0, 1] and networks.levels == [0, 1, 2]
    level = found["level"]
    model = networks.load(Network(1, level))
    records = Store(run).read(f"jobs/seed1-level{level:02d}-ticket.json")["history"]["records"]
    assert networks.fit.trainer.evaluate(model, "test")[1] == records[-1]["test_accuracy"]
    assert not model.training
    with seeded(3):
        before = torch.rand(1)
    with seeded(3):
        networks._train(Network(0, 0))
        assert torch.equal(torch.rand(1), before), "the caller's generators are left alone"


def test_every_analysis_leaves_its_numbers_and_can_be_drawn(analyzed):
    run, found, told = analyzed
    assert list(found["analyses"]) == list(analyses.RUNNERS) and found["skipped"] == {}
    saved = analysis.load(run)
    assert list(saved) == list(analyses.RUNNERS)
    for name, entry in saved.items():
        assert entry["command"].startswith(f"sparselottery analyze {run} {name}")
        assert entry["numbers"]["level"] == found["level"] and 0 < entry["numbers"]["density"] < 1
        assert all(figure.rows for figure in analysis.figures(name, entry["numbers"]) if figure.name != "exemplars")
    assert any("2 networks, 25 points each on 50 examples" in line and "one chunk measured" in line for line in told)
    assert any("networks to train again, about" in line for line in told), "cost is said before"
    children = saved["stability"]["numbers"]["children"]
    assert len(children["dense"]["lines"]) == len(children["ticket"]["lines"]) == 2
    assert children["dense"]["lines"][0]["error"][0] != children["dense"]["lines"][0]["loss"][0]


def test_children_share_the_start_and_differ_in_the_order(analyzed):
    networks = Networks(analyzed[0])
    level = analyzed[1]["level"]
    first, second = (networks.load(Network(0, level, child)) for child in (1, 2))
    assert first[1].mask == second[1].mask and not torch.equal(first[1].weight, second[1].weight)


def test_what_is_there_is_used_again(analyzed, monkeypatch):
    run = analyzed[0]
    files = {name: (run / "analysis" / f"{name}.json").read_bytes() for name in analyses.RUNNERS}
    monkeypatch.setattr(Networks, "_train", lambda *_: pytest.fail("nothing is to be trained"))
    again = analyses.analyze(run, settings=FAST)
    assert all(entry["reused"] for entry in again["analyses"].values())
    assert files == {name: (run / "analysis" / f"{name}.json").read_bytes() for name in analyses.RUNNERS}


def test_other_settings_a_damaged_file_and_again_compute_anew(copy):
    (copy / "analysis" / "weight-motion.json").write_text("{")
    told = analyses.analyze(copy, ["weight-motion", "landscape"], replace(FAST, resolution=3))
    assert [entry["reused"] for entry in told["analyses"].values()] == [False, False]
    assert len(analysis.read(copy, "landscape")["numbers"]["axis"]) == 3
    assert "--resolution 3 " not in analysis.read(copy, "weight-motion")["command"]
    assert analysis.read(copy, "landscape")["command"].endswith("--examples 50 --resolution 3")
    assert analyses.analyze(copy, ["weight-motion"], again=True)["analyses"]["weight-motion"]["reused"] is False


def test_networks_that_were_deleted_or_damaged_are_trained_again(copy):
    networks = Networks(copy)
    wanted = [Network(0, 0), Network(1, 0)]
    assert networks.missing(wanted) == []
    networks.path(wanted[0]).write_bytes(b"torn")
    networks.path(wanted[1]).unlink()
    assert networks.missing(wanted) == wanted
    with pytest.raises(ValueError, match="seed0-level00 is not kept"):
        networks.load(wanted[0])
    networks.train(wanted)
    assert networks.missing(wanted) == []


def test_a_network_of_another_ticket_is_not_taken(copy):
    networks = Networks(copy)
    level = networks.level()
    store = Store(copy)
    shutil.copy(store.ticket(1, level), store.ticket(0, level))
    assert networks.missing([Network(0, level), Network(1, level)]) == [Network(0, level)]


def test_a_record_that_is_not_repeated_is_told(copy):
    path = copy / "jobs" / "seed0-level00-ticket.json"
    outcome = json.loads(path.read_text())
    outcome["history"]["records"][-1]["validation_loss"] += 1.0
    path.write_text(json.dumps(outcome))
    shutil.rmtree(copy / "analysis")
    told = []
    found = analyses.analyze(copy, ["weight-motion"], tell=told.append)
    assert found["as_recorded"] is False and any("1 of the networks trained again differ" in line for line in told)


def test_a_run_that_keeps_no_ticket_of_level_0_begins_with_its_seeds(copy):
    before = analyses.analyze(copy, ["weight-motion"])
    for seed in (0, 1):
        Store(copy).ticket(seed, 0).unlink()
    networks = Networks(copy)
    assert networks.levels == [0, 1, 2] and networks.ticket(0, 0).density == 1
    shutil.rmtree(copy / "analysis")
    after = analyses.analyze(copy, ["weight-motion"])
    assert after["as_recorded"] is True and after["level"] == before["level"]


def test_two_workers_train_the_same_networks(copy):
    networks, wanted = Networks(copy), [Network(0, 0), Network(1, 0)]
    before = [networks.path(n).read_bytes() for n in wanted]
    for n in wanted:
        networks.path(n).unlink()
    networks.train(wanted, workers=2)
    assert [networks.path(n).read_bytes() for n in wanted] == before


def test_rewinding_starts_tickets_and_children_late(tmp_path):
    run = runs.run_imp(replace(SMALL, rewind="10it", seeds=1, rounds=1), tmp_path, workers=1).run
    told = []
    found = analyses.analyze(run, settings=FAST, tell=told.append)
    assert found["as_recorded"] is True, "of the dense network from the start, and of the ticket from step 10 on"
    assert "needs at least 2 seeds" in found["skipped"]["class-damage"]
    assert set(found["analyses"]) == {"weight-motion", "landscape", "stability"}
    assert analysis.read(run, "stability")["numbers"]["overlap"] is None
    assert "step 10it" in analysis.figures("stability", analysis.read(run, "stability")["numbers"])[0].caption
    with pytest.raises(ValueError, match="class damage compares populations and needs at least 2 seeds"):
        analyses.analyze(run, ["class-damage"])


def test_mistakes_are_named(copy, tmp_path):
    for names, settings, message in (
        (["colour"], None, r"analysis: expected any of weight-motion, .*, got 'colour'"),
        ([], analyses.Settings(level=7), r"level: expected one of \[1, 2\], got 7"),
        ([], analyses.Settings(seed=9), r"seed: expected one of \[0, 1\], got 9"),
        (["landscape"], analyses.Settings(resolution=4), "resolution: expected an odd number"),
        (["landscape"], analyses.Settings(examples=0), "examples: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            analyses.analyze(copy, names, settings)
    with pytest.raises(TypeError, match="names: expected a list"):
        analyses.analyze(copy, "landscape")
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        analyses.analyze(tmp_path / "nowhere")


def test_folders_that_cannot_be_analyzed(copy):
    config = json.loads((copy / "config.json").read_text())
    for changed, message in (
        (None, r"has no config\.json"),
        ("{", r"config\.json: expected JSON"),
        (json.dumps({**config, "hparams": None}), "expected the hyperparameters"),
        (json.dumps({**config, "rewind": "soon"}), r"config\.json: damaged .rewind"),
    ):
        path = copy / "config.json"
        path.unlink() if changed is None else path.write_text(changed)
        with pytest.raises(ValueError, match=message):
            analyses.analyze(copy)
    (copy / "config.json").write_text(json.dumps(config))
    ticket = Store(copy).ticket(0, Networks(copy).level())
    ticket.write_bytes(ticket.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        analyses.analyze(copy, ["weight-motion"], again=True)
    shutil.rmtree(copy / "tickets")
    with pytest.raises(ValueError, match="expected tickets by level, as finished runs of imp"):
        analyses.analyze(copy)


def test_a_network_that_has_diverged_is_named(copy):
    networks = Networks(copy)
    networks.train([Network(0, 0)])
    model = networks.load(Network(0, 0))
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    from sparselottery import Ticket

    Ticket.of(model, model).save(networks.path(Network(0, 0)))
    for name, message in (
        ("weight-motion", r"trained: fc1\.weight: expected finite values"),
        ("class-damage", "dense: the outputs of seed number 0 are not finite"),
        ("landscape", "seed 0, dense: its outputs are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            analyses.analyze(copy, [name], FAST, again=True)


def test_the_command(copy, capsys):
    argv = ["analyze", str(copy), "weight-motion", "--workers", "1"]
    assert cli.main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert captured.out.count("\n") == 1 and found["analyses"]["weight-motion"]["reused"] is True
    figures = [copy / "analysis" / f"{name}.png" for name in ("weight_moved", "weight_outward")]
    assert found["analyses"]["weight-motion"]["figures"] == [str(f) for f in figures] and all(
        map(type(copy).exists, figures)
    )
    assert cli.main(argv) == 0
    assert "KS distance" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["colour", "early-bird"])
def test_an_unknown_analysis_is_one_line(copy, capsys, name):
    assert cli.main(["analyze", str(copy), name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected any of weight-motion, class-damage, landscape, stability" in error
