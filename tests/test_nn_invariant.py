"""Pruned weights are exactly zero, whoever writes to the weights: optimizers, scalers, users, shared layers."""

import copy
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery import masks
from sparselottery.nn import masked_modules


def network(density=0.2, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40, dtype=dtype), nn.Tanh(), nn.Linear(40, 3)
    ).to(dtype)
    sl.prune(model, density=density)
    return model


def batch(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 8, 8, generator=g).to(dtype), torch.randint(0, 3, (16,), generator=g)


def check(model):
    """The invariant, read from the storage; and that there is something to prune and something left."""
    for name, layer in masked_modules(model):
        dead = ~layer.mask.to_dense()
        assert dead.any() and not dead.all(), name
        values = layer.weight.detach()[dead]
        assert (values == 0).all() and not values.signbit().any(), f"{name}: {(values != 0).sum()} weights came back"


def train(model, optimizer, steps=3, dtype=torch.float32):
    losses = []
    for step in range(steps):
        x, y = batch(step % 2, dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        check(model)
        losses.append(loss.item())
    return losses


VARIANTS = [dict(), dict(foreach=True), dict(foreach=False), dict(fused=True)]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)),
    "adam": (torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_train_and_keep_the_zeros(name, variant):
    make, arguments = OPTIMIZERS[name]
    model = network()
    losses = train(model, make(model.parameters(), **arguments, **variant), steps=10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("told", [True, False], ids=["optimizer given", "optimizer not given"])
def test_pruning_in_mid_training_with_live_state(name, variant, told):
    make, arguments = OPTIMIZERS[name]
    model = network(0.9)
    optimizer = make(model.parameters(), **arguments, **variant)
    train(model, optimizer, steps=4)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()  # a gradient is waiting, too
    sl.prune(model, density=0.3, optimizer=optimizer if told else None)
    check(model)
    for _, layer in masked_modules(model):
        dead = ~layer.mask.to_dense()
        assert (layer.weight.grad[dead] == 0).all()
        state = [v for v in optimizer.state[layer.weight].values() if isinstance(v, torch.Tensor) and v.ndim]
        assert state
        assert all((s[dead] == 0).all() for s in state) == told
    optimizer.step()  # no zero_grad: on the gradient from before
    check(model)
    train(model, optimizer, steps=3)


def test_other_optimizers():
    for make in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Rprop):
        model = network()
        train(model, make(model.parameters()))

    model, (x, y) = network(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

    def closure():  # forwards between the writes of one step
        optimizer.zero_grad()
        dense = sl.densify(copy.deepcopy(model))
        loss = F.cross_entropy(model(x), y)
        torch.testing.assert_close(loss, F.cross_entropy(dense(x), y))
        loss.backward()
        return loss

    optimizer.step(closure)
    check(model)


def test_own_optimizers():
    for make, arguments in (
        (sl.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
        (sl.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    ):
        model = network(0.9)
        optimizer = make(model.parameters(), **arguments)
        train(model, optimizer)
        sl.prune(model, density=0.3)
        train(model, optimizer)


def test_gradient_accumulation_and_clipping():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        for part in range(4):
            x, y = batch(part)
            (F.cross_entropy(model(x), y) / 4).backward()
        if step == 1:
            sl.prune(model, density=0.1, optimizer=optimizer)
        live = [p.grad.norm() for p in model.parameters()]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(norm, torch.stack(live).norm())
        for _, layer in masked_modules(model):
            assert (layer.weight.grad[~layer.mask.to_dense()] == 0).all(), "dead weights have no say in the norm"
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 0)
        check(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(dtype):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    losses = []
    for step in range(8):
        x, y = batch(step % 2)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss if step != 3 else loss * float("inf")).backward()  # step 3 is skipped by the scaler
        scaler.step(optimizer)
        scaler.update()
        check(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_low_precision_weights():
    for dtype in (torch.bfloat16, torch.float64):
        model = network(dtype=dtype)
        train(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1), dtype=dtype)


def dense_answer(layer, x, weight):
    return F.linear(x, weight * layer.mask.to_dense(), layer.bias)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2).add_(1),
    "data": lambda layer: layer.weight.data.normal_(),
    "data, live weights too": lambda layer: layer.weight.data.mul_(3).add_(1),
    "init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "new storage": lambda layer: setattr(layer.weight, "data", torch.randn(7, 40)),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(7, 40))),
    "copy": lambda layer: layer.weight.copy_(torch.full((7, 40), float("nan")).where(~layer.mask.to_dense(), 1.0)),
    "mask words": lambda layer: layer.weight_mask.fill_(3),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(torch.randn(7 * 40 + 7), layer.parameters()),
    "one dead weight, then eval": lambda layer: (layer.weight.data.view(-1)[-41:].fill_(1), layer.eval()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("graph", [True, False], ids=["grad", "no_grad"])
def test_no_forward_computes_with_weights_that_came_back(write, graph):
    layer, x = sl.MaskedLinear(40, 7), torch.randn(5, 40)
    layer.set_mask(torch.rand(7, 40, generator=torch.Generator().manual_seed(0)) < 0.3)
    layer(x)
    with torch.no_grad():
        write(layer)
    before = layer.weight.detach().clone()
    with torch.set_grad_enabled(graph):
        got = layer(x)
    want = F.linear(x, before.where(layer.mask.to_dense(), 0.0), layer.bias)
    torch.testing.assert_close(got.detach(), want.detach())
    check(layer)
    if graph:  # and whatever is registered now is under the optimizers' watch
        got.sum().backward()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        layer.weight.data.add_(1)
        optimizer.step()
        check(layer)


def test_state_dict_never_shows_weights_that_came_back():
    layer = sl.MaskedLinear(40, 7, mask=torch.rand(7, 40) < 0.3)
    layer.weight.data.view(-1)[-41:].fill_(1)  # not the first dead weight: no forward would notice
    assert (layer.state_dict()["weight"][~layer.mask.to_dense()] == 0).all()


def test_restoring_zeros_does_not_disturb_a_graph_that_waits():
    layer, x = sl.MaskedLinear(40, 7, mask=torch.rand(7, 40) < 0.3), torch.randn(5, 40, requires_grad=True)
    first = layer(x)
    layer.weight.data[~layer.mask.to_dense()] = 5
    second = layer(x)
    (first + second).sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.weight.detach().sum(0).expand(5, 40))


def test_a_new_mask_between_forward_and_backward_is_an_error():
    layer = sl.MaskedLinear(40, 7, mask=torch.rand(7, 40) < 0.5)
    y = layer(torch.randn(5, 40, requires_grad=True))
    layer.set_mask(layer.mask & sl.Mask.from_dense(torch.rand(7, 40) < 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- shared weights ----


class Twice(nn.Module):
    """Two layers with one weight, and a third user of it that is not a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x):
        return self.again(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


def tied(model):
    assert model.a.weight is model.b.weight and model.a.weight_mask is model.b.weight_mask
    assert model.c is model.again
    assert [name for name, _ in masked_modules(model)] == ["a", "c"]
    assert model.a.mask == model.b.mask


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_that_share_a_weight_share_its_mask(name):
    torch.manual_seed(0)
    make, arguments = OPTIMIZERS[name]
    model = Twice()
    report = sl.prune(model, density=0.25)
    assert (report.total, report.kept) == (288, 72)
    tied(model)
    optimizer = make(model.parameters(), **arguments)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        check(model)
        if step == 1:
            model.b.set_mask(model.b.mask & sl.Mask.from_dense(torch.rand(12, 12) < 0.7))
            tied(model)
            check(model)
    twin = copy.deepcopy(model)
    tied(twin)
    tied(model.double())
    x = torch.randn(3, 12)
    want = sl.densify(copy.deepcopy(twin))(x)
    torch.testing.assert_close(twin(x), want)
    other = sl.sparsify(Twice())
    other.load_state_dict(twin.state_dict())
    tied(other)
    torch.testing.assert_close(other(x), want)
    with torch.no_grad():
        other.b.weight.fill_(2)
    other.a(x), check(other)


def test_tying_after_masking_takes_over_the_mask():
    a, b = sl.MaskedLinear(12, 12, mask=torch.rand(12, 12) < 0.3), sl.MaskedLinear(12, 12)
    b.weight = a.weight
    x = torch.randn(2, 12)
    torch.testing.assert_close(b(x), F.linear(x, a.weight, b.bias))
    assert b.weight_mask is a.weight_mask and b.density < 0.5


def test_attention_reads_the_weight_of_its_output_layer_itself():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    assert sl.prune(model, density=0.3).layers.keys() == {"self_attn.out_proj", "linear1", "linear2"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(4, 5, 16)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - x.flip(0)).square().mean().backward()
        optimizer.step()
        check(model)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), sl.densify(copy.deepcopy(model))(x))  # the fast path of inference


# ---- averages, life time ----


def test_averaged_copies():
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        train(model, optimizer, steps=1)
        if step == 2:
            sl.prune(model, density=0.1)
        average.update_parameters(model)
    average(batch()[0])
    check(average)
    assert [layer.mask for _, layer in masked_modules(average)] == [layer.mask for _, layer in masked_modules(model)]


def test_neither_parameters_nor_layers_are_kept_alive():
    layer = sl.MaskedLinear(4, 4)
    weight = layer.weight
    assert masks.words_of(weight) is layer.weight_mask
    del layer
    gc.collect()
    assert masks.words_of(weight) is None
    torch.optim.SGD([weight], lr=0.1).step()


def test_an_optimizer_over_plain_and_masked_parameters():
    plain, masked = nn.Linear(4, 4), sl.MaskedLinear(4, 4, mask=torch.eye(4, dtype=torch.bool))
    optimizer = torch.optim.SGD(itertools.chain(plain.parameters(), masked.parameters()), lr=0.1)
    masked.weight.grad = torch.ones(4, 4)
    plain.weight.grad = torch.ones(4, 4)
    before = plain.weight.detach().clone()
    optimizer.step()
    check(masked)
    torch.testing.assert_close(plain.weight.detach(), before - 0.1)


def test_functional_call_lends_parameters_and_leaves_masks_apart():
    model, other = network(0.2), network(0.7)
    keep = [layer.mask for net in (model, other) for _, layer in masked_modules(net)]
    x, _ = batch()
    for lent in (other, nn.Sequential(*[copy.deepcopy(layer) for layer in other])):
        parameters = {name: nn.Parameter(torch.randn_like(p)) for name, p in lent.named_parameters()}
        before = {name: p.clone() for name, p in parameters.items()}
        expected = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in expected.named_parameters():
                p.copy_(parameters[name])
        torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), expected(x))
        torch.func.functional_call(model, dict(lent.named_parameters()), (x,))
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert keep == [layer.mask for net in (model, other) for _, layer in masked_modules(net)]
    check(model)
    check(other)


def test_per_sample_gradients():
    model, (x, _) = network(), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(single[name].sum(0), p.grad, rtol=1e-3, atol=1e-4)


def test_a_parametrized_weight_is_masked_in_the_forward():
    model, (x, _) = network(), batch()
    layer = model[3]
    keep = layer.mask.to_dense()
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original1.add_(1.0)
    expected = F.linear(torch.ones(2, 288), layer.weight * keep, layer.bias)
    torch.testing.assert_close(layer(torch.ones(2, 288)), expected)
    model.load_state_dict(copy.deepcopy(model).double().state_dict())
    model(x).sum().backward()
    with pytest.raises(ValueError, match="3: its weight is computed"):
        sl.densify(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    train(model, torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("own", [True, False])
def test_what_a_parametrization_computes_from_is_not_masked(own):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = network()[3], torch.randn(5, 288)
    weight, keep = layer.weight, layer.mask.to_dense()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    assert layer.parametrizations.weight.original is weight and masks.words_of(weight) is None
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = (sl.optim if own else torch.optim).SGD([weight], lr=0.1, weight_decay=0.5)
    layer(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach()[~keep], torch.full((int((~keep).sum()),), 0.95))
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert masks.words_of(layer.weight) is layer.weight_mask
    layer(x)
    assert (layer.weight[~keep] == 0).all() and torch.equal(layer.mask.to_dense(), keep)


def test_a_weight_that_was_replaced_is_free_again():
    layer = network()[3]
    before = layer.weight
    layer.weight = nn.Parameter(torch.ones(40, 288))
    assert masks.words_of(before) is None and masks.words_of(layer.weight) is layer.weight_mask


def test_from_meta_by_to_empty_keeps_everything():
    with torch.device("meta"):
        layer = sl.MaskedLinear(40, 7)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.density == 1
    layer.set_mask(torch.zeros(7, 40, dtype=torch.bool))
    layer.weight.grad = torch.ones(7, 40)
    torch.optim.SGD(layer.parameters(), 1.0).step()
    assert (layer.weight == 0).all()


@pytest.mark.filterwarnings("ignore")  # tracing warns of every shape that is looked at
def test_traces():
    model, (x, _) = network().requires_grad_(False), batch()
    torch.testing.assert_close(torch.jit.trace(model, x[:2])(x), model(x))
