"""torch.compile around training with masked layers: one graph, compiled once, the numbers of eager, masks read anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import sparselottery as sl

BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 70),
        nn.ReLU(),
        nn.Linear(70, 5),
    ]
    model = sl.sparsify(nn.Sequential(*layers))
    sl.prune(model, density=0.3)
    return model


def data(step, count=12):
    g = torch.Generator().manual_seed(step)
    return torch.randn(count, 2, 6, 6, generator=g), torch.randint(5, (count,), generator=g)


def masked(model):
    return [layer for layer in model if hasattr(layer, "set_mask")]


def prune_at(step, model):
    """Masks change between steps in both ways that there are; one weight comes back."""
    if step == 3:
        sl.prune(model, density=0.1)
    if step == 5:
        layer = model[3]
        layer.set_mask(layer.mask.to_dense().roll(1, 0))


@pytest.mark.parametrize("backend, name", [("aot_eager", "SGD"), ("inductor", "AdamW")])
def test_training_is_one_graph_compiled_once_with_eagers_numbers(backend, name):
    options = {"lr": 0.05} | ({"momentum": 0.9} if name == "SGD" else {"capturable": True})
    losses, models = [], []
    for compiled in (True, False):
        model = network()
        optimizer = getattr(sl.optim, name)(model.parameters(), **options)

        def loss_of(x, y, model=model):
            return F.cross_entropy(model(x), y)

        forward = torch.compile(loss_of, backend=backend, fullgraph=True) if compiled else loss_of
        losses.append([])
        for step in range(8):
            prune_at(step, model)
            optimizer.zero_grad()
            loss = forward(*data(step))
            loss.backward()
            for layer in masked(model):
                assert (layer.weight.grad[~layer.mask.to_dense()] == 0).all()
            optimizer.step()
            losses[-1].append(loss.detach())
            if compiled and step == 1:
                assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        models.append(model)
    assert counters["stats"]["unique_graphs"] == 1, "compiled again between steps"
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5, atol=1e-6)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for layer in masked(models[0]):
        assert (layer.weight[~layer.mask.to_dense()] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_module_honours_masks_that_change(backend):
    model = network().eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, _ = data(0)
    with torch.no_grad():
        for step in (0, 3, 5):
            prune_at(step, model)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            # Whoever wrote what into pruned weights: the mask decides.
            for layer in masked(model):
                layer.weight.data[~layer.mask.to_dense()] = 9.0
            got = compiled(x)
            for layer in masked(model):
                layer.weight[~layer.mask.to_dense()] = 0
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_other_batches_compile_at_most_once_more():
    """The second size makes the batch a symbol; after that every size runs."""
    model = network()
    compiled = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
    for count in (12, 7, 9, 30, 31):
        model.zero_grad()
        x, _ = data(count, count)
        loss = compiled(x)
        loss.backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().mean().backward()
        for p, g in zip(model.parameters(), got, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_loop_with_the_optimizer_inside():
    """Compiled around the whole step: the optimizer's part runs as it is, the rest compiled, nothing compiled per step."""
    losses = []
    for compiled in (True, False):
        model = network()
        optimizer = sl.optim.AdamW(model.parameters(), lr=0.01)

        def train(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(train, backend="aot_eager") if compiled else train
        losses.append([])
        for step in range(8):
            prune_at(step, model)
            losses[-1].append(run(*data(step)))
            if step == 2:
                graphs = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5, atol=1e-6)
