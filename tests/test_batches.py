"""imp and one_shot with several trainings at once: the same figures, the same bits after an interruption, clear refusals."""

import types

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.tickets import batches
from sparselottery.tickets.store import Job


def make_model(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    return (centres[y] + 0.8 * torch.randn(count, 8, generator=generator)).double(), y


DATA = blobs(100, 0), blobs(40, 1), blobs(50, 2)
FIT = sl.Trainer(*DATA, batch_size=20, lr=0.01, budget=20, evaluate_every=5)
RUN = {"rounds": 2, "rate": 0.5, "seeds": 2}


def figures(result):
    return [
        value
        for entry in result.levels
        for kind in ("ticket", "reinit", "random-mask", "shuffle")
        if kind in entry
        for figure in ("test_accuracy", "validation_loss", "early_stop_iteration")
        for value in entry[kind][figure]["values"]
    ]


@pytest.mark.parametrize("rewind", ["init", "1ep"])
@pytest.mark.parametrize("many", [3, 100])
def test_the_same_figures_as_one_by_one(rewind, many):
    alone = sl.imp(make_model, FIT, rewind=rewind, **RUN)
    together = sl.imp(make_model, FIT.fit, rewind=rewind, replicas=many, **RUN)
    assert figures(together) == pytest.approx(figures(alone), rel=1e-6)
    for level in range(3):
        for seed in range(2):
            ours, theirs = together.ticket(level, seed), alone.ticket(level, seed)
            assert ours.masks == theirs.masks
            for key, value in ours.initial.items():
                torch.testing.assert_close(value, theirs.initial[key], rtol=1e-6, atol=1e-8)


def test_one_shot():
    alone = sl.one_shot(make_model, FIT, density=[0.5, 0.2], seeds=2)
    together = sl.one_shot(make_model, FIT, density=[0.5, 0.2], seeds=2, replicas=5)
    assert figures(together) == pytest.approx(figures(alone), rel=1e-6)


def test_a_run_that_goes_on_leaves_the_same_bits(tmp_path):
    whole = sl.imp(make_model, FIT, out=tmp_path / "whole", replicas=3, **RUN)
    sl.imp(make_model, FIT, out=tmp_path / "other", replicas=3, **RUN)
    lost = ["jobs/seed0-level01-shuffle.json", "jobs/seed1-level02-ticket.json", "jobs/seed1-level00-ticket.json"]
    for name in [*lost, "tickets/seed1-level01.safetensors"]:
        (tmp_path / "other" / name).unlink()
    again = sl.imp(make_model, FIT, out=tmp_path / "other", replicas=3, **RUN)
    assert figures(again) == figures(whole)
    for ticket in sorted((tmp_path / "whole" / "tickets").iterdir()):
        assert ticket.read_bytes() == (tmp_path / "other" / "tickets" / ticket.name).read_bytes()
    with pytest.raises(ValueError, match=r"out: .* replicas"):
        sl.imp(make_model, FIT, out=tmp_path / "other", **RUN)


def test_batches_are_of_one_level_and_independent_of_what_is_done():
    jobs = [Job(seed, level, kind) for seed in (0, 1) for level in (0, 1) for kind in ("ticket", "reinit")[: level + 1]]
    found = batches.batches(jobs, 3)
    assert [[(job.seed, job.level) for job in batch] for batch in found] == [
        [(0, 0), (1, 0)],
        [(0, 1), (0, 1), (1, 1)],
        [(1, 1)],
    ]


def model_on(kind):
    parameter = types.SimpleNamespace(device=types.SimpleNamespace(type=kind))
    return lambda: types.SimpleNamespace(parameters=lambda: iter([parameter]))


class Many:
    """A fit of a user's that can train many."""

    def __init__(self, reason=None):
        self.reason = reason

    def __call__(self, model, *, seed, budget):
        raise NotImplementedError

    def fit_many(self, models, *, seeds, budget):
        raise NotImplementedError

    def why_not_many(self, model):
        return self.reason


def test_what_the_device_favours():
    assert batches.how_many(None, Many(), model_on("cuda"), 1) == batches.MOST
    assert batches.how_many(None, Many("it branches"), model_on("cuda"), 1) == 1
    assert batches.how_many(None, Many(), model_on("cpu"), 1) == 1
    assert batches.how_many(None, Many(), model_on("cuda"), 2) == 1
    assert batches.how_many(None, print, model_on("cuda"), 1) == 1
    assert batches.how_many(7, Many(), model_on("cpu"), 1) == 7


def drops():
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).double()


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"replicas": 0}, ValueError, "replicas: expected at least 1, got 0"),
        ({"replicas": 2.0}, TypeError, "replicas: expected an int, got float"),
        ({"replicas": 2, "workers": 2}, ValueError, "replicas: expected 1 with 2 workers, got 2"),
        ({"replicas": 2, "fit": lambda model, *, seed, budget: None}, TypeError, "needs a fit that has fit_many"),
        (
            {"replicas": 2, "make_model": drops, "controls": ()},
            ValueError,
            r"replicas: 1 \(Dropout\) draws random numbers",
        ),
        (
            {"replicas": 2, "fit": sl.Trainer(*DATA, optimizer=torch.optim.LBFGS)},
            ValueError,
            "replicas: optimizer: LBFGS is not known",
        ),
    ],
)
def test_bad_input(arguments, error, says):
    arguments = {"make_model": make_model, "fit": FIT, **RUN} | arguments
    with pytest.raises(error, match=says):
        sl.imp(arguments.pop("make_model"), arguments.pop("fit"), **arguments)
