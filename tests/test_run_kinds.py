"""Networks of runs whose tickets are channels, methods or masks alone: what is analysed is what the run trained."""

import pytest
import torch

from sparselottery import analysis, cli, report
from sparselottery.experiments import analyses, hparams, runs
from sparselottery.experiments.mutual_information import run_mutual_information
from sparselottery.experiments.networks import Network
from sparselottery.experiments.run_kinds import networks_of
from sparselottery.experiments.supermask import run_supermask
from sparselottery.nn.convert import masked_modules
from sparselottery.tickets.early_bird_driver import ticketed
from sparselottery.tickets.store import Store
from sparselottery.tickets.ticket import Ticket

FAST = analyses.Settings(resolution=3, examples=50)
SHORT = {"budget": "30it", "evaluate_every": 30, "seeds": 2}
BIRD = hparams.EarlyBird(budget="2ep", milestones=(), window=2, seeds=2, controls=(), validation=1000, test=100)


def _early_bird(folder, **changes):
    return runs.run_early_bird(hparams.replace(BIRD, **changes), folder, workers=1).run


def _mutual(folder):
    methods = ("random", "mutual-information")
    asked = hparams.MutualInformation(density=0.25, methods=methods, **SHORT)
    return run_mutual_information(asked, folder, workers=1)["run"]


def _supermask(folder):
    return run_supermask(hparams.Supermask(mask_budget="30it", densities=(0.5,), **SHORT), folder, workers=1).run


@pytest.fixture(scope="module")
def bird(tmp_path_factory):
    return _early_bird(tmp_path_factory.mktemp("channels"))


@pytest.fixture(scope="module")
def supermask(tmp_path_factory):
    return _supermask(tmp_path_factory.mktemp("supermask"))


def test_channel_tickets_answer_every_question(bird, capsys):
    assert cli.main(["analyze", str(bird), "--resolution", "3", "--examples", "50", "--workers", "1"]) == 0
    assert set(analyses.RUNNERS) <= set(analysis.load(bird))
    assert "differ from the run's records" not in capsys.readouterr().err
    density = Store(bird).read("result.json")["levels"][1]["density"]
    found = analysis.read(bird, "class-damage")["numbers"]
    assert found["density"] == pytest.approx(density, abs=0.01), "of the weights, not of the channels"
    assert "no better than chance: dense of seed 0, 1" in report.write_report(bird).read_text(), (
        "two epochs teach nothing"
    )
    recorded = Store(bird).read("result.json")["levels"][1]["ticket"]["final_test_accuracy"]["values"]
    assert found["overall"]["ticket"]["values"] == pytest.approx(recorded)


def test_a_channel_ticket_in_the_dense_networks_shape_computes_the_same(bird):
    networks = networks_of(bird)
    networks.train([Network(1, 1)])
    model, x = networks.load(Network(1, 1)), networks.fit.trainer.data["test"][0][:20]
    plain = networks.fit.make_model()(seed=1)
    small = ticketed(Ticket.load(Store(bird).ticket(1, 1)), plain, networks.fit.example())
    networks.fit(small, seed=1, on_epoch=lambda model, epoch: None)
    small.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), small(x), rtol=1e-4, atol=1e-4)
    kept = sum(layer.mask.count for _, layer in masked_modules(model))
    assert kept == sum(p.numel() for p in small.parameters() if p.ndim > 1) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "drawn", "model": "resnet-20", "seeds": 1},
        {"structure": "unstructured", "model": "lenet-300-100", "density": 0.2, "seeds": 1, "lr": 0.01},
    ],
    ids=["drawn, with shortcuts", "unstructured"],
)
def test_other_early_birds(changes, tmp_path):
    run = _early_bird(tmp_path, heatmap=False, **changes)
    found = analyses.analyze(run, ["weight-motion", "landscape"], FAST)
    assert found["as_recorded"] and 0 < found["density"] < 1


def test_methods_are_levels_and_mutual_information_is_asked_for_by_itself(tmp_path):
    run = _mutual(tmp_path)
    found = analyses.analyze(run, settings=FAST)
    assert found["level"] == 2 and found["as_recorded"] and list(found["analyses"]) == list(analyses.RUNNERS)
    other = analyses.analyze(run, ["weight-motion"], analyses.Settings(level=1))
    assert other["as_recorded"] and other["density"] == pytest.approx(found["density"], rel=0.01)


@pytest.mark.parametrize("level", [1, 2])
def test_supermasks_are_analysed_untrained(supermask, level):
    found = analyses.analyze(supermask, settings=analyses.Settings(level=level, resolution=3, examples=50))
    assert found["as_recorded"] and list(found["skipped"]) == ["stability"]
    model = networks_of(supermask).load(Network(0, level))
    start = Ticket.load(Store(supermask).ticket(0, level)).initial
    assert all(torch.equal(m.weight, start[f"{n}.weight"] * m.mask.to_dense()) for n, m in masked_modules(model))
    with pytest.raises(ValueError, match="stability: expected tickets that are trained"):
        analyses.analyze(supermask, ["stability"], FAST)
