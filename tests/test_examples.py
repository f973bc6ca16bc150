"""The examples run, with small settings, and leave a ticket of the density they say."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import sparselottery as sl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEXT = " ".join(f"{i} lottery tickets, {i * i} of them winning;" for i in range(120))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example as a program in an empty folder; returns what it printed and the ticket it wrote."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--out", "ticket.safetensors"])
        state = torch.get_rng_state()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        torch.set_rng_state(state)
        printed = capsys.readouterr().out
        ticket = sl.Ticket.load(tmp_path / "ticket.safetensors")
        assert f"{ticket.count} of {ticket.total} weights: ticket.safetensors" in printed
        return printed, ticket

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_plain_loop(run):
    printed, ticket = run("plain_loop.py", "--rounds", 2, "--steps", 30, "--seeds", 1)
    assert ticket.total == 64 * 300 + 300 * 100 + 100 * 10
    assert ticket.count == 10 * 10 * 9 * 0.9 + 0.64 * 49200  # the output layer at half the rate
    levels = re.findall(r"([\d.]+) % of the weights: .*'ticket': '([\d.]+) %'", printed)
    assert [float(density) for density, _ in levels] == [100, 80.2, 64.34]
    assert all(float(accuracy) > 50 for _, accuracy in levels) and printed.count("reinit") == 2


def test_transformer_ticket(run, text):
    printed, ticket = run("transformer_ticket.py", text, "--rounds", 2, "--steps", 12, "--rewind", 3, "--context", 16)
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", printed)]
    assert len(losses) == 3 and all(loss < 3.8 for loss in losses)
    assert ticket.total == 2 * 12 * 64 * 64 + 64 * len(set(TEXT))
    blocks = sum(mask.count for name, mask in ticket.masks.items() if name != "output")
    assert blocks == round(round(98304 * 0.8) * 0.8) and ticket.masks["output"].density == 1


def test_transformer_ticket_wants_enough_text(run, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="2"):
        run("transformer_ticket.py", tmp_path / "short.txt")
    assert "text: expected more than 660 letters, got 9" in capsys.readouterr().err


def test_hf_trainer_callback(run, text, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    options = ("--density", 0.25, "--steps", 10, "--context", 16, "--width", 16, "--folder", tmp_path / "run")
    printed, ticket = run("hf_trainer_callback.py", text, *options)
    assert ticket.count == round(0.25 * ticket.total) and ticket.total == 2 * 12 * 16 * 16
    densities = [float(d) for d in re.findall(r"'density': '?([\d.]+)", printed)]
    assert densities[-1] == 0.25 and densities == sorted(densities, reverse=True) and densities[0] > 0.25
    from safetensors.torch import load_file

    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*/model.safetensors")
    saved = load_file(checkpoint)
    for name, mask in ticket.masks.items():
        assert (saved[f"{name}.weight"][~mask.to_dense()] == 0).all()
        assert torch.equal(saved[f"{name}.weight_mask"], mask.words)


def test_cartpole_ticket(run):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    printed, ticket = run(
        "cartpole_ticket.py", "--rounds", 1, "--rate", 0.3, "--episodes", 5, "--longest", 30, "--seeds", 2
    )
    assert ticket.total == 4 * 64 + 64 * 64 + 64 * 2 and ticket.density == pytest.approx(0.7, abs=0.01)
    returns = [float(mean) for mean in re.findall(r"mean return (\d+) ±", printed)]
    assert len(returns) == 3 and all(5 < mean <= 30 for mean in returns)


def test_every_example_is_here_and_in_the_readme():
    files = {path.name for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r"run\(\s*\"(\w+\.py)\"", Path(__file__).read_text()))
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert files == tested == listed
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120
