"""Claims of the papers: how they are measured and judged, and the whole path once on real MNIST."""

import json
import os

import pytest
import torch
from torch import nn

from sparselottery import cli
from sparselottery.analysis import reproduction
from sparselottery.experiments import any_run, claims, hparams, models, reproduce


def level(density, **kinds):
    return {"density": density} | {
        kind: {name: {"mean": value} for name, value in figures.items()} for kind, figures in kinds.items()
    }


LEVELS = [
    level(1.0, ticket={"early_stop_iteration": 4000, "test_accuracy": 0.978}),
    level(
        0.2115,
        ticket={"early_stop_iteration": 3000, "test_accuracy": 0.982},
        reinit={"early_stop_iteration": 8000, "test_accuracy": 0.979},
    ),
]
FOUND = {"imp": {"levels": LEVELS}, "other": {"levels": [level(1.0, ticket={"test_accuracy": 0.9})]}}


def test_measures():
    assert claims.early_stop_ratio(0.211)(FOUND) == pytest.approx(0.75)
    assert claims.early_stop_ratio(0.211, "reinit")(FOUND) == pytest.approx(2.0)
    assert claims.points_over(0.211)(FOUND) == pytest.approx(0.4)
    assert claims.points_over(0.211, "ticket", "reinit")(FOUND) == pytest.approx(0.3)
    assert claims.best_points_over_dense()(FOUND) == pytest.approx(0.4)
    dense, other = claims.mean(1.0, scale=100), claims.mean(1.0, run="other", scale=100)
    assert claims.points_between(dense, other)(FOUND) == pytest.approx(7.8)
    with pytest.raises(ValueError, match=r"levels: expected one near density 0\.05"):
        claims.points_over(0.05)(FOUND)


def test_a_ticket_is_chosen_on_validation_data():
    pairs = ((1.0, 0.99, 0.6), (0.5, 0.7, 0.62), (0.2, 0.71, 0.61), (0.1, 0.5, 0.9))
    levels = [level(d, ticket={"validation_accuracy": v, "test_accuracy": t}) for d, v, t in pairs]
    assert claims.chosen_points_over_dense()({"imp": {"levels": levels}}) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "side, expected, tolerance, holds",
    [("most", 0.7, 0.1, True), ("most", 0.62, 0.1, False), ("least", 0.8, 0.1, True), ("least", 0.9, 0.1, False)],
)
def test_a_claim_fails_where_it_is_missed(side, expected, tolerance, holds):
    claim = claims.Claim("sooner", claims.early_stop_ratio(0.211), expected, tolerance, side)
    checked = claim.check(FOUND)
    assert checked["holds"] is holds and checked["measured"] == pytest.approx(0.75)
    assert claims.line(checked).startswith("pass" if holds else "FAIL")


