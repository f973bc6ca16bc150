"""PackedLinear, PackedConv2d, pack and unpack: what they compute, what they cost, and how they behave as modules."""

import copy
import io
import multiprocessing
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import MaskedConv1D, PackedConv1D, masked_modules
from sparselottery.nn.packed import PackedWeight
from sparselottery.ops import dispatch


@pytest.fixture(autouse=True)
def without_a_stopwatch(monkeypatch):
    """Masked and packed layers sum in the same order; the sparse kernels have tests of their own."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")


def network(seed=0, density=0.3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.Linear(16, 3))
    sl.prune(model, density=density)
    return model


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=g), torch.randint(0, 3, (8,), generator=g)


def losses(model, optimizer, steps, first=0):
    found = []
    for step in range(first, first + steps):
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss)  # with its graph, as in many a user's loop
    return torch.stack([loss.detach() for loss in found])


def packed_layers(model):
    return [m for m in model.modules() if isinstance(m, PackedWeight)]


# ---- what they compute ----

LAYERS = {
    "linear": (lambda: nn.Linear(33, 7), (5, 33), sl.PackedLinear),
    "linear without bias, 3-d": (lambda: nn.Linear(33, 7, bias=False), (2, 5, 33), sl.PackedLinear),
    "conv1d": (lambda: Conv1D(7, 33), (2, 5, 33), PackedConv1D),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), groups=2), (2, 4, 8, 9), sl.PackedConv2d),
    "conv same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2), (2, 4, 8, 9), sl.PackedConv2d),
    "conv valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 9), sl.PackedConv2d),
    "conv unbatched": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 8, 9), sl.PackedConv2d),
    "conv reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 9), sl.PackedConv2d),
    "conv circular": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (4, 8, 9), sl.PackedConv2d),
}
every_layer = pytest.mark.parametrize("make, shape, kind", LAYERS.values(), ids=LAYERS)


def pair(make, density=0.3):
    torch.manual_seed(1)
    masked = make()
    sl.prune(masked, density=density)
    return masked, sl.pack(copy.deepcopy(masked))


@every_layer
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_the_same_as_masked(make, shape, kind, dtype, tolerance):
    masked, packed = pair(make)
    masked, packed = masked.to(dtype), packed.to(dtype)
    assert type(packed) is kind and packed.values.shape == (masked.mask.count,) and packed.mask == masked.mask
    assert torch.equal(packed.dense_weight(), masked.weight)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_() for _ in "ab"]
    outputs = [layer(x) for layer, x in zip((masked, packed), inputs, strict=True)]
    for y in outputs:
        y.float().sin().sum().backward()
    results = [
        (outputs[1], outputs[0]),
        (inputs[1].grad, inputs[0].grad),
        (packed.values.grad, masked.weight.grad[masked.mask.to_dense()]),
    ]
    if masked.bias is not None:
        results.append((packed.bias.grad, masked.bias.grad))
    for got, want in results:
        assert got.dtype == dtype and got.shape == want.shape
        assert (got - want).double().norm() <= tolerance * (1 + want.double().norm())


@every_layer
def test_there_and_back(make, shape, kind):
    masked, packed = pair(make)
    parameter = packed.values
    back = sl.unpack(packed)
    assert back is packed and type(back) is type(masked) and back.weight is parameter
    assert back.state_dict().keys() == masked.state_dict().keys()
    assert all(torch.equal(v, masked.state_dict()[k]) for k, v in back.state_dict().items())
    x = torch.randn(shape)
    assert torch.equal(back(x), masked(x))
    nn.init.ones_(back.weight)  # the invariant holds again
    back(x)
    assert (back.weight[~back.mask.to_dense()] == 0).all()


def test_channels_last():
    masked, packed = pair(lambda: nn.Conv2d(8, 16, 3, padding=1))
    packed = packed.to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 10, 10).to(memory_format=torch.channels_last)
    y = packed(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, masked(x))
    grad = torch.randn_like(y)
    y.backward(grad)
    masked(x).backward(grad)
    torch.testing.assert_close(packed.values.grad, masked.weight.grad[masked.mask.to_dense()])


def test_made_by_hand():
    torch.manual_seed(0)
    keep = torch.rand(7, 33) < 0.3
    layer = sl.PackedLinear(33, 7, mask=keep)
    torch.manual_seed(0)
    torch.rand(7, 33)
    twin = sl.MaskedLinear(33, 7, mask=keep)
    x = torch.randn(2, 33)
    assert torch.equal(layer(x), twin(x)) and layer.values.shape == (int(keep.sum()),)
    assert "density=" in repr(layer)
    conv = sl.PackedConv2d(4, 6, 3, padding=1, mask=torch.rand(6, 4, 3, 3) < 0.5, dtype=torch.float64)
    assert conv(torch.randn(1, 4, 5, 5).double()).shape == (1, 6, 5, 5)
    assert type(sl.unpack(nn.Sequential(conv))[0]) is sl.MaskedConv2d
    assert sl.PackedLinear(4, 3).density == 1
    with pytest.raises(ValueError, match="mask: expected shape"):
        sl.PackedLinear(33, 7, mask=keep[:1])


def test_compiles_without_a_graph_break():
    model = sl.pack(network())
    x, _ = batch(0)
    want = model(x)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    got.sum().backward()
    torch.testing.assert_close(got, want)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


# ---- training ----

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1, foreach=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.003, amsgrad=True),
    "sl.adam": lambda p: sl.optim.Adam(p, lr=0.003),
    "sl.sgd": lambda p: sl.optim.SGD(p, lr=0.05, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
def test_losses_of_a_hundred_steps_are_those_of_the_masked_model(make_optimizer):
    masked, packed = network(), sl.pack(network())
    want = losses(masked, make_optimizer(masked.parameters()), 100)
    got = losses(packed, make_optimizer(packed.parameters()), 100)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for p, m in zip(packed_layers(packed), [layer for _, layer in masked_modules(masked)], strict=True):
        torch.testing.assert_close(p.dense_weight(), m.weight, rtol=1e-3, atol=1e-5)


@every_optimizer
def test_packing_unpacking_and_pruning_in_mid_training(make_optimizer):
    """Alternately packed and masked, pruned when packed: the same as masked all the time."""
    masked, other = network(), network()
    optimizers = [make_optimizer(m.parameters()) for m in (masked, other)]
    want = [losses(masked, optimizers[0], 10)]
    sl.prune(masked, density=0.1, optimizer=optimizers[0])
    want += [losses(masked, optimizers[0], 10, 10), losses(masked, optimizers[0], 10, 20)]
    got = [losses(other, optimizers[1], 5)]
    sl.pack(other, optimizer=optimizers[1])
    got.append(losses(other, optimizers[1], 5, 5))
    report = sl.prune(other, density=0.1, optimizer=optimizers[1])
    assert report.kept == sum(layer.values.numel() for layer in packed_layers(other))
    state = optimizers[1].state[packed_layers(other)[0].values]
    assert all(v.numel() in (1, packed_layers(other)[0].values.numel()) for v in state.values())
    got.append(losses(other, optimizers[1], 10, 10))
    sl.unpack(other, optimizer=optimizers[1])
    got.append(losses(other, optimizers[1], 10, 20))
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-4, atol=1e-6)


def test_gradients_come_along():
    model = network()
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = {name: layer.weight.grad.clone() for name, layer in masked_modules(model)}
    sl.pack(model)
    for name, layer in model.named_modules():
        if name in before:
            assert torch.equal(layer.values.grad, before[name][layer.mask.to_dense()])
    sl.unpack(model)
    for name, layer in masked_modules(model):
        assert torch.equal(layer.weight.grad, before[name])


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_of_adam_at_90_percent():
    """Four values of 4 bytes at a tenth of the weights, and a bit for each: 1.725 bytes a dense weight, where dense takes 16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False))
    dense = sum(p.numel() for p in model.parameters())
    sl.pack(sl.sparsify(model)) and sl.prune(model, sparsity=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(3, 1024)).square().sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    held = nbytes([*parameters, *(p.grad for p in parameters), *state, *model.buffers()])
    kept = round(0.1 * dense)
    assert len(state) == 4 and held == 4 * 4 * kept + dense // 8
    assert held / dense < 1.7251
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    assert saved.tell() < 4 * kept + dense // 8 + 5000


