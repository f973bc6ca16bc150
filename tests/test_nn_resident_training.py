"""resident in a training: optimizers, pruning, BatchNorm, autograd, memory, threads."""

import copy

import pytest
import residents
import torch
from residents import convnet, gradients, mlp, randomize
from torch import nn
from torch.nn import functional as F

import sparselottery as sl


@pytest.fixture(autouse=True)
def in_cpp(tmp_path, monkeypatch):
    residents.in_cpp_only(tmp_path, monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    return residents.note_calls(monkeypatch)


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
