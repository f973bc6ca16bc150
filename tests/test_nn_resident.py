"""resident: which layers run in C++, that they compute what the layers do, and that nobody can tell otherwise."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparselottery as sl
from sparselottery import _ext
from sparselottery.nn.resident import Resident


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch):
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


def test_runs_and_reasons():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 2), nn.Identity()),
        nn.Flatten(),
        nn.Linear(4 * 5 * 5, 3),
        nn.Softmax(1),
    )
    ours, x = sl.resident(model), torch.randn(5, 3, 8, 8)
    why = {
        "2": "GELU is not known to it",
        "3": "Dropout drops while training",
        "4": "padding_mode='reflect'",
        "5": None,
        "9": "Softmax is not known to it",
    }
    assert ours.where() == {"0": None, "1": None} | why | {"6.0": None, "6.1": None, "7": None, "8": None}
    assert "3 runs by itself: Dropout drops while training" in repr(ours)
    ours.eval()
    assert ours.where()["3"] == "no layer with weights beside it"
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    assert "all in C++" in repr(sl.resident(mlp()))


def test_one_call_each_way(calls):
    model, x = sl.resident(convnet().eval()), torch.randn(4, 3, 16, 16)
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert calls == ["make", "record", "backward", "forward"]


def test_the_same_parameters_and_keys():
    model = convnet()
    ours = sl.resident(model)
    assert type(ours) is Resident and ours.training and not sl.resident(model.eval()).training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in model.parameters()]
    assert list(ours.state_dict()) == list(model.state_dict())
    assert type(ours[2:5]) is Resident and ours[0] is model[0]
    named = nn.Sequential()
    named.add_module("first", nn.Linear(3, 3))
    assert list(sl.resident(named).state_dict()) == ["first.weight", "first.bias"]


def train(model, optimizer, steps=4, batch=16, closure=None):
    losses = []
    for i in range(steps):
        draw = torch.Generator().manual_seed(i)
        x, y = torch.randn(batch, 3, 16, 16, generator=draw), torch.randint(4, (batch,), generator=draw)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if closure:
            closure(i)
    return losses


class Data(torch.optim.Optimizer):
    """Writes as old optimizers do: no version moves."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: sl.optim.Adam(p, lr=0.01),
        lambda p: sl.optim.SGD(p, lr=0.1),
        Data,
    ],
)
def test_training_goes_as_with_the_layers(make):
    model = convnet().train()
    other = sl.resident(copy.deepcopy(model))
    expected, found = train(model, make(model.parameters())), train(other, make(other.parameters()))
    assert found == pytest.approx(expected, rel=2e-3) and expected[0] != expected[-1]
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-2, atol=2e-3, msg=name)
    assert int(other[1].num_batches_tracked) == 4