def levels_of(run):
    """The levels that a run ends with, by pruning the network it names; each figure 0.9."""
    image = (3, 32, 32) if run.data == "cifar-10" else (1, 28, 28)
    with torch.device("meta"):
        sizes = {
            name: (module.weight.numel(), isinstance(module, nn.Conv2d))
            for name, module in models.MODELS[run.model](run.model, image, 10, 0.0).named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
    total = sum(size for size, _ in sizes.values())
    names = ("early_stop_iteration", "test_accuracy", "final_test_accuracy", "validation_accuracy")
    figures = {name: {"mean": 0.9} for name in names}
    if isinstance(run, hparams.OneShot):
        densities = [1.0, *run.densities]
    elif run.scope == "global":
        fixed = sizes["output"][0] * (not run.output_factor)
        densities = [(fixed + (total - fixed) * (1 - run.rate) ** i) / total for i in range(run.rounds + 1)]
    else:
        factor = {
            name: run.output_factor if name == "output" else run.conv_factor if conv else 1
            for name, (_, conv) in sizes.items()
        }
        densities = [
            sum(size * (1 - run.rate * factor[name]) ** i for name, (size, _) in sizes.items()) / total
            for i in range(run.rounds + 1)
        ]
    levels = [{"density": density, "ticket": figures} for density in densities]
    for i in run.control_levels or range(1, len(levels)):
        levels[i] |= dict.fromkeys(run.controls, figures)
    return levels


def result_of(run):
    """What a run would end with, as far as claims and panels may read it; each figure 0.9."""
    figures = {name: {"mean": 0.9, "ci95": 0.1} for name in ("test_accuracy", "final_test_accuracy", "weight_density")}
    if isinstance(run, hparams.MutualInformation):
        method = {**figures, "cost": {"relative": {"mean": 2.0}}}
        return {"dense": figures, "methods": dict.fromkeys(run.methods, method)}
    if isinstance(run, hparams.Supermask):
        masks = ("learned", "criterion", "random-mask")
        return {"methods": {mask: {**figures, "density": {"mean": 0.5, "ci95": 0.1}} for mask in masks}}
    if isinstance(run, hparams.EarlyBird):
        levels = [{"density": d, "ticket": figures} for d in (1.0, run.density)]
        cost = {"ratio": {"imp / early-bird": {"seconds": 4.0}}}
        return {"levels": levels, "drawn_epochs": {"mean": 7.0}, "epochs": 50, "cost": cost}
    return {"levels": levels_of(run)}


@pytest.mark.parametrize("scale", reproduce.SCALES)
@pytest.mark.parametrize("name", sorted(reproduce.FIGURES))
def test_every_claim_finds_its_level_in_every_scale(name, scale):
    """Densities by the schedule alone: no claim may ask for a level or control that its run does not train."""
    figure = reproduce.find(name, scale)
    found = {label: result_of(run) for label, run in figure.runs[scale].items()}
    assert figure.claims[scale]
    checked = [claim.check(found) for claim in figure.claims[scale]]
    assert all(isinstance(claim["measured"], float) for claim in checked)
    panels = figure.panels(found)
    assert panels and all(len(panel["series"]) >= len(found) for panel in panels)
    assert len({claim["claim"] for claim in checked}) == len(checked)
    numbers = {"figure": name, "title": figure.title, "claims": checked, "panels": panels}
    (drawn,) = reproduction.figures(numbers)
    assert drawn.name == name and [row[0] for row in drawn.rows] == [claim["claim"] for claim in checked]


@pytest.mark.parametrize("scale", reproduce.SCALES)
@pytest.mark.parametrize("name", sorted(reproduce.FIGURES))
def test_every_run_can_be_asked_for(name, scale):
    for run in reproduce.find(name, scale).runs[scale].values():
        assert type(run) in any_run.RUNS
        assert not isinstance(run, hparams.Imp | hparams.OneShot) or run.rates() is not None
        image = {"cifar-10": (3, 32, 32), "digits": (1, 8, 8)}.get(run.data, (1, 28, 28))
        models.make(run.model, image, 10, dropout=run.dropout)


def test_unknown_names():
    with pytest.raises(ValueError, match="figure: expected one of"):
        reproduce.reproduce("guernica")
    with pytest.raises(ValueError, match="scale: expected one of"):
        reproduce.reproduce("lenet", "huge")


@pytest.mark.skipif(not os.environ.get("SPARSELOTTERY_DATA"), reason="SPARSELOTTERY_DATA is not set: no MNIST")
def test_lenet_smoke_on_mnist(tmp_path, capsys):
    root = os.environ["SPARSELOTTERY_DATA"]
    arguments = [
        "reproduce",
        "lenet",
        "--scale",
        "smoke",
        "--data-root",
        root,
        "--out",
        str(tmp_path),
        "--workers",
        "1",
    ]
    status = cli.main([*arguments, "--json"])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert os.path.exists(os.path.join(result["run"], "analysis", "reproduction.json"))
    assert result["figure"] == "lenet" and result["scale"] == "smoke"
    assert {"claim", "measured", "expected", "tolerance", "holds"} <= set(result["claims"][0])
    assert status == (0 if all(claim["holds"] for claim in result["claims"]) else 1)
    assert all(claim["holds"] for claim in result["claims"]), captured.err
    with open(result["png"], "rb") as file:
        assert file.read(4) == b"\x89PNG"
