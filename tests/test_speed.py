"""Measuring speed: what comes back, and that nothing is measured of a ticket that computes something else."""

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.experiments import hparams, models, runs, speed
from sparselottery.ops import dispatch


def make_model():
    return models.make("lenet-300-100", (1, 8, 8), 10)


@pytest.fixture
def ticket():
    model = sl.sparsify(make_model())
    sl.prune(model, density=0.1)
    return sl.Ticket.of(model, make_model())


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 1, 8, 8, generator=generator), torch.randint(10, (20,), generator=generator)


def test_ratios_are_dense_over_ticket(ticket, batch):
    threads = torch.get_num_threads()
    with dispatch.reproducible():  # measuring backends first would take longer than all the rest
        found = speed.measure_speed(ticket, make_model, batch, rounds=2, burst=0.001)
    for kind in ("train_step", "inference"):
        times = found[f"{kind}_us"]
        assert min(times.values()) > 0 and found[kind] == times["dense"] / times["ticket"]
    assert found["batch_size"] == 20 and found["density"] == pytest.approx(0.1, abs=1e-4)
    assert torch.get_num_threads() == threads


class Crooked(nn.Module):
    """Gives other outputs when it is masked, with or without gradients."""

    def __init__(self, wrong_when):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.wrong_when = wrong_when

    def forward(self, x):
        masked = isinstance(self.layer, sl.MaskedLinear)
        return self.layer(x.flatten(1)) * (2.0 if masked and torch.is_grad_enabled() == self.wrong_when else 1.0)


@pytest.mark.parametrize("wrong_when, message", [(False, "outputs differ"), (True, "training the ticket gives loss")])
def test_no_speed_of_something_else(batch, wrong_when, message):
    model = sl.sparsify(Crooked(wrong_when))
    sl.prune(model, density=0.1)
    with pytest.raises(RuntimeError, match=message):
        speed.measure_speed(sl.Ticket.of(model, model), lambda: Crooked(wrong_when), batch, rounds=1)


def test_the_rate_that_trained_the_ticket_does_not_disturb_the_measurement(tmp_path, monkeypatch):
    """At a rate made for SGD, Adam's rounding would part the two networks whose losses are compared."""
    asked = hparams.Imp(rounds=1, seeds=1, budget="4it", controls=(), optimizer="sgd", lr=0.5, momentum=0.9)
    result = runs.run_imp(asked, tmp_path, workers=1)
    result.found.update(level=1)
    monkeypatch.setattr(speed, "_interleaved", lambda functions, *_: dict.fromkeys(functions, 1.0))
    with dispatch.reproducible():
        assert speed.speed_of_run(result, asked)["train_step"] == 1
