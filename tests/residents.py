"""Networks for the tests of `sl.resident`, and what they are compared by."""

import copy

import torch
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.nn import resident_choice


def in_cpp(monkeypatch):
    """Whatever would be faster."""
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    monkeypatch.setattr(resident_choice, "choose", lambda *_: resident_choice.IN_CPP)


def in_cpp_only(tmp_path, monkeypatch):
    """With a cache of its own."""
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    in_cpp(monkeypatch)


def note_calls(monkeypatch):
    """What is called of the C++ networks, in order."""
    made, real = [], _ext.extension()

    class Noting:
        def __init__(self, *args, **kwargs):
            made.append("make")
            self.network = real.CpuNetwork(*args, **kwargs)

        def __getattr__(self, name):
            if name not in ("output_shape", "changed"):
                made.append(name)
            return getattr(self.network, name)

    class Extension:
        CpuNetwork = Noting

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(_ext, "extension", Extension)
    return made


def randomize(model, density=0.3, seed=0):
    """Masks of this density, and every parameter and statistic drawn."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan = module.weight[0].numel() * max(density, 0.1)
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * (2 / fan) ** 0.5)
        if density < 1 and isinstance(module, (nn.Linear, nn.Conv2d)):
            sl.sparsify(module)
            module.set_mask(torch.rand(module.weight.shape, generator=draw) < density)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.copy_(torch.randn(len(module.running_mean), generator=draw) / 4)
            module.running_var.copy_(torch.rand(len(module.running_var), generator=draw) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(len(module.weight), generator=draw))
                module.bias.copy_(torch.randn(len(module.bias), generator=draw))
    return model


def convnet(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10, bias=False),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    return randomize(model, **options)


def mlp(**options):
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5)), **options
    )


def gradients(model, x, grad=None, training=False):
    """y, dx, gradients of the parameters and the running statistics after forward and backward in float64 or as they come."""
    model.train(training)
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = list(model.parameters())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if grad is None else grad
    found = torch.autograd.grad(y, [x, *parameters], grad)
    return [y.detach(), *found, *(b.clone() for n, b in model.named_buffers() if "mask" not in n)]


def compare(model, x, training=False, tolerance=2e-5):
    """Resident against the layers in float64; every layer in C++."""
    exact = gradients(copy.deepcopy(model).double(), x.double(), training=training)
    ours = sl.resident(copy.deepcopy(model))
    assert not any(ours.train(training).where().values()), ours.where()
    found = gradients(ours, x, training=training)
    assert len(found) == len(exact)
    for a, b in zip(found, exact, strict=True):
        scale = float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(scale, 0.02))
    for name, layer in ours.named_modules():
        if isinstance(layer, sl.MaskedLinear | sl.MaskedConv2d):
            dead = found[2 + [n for n, _ in ours.named_parameters()].index(f"{name}.weight")][~layer.mask.to_dense()]
            assert not dead.any(), "gradients off the mask are zero"
