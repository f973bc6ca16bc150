"""Trainer.fit_many on a GPU: the same as one by one, and as on the CPU."""

import copy

import pytest
import torch

import sparselottery as sl
from sparselottery.experiments import models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def data(count, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=g).double()
    return x, x.flatten(1)[:, :10].argmax(1)


@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_same_as_one_by_one(name, optimizer):
    fit = sl.Trainer(
        data(120, 0), data(60, 1), data(60, 2), batch_size=20, budget=20, evaluate_every=5, optimizer=optimizer, lr=1e-3
    )
    together = []
    for seed in range(4):
        model = sl.sparsify(models.make(name, (1, 8, 8), 10, seed=seed)).double().to("cuda")
        sl.prune(model, density=(1.0, 0.5, 0.2, 0.1)[seed])
        together.append(model)
    apart, on_cpu = copy.deepcopy(together), [copy.deepcopy(model).cpu() for model in together]
    got = fit.fit_many(together, seeds=[0, 1, 2, 3])
    for found in (
        [fit.fit(model, seed=seed) for seed, model in enumerate(apart)],
        fit.fit_many(on_cpu, seeds=[0, 1, 2, 3]),
    ):
        for ours, theirs in zip(got, found, strict=True):
            assert [r.validation_loss for r in ours.records] == pytest.approx(
                [r.validation_loss for r in theirs.records], rel=1e-6
            )
    for a, b in zip(together, apart, strict=True):
        for key, value in a.state_dict().items():
            torch.testing.assert_close(value, b.state_dict()[key], rtol=1e-5, atol=1e-7)
