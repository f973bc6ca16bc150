"""Trainer.fit_many: several models at once give what one by one gives, each with its own mask, seed, history and early stop.

In float64, where 50 steps leave differences of rounding alone: in float32 ReLU and pooling let them grow.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.experiments import models
from sparselottery.nn import masked_modules

DENSITIES = (1.0, 0.5, 0.2, 0.05)


def data(count=130, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, size, size, generator=g).double()
    return x, (x.flatten(1)[:, :10].argmax(1) + torch.randint(0, 2, (count,), generator=g)) % 10


def trainer(**options):
    options = {"batch_size": 20, "budget": 50, "evaluate_every": 10, "lr": 2e-3} | options
    return sl.Trainer(data(), data(60, 1), data(50, 2), **options)


def lenet(seed):
    return models.make("lenet-300-100", (1, 8, 8), 10, seed=seed)


def small_conv(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def replicas(make, densities=DENSITIES):
    found = []
    for seed, density in enumerate(densities):
        model = sl.sparsify(make(seed)).double()
        if density < 1:
            sl.prune(model, density=density)
        found.append(model)
    return found


def compare(trainer, together, seeds, tolerance=1e-7, **steps):
    apart = copy.deepcopy(together)
    got = trainer.fit_many(together, seeds=seeds, **steps)
    want = [trainer.fit(model, seed=seed, **steps) for model, seed in zip(apart, seeds, strict=True)]
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert [r.iteration for r in ours.records] == [r.iteration for r in theirs.records]
        for name in ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy"):
            a, b = ([getattr(r, name) for r in h.records] for h in (ours, theirs))
            assert [v is None for v in a] == [v is None for v in b], name
            near = max(tolerance, 1e-5) if name == "train_loss" else tolerance  # `fit` sums it in float32
            numbers = [[v for v in values if v is not None] for values in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], rel=near), name
        assert ours.early_stop_iteration == theirs.early_stop_iteration
        assert (ours.snapshot is None) == (theirs.snapshot is None)
        if ours.snapshot is not None:
            assert_states(ours.snapshot, theirs.snapshot, tolerance)
    for a, b in zip(together, apart, strict=True):
        assert_states(a.state_dict(), b.state_dict(), tolerance)
        assert all(x.training == y.training for x, y in zip(a.modules(), b.modules(), strict=True))
    for model in together:
        for _, layer in masked_modules(model):
            assert (layer.weight[~layer.mask.to_dense()] == 0).all()
    return got


def assert_states(got, want, tolerance):
    assert got.keys() == want.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=tolerance, atol=tolerance, msg=key)


OPTIMIZERS = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "optimizer_options": {"momentum": 0.9, "weight_decay": 1e-3}},
    "adamw": {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}},
    "torch adam": {"optimizer": lambda p: torch.optim.Adam(p, lr=2e-3)},
    "torch sgd": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)},
}


@pytest.mark.parametrize("make", [lenet, small_conv])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_same_as_one_by_one(make, options):
    compare(trainer(**options), replicas(make), [3, 1, 4, 1])


def test_float32_too():
    together = [model.float() for model in replicas(lenet)]
    pairs = [(x.float(), y) for x, y in (data(), data(60, 1))]
    compare(sl.Trainer(*pairs, batch_size=20, budget=20, evaluate_every=10), together, [0, 1, 2, 3], tolerance=1e-3)


def test_residual_network():
    make = lambda seed: models.make("resnet-20", (1, 8, 8), 10, seed=seed)  # noqa: E731
    compare(trainer(budget=6, evaluate_every=3), replicas(make, (1.0, 0.3)), [0, 1])


@pytest.mark.parametrize("evaluate_test", ["always", "improved"])
def test_early_stops_are_each_ones_own(evaluate_test):
    together = replicas(lenet, (1.0, 0.5, 0.2, 0.05, 0.01))
    fit = trainer(lr=2e-2, evaluate_every=2, patience=2, evaluate_test=evaluate_test)
    histories = compare(fit, together, [0, 1, 2, 3, 4], tolerance=1e-5)
    lengths = [len(history.records) for history in histories]
    assert len(set(lengths)) > 1, "all stopped together: this shows nothing"


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_of_those_that_go_on(options):
    """One replica stops at once, the others keep their optimizers' state."""
    together = replicas(small_conv, (1.0, 0.3, 0.2))
    with torch.no_grad():
        for p in together[1].parameters():
            p.fill_(float("nan"))
    fit = trainer(**options, evaluate_every=5, patience=2, budget=30)
    apart = copy.deepcopy(together)
    got = fit.fit_many(together, seeds=[0, 1, 2])
    assert len(got[1].records) == 2
    for i in (0, 2):
        want = fit.fit(apart[i], seed=i)
        assert [r.validation_loss for r in got[i].records] == pytest.approx([r.validation_loss for r in want.records])
        assert_states(together[i].state_dict(), apart[i].state_dict(), 1e-7)


