"""resident: that layers in C++ compute what the layers do."""

import copy
import itertools

import pytest
import residents
import torch
from residents import compare, convnet, gradients, mlp, randomize
from torch import nn

import sparselottery as sl


@pytest.fixture(autouse=True)
def in_cpp(tmp_path, monkeypatch):
    residents.in_cpp_only(tmp_path, monkeypatch)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("batch", [1, 5, 16, 33, 64, 130])
def test_linear_layers(density, batch):
    compare(mlp(density=density), torch.randn(batch, 20))


@pytest.mark.parametrize(
    ("training", "density", "batch"), list(itertools.product([False, True], [0.05, 0.4, 1.0], [5, 17, 40]))
)
def test_a_network_of_everything(training, density, batch):
    compare(convnet(density=density), torch.randn(batch, 3, 16, 16), training, tolerance=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (1, 3), padding="same"),
        nn.Conv2d(4, 6, 5, padding="valid", bias=False),
        nn.Conv2d(4, 6, 3, padding=(2, 0), stride=(1, 3)),
        nn.Conv2d(4, 6, 3, dilation=2, padding=2),
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.Conv2d(4, 7, 1),
        nn.Conv2d(4, 6, 9, padding=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_convolutions(layer, density):
    layer = copy.deepcopy(layer)
    compare(randomize(nn.Sequential(nn.ReLU(), layer, nn.ReLU()), density=density), torch.randn(19, 4, 9, 11))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d((2, 3), stride=1),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool2d((1, 4), stride=(2, 3)),
    ],
    ids=str,
)
def test_pools(pool):
    model = randomize(nn.Sequential(nn.Conv2d(2, 3, 1), pool, nn.Flatten()))
    compare(model, torch.randn(18, 2, 9, 10))


def test_max_pool_gives_ties_and_nan_to_whom_torch_does():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    with torch.no_grad():
        model[0].weight.fill_(1), model[0].bias.zero_()
    x = torch.zeros(3, 1, 4, 4)
    x[1] = 1
    for a, b in zip(gradients(sl.resident(model), x), gradients(model, x), strict=True):
        torch.testing.assert_close(a, b)
    x[2, 0, 1, 1] = torch.nan
    with torch.no_grad():
        assert torch.equal(sl.resident(model)(x).isnan(), model(x).isnan())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_frozen_batchnorm_gives_a_finite_gradient_to_an_input_that_is_not(value):
    model, x = convnet().eval()[:2], torch.randn(5, 3, 6, 6)
    x[1, 2, 3, 4] = value
    ours, layers = (gradients(m, x)[1] for m in (sl.resident(model), model))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, layers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [1, 0.7, 0.2])
def test_weights_in_any_layout(density):
    """channels_last is what image models are often kept in, a transposed linear weight is a view of another one."""
    for training in (True, False):
        model = convnet(density=density).to(memory_format=torch.channels_last)
        model[8].weight.data = model[8].weight.data.t().contiguous().t()
        assert not model[4].weight.is_contiguous()
        assert not model[8].weight.is_contiguous()
        assert set(sl.resident(model).where().values()) == {None}
        compare(model, torch.randn(9, 3, 16, 16).to(memory_format=torch.channels_last), training)
