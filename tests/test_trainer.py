"""The shipped training loop: the same bits again, the early stop, rates, and equality with a plain loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery.masks import Mask
from sparselottery.nn.convert import sparsify
from sparselottery.training.trainer import Trainer


def blobs(count, seed):
    """Four noisy clusters in 8 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    return centres[y] + 0.8 * torch.randn(count, 8, generator=generator), y


TRAIN, VALIDATION, TEST = blobs(103, 0), blobs(40, 1), blobs(50, 2)


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))


def trainer(**options):
    options = {"batch_size": 10, "lr": 0.01, "budget": 60, "evaluate_every": 10} | options
    return Trainer(TRAIN, VALIDATION, TEST, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_the_same_bits_again_whatever_came_before(optimizer):
    outcomes = []
    for _ in range(2):
        model = network(dropout=0.3)
        history = trainer(optimizer=optimizer)(model, seed=5)
        outcomes.append((history, weights(model)))
        torch.rand(3)
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])
    other = network(dropout=0.3)
    trainer(optimizer=optimizer)(other, seed=6)
    assert not torch.equal(weights(other), outcomes[0][1])


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    trainer()(network(dropout=0.5), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_equals_a_plain_loop():
    ours, plain = network(), network()
    made = trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), budget=25)
    made(ours, seed=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for iteration in range(25):
        chosen = made.batch(3, iteration)
        optimizer.zero_grad()
        F.cross_entropy(plain(TRAIN[0][chosen]), TRAIN[1][chosen]).backward()
        optimizer.step()
    assert torch.equal(weights(ours), weights(plain))


def test_records_and_the_early_stop():
    history = trainer(evaluate_every=25)(network(), seed=0)
    assert [r.iteration for r in history.records] == [25, 50, 60]
    for record in history.records:
        assert record.train_loss > 0 and 0 <= record.validation_accuracy <= 1 and 0 <= record.test_accuracy <= 1
    losses = [r.validation_loss for r in history.records]
    assert history.validation_loss == min(losses)
    assert history.records[-1].test_accuracy > 0.8  # it learns


def test_recorded_figures_are_the_models():
    model = network()
    made = trainer(budget=20, evaluation_batch=7)
    record = made(model, seed=0).records[-1]
    with torch.no_grad():
        assert record.validation_loss == pytest.approx(
            F.cross_entropy(model(VALIDATION[0]), VALIDATION[1]).item(), rel=1e-5
        )
        assert record.test_accuracy == (model(TEST[0]).argmax(1) == TEST[1]).double().mean().item()
    assert made.evaluate(model, "test")[1] == record.test_accuracy
    assert model.training


def test_train_loss_is_the_mean_since_the_last_evaluation():
    made = trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.0), budget=20, evaluate_every=10)
    model = network()
    with torch.no_grad():
        expected = [
            sum(F.cross_entropy(model(TRAIN[0][b]), TRAIN[1][b]).item() for b in (made.batch(0, i) for i in block)) / 10
            for block in (range(10), range(10, 20))
        ]
    assert [r.train_loss for r in made(model, seed=0).records] == pytest.approx(expected, rel=1e-5)


def test_batches_cover_an_epoch_and_differ_between_epochs():
    made = trainer()
    assert made.steps_per_epoch == 10  # 103 examples in tens: three are left out
    epochs = [torch.cat([made.batch(0, 10 * e + i) for i in range(10)]) for e in range(2)]
    assert all(len(e.unique()) == 100 for e in epochs)
    assert not torch.equal(*epochs)
    assert Trainer(TRAIN, batch_size=500).batch_size == 103


def test_evaluating_test_data_only_where_it_counts():
    often, seldom = (trainer(evaluate_test=e, budget=100)(network(), seed=0) for e in ("always", "improved"))
    assert seldom.early_stop == often.early_stop and seldom.test_accuracy == often.test_accuracy is not None
    assert seldom.final_test_accuracy == often.final_test_accuracy is not None
    best = float("inf")
    for a, b in zip(often.records, seldom.records, strict=True):
        if a.validation_loss < best or a is often.records[-1]:
            assert a == b
        else:
            assert b.test_accuracy is None and a.validation_loss == b.validation_loss
        best = min(best, a.validation_loss)


def test_without_validation_or_test_data():
    history = Trainer(TRAIN, budget=3)(network(), seed=0)
    assert len(history.records) == 1 and history.test_accuracy is None and history.early_stop is None
    assert history.records[0].train_loss > 0


def test_patience_stops_for_good():
    history = trainer(lr=0.5, budget=2000, patience=3)(network(), seed=0)
    assert history.records[-1].iteration == history.early_stop_iteration + 30 < 2000