# ---- as modules ----


def test_state_dicts_load_into_both_kinds():
    masked, packed = network(), sl.pack(network())
    assert set(packed.state_dict()) == {
        k.replace("weight", "values") for k in masked.state_dict() if "mask" not in k
    } | {k for k in masked.state_dict() if "mask" in k}
    x, _ = batch(0)
    for density in (0.3, 0.05):  # another mask: another number of values
        source = network(seed=5, density=density)
        for state in (source.state_dict(), sl.pack(copy.deepcopy(source)).state_dict()):
            for assign in (False, True):
                for target in (network(seed=7), sl.pack(network(seed=7))):
                    assert target.load_state_dict(state, assign=assign) == ([], [])
                    torch.testing.assert_close(target(x), source(x))
                    again = target.state_dict()
                    assert all(torch.equal(again[key], value) for key, value in state.items() if key in again)
    parameters = [layer.values for layer in packed_layers(packed)]
    packed.load_state_dict(network(seed=5, density=0.05).state_dict())
    assert [layer.values for layer in packed_layers(packed)] == parameters  # the same objects
    losses(packed, torch.optim.Adam(packed.parameters()), 2)


def test_a_plain_state_keeps_everything():
    plain = sl.densify(network())
    packed = sl.pack(network(seed=3))
    packed.load_state_dict(plain.state_dict())
    x, _ = batch(0)
    torch.testing.assert_close(packed(x), plain(x))
    assert all(layer.density == 1 for layer in packed_layers(packed))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda s: s.update({"3.values": s["3.values"][1:]}),
            r"3: values: expected \[\d+\] for a weight_mask that keeps",
        ),
        (lambda s: s.update({"3.weight_mask": s["3.weight_mask"][1:]}), r"3: weight_mask: expected int32 \[16, 8\]"),
        (lambda s: s.update({"3.weight_mask": s["3.weight_mask"].float()}), "3: weight_mask: expected int32"),
        (lambda s: s.pop("3.values"), "Missing key"),
        (lambda s: s.pop("3.weight_mask"), "Missing key"),
    ],
)
@pytest.mark.parametrize("kind", ["packed", "masked"])
def test_states_that_do_not_fit(change, says, kind):
    state = dict(sl.pack(network(seed=5)).state_dict())
    change(state)
    target = sl.pack(network()) if kind == "packed" else network()
    with pytest.raises(RuntimeError, match=says):
        target.load_state_dict(state)


