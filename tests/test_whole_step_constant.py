"""Constant channels before BatchNorm, as masks without survivors leave them.

BatchNorm divides what rounding leaves of such a channel by the root of eps. Where its bias is 0, as in a new network, the sign of
that decides whether a ReLU behind it lets the channel's gradient through: training in C++ goes as through the modules only where
both round alike.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from test_network import build, gradients_of, make
from test_whole_step import assert_losses_alike, both_ways
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.training import whole_step

SHAPE = (3, 8, 10)
# The vector kernels fuse multiply and add, as torch's do; torch without vectors does as our portable ones.
FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
ISAS = [isa for isa in _ext.extension().cpu_isas() if (isa != "portable") == FUSES]


@pytest.fixture(params=ISAS)
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def convolutions():
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(160, 5),
    ]


def linears():
    return [
        nn.Flatten(),
        nn.Linear(240, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ]


def with_constant_channels(modules, seed):
    """Every second output of a layer before BatchNorm has lost all its weights, and has its bias left."""
    torch.manual_seed(seed)
    model = nn.Sequential(*modules)
    for m in model:
        m.reset_parameters() if hasattr(m, "reset_parameters") else None
    sl.sparsify(model)
    for m in model:
        if hasattr(m, "set_mask"):
            mask = torch.rand(m.weight.shape) < 0.4
            if m is not model[-1]:
                mask[::2] = False
            m.set_mask(mask)
    return model


@pytest.mark.parametrize("modules", [convolutions, linears])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options", [{"lr": 0.01}, {"lr": 0.05, "optimizer_options": {"momentum": 0.9, "weight_decay": 5e-4}}]
)
def test_losses_are_those_of_the_module_path(isa, monkeypatch, modules, seed, options):
    monkeypatch.setattr(whole_step, "_why_slower", lambda *_: None)
    model = with_constant_channels(modules(), seed)
    # Not the parameters: the gradient of a bias before BatchNorm is nothing but rounding, of which Adam would make full steps.
    assert_losses_alike(*both_ways(model, SHAPE, optimizer="sgd", **options))


@pytest.mark.parametrize("shape", [(7,), (7, 1, 1), (7, 3, 5)], ids=str)
@pytest.mark.parametrize("batch", [2, 60, 130])
def test_they_come_out_as_in_torch_to_the_bit(isa, shape, batch):
    norm = nn.BatchNorm1d(7) if len(shape) == 1 else nn.BatchNorm2d(7)
    nn.init.uniform_(norm.weight, 0.5, 2)
    for values in (torch.zeros(7), torch.linspace(0.1, 30, 7), torch.tensor([1e-30, 1e-6, -0.3, 7.7, -1e4, 1e8, 1e20])):
        x = values.view(1, 7, *[1] * (len(shape) - 1)).expand(batch, *shape).contiguous()
        network = make(nn.Sequential(norm), shape)
        y, dx, _ = gradients_of(network, nn.Sequential(norm), x, torch.ones(batch, *shape))
        assert torch.equal(y, norm(x))
        assert dx.isfinite().all()


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
def test_gradients_of_channels_that_are_nearly_constant(isa, spread):
    model = build([nn.BatchNorm2d(4)], None)
    x, grad = 3 + spread * torch.randn(40, 4, 6, 5), torch.randn(40, 4, 6, 5)
    _, ours, _ = gradients_of(make(model, (4, 6, 5)), model, x, grad)
    theirs, exact = (
        torch.autograd.grad(m.train()(inputs), inputs, grad.to(inputs))[0]
        for m, inputs in (
            (copy.deepcopy(model).to(t), x.to(t).requires_grad_()) for t in (torch.float32, torch.float64)
        )
    )
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()


def test_without_vector_instructions():
    """The portable kernels, against a torch without vectors."""
    if not FUSES:
        return  # then the tests above have run them
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    chosen = "(path and options0) or bit or nearly"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
