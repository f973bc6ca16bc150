"""The papers' networks: their sizes, their initialization, what they refuse."""

import math

import pytest
import torch
from torch import nn

from sparselottery.experiments import models

SIZES = [
    ("lenet-300-100", (1, 28, 28), 266_200, 0),
    ("lenet-300-100", (1, 8, 8), 64 * 300 + 300 * 100 + 100 * 10, 0),
    ("conv-2", (3, 32, 32), 4_300_992, 38_592),
    ("conv-4", (3, 32, 32), 2_425_024, 259_776),
    ("conv-6", (3, 32, 32), 2_261_184, 1_144_512),
    ("resnet-20", (3, 32, 32), 270_896, 270_256),
    ("vgg-19", (3, 32, 32), 20_024_000, 20_018_880),
    ("conv-bn-4", (1, 8, 8), 17_552, 16_272),
]


@pytest.mark.parametrize("name, shape, everything, conv", SIZES)
def test_weight_counts_are_the_papers(name, shape, everything, conv):
    model = models.make(name, shape, 10)
    assert models.weights(model) == {"all": everything, "conv": conv}
    assert model.eval()(torch.zeros(2, *shape)).shape == (2, 10)
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    assert last == "output"


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-2", "resnet-20"])
def test_initialization_follows_the_seed_alone(name):
    before = torch.get_rng_state()
    first = models.make(name, (3, 8, 8), 10, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = (models.make(name, (3, 8, 8), 10, seed=s).state_dict() for s in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_weights_are_gaussian_glorot():
    layer = models.make("lenet-300-100", (1, 28, 28), 10).fc1
    deviation = math.sqrt(2 / (784 + 300))
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert (layer.weight.abs() > 2 * deviation).float().mean().item() == pytest.approx(
        0.0455, abs=0.003
    )  # a normal's tails
    assert not layer.bias.any()


def test_dropout_sits_before_each_fully_connected_layer():
    model = models.make("conv-2", (3, 8, 8), 10, dropout=0.5)
    kinds = [type(m).__name__ for m in model]
    after = [kinds[i + 1] for i, kind in enumerate(kinds) if kind == "Dropout"]
    assert after == ["Linear"] * 3 and all(m.p == 0.5 for m in model if isinstance(m, nn.Dropout))
    plain = models.make("conv-2", (3, 8, 8), 10)
    assert torch.equal(plain.fc1.weight, model.fc1.weight)  # dropout changes no initial weight


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lenet-5", (1, 28, 28), 10), "model: expected one of lenet-300-100"),
        (("conv-6", (3, 4, 4), 10), r"input_shape: expected an image that conv-6 can halve 3 times, got \[3, 4, 4\]"),
        (
            ("conv-bn-4", (1, 3, 8), 10),
            r"input_shape: expected an image that conv-bn-4 can halve 2 times, got \[1, 3, 8\]",
        ),
        (("resnet-20", (64,), 10), r"input_shape: expected \(channels, height, width\) for resnet-20"),
        (("lenet-300-100", (1, 8, 8), 0), "classes: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.make(*arguments)


@pytest.mark.parametrize("name, dropout", [("conv-2", 1.0), ("conv-2", -0.1), ("lenet-300-100", 0.5)])
def test_dropout_out_of_place_is_refused(name, dropout):
    with pytest.raises(ValueError, match="dropout: expected"):
        models.make(name, (3, 8, 8), 10, dropout=dropout)