def test_pruning_between_steps(calls):
    model = convnet(density=0.6).train()
    other = sl.resident(copy.deepcopy(model))
    both = []
    for m in (model, other):
        optimizer = sl.optim.SGD(m.parameters(), lr=0.05)
        both.append(train(m, optimizer, closure=lambda i, m=m: i == 1 and sl.prune(m, density=0.3)))
    assert both[0] == pytest.approx(both[1], rel=2e-3)
    assert calls.count("make") == 2, "with the mask that it had and the one that it got"
    assert all(not layer.weight[~layer.mask.to_dense()].any() for layer in (other[0], other[4], other[8]))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.mul_(2),
        lambda m: m[0].bias.add_(1),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(33, 20))),
        lambda m: m[2].set_mask(torch.zeros(17, 33, dtype=torch.bool)),
        lambda m: m.load_state_dict(mlp(density=0.5, seed=3).state_dict()),
        lambda m: m.__setitem__(2, nn.Linear(33, 17)),
        lambda m: m.append(nn.Linear(5, 2)),
        lambda m: m[2].register_forward_hook(lambda module, args, y: y + 1),
        lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: nn.utils.parametrizations.orthogonal(m[4]),
        lambda m: m.half().float(),
        lambda m: m[0].requires_grad_(False),
    ],
)
def test_what_changes_is_noticed(change):
    ours, x = sl.resident(mlp()), torch.randn(6, 20)
    with torch.no_grad():
        before = ours(x)
        change(ours)
        after = ours(x)
        torch.testing.assert_close(after, nn.Sequential.forward(ours, x), rtol=1e-4, atol=1e-5)
    y = ours(x)
    assert (y.requires_grad and not torch.equal(after, before)) or all(
        p.requires_grad is False for p in ours[0].parameters()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "dilation", (2, 2)) or setattr(m[0], "padding", (2, 2)),
        lambda m: setattr(m[1], "eps", 0.5),
        lambda m: setattr(m[1], "momentum", 0.9),
        lambda m: setattr(m[1], "track_running_stats", False),
        lambda m: setattr(m[3], "padding", 1) or setattr(m[3], "kernel_size", 3) or setattr(m[3], "stride", 2),
        lambda m: setattr(m[6], "divisor_override", 3),
        lambda m: m[1].bias.data.add_(1),
        lambda m: m[1].running_mean.data.add_(1),
        lambda m: m[1].running_var.data.mul_(2),
        lambda m: m[4].bias.data.add_(1),
        lambda m: m.to(memory_format=torch.channels_last),
    ],
)
def test_settings_and_vectors_that_change_are_noticed(change):
    ours = sl.resident(convnet()).train()
    for training in (True, False):
        x = torch.randn(6, 3, 16, 16)
        ours.train(training)
        ours(x)
        change(ours)
        layers = nn.Sequential(*copy.deepcopy(list(ours)))
        expected = layers(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(ours[1], name), getattr(layers[1], name))


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


def test_modes_of_batchnorm():
    ours, model = sl.resident(convnet()), convnet()
    for m in (ours, model):
        m.train()
        m[1].eval()  # frozen
    x = torch.randn(9, 3, 16, 16)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    for i in (1, 9):
        torch.testing.assert_close(ours[i].running_var, model[i].running_var)
    assert int(ours[1].num_batches_tracked) == 0 and int(ours[9].num_batches_tracked) == 1
    with torch.no_grad():
        ours(x), model(x)
    assert int(ours[9].num_batches_tracked) == 2
    torch.testing.assert_close(ours[9].running_mean, model[9].running_mean, rtol=1e-4, atol=1e-5)
    alone = sl.resident(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        alone(torch.randn(1, 3))


def test_autograd_says_what_torch_would():
    ours, x = sl.resident(mlp()), torch.randn(4, 20)
    y = ours(x)
    y.sum().backward(retain_graph=True)
    first = ours[0].weight.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = ours(x)
    with torch.no_grad():
        ours[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_gradients(training):
    def penalty(model):
        model.train(training)
        x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        parameters = list(model.parameters())
        second = torch.autograd.grad(y.sum() + dx.square().sum(), parameters)
        return [*second, *(b for n, b in model.named_buffers() if "mask" not in n)]

    for a, b in zip(penalty(sl.resident(convnet())), penalty(convnet()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_several_forwards_before_a_backward():
    ours, model = sl.resident(mlp()), mlp()
    inputs = [torch.randn(n, 20) for n in (4, 9, 4)]
    for m in (ours, model):
        outputs = [m(x) for x in inputs]
        for y in reversed(outputs):
            y.square().sum().backward()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spoil", [lambda g: g.add_(1), lambda g: g.data.add_(1), lambda g: g.numpy().fill(1), lambda g: g]
)
def test_memory_of_gradients_is_lent_again_with_zeros_off_the_mask(spoil):
    ours = sl.resident(randomize(nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8)), density=0.1))
    x, dead = torch.randn(20, 512), ~ours[0].mask.to_dense()
    for _ in range(3):
        addresses = []
        for _ in range(2):
            ours.zero_grad()
            ours(x).square().sum().backward()
            addresses.append(ours[0].weight.grad.data_ptr())
        assert addresses[0] == addresses[1]
        gradient = ours[0].weight.grad
        assert not gradient[dead].any()
        (expected,) = torch.autograd.grad(nn.Sequential.forward(ours, x).square().sum(), ours[0].weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
        kept = gradient.clone(), gradient
        ours.zero_grad()
        ours(x).sum().backward()
        assert torch.equal(*kept), "memory that somebody still uses is not written to"
        spoil(gradient)
        ours.zero_grad()
        del gradient, kept


def test_frozen_parameters_and_inputs_get_no_gradient():
    ours, model = sl.resident(mlp()), mlp()
    for m in (ours, model):
        m[0].requires_grad_(False)
        m[2].bias.requires_grad_(False)
        m(torch.ones(3, 20)).sum().backward()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_a_layer_used_twice():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    compare(model, torch.randn(5, 6))


def test_inputs_of_every_kind(calls):
    ours, model = sl.resident(convnet().eval()), convnet().eval()
    for x in (
        torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 16, 32)[::2, :, :, ::2],
        torch.randn(1, 3, 16, 16).expand(3, -1, -1, -1),
        torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2),
    ):
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    assert "make" in calls
    calls.clear()
    assert ours(torch.randn(0, 3, 16, 16)).shape == (0, 4)
    for bad in (torch.randn(2, 4, 16, 16), torch.randn(2, 3, 64, 64), torch.randn(2, 3)):
        with pytest.raises((RuntimeError, ValueError)):
            ours(bad)
    grid = sl.resident(randomize(nn.Sequential(nn.Linear(5, 4))))
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(grid(x), nn.Sequential.forward(grid, x))
    flattens = sl.resident(randomize(nn.Sequential(nn.Flatten(), nn.Linear(30, 4))))
    x = torch.randn(2, 3, 5, 2)
    torch.testing.assert_close(flattens(x), nn.Sequential.forward(flattens, x), rtol=1e-4, atol=1e-5)