def test_snapshot_is_what_training_until_there_gives():
    model, until = network(), network()
    history = trainer()(model, seed=0, snapshot_at="1ep3it")
    trainer()(until, seed=0, budget=13)
    assert all(torch.equal(history.snapshot[k], v) for k, v in until.state_dict().items())
    initial = trainer()(network(), seed=0, snapshot_at=0).snapshot
    assert torch.equal(initial["0.weight"], network().state_dict()["0.weight"])
    assert trainer()(network(), seed=0).snapshot is None
    with pytest.raises(ValueError, match="snapshot_at: expected a step from 0 to 60, got '7ep'"):
        trainer()(network(), seed=0, snapshot_at="7ep")


def test_starting_later_goes_on_with_batches_and_rate():
    plain = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "warmup": 30,
        "milestones": [40],
    }  # no state to carry over
    whole, halves = network(), network()
    trainer(**plain)(whole, seed=0)
    trainer(**plain)(halves, seed=0, budget=25)
    history = trainer(**plain)(halves, seed=0, start_at=25)
    assert torch.equal(weights(whole), weights(halves))
    assert [r.iteration for r in history.records] == [30, 40, 50, 60]


def test_rates():
    made = trainer(warmup=4, milestones=["1ep", 20], gamma=0.5)
    assert [made.rate(i) for i in (0, 1, 3, 4, 9, 10, 19, 20)] == [0.25, 0.5, 1, 1, 1, 0.5, 0.5, 0.25]
    seen = []

    class Watch(torch.optim.SGD):
        def step(self):
            seen.append(self.param_groups[0]["lr"])

    trainer(optimizer=lambda p: Watch(p, lr=8.0), warmup=4, milestones=[5], gamma=0.5, budget=6)(network(), seed=0)
    assert seen == [2, 4, 6, 8, 8, 4]


def test_no_iterations_still_measure():
    history = trainer()(network(), seed=0, budget=0)
    assert history.records[0].iteration == 0 and history.records[0].train_loss is None
    assert history.records[0].test_accuracy is not None


def test_pruned_weights_stay_zero():
    model = sparsify(network())
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    model[0].set_mask(Mask.from_dense(mask))
    trainer(optimizer_options={"weight_decay": 0.1}, optimizer="adamw")(model, seed=0)
    assert not model[0].weight[~mask].any() and model[0].weight[mask].all()


def test_evaluation_keeps_every_modules_mode():
    model = network(dropout=0.5)
    model[0].eval()  # a frozen part
    before = [module.training for module in model.modules()]
    trainer().evaluate(model)
    assert [module.training for module in model.modules()] == before


def test_config_tells_what_decides():
    base = trainer().config()
    assert base == trainer().config()
    assert base != trainer(lr=0.02).config() and base != trainer(budget="7ep").config()
    assert base == trainer(budget="6ep").config()
    changed = copy.deepcopy(TRAIN)
    changed[0][3, 3] += 1
    assert base != Trainer(changed, VALIDATION, TEST, batch_size=10, lr=0.01, budget=60, evaluate_every=10).config()


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"evaluate_every": 2.5}, TypeError, "evaluate_every: expected an int, got float"),
        ({"optimizer": "rmsprop"}, ValueError, r"optimizer: expected one of \['adam', 'adamw', 'sgd'\] or a callable"),
        ({"budget": "soon"}, ValueError, "budget: expected iterations or a string"),
        ({"evaluate_test": "never"}, ValueError, 'evaluate_test: expected "always" or "improved"'),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        trainer(**options)


def test_bad_data_and_models():
    x, y = TRAIN
    with pytest.raises(TypeError, match="train: expected a pair of tensors"):
        Trainer(x)
    with pytest.raises(ValueError, match=r"train: expected x \[N, \*\] and y \[N\], got \[103, 8\] and \[50\]"):
        Trainer((x, y[:50]))
    with pytest.raises(TypeError, match=r"train: expected labels of dtype torch.int64, got torch.float32"):
        Trainer((x, y.float()))
    with pytest.raises(ValueError, match=r"test: expected examples of shape \[8\] as in train, got \[7\]"):
        Trainer(TRAIN, test=(x[:, :7], y))
    with pytest.raises(ValueError, match="train: expected at least one example"):
        Trainer((x[:0], y[:0]))
    with pytest.raises(ValueError, match="validation: expected at least one example"):
        Trainer(TRAIN, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="patience: expected validation data"):
        Trainer(TRAIN, patience=2)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        trainer()("model", seed=0)
    with pytest.raises(TypeError, match="seed: expected an int"):
        trainer()(network(), seed="zero")
    with pytest.raises(TypeError, match="optimizer: expected it to return a torch optimizer, got NoneType"):
        trainer(optimizer=lambda p: None)(network(), seed=0)
    with pytest.raises(ValueError, match="part: expected one of"):
        trainer().evaluate(network(), "tests")


def test_a_check_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    model[1].eval()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Trainer(TRAIN).check(model, snapshot_at="1ep")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training and model[0].training and not model[1].training
    with pytest.raises(ValueError, match="snapshot_at: expected a step from 0 to 5"):
        Trainer(TRAIN).check(model, budget=5, snapshot_at=6)
    with pytest.raises(ValueError, match="model: does not fit the data"):
        Trainer(TRAIN).check(nn.Linear(9, 4))
