"""Densities of rounds, gradual pruning in any loop and in the trainer."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.pruning import rate_for, round_densities


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))


def data(count=60, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator), torch.randint(4, (count,), generator=generator)


def density(model):
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def test_rounds_keep_the_same_share():
    found = round_densities(0.0352, 15)
    assert len(found) == 15 and found[-1] == 0.0352
    ratios = [b / a for a, b in zip((1.0, *found), found, strict=False)]
    assert ratios == pytest.approx([0.0352 ** (1 / 15)] * 15)
    assert rate_for(0.8**7, 7) == pytest.approx(0.2) and round_densities(0.5, 1) == (0.5,)


def test_cubic_formula():
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 of the paper, with t0 = 100, dt = 50, n = 18, s_i = 0.2, s_f = 0.9."""
    schedule = sl.Gradual(0.1, begin=100, end=1000, every=50, initial=0.8)
    for k in range(19):
        sparsity = 0.9 + (0.2 - 0.9) * (1 - k * 50 / (18 * 50)) ** 3
        assert schedule.density_at(100 + 50 * k) == pytest.approx(1 - sparsity, abs=1e-12)
        assert schedule.due(100 + 50 * k)
    assert schedule.density_at(0) == schedule.density_at(99) == 0.8 and schedule.density_at(5000) == 0.1
    assert schedule.density_at(149) == schedule.density_at(100), "between two steps nothing goes"
    due = [t for t in range(1200) if schedule.due(t)]
    assert due == list(range(100, 1001, 50))
    falling = [schedule.density_at(t) for t in due]
    steps = [a - b for a, b in itertools.pairwise(falling)]
    assert steps == sorted(steps, reverse=True), "fast at first"


def test_the_last_step_is_taken_even_off_the_grid():
    schedule = sl.Gradual(0.5, begin=0, end=25, every=10)
    assert [t for t in range(40) if schedule.due(t)] == [0, 10, 20, 25]
    assert schedule.density_at(24) == schedule.density_at(20) > schedule.density_at(25) == 0.5


def test_fractions_of_the_training():
    schedule = sl.Gradual(0.2).over(400)
    assert (schedule.begin, schedule.end, schedule.every) == (0, 300, 4)
    assert sl.Gradual(0.2, begin=10, end=0.5, every=1).over(40) == sl.Gradual(0.2, begin=10, end=20, every=1)
    assert sl.Gradual(0.2, every=0.0).over(40).every == 1
    with pytest.raises(ValueError, match="begin: expected iterations, got the fraction"):
        sl.Gradual(0.2).due(3)
    with pytest.raises(ValueError, match="end: expected a step after begin"):
        sl.Gradual(0.2, begin=10, end=0.1).over(50)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, sl.optim.Adam])
def test_in_any_loop(optimizer):
    model, (x, y) = network(), data()
    optimizer = optimizer(model.parameters(), lr=0.01)
    schedule = sl.Gradual(0.15, begin=5, end=40, every=7, options={"scope": "layer", "rates": {"output": 0.5}})
    before = 1.0
    for iteration in range(1, 61):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        report = schedule(model, iteration, optimizer)
        assert (report is not None) == (schedule.due(iteration) and schedule.density_at(iteration) < 1)
        total = 240 + 600 + 80
        assert density(model) == round(schedule.density_at(iteration) * total) / total <= before
        before = density(model)
        for layer in model[::2] if iteration > 12 else ():
            assert not optimizer.state[layer.weight]["exp_avg"][~layer.mask.to_dense()].any()
    assert model[4].density > model[2].density


def test_in_the_trainer():
    trainer = sl.Trainer(data(), data(20, 2), data(20, 3), batch_size=20, budget=40, evaluate_every=10, lr=0.01)
    seen = []

    class Watched(sl.Gradual):
        def __call__(self, model, iteration, optimizer=None):
            report = super().__call__(model, iteration, optimizer)
            seen.append((iteration, density(model)))
            return report

    model = network()
    assert "schedule" in trainer.why_not_whole_step(sl.sparsify(network()), schedule=Watched(0.2))
    history = trainer(model, seed=0, schedule=Watched(0.2, begin=0.25, end=0.75, every=0.1))
    assert [i for i, _ in seen] == list(range(1, 41))
    schedule = sl.Gradual(0.2, begin=10, end=30, every=4)
    assert [d for _, d in seen] == [round(schedule.density_at(i) * 920) / 920 for i in range(1, 41)]
    assert len(history.records) == 4 and density(model) == 184 / 920
    again = network()
    assert trainer(again, seed=0, schedule=schedule) == history
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model[::2], again[::2], strict=True))


def test_a_function_will_do_as_a_schedule():
    calls = []
    trainer = sl.Trainer(data(), batch_size=20, budget=3)
    trainer(network(), schedule=lambda model, iteration, optimizer: calls.append((iteration, type(optimizer))))
    assert calls == [(i, sl.optim.Adam) for i in (1, 2, 3)]
    with pytest.raises(TypeError, match="schedule: expected a callable or None, got float"):
        trainer(network(), schedule=0.5)


BAD = [
    (dict(density=0), ValueError, "density: expected a fraction between 0 and 1, got 0"),
    (dict(density=1), ValueError, "density: expected a fraction between 0 and 1, got 1"),
    (dict(density="0.1"), TypeError, "density: expected a fraction between 0 and 1, got str"),
    (dict(density=0.5, initial=0.4), ValueError, "initial: expected a density above 0.5 and up to 1, got 0.4"),
    (dict(density=0.5, initial=1.5), ValueError, "initial: expected a density above 0.5"),
    (dict(density=0.5, power=0), ValueError, "power: expected a positive number, got 0"),
    (dict(density=0.5, begin=-1), ValueError, "begin: expected iterations (an int) or a fraction"),
    (dict(density=0.5, end=1.5), ValueError, "end: expected iterations (an int) or a fraction from 0 to 1 (a float)"),
    (dict(density=0.5, begin=float("nan")), ValueError, "begin: expected iterations (an int) or a fraction"),
    (dict(density=0.5, begin="1ep"), TypeError, "begin: expected iterations or a fraction of the training, got str"),
    (dict(density=0.5, begin=10, end=10), ValueError, "end: expected a step after begin (10), got 10"),
    (dict(density=0.5, every=0), ValueError, "every: expected at least 1 iteration, got 0"),
    (dict(density=0.5, options=[]), TypeError, "options: expected a mapping of arguments of sl.prune, got list"),
    (dict(density=0.5, options={"rate": 0.1}), ValueError, "options: expected other arguments of sl.prune than rate"),
]


@pytest.mark.parametrize("arguments, error, text", BAD)
def test_bad_schedules(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        sl.Gradual(**arguments)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((0, 3), ValueError, "density: expected a fraction between 0 and 1, got 0"),
        ((1.0, 3), ValueError, "density: expected a fraction between 0 and 1, got 1.0"),
        ((True, 3), TypeError, "density: expected a fraction between 0 and 1, got bool"),
        ((0.5, 0), ValueError, "rounds: expected at least 1, got 0"),
        ((0.5, 2.0), TypeError, "rounds: expected an int, got float"),
    ],
)
def test_bad_rounds(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        round_densities(*arguments)


def test_a_network_that_is_sparser_already():
    model = network()
    sl.prune(model, density=0.2)
    with pytest.raises(ValueError, match="prune never regrows"):
        sl.Gradual(0.1, begin=0, end=10, every=1)(model, 1)