def test_a_weight_of_another_shape():
    state = network().state_dict() | {"3.weight": torch.zeros(16, 255)}
    with pytest.raises(RuntimeError, match=r"3: weight: expected \[16, 256\], got \[16, 255\]"):
        sl.pack(network()).load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    model = sl.pack(network())
    x, _ = batch(0)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x))
    losses(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2)
    assert not torch.equal(twin(x), model(x))
    assert type(sl.unpack(twin)[3]) is sl.MaskedLinear


class Special(nn.Linear):
    """A layer class of a user's."""


def test_a_users_layer_class_comes_back():
    model = nn.Sequential(Special(30, 5))
    sl.prune(model, density=0.5)
    sl.pack(model)
    model = pickle.loads(pickle.dumps(model))
    assert type(sl.densify(model)[0]) is Special


def tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20)})
    model["b"].weight = model["a"].weight
    sl.prune(model, density=0.3)
    return model


def test_tied_weights_stay_tied():
    model = sl.pack(tied())
    assert model["a"].values is model["b"].values and len(list(model.parameters())) == 3
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin["a"].values is twin["b"].values
        twin["b"](twin["a"](torch.randn(2, 20))).sum().backward()
        assert twin["a"].values.grad.shape == twin["a"].values.shape
    sl.prune(model, density=0.1)
    assert model["a"].values is model["b"].values and model["b"].mask == model["a"].mask
    fresh = sl.pack(tied())
    fresh.load_state_dict(model.state_dict())
    assert fresh["a"].values is fresh["b"].values and torch.equal(fresh["a"].values, model["a"].values)
    back = sl.unpack(model)
    assert back["a"].weight is back["b"].weight and back["a"].weight_mask is back["b"].weight_mask


