"""Refilled and regrouped tickets of a run: what they keep, what they start from, and the loud ends."""

import json
import shutil

import pytest
import torch

import sparselottery as sl
from sparselottery import analysis, cli
from sparselottery.experiments import restructure as module
from sparselottery.experiments import runs
from sparselottery.experiments.hparams import Imp
from sparselottery.experiments.restructure import restructure
from sparselottery.report import write_report
from sparselottery.tickets.result import Result
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


def test_what_is_there_is_used_again_and_what_is_missing_or_changed_is_made(run, monkeypatch):
    first = restructure(run, "refill", level=1)
    files = sorted((run / "refill-level01").iterdir())
    before = [path.read_bytes() for path in files]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_train", lambda *_: pytest.fail("nothing is to be trained"))
        assert restructure(run, "refill", level=1) == first
    told = []
    (run / "refill-level01" / "seed1.json").unlink()  # stopped while it trained
    (run / "refill-level01" / "seed0.safetensors").write_bytes(b"torn")
    assert restructure(run, "refill", level=1, tell=told.append) == first
    assert [path.read_bytes() for path in files] == before
    assert told[0].startswith("refill: training 2 tickets, about ") and told[-1] == "seed 1: trained"
    other = restructure(run, "refill", level=1, exclude=("fc1", "output"))
    assert other["covered"] != first["covered"] and other["test_accuracy"] != first["test_accuracy"]
    assert restructure(run, "refill", level=1) == first


def test_two_workers_find_the_same(run):
    first = restructure(run, "refill", level=2)
    shutil.rmtree(run / "refill-level02")
    assert restructure(run, "refill", level=2, workers=2) == first


def test_the_report_shows_every_level(run):
    found = [restructure(run, "refill", level=level) for level in (1, 2)]
    (figure,) = analysis.figures("refill", analysis.read(run, "refill")["numbers"])
    assert [row[0] for row in figure.rows] == [
        "dense", "level 1, single weights", "level 1, channels", "level 2, single weights", "level 2, channels"
    ]  # fmt: skip
    assert figure.rows[4][3:] == [f"{100 * found[1][name]:.1f}" for name in ("covered", "by_chance")]
    assert figure.rows[0][2].startswith(f"{100 * Result.load(run).levels[0]['ticket']['test_accuracy']['mean']:.2f}")
    page = write_report(run).read_text()
    assert "Tickets refilled to whole channels" in page and f"sparselottery refill {run} --level 2" in page
    assert "% by chance." in page


def test_chance_is_what_random_masks_keep():
    """Survivors anywhere: the channels of a layer hold as large a part of them as of all weights."""
    torch.manual_seed(0)
    model = sl.sparsify(torch.nn.Sequential(torch.nn.Linear(400, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10)))
    sl.prune(model, density=0.3, criterion="random", scope="layer")
    report = sl.refill(model, exclude=["2"])
    assert report.by_chance == pytest.approx(60 / 200) and report.covered == pytest.approx(0.3, abs=0.03)
    sl.prune(model, density=0.1, structure="channel", exclude=["2"])
    (first,) = [layer for name, layer in sl.pruning.masked_modules(model) if name == "0"]
    kept = first.mask.count / first.mask.numel
    report = sl.refill(model, exclude=["2"])
    assert report.covered == 1 and report.by_chance == pytest.approx(kept)


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="how: expected one of refill, regroup, got 'melt'"):
        restructure(run, "melt")
    with pytest.raises(ValueError, match=r"level: expected one of \[1, 2\], got 7"):
        restructure(run, "refill", level=7)
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        restructure(tmp_path / "none", "refill")
    assert module.HOW == ("refill", "regroup")


def test_the_commands(run, capsys):
    shutil.rmtree(run / "refill-level02", ignore_errors=True)
    for told in ("seed 1: trained\n", "refill: there already\n"):
        assert cli.main(["refill", str(run), "--level", "2", "--workers", "1", "--json"]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert found["structure"] == "channel" and told in captured.err
    assert cli.main(["regroup", str(run), "--structure", "channel", "--workers", "1"]) == 2
    assert "structure: expected blocks such as 'block:16x16'" in capsys.readouterr().err.splitlines()[-1]
