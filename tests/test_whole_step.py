"""Training in C++ against training through the modules."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.training import whole_step


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request, monkeypatch):
    monkeypatch.setattr(whole_step, "_DENSEST_PORTABLE", 1.0)
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def data(n=300, shape=(37,), seed=0, classes=5):
    features = math.prod(shape)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centers[y] + 0.7 * torch.randn(n, features, generator=g), y


def network(density=1.0, widths=(37, 50, 18, 5), bias=True, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers[:-1])
    if density < 1:
        sl.sparsify(model)
        sl.prune(model, density=density)
    return model


def both_ways(model, shape=(37,), **options):
    """(model, history) through the modules and in C++, from the same start."""
    results = []
    for whole in (False, True):
        settings = {"batch_size": 60, "budget": 100, "evaluate_every": 10, "lr": 1e-3} | options
        parts = [(x.view(-1, *shape), y) for x, y in (data(shape=shape), data(100, shape, 1), data(90, shape, 2))]
        trainer = sl.Trainer(*parts, whole_step=whole, **settings)
        trained = copy.deepcopy(model)
        assert (trainer.why_not_whole_step(trained) is None) == whole
        results.append((trained, trainer.fit(trained, seed=3)))
    return results


def assert_alike(modules, whole):
    """Losses within 1e-5, and the rest as close as that allows."""
    assert_losses_alike(modules, whole)
    for p, q in zip(whole[0].parameters(), modules[0].parameters(), strict=True):
        # As a whole: where a gradient is nothing but rounding, Adam moves a single weight by the learning rate.
        assert (p - q).norm() <= 2e-4 * q.norm() + 1e-6


def assert_losses_alike(modules, whole):
    (_, history), (_, found) = modules, whole
    assert [r.iteration for r in found.records] == [r.iteration for r in history.records]
    for a, b in zip(found.records, history.records, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5, abs=1e-5)
        assert a.validation_loss == pytest.approx(b.validation_loss, rel=1e-5, abs=1e-5)
        assert a.validation_accuracy == pytest.approx(
            b.validation_accuracy, abs=0.011
        )  # one of 100 may sit on the fence
        assert a.test_accuracy == pytest.approx(b.test_accuracy, abs=0.012)


@pytest.mark.parametrize("density", [1.0, 0.7, 0.3, 0.03])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"optimizer": "adam", "optimizer_options": {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.01}},
        {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}, "warmup": 30, "milestones": (50, 80)},
        {"optimizer": "sgd", "lr": 0.05},
        {
            "optimizer": "sgd",
            "lr": 0.02,
            "optimizer_options": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        },
        {"optimizer": "sgd", "lr": 0.02, "optimizer_options": {"momentum": 0.9, "dampening": 0.3}},
    ],
    ids=["adam", "adam-decay", "adamw-schedule", "sgd", "nesterov", "dampening"],
)
def test_losses_are_those_of_the_module_path(isa, density, options):
    assert_alike(*both_ways(network(density), **options))


@pytest.mark.parametrize("batch", [1, 7, 16, 64, 65, 130, 300])
def test_batches_of_any_size(isa, batch):
    assert_alike(*both_ways(network(0.3), batch_size=batch, budget=30, lr=1e-3))


@pytest.mark.parametrize("widths", [(37, 5), (37, 1, 5), (37, 3, 33, 17, 5)])
@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_widths_that_fill_no_vector(isa, widths, density, bias):
    assert_alike(*both_ways(network(density, widths, bias), budget=30))


def test_plain_and_masked_layers_together_and_a_relu_at_the_end():
    model = nn.Sequential(
        sl.MaskedLinear(37, 20), nn.Linear(20, 9), nn.Sequential(nn.ReLU(), nn.Linear(9, 5)), nn.ReLU()
    )
    model[0].set_mask(torch.rand(20, 37) < 0.2)
    assert_alike(*both_ways(model, budget=40))


def test_a_layer_without_survivors_and_unpruned_masks():
    model = sl.sparsify(network())
    assert_alike(*both_ways(model, budget=20))
    model[3].set_mask(torch.zeros(18, 50, dtype=torch.bool))
    assert_alike(*both_ways(model, budget=20))


def test_dead_weights_stay_exactly_zero():
    model = network(0.2)
    sl.Trainer(data(), optimizer="adamw", budget=50).fit(model, seed=0)
    for layer in model:
        if isinstance(layer, sl.MaskedLinear):
            assert (layer.weight[~layer.mask.to_dense()] == 0).all()
            assert layer.weight[layer.mask.to_dense()].ne(0).all()


def test_zeros_are_restored_before_it_starts():
    model = network(0.2)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    assert_alike(*both_ways(model, budget=20))


def test_same_bits_again_and_for_any_number_of_threads():
    outcomes = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            model = network(0.3, (37, 700, 300, 5))
            history = sl.Trainer(data(), data(100, seed=1), budget=30).fit(model, seed=1)
            outcomes.append((history.records, [p.detach().clone() for p in model.parameters()]))
        finally:
            torch.set_num_threads(1)
    for records, parameters in outcomes[1:]:
        assert records == outcomes[0][0]
        assert all(torch.equal(p, q) for p, q in zip(parameters, outcomes[0][1], strict=True))


def test_snapshot_and_start_at_are_the_steps_asked_for():
    options = {"batch_size": 60, "budget": 40, "evaluate_every": 15, "optimizer": "sgd", "lr": 0.05}
    trainer = sl.Trainer(data(), data(100, seed=1), **options)
    model, until = network(0.3), network(0.3)
    history = trainer.fit(model, seed=2, snapshot_at=17)
    trainer.fit(until, seed=2, budget=17)
    assert all(torch.equal(history.snapshot[k], v) for k, v in until.state_dict().items())
    rest = trainer.fit(until, seed=2, start_at=17)  # SGD without momentum has no state: the two halves are the whole
    assert all(torch.equal(p, q) for p, q in zip(until.parameters(), model.parameters(), strict=True))
    assert rest.records[-1].validation_loss == history.records[-1].validation_loss


def test_an_interruption_leaves_the_model_as_the_last_step_left_it(monkeypatch):
    model, expected = network(0.3), network(0.3)
    run, calls = whole_step.WholeStep.run, []

    def interrupted(self, order, factors):
        calls.append(len(factors))
        if len(calls) == 3:
            raise KeyboardInterrupt
        run(self, order, factors)

    monkeypatch.setattr(whole_step.WholeStep, "run", interrupted)
    trainer = sl.Trainer(data(), budget=60, evaluate_every=10)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, seed=0)
    monkeypatch.undo()
    trainer.fit(expected, seed=0, budget=sum(calls[:2]))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6, 1e30])
def test_losses_of_large_outputs_are_exact(shift):
    """exp overflows, and beside an output of 1e6 float32 has no place for a loss of 0.69: the largest is taken off first."""
    model = network(widths=(37, 5))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 0.0, -1e3, -1e3, -float("inf")]) + shift)
    x, _ = data()
    y = torch.arange(len(x)) % 2
    expected = F.cross_entropy(model.double()(x.double()), y).item()
    trainer = sl.Trainer((x, y), (x, y), budget=1, optimizer="sgd", lr=0.0)
    record = trainer.fit(model.float(), seed=0).records[-1]
    assert record.train_loss == pytest.approx(expected, rel=1e-6)
    assert record.validation_loss == pytest.approx(expected, rel=1e-6)


def test_ctrl_c_waits_for_so_much_work_and_no_longer(monkeypatch):
    run, calls = whole_step.WholeStep.run, []

    def noted(self, order, factors):
        calls.append(len(factors))
        run(self, order, factors)

    monkeypatch.setattr(whole_step.WholeStep, "run", noted)
    monkeypatch.setattr(whole_step, "WORK", 10 * 60 * 37 * 5)
    trainer = sl.Trainer(data(600), batch_size=60, budget="4ep", evaluate_every=15)
    trainer.fit(network(widths=(37, 5)), seed=0)
    assert sum(calls) == 40 and max(calls) == 10
    calls.clear()
    monkeypatch.setattr(whole_step, "WORK", 1)
    trainer.fit(network(widths=(37, 5)), seed=0)
    assert calls == [1] * 40


def test_what_is_not_a_number_is_not_hidden():
    x, y = data()
    x[5] = float("nan")
    history = sl.Trainer((x, y), data(100, seed=1), budget=10).fit(network(), seed=0)
    assert history.records[-1].train_loss != history.records[-1].train_loss
    assert history.records[-1].validation_loss != history.records[-1].validation_loss


def test_why_not():
    def reason(model=None, pairs=None, **options):
        return sl.Trainer(pairs or data(), **options).why_not_whole_step(model or network()) or ""

    assert reason() == ""
    assert "whole_step=False" in reason(whole_step=False)
    assert "not torch.nn.functional.cross_entropy" in reason(loss=lambda output, y: F.cross_entropy(output, y))
    assert "caller's own" in reason(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert "'amsgrad'" in reason(optimizer_options={"amsgrad": True})
    assert "a Dropout" in reason(nn.Sequential(nn.Linear(37, 9), nn.Dropout(0.5), nn.Linear(9, 5)))
    assert "not an nn.Sequential" in reason(nn.Linear(37, 5))
    assert "no layer with weights" in reason(nn.Sequential(nn.Flatten()), None, optimizer="sgd")
    assert "drops while training" in reason(nn.Sequential(nn.Linear(37, 9), nn.Dropout(0.5), nn.Linear(9, 5)).eval())
    assert "float32" in reason(network().double())
    assert "labels that are no class" in reason(network(widths=(37, 3)))
    assert "expected 36 channels or features, got 37" in reason(network(widths=(36, 5)))
    frozen = network()
    frozen[1].weight.requires_grad_(False)
    assert "not trained" in reason(frozen)
    shared = nn.Sequential(nn.Linear(37, 37), nn.Linear(37, 37), nn.Linear(37, 5))
    shared[1].weight = shared[0].weight
    assert "share a parameter" in reason(shared)
    hooked = network()
    hooked[3].register_forward_hook(lambda *_: None)
    assert "a Linear: it has a hook" in reason(hooked)
    own = network()
    own[3].forward = lambda x: x
    assert "a Linear: it has a hook" in reason(own)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        clipped = network()
        getattr(clipped[3].bias, register)(lambda g: None)
        assert "a hook on a parameter" in reason(clipped)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "a hook on all modules" in reason()
    everywhere.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in reason()
    one_memory = nn.Sequential(nn.Linear(37, 37), nn.Linear(37, 37), nn.Linear(37, 5))
    one_memory[1].weight.data = one_memory[0].weight.data
    assert "share a parameter" in reason(one_memory)
    lent, masked = network(), sl.MaskedLinear(37, 50)
    masked.set_mask(torch.rand(50, 37) < 0.2)
    masked.weight = lent[1].weight
    assert "a layer elsewhere masks" in reason(lent)
    packed = sl.pack(network(0.3))
    assert "PackedLinear" in reason(packed)


@pytest.mark.parametrize("masked", [False, True])
def test_parameters_that_are_smaller_than_the_layer_says_go_through_the_modules(masked):
    """C++ would read and write beyond their ends."""
    model = network(0.3 if masked else 1.0)
    model[3].bias = nn.Parameter(torch.zeros(1))
    assert "not of the shape" in sl.Trainer(data()).why_not_whole_step(model)
    if masked:
        return
    narrow = network()
    narrow[1].weight = nn.Parameter(narrow[1].weight.detach()[:20].clone())
    narrow[1].bias = nn.Parameter(narrow[1].bias.detach()[:20].clone())
    narrow[3].weight = nn.Parameter(narrow[3].weight.detach()[:, :20].clone())
    trainer = sl.Trainer(data(), budget=5)
    assert "not of the shape" in trainer.why_not_whole_step(narrow)
    trainer.fit(narrow, seed=0)


def test_large_dense_layers_are_left_to_a_library():
    def reason(density, batch):
        x = torch.zeros(300, 784), torch.zeros(300, dtype=torch.int64)
        return sl.Trainer(x, batch_size=batch).why_not_whole_step(network(density, (784, 1024, 10)))

    assert "large dense layers" in reason(1.0, 300)
    assert reason(1.0, 60) is None
    assert reason(0.2, 300) is None


def test_a_forced_backend_is_honoured(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")
    assert "SPARSELOTTERY_BACKEND=dense" in sl.Trainer(data()).why_not_whole_step(network())


def test_negative_views():
    x, y = data()
    negative = sl.Trainer((torch._neg_view(x), y), budget=5).fit(network(), seed=0)
    assert negative.records == sl.Trainer((-x, y), budget=5).fit(network(), seed=0).records


def test_errors_are_those_of_the_optimizer():
    with pytest.raises(ValueError, match="lr: expected a number of at least 0"):
        sl.Trainer(data(), lr=-1.0, budget=5).fit(network(), seed=0)
