"""Refilled and regrouped tickets of a run: what they keep, what they start from, and the loud ends."""

import json

import pytest
import torch

from sparselottery import cli
from sparselottery.experiments import restructure as module
from sparselottery.experiments import runs
from sparselottery.experiments.hparams import Imp
from sparselottery.experiments.restructure import restructure
from sparselottery.tickets.ticket import Ticket


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    hparams = Imp(rounds=2, rate=0.5, seeds=2, budget="60it", evaluate_every=30, controls=())
    return runs.run_imp(hparams, tmp_path_factory.mktemp("runs"), workers=1).run


def channels(mask):
    return mask.to_dense().flatten(1).float().mean(1)


def test_refill(run):
    found = restructure(run, "refill", level=2)
    assert len(found["test_accuracy"]["values"]) == 2 and found["ticket"] == found["tickets"][0]
    assert found["density"] == pytest.approx(found["unstructured"]["density"], rel=0.02)
    assert json.loads((run / "refill-level02" / "result.json").read_text()) == found
    for seed, path in enumerate(found["tickets"]):
        ticket = Ticket.load(path)
        for layer in ("fc1", "fc2"):
            assert set(channels(ticket.masks[layer]).tolist()) == {0.0, 1.0}, "whole channels"
        old, first = (Ticket.load(run / "tickets" / f"seed{seed}-level{i:02d}.safetensors") for i in (2, 0))
        assert torch.equal(ticket.masks["output"].to_dense(), old.masks["output"].to_dense()), "the output layer stays"
        kept = ticket.masks["fc1"].to_dense()
        assert torch.equal(ticket.initial["fc1.weight"][kept], first.initial["fc1.weight"][kept]), "back at \u03b80"
        assert ticket.initial["fc1.weight"][kept].ne(0).all()


def test_regroup_finds_nothing_loudly_and_leaves_no_ticket(run):
    with pytest.raises(ValueError, match=r"fc1: found no blocks of 8x8"):
        restructure(run, "regroup", structure="block:8x8", level=1)
    assert not (run / "regroup-level01").exists()


def test_the_same_again(run):
    first = restructure(run, "refill", level=1)
    assert restructure(run, "refill", level=1) == first


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="how: expected one of refill, regroup, got 'melt'"):
        restructure(run, "melt")
    with pytest.raises(ValueError, match=r"level: expected one of \[1, 2\], got 7"):
        restructure(run, "refill", level=7)
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        restructure(tmp_path / "none", "refill")
    assert module.HOW == ("refill", "regroup")


def test_the_commands(run, capsys):
    assert cli.main(["refill", str(run), "--level", "2", "--workers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["structure"] == "channel" and "seed 1: " in captured.err
    assert cli.main(["regroup", str(run), "--structure", "channel", "--workers", "1"]) == 2
    assert "structure: expected blocks such as 'block:16x16'" in capsys.readouterr().err.splitlines()[-1]
