"""Averages of masked models (torch.optim.swa_utils): masks follow the model, weights are averaged, nothing else lives."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import sparselottery as sl

WAYS = {
    "mean": {},
    "mean, one by one": {"avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def trained(model, steps):
    """The states of the weights after each of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(steps):
        model(torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield copy.deepcopy(model[0].weight.detach())


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_average_has_its_models_masks(way, use_buffers):
    model = convnet()
    sl.prune(model, density=0.5)
    average = AveragedModel(model, use_buffers=use_buffers, **WAYS[way])
    seen = []
    for i, weight in enumerate(trained(model, 4)):
        if i == 2:
            sl.prune(model, density=0.3)
            weight = model[0].weight.detach().clone()
        average.update_parameters(model)
        seen.append(weight)
    x = torch.randn(2, 3, 6, 6)
    average.eval()(x)
    for ours, theirs in ((average.module[i], model[i]) for i in (0, 4)):
        assert torch.equal(ours.weight_mask, theirs.weight_mask) and ours.density == theirs.density
        assert (ours.weight[~theirs.mask.to_dense()] == 0).all()
    keep = model[0].mask.to_dense()
    if way.startswith("mean"):
        torch.testing.assert_close(average.module[0].weight[keep], torch.stack(seen).mean(0)[keep])
    else:
        ema = seen[0]
        for weight in seen[1:]:
            ema = 0.9 * ema + 0.1 * weight
        torch.testing.assert_close(average.module[0].weight[keep], ema[keep])
    sl.Ticket.of(average.module, average.module)  # a ticket of an average can be made


def test_layers_masked_after_the_average_was_made():
    model = convnet()
    average = AveragedModel(model)
    sl.prune(model, density=0.5)
    with pytest.raises(ValueError, match="model: expected 0 masked layers as in its AveragedModel, got 2; make the"):
        average.update_parameters(model)


def test_averages_of_plain_models_are_left_alone():
    sl.sparsify(nn.Linear(3, 3))
    model = convnet()
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].running_mean.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, model[0].weight - 0.5)
    torch.testing.assert_close(average.module[1].running_mean, model[1].running_mean - 0.5)