def test_schedule_snapshot_and_start():
    fit = trainer(warmup=5, milestones=["1ep", 20], gamma=0.3)
    compare(fit, replicas(lenet), [0, 1, 2, 3], snapshot_at="1ep2it", budget=30)
    histories = compare(fit, replicas(lenet), [0, 1, 2, 3], start_at=8, snapshot_at=8)
    assert all(history.snapshot is not None for history in histories)
    nothing = compare(fit, replicas(lenet), [0, 1, 2, 3], budget=0)
    assert [len(history.records) for history in nothing] == [1] * 4


def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.middle, self.again, self.end = (
                nn.Linear(n, m) for n, m in ((64, 30), (30, 30), (30, 30), (30, 10))
            )
            self.again.weight = self.middle.weight
            self.end.weight.requires_grad_(False)

        def forward(self, x):
            return self.end(self.again(self.middle(self.fc1(x.flatten(1)).relu()).relu()).relu())

    def make(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Tied()

    together = replicas(make, (1.0, 0.3))
    frozen = [model.end.weight.clone() for model in together]
    compare(trainer(budget=20), together, [0, 1])
    assert all(m.again.weight is m.middle.weight for m in together)
    assert all(torch.equal(m.end.weight, w) for m, w in zip(together, frozen, strict=True))


def test_a_loss_of_ones_own_and_no_validation():
    def loss(output, y):
        return F.nll_loss(output.log_softmax(-1), y) + 0.01 * output.square().mean()

    fit = sl.Trainer(data(), batch_size=20, budget=20, evaluate_every=10, loss=loss)
    compare(fit, replicas(lenet), [0, 1, 2, 3])


def test_plain_models():
    compare(trainer(budget=10), [lenet(s).double() for s in range(3)], [0, 1, 2])


class Average(nn.Module):
    """Counts in place and puts a new tensor in place of the average, as a module of one's own may."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(64, dtype=torch.float64))

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.seen += len(x)
            self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.fc(x - self.average)


def test_buffers_that_a_forward_replaces():
    found = [Average().double() for _ in range(3)]
    compare(trainer(budget=10, patience=1), found, [0, 1, 2])
    assert found[0].seen == 200 and not torch.equal(found[0].average, found[1].average)


def weight_normed():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))
    return nn.Sequential(nn.Flatten(), linear).double()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_parametrized_layers():
    """Each has a class of its own, made when it was parametrized."""
    fit = trainer(budget=10)
    assert fit.why_not_many(weight_normed()) is None
    compare(fit, [weight_normed() for _ in range(2)], [0, 1])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.lstm(x.squeeze(1))[0][:, -1])


def test_what_torch_cannot_batch_is_a_reason_and_no_crash():
    fit = trainer()
    assert "the model: cannot be trained as a batch (Batching rule not" in fit.why_not_many(Recurrent().double())
    with pytest.raises(ValueError, match="models: cannot be trained as a batch"):
        fit.fit_many([Recurrent().double() for _ in range(2)], seeds=[0, 1])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        y = self.fc(x.flatten(1))
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    "make, seeds, error, says",
    [
        (
            lambda: [lenet(0).double(), small_conv(1).double()],
            [0, 1],
            ValueError,
            r"models\[1\]: expected the architecture",
        ),
        (lambda: [lenet(0).double(), lenet(1)], [0, 1], ValueError, r"models\[1\]: expected the architecture, dtypes"),
        (
            lambda: [models.make("conv-2", (1, 8, 8), 10, dropout=0.5).double()],
            [0],
            ValueError,
            r"models\[0\]: dropout1 \(Dropout\) draws random numbers",
        ),
        (lambda: [sl.pack(m) for m in replicas(lenet)], [0, 1, 2, 3], ValueError, r"models\[0\]: fc1 .* is packed"),
        (lambda: [Branches().double()], [0], ValueError, "models: cannot be trained as a batch"),
        (lambda: [lenet(0).double().requires_grad_(False)], [0], ValueError, "no parameter to train"),
        (lambda: [lenet(0).double()] * 2, [0, 1], ValueError, "got one of them twice"),
        (lambda: [lenet(0).double()], [0, 1], ValueError, "seeds: expected one for each"),
        (list, [], ValueError, "seeds: expected one for each of at least one model"),
        (lambda: [lenet(0).double()], 3, TypeError, "seeds: expected a sequence of ints"),
        (lambda: lenet(0), [3], TypeError, "models: expected a sequence"),
    ],
)
def test_bad_input(make, seeds, error, says):
    with pytest.raises(error, match=says):
        trainer().fit_many(make(), seeds=seeds)


def test_a_loss_for_each_example_is_refused():
    together = [lenet(s).double() for s in range(2)]
    before = copy.deepcopy(together[0].state_dict())
    fit = trainer(loss=lambda output, y: F.cross_entropy(output, y, reduction="none"))
    with pytest.raises(TypeError, match=r"loss: expected it to return a scalar tensor, got \[20\]"):
        fit.fit_many(together, seeds=[0, 1])
    assert_states(together[0].state_dict(), before, 0)


def test_an_optimizer_that_looks_at_whole_tensors():
    fit = trainer(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="optimizer: LBFGS is not known to treat every element"):
        fit.fit_many(replicas(lenet), seeds=[0, 1, 2, 3])