def test_the_rest_of_the_package_knows_them():
    masked, packed = network(density=0.1), sl.pack(network(density=0.1))
    x, _ = batch(0)
    rows = sl.explain(packed).rows
    assert [row.kind for row in rows] == ["PackedConv2d", "PackedLinear", "PackedLinear"]
    assert [row.shape for row in rows] == [(4, 1, 3, 3), (16, 256), (3, 16)]
    assert all("packed: " in str(row.note) for row in rows)
    torch.testing.assert_close(sl.compress(packed, x)(x), masked.eval()(x))
    assert len(packed_layers(packed)) == 3
    with pytest.raises(sl.TicketError, match=r"0: is packed; call sl\.unpack"):
        sl.Ticket.of(packed, masked)
    plain = sl.densify(copy.deepcopy(packed))
    assert [type(m) for m in plain][::3] == [nn.Conv2d, nn.Linear]
    torch.testing.assert_close(plain(x), masked(x))
    sl.sparsify(packed)  # nothing to do
    assert len(packed_layers(packed)) == 3


def test_explain_shows_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSELOTTERY_BACKEND")
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(200, 150))
    sl.prune(model, density=0.02)
    sl.pack(model)
    dispatch.clear()
    try:
        model(torch.randn(64, 200)).sum().backward()
        (row,) = sl.explain(model).rows
    finally:
        dispatch.clear()
    assert [m["direction"] for m in row.measurements] == ["forward", "backward"]
    assert all({"dense", "cpu"} <= set(m["us"]) for m in row.measurements)
    assert "expanded" not in row.note and row.backend != "undecided"


def test_only_some_layers():
    model = sl.pack(network(), exclude="4")
    assert type(model[4]) is sl.MaskedLinear and type(model[3]) is sl.PackedLinear
    sl.prune(model, density=0.1)
    assert type(model[4]) is sl.MaskedLinear and type(model[3]) is sl.PackedLinear
    assert sum(layer.mask.count for layer in (model[0], model[3], model[4])) == round(0.1 * (36 + 4096 + 48))


def test_a_failed_prune_changes_nothing():
    model = sl.pack(network())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="density"):
        sl.prune(model, density=2.0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        sl.pack(3)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        sl.unpack(3)
    with pytest.raises(ValueError, match=r"found none; sl\.prune or sl\.sparsify"):
        sl.pack(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got int"):
        sl.pack(network(), optimizer=3)
    with pytest.raises(ValueError, match="on the meta device"):
        sl.pack(sl.MaskedLinear(3, 3, device="meta"))
    model = tied()
    with pytest.raises(ValueError, match=r"a\.weight: is the weight of a layer to pack too"):
        sl.pack(model, exclude="a")
    assert type(model["b"]) is sl.MaskedLinear
    model = sl.pack(network())
    optimizer = sl.optim.Adam(model.parameters())
    losses(model, optimizer, 1)
    sl.prune(model, density=0.1)  # without optimizer=
    with pytest.raises(ValueError, match="exp_avg"):
        losses(model, optimizer, 1)


def test_masked_conv1d_is_what_comes_back():
    masked, packed = pair(lambda: Conv1D(7, 33))
    assert isinstance(masked, MaskedConv1D) and isinstance(sl.unpack(packed), MaskedConv1D)


# ---- DistributedDataParallel ----


def worker(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        parallel = DistributedDataParallel(sl.pack(network()))
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01, weight_decay=0.1)
        reduced = []

        def count(_, bucket):
            reduced.append(bucket.buffer().numel())
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda f: f.value()[0] / 2)

        parallel.register_comm_hook(None, count)
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(10 * step + rank)
            F.cross_entropy(parallel(x), y).backward()
            optimizer.step()
        state = {key: value.numpy() for key, value in parallel.module.state_dict().items()}
        results.put((rank, sum(reduced) // 6, state))
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(r, os.path.join(tmp_path, "r"), results)) for r in range(2)]
    for process in processes:
        process.start()
    try:
        (_, traffic, state0), (_, _, state1) = sorted((results.get(timeout=50) for _ in "ab"), key=lambda r: r[0])
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert all((state0[key] == state1[key]).all() for key in state0)
    model = sl.pack(network())
    assert traffic == sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(6):
        optimizer.zero_grad()
        for rank in range(2):
            x, y = batch(10 * step + rank)
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(state0[key]), value, rtol=1e-4, atol=1e-5)
