"""What a caller of the trainer can put into its loop: a penalty on the model, and a look at it after every epoch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_trainer import TEST, TRAIN, VALIDATION, network, trainer, weights
from torch import nn

from sparselottery.training.trainer import Trainer


def test_on_epoch_is_called_after_every_whole_epoch_and_changes_nothing():
    seen, plain, hooked = [], network(), network()
    own = trainer(whole_step=False, budget=35)
    expected = own(plain, seed=1)
    history = own(hooked, seed=1, on_epoch=lambda model, epoch: seen.append((epoch, model is hooked)))
    assert seen == [(1, True), (2, True), (3, True)]  # 103 examples: 10 iterations each; the last half epoch is none
    assert history == expected and torch.equal(weights(plain), weights(hooked))


def test_on_epoch_ends_the_training_with_an_evaluation_there():
    model = network()
    history = trainer(evaluate_every=25)(model, seed=1, on_epoch=lambda model, epoch: epoch == 3)
    assert [r.iteration for r in history.records] == [25, 30]
    assert history.records[-1].test_accuracy is not None
    same = network()
    trainer(evaluate_every=25, whole_step=False)(same, seed=1, budget=30)
    assert torch.equal(weights(model), weights(same))


def test_epochs_count_from_the_beginning_where_training_starts_later():
    seen = []
    trainer()(network(), seed=1, budget="4ep", start_at="2ep", on_epoch=lambda model, epoch: seen.append(epoch))
    assert seen == [3, 4]


def test_penalty_joins_every_minibatchs_loss():
    def penalty(model):
        return 0.05 * sum(p.abs().sum() for p in model.parameters())

    model, plain = network(), network()
    own = trainer(optimizer="sgd", lr=0.1, budget=7)
    history = own(model, seed=2, penalty=penalty)
    optimizer, losses = torch.optim.SGD(plain.parameters(), lr=0.1), []
    for i in range(7):
        chosen = own.batch(2, i)
        loss = F.cross_entropy(plain(TRAIN[0][chosen]), TRAIN[1][chosen])
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + penalty(plain)).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    assert history.records[-1].train_loss == pytest.approx(sum(losses) / 7, rel=1e-5)  # without the penalty


@pytest.mark.parametrize("hook", ["penalty", "on_epoch"])
def test_hooks_keep_training_out_of_cpp_and_must_be_callable(hook):
    own, model = trainer(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert own.why_not_whole_step(model) is None
    assert own.why_not_whole_step(model, **{hook: lambda *_: None}) == f"{hook} looks at the modules"
    with pytest.raises(TypeError, match=f"{hook}: expected a callable or None, got int"):
        own(model, **{hook: 3})


def test_hooked_training_of_a_mlp_is_that_of_its_modules():
    first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    second = copy.deepcopy(first)
    trainer()(first, seed=3, on_epoch=lambda model, epoch: None)
    trainer(whole_step=False)(second, seed=3)
    assert torch.equal(weights(first), weights(second))


def test_epochs_and_example():
    own = Trainer(TRAIN, VALIDATION, TEST, batch_size=10, budget="3ep")
    assert (own.epochs(), own.epochs(25), own.epochs("7ep")) == (3, 2, 7)
    assert torch.equal(own.example(), TRAIN[0][:2])