def test_images_of_many_sizes():
    ours = sl.resident(randomize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())))
    for side in (4, 5, 6, 7, 8, 9, 4):
        x = torch.randn(2, 2, side, side)
        torch.testing.assert_close(ours(x), nn.Sequential.forward(ours, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_as_layers(dtype, calls):
    ours, x = sl.resident(mlp()).to(dtype), torch.randn(3, 20, dtype=dtype)
    assert torch.equal(ours(x), nn.Sequential.forward(ours, x)) and "make" not in calls
    assert set(ours.where().values()) >= {f"its parameters are {str(dtype)[6:]}, not float32"}


def test_contexts_run_as_layers(calls, monkeypatch):
    ours, x = sl.resident(mlp()).eval(), torch.randn(3, 20)
    expected = nn.Sequential.forward(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(ours)(x[:, None])[:, 0], expected, rtol=1e-4, atol=1e-5)
    weights = {name: p * 2 for name, p in ours.named_parameters()}
    assert not torch.allclose(torch.func.functional_call(ours, weights, x), expected)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    ours(x)
    handle.remove()
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")
    ours(x)
    monkeypatch.delenv("SPARSELOTTERY_BACKEND")
    assert not {"forward", "record"} & set(calls)
    ours(x)
    assert calls[-1] == "record"
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_it_is_copied_saved_and_exported():
    ours, x = sl.resident(convnet()).eval(), torch.randn(3, 3, 16, 16)
    expected = ours(x).detach()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(other) is Resident and torch.equal(other(x), expected)
        with torch.no_grad():
            other[0].weight.mul_(2)
        assert not torch.equal(other(x), expected) and torch.equal(ours(x), expected)
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    results, x = [], torch.randn(40, 3, 16, 16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(sl.resident(convnet()), x, training=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_explain_and_bad_input():
    ours = sl.resident(convnet())
    found = {row.name: row for row in sl.explain(nn.Sequential(ours, nn.Linear(4, 2))).rows}
    assert [found[name].backend for name in ("0.0", "0.4", "0.8", "1")] == ["cpu (resident)"] * 3 + ["dense"]
    assert found["0.0"].note == "in C++ with its neighbours"
    with pytest.raises(
        TypeError, match=r"model: expected an nn\.Sequential, got Linear; its Sequentials can be resident"
    ):
        sl.resident(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Sequential, got int$"):
        sl.resident(3)
    hooked = mlp()
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="model: expected no hooks"):
        sl.resident(hooked)
