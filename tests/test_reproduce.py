"""Claims of the papers: how they are measured and judged, and the whole path once on real MNIST."""

import json
import os

import pytest

from sparselottery import cli
from sparselottery.experiments import reproduce


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


def test_measures():
    assert reproduce.early_stop_ratio(0.211)(LEVELS) == pytest.approx(0.75)
    assert reproduce.early_stop_ratio(0.211, "reinit")(LEVELS) == pytest.approx(2.0)
    assert reproduce.points_over(0.211)(LEVELS) == pytest.approx(0.4)
    assert reproduce.points_over(0.211, "ticket", "reinit")(LEVELS) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"levels: expected one near density 0\.05"):
        reproduce.points_over(0.05)(LEVELS)


@pytest.mark.parametrize(
    "side, expected, tolerance, holds",
    [("most", 0.7, 0.1, True), ("most", 0.62, 0.1, False), ("least", 0.8, 0.1, True), ("least", 0.9, 0.1, False)],
)
def test_a_claim_fails_where_it_is_missed(side, expected, tolerance, holds):
    claim = reproduce.Claim("sooner", reproduce.early_stop_ratio(0.211), expected, tolerance, side)
    checked = claim.check(LEVELS)
    assert checked["holds"] is holds and checked["measured"] == pytest.approx(0.75)
    assert reproduce.line(checked).startswith("pass" if holds else "FAIL")


def test_every_claim_finds_its_level_in_every_scale():
    """Densities by the schedule alone: no claim may ask for a level or control that its run does not train."""
    for figure in reproduce.FIGURES.values():
        for scale in reproduce.SCALES:
            run = figure.runs[scale]
            densities = [(1 - run.rate) ** i for i in range(run.rounds + 1)]
            figures = {name: {"mean": 0.9} for name in ("early_stop_iteration", "test_accuracy", "final_test_accuracy")}
            levels = [{"density": d, "ticket": figures} for d in densities]
            for i in run.control_levels or range(1, run.rounds + 1):
                levels[i] |= dict.fromkeys(run.controls, figures)
            for claim in figure.claims[scale]:
                assert isinstance(claim.check(levels)["measured"], float), claim.text


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
    assert result["figure"] == "lenet" and result["scale"] == "smoke"
    assert {"claim", "measured", "expected", "tolerance", "holds"} <= set(result["claims"][0])
    assert status == (0 if all(claim["holds"] for claim in result["claims"]) else 1)
    assert all(claim["holds"] for claim in result["claims"]), captured.err
    with open(result["png"], "rb") as file:
        assert file.read(4) == b"\x89PNG"
