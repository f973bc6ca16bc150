"""Mutual information and pruned neurons of a network on a GPU: what the CPU says."""

import pytest
import torch

import sparselottery as sl
from sparselottery.experiments import models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("sample", [16384, 64])
@pytest.mark.parametrize("name", ["lenet-300-100", "conv-bn-4"])
def test_bits_are_those_of_the_cpu(name, sample):
    x = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) * 40).long() % 4
    model = models.make(name, (1, 8, 8), 10)
    expected = sl.mutual_information(model, x, y, bins=4, sample=sample)
    found = sl.mutual_information(model.cuda(), x, y, bins=4, sample=sample)  # batches are moved to the model
    there = sl.mutual_information(model, x.cuda(), y.cuda(), bins=4, sample=sample)
    for layer, bits in expected.items():
        assert found[layer].device.type == "cpu" and torch.equal(found[layer], there[layer])
        assert torch.allclose(found[layer], bits, atol=0.05)  # a rounding may move a value over an edge
        assert (found[layer] - bits).abs().median() < 1e-6


def test_neurons_are_pruned_where_the_model_is():
    model = models.make("conv-bn-4", (1, 8, 8), 10).cuda().eval()
    optimizer = sl.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.rand(60, 1, 8, 8, device="cuda"), torch.arange(60, device="cuda") % 10
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    bits = sl.mutual_information(model, x, y)
    report = sl.prune_neurons(model, bits, density=0.5, scope="global", optimizer=optimizer)
    assert report.count == 48 and all(layer.mask.device.type == "cuda" for _, layer in sl.pruning.masked_modules(model))
    before = model(x)
    with torch.no_grad():
        model.bn2.bias[~report.kept["conv2"].cuda()] = 9.0
    assert torch.equal(model(x), before)
