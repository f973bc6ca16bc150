"""Every layer of a network in C++, forward, backward and in training steps, at sizes small enough for a build with sanitizers."""

import copy
import itertools

import pytest
import residents
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_network import build, check, make, mask_for
from torch import nn
from torch.nn import functional as F

import sparselottery as sl
from sparselottery import _ext
from sparselottery.masks import Mask

ISAS = _ext.extension().cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


def everything():
    """Images of 3 x 9 x 7 to 5 classes."""
    return [
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 6, (3, 2), padding=(2, 1), dilation=(2, 1)),
        nn.ReLU(),
        nn.AvgPool2d((2, 1), 1),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 3, 19, bias=False),
        nn.BatchNorm1d(19),
        nn.ReLU(),
        nn.Linear(19, 5),
    ]


@pytest.mark.parametrize("densest", [0.0, 1.0], ids=["as dense matrices", "as survivors"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_backward(isa, densest, training):
    several_tiles = {"portable": 17, "avx2": 33, "avx512": 65}[isa]  # of four vectors each
    options = {"linear_densest": densest, "conv_densest": densest, "training": training, "tolerance": 2e-4}
    for batch, density in ((2, 0.4), (several_tiles, "holes")):
        check(build(everything(), density), (3, 9, 7), batch, **options)


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize(
    "numbers",
    [{"adam": False, "momentum": 0.9, "nesterov": True}, {"adam": True, "beta1": 0.9, "beta2": 0.99, "eps": 0.1}],
    ids=["sgd", "adam"],
)
def test_training_steps(isa, density, numbers, batch=18):
    model = build(everything(), density).train()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, 9, 7, generator=g), torch.randint(5, (50,), generator=g)
    order = torch.randint(50, (3 * batch,), generator=g)
    zeros = dict.fromkeys(("momentum", "dampening", "nesterov", "beta1", "beta2", "eps", "decoupled"), 0.0)
    options = {k: float(v) for k, v in (zeros | {"weight_decay": 0.01} | numbers).items()}
    network = make(model, (3, 9, 7), optimizer=options)
    total = network.train(x.data_ptr(), x[0].numel(), y.data_ptr(), order.data_ptr(), batch, [0.02, 0.01, 0.005])
    exact, expected = copy.deepcopy(model).double(), 0.0
    optimizer = (
        torch.optim.Adam(exact.parameters(), betas=(0.9, 0.99), eps=0.1, weight_decay=0.01)
        if numbers["adam"]
        else torch.optim.SGD(exact.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    )
    for chosen, rate in zip(order.view(3, batch), (0.02, 0.01, 0.005), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(exact(x[chosen].double()), y[chosen])
        loss.backward()
        optimizer.step()
        expected += loss.item()
    assert total == pytest.approx(expected, rel=1e-4)
    exact.eval()
    with torch.no_grad():
        outputs = exact(x.double())
    loss, _ = network.evaluate(x.data_ptr(), x[0].numel(), y.data_ptr(), len(x))
    assert loss / 50 == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-3)
    for i, m in enumerate(exact):
        if isinstance(m, nn.Linear | nn.Conv2d):
            stored = torch.zeros_like(m.weight, dtype=torch.float32)  # survivors only are written
            network.store(i, (stored.data_ptr(), 0, 0, 0))
            torch.testing.assert_close(stored.double(), m.weight.detach(), rtol=1e-3, atol=1e-4)


def test_a_smaller_batch_after_one_without_memory():
    model = build(everything(), 0.4).train()
    x, y, order = torch.randn(50, 3, 9, 7), torch.randint(5, (50,)), torch.randint(50, (18,))
    options = dict.fromkeys(("momentum", "dampening", "nesterov", "beta1", "beta2", "eps", "decoupled"), 0.0)
    losses = []
    for batches in ([18], [2**45, 2**44, 18]):
        network = make(model, (3, 9, 7), optimizer=options | {"adam": 0.0, "weight_decay": 0.0})
        for batch in batches[:-1]:
            with pytest.raises(MemoryError):
                network.train(x.data_ptr(), x[0].numel(), y.data_ptr(), order.data_ptr(), batch, [0.1])
        losses.append(network.train(x.data_ptr(), x[0].numel(), y.data_ptr(), order.data_ptr(), 18, [0.1]))
    assert losses[0] == losses[1]


# ---- sl.resident over shapes, densities, strides and pools ----

sizes = st.integers(1, 9)
densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, "one", "holes"])


def masked(modules, density):
    model = nn.Sequential(*modules)
    sl.sparsify(model)
    for m in model:
        if hasattr(m, "set_mask"):
            m.set_mask(Mask.from_dense(mask_for(m.weight.shape, density, torch.Generator().manual_seed(0))))
    return model


@st.composite
def convolutions(draw):
    """(layers, the shape of an input)."""
    groups, side = draw(st.sampled_from([1, 1, 2])), draw(st.tuples(st.integers(3, 12), st.integers(3, 12)))
    channels, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    options = {name: draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for name in ("kernel_size", "stride")}
    options |= {"padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), "groups": groups}
    modules = [nn.Conv2d(channels, outputs, bias=draw(st.booleans()), **options)]
    height, width = modules[0](torch.zeros(1, channels, *side)).shape[2:]
    modules += [nn.ReLU()] * draw(st.booleans())
    window, step = (draw(st.integers(1, min(3, height))), draw(st.integers(1, min(3, width)))), draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, n // 2)) for n in window)
    pools = [
        nn.MaxPool2d(window, step, padding),
        nn.AvgPool2d(window, step, padding, count_include_pad=draw(st.booleans())),
        nn.Identity(),
    ]
    modules += [draw(st.sampled_from(pools)), nn.Flatten()]
    features = nn.Sequential(*modules)(torch.zeros(1, channels, *side)).shape[1]
    return [*modules, nn.Linear(features, draw(sizes))], (draw(st.integers(1, 20)), channels, *side)


@given(case=convolutions(), density=densities, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_resident_convolutions(case, density, seed):
    torch.manual_seed(seed)
    modules, shape = case
    with pytest.MonkeyPatch.context() as patch:
        residents.in_cpp(patch)
        residents.compare(masked(modules, density), torch.randn(shape), tolerance=1e-4)


@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=4), batch=st.integers(1, 70), density=densities)
@settings(max_examples=40, deadline=None)
def test_resident_linear_layers(widths, batch, density):
    torch.manual_seed(0)
    modules = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    with pytest.MonkeyPatch.context() as patch:
        residents.in_cpp(patch)
        residents.compare(masked(modules, density), torch.randn(batch, widths[0]), tolerance=1e-4)
