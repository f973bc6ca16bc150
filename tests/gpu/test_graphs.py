"""Training steps on a GPU: nothing waits for the device, whole steps in CUDA graphs, masters, replays bit-equal to eager."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparselottery as sl
from sparselottery.nn.invariant import unmasked_gradients
from sparselottery.ops import dispatch, masked_optim, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REPLAYS = 1000
OPTIMIZERS = [
    ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}),
    ("Adam", {"lr": 1e-3, "capturable": True, "amsgrad": True}),
    ("AdamW", {"lr": 1e-3, "capturable": True, "weight_decay": 0.1}),
]


def network(dtype=torch.float32, density=0.2):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 120), nn.ReLU()]
    model = sl.sparsify(nn.Sequential(*layers, nn.Linear(120, 10)).cuda())
    sl.prune(model, density=density)
    return model.to(dtype)


def data(dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(1)
    return torch.randn(32, 3, 8, 8, generator=g, device="cuda").to(dtype), torch.arange(32, device="cuda") % 10


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch):
    """One fixed choice of kernels, so that an eager run and a graph's take the same."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with dispatch.reproducible():
        yield


def stepper(model, optimizer, x, y):
    def train():
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def pair(name, options, **more):
    dtype = more.pop("dtype", torch.float32)
    model, (x, y) = network(dtype), data(dtype)
    options = options | more
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    optimizer = getattr(sl.optim, name)(model.parameters(), **options)
    return model, optimizer, x, stepper(model, optimizer, x, y)


def warm_up(train, steps=3):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            train()
    torch.cuda.current_stream().wait_stream(side)


def capture(train):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train()
    return graph, loss


def assert_same_bits(one, other, optimizers=()):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    if optimizers:
        states = [[v for s in o.state.values() for v in s.values()] for o in optimizers]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("form", ["float32", "bfloat16 masters", "rate on the device", "gradients unmasked"])
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_replays_equal_eager_bit_for_bit(name, options, form):
    more = {}
    if form == "bfloat16 masters":
        more = {"dtype": torch.bfloat16, "master_weights": True}
    if form == "rate on the device":
        more = {"lr": torch.tensor(options["lr"], device="cuda")}
    model, ours, x, train = pair(name, options, **more)
    twin, theirs, twin_x, twin_train = pair(name, options, **more)
    context = unmasked_gradients() if form == "gradients unmasked" else dispatch.reproducible()
    with context:
        warm_up(train)
        warm_up(twin_train)
        graph, loss = capture(train)  # captured, not run
        for step in range(REPLAYS):
            if step % 100 == 50:  # other data, another rate: written where the graph reads
                fresh = torch.randn(x.shape, device="cuda").to(x.dtype)
                x.copy_(fresh)
                twin_x.copy_(fresh)
                if form == "rate on the device":
                    for optimizer in (ours, theirs):
                        optimizer.param_groups[0]["lr"].mul_(0.9)
            graph.replay()
            eager_loss = twin_train()
            if step % 250 == 0:
                assert torch.equal(loss, eager_loss)
    assert_same_bits(model, twin, (ours, theirs))
    for layer in model:
        if hasattr(layer, "mask"):
            assert (layer.weight[~layer.mask.to_dense()] == 0).all()


@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_eager_steps_and_another_graph_between_replays(name, options):
    """Each way of stepping keeps its own tables: none sees the other's gradients."""
    model, ours, _, train = pair(name, options)
    twin, theirs, _, twin_train = pair(name, options)
    warm_up(train)
    warm_up(twin_train)
    graphs = [capture(train)[0] for _ in range(2)]
    for step in range(60):
        if step % 3 == 2:
            train()
        else:
            graphs[step % 3].replay()
        twin_train()
        if step % 10 == 0:
            torch.cuda.empty_cache()
            _ = [torch.full((1 << 20,), math.nan, device="cuda") for _ in range(4)]  # over whatever was let go
    assert_same_bits(model, twin, (ours, theirs))


def test_masks_pruned_between_replays_are_honoured():
    model, _, _, train = pair(*OPTIMIZERS[2])
    warm_up(train)
    graph, _ = capture(train)
    for density in (0.1, 0.05):
        for _ in range(5):
            graph.replay()
        sl.prune(model, density=density)
        alive = [layer.mask.to_dense() for layer in model if hasattr(layer, "mask")]
        for _ in range(5):
            graph.replay()
        weights = [layer.weight for layer in model if hasattr(layer, "mask")]
        for weight, keep in zip(weights, alive, strict=True):
            assert (weight[~keep] == 0).all() and (weight[keep] != 0).any()


@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_an_eager_step_never_waits(name, options):
    _, _, _, train = pair(name, options, lr=torch.tensor(options["lr"], device="cuda"))
    for _ in range(3):
        train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_masters_are_torchs_float32_weights(name, options, dtype):
    params = [
        nn.Parameter(torch.randn(300, 70, device="cuda").to(dtype)),
        nn.Parameter(torch.randn(70, device="cuda").to(dtype)),
    ]
    plain = [nn.Parameter(p.detach().float()) for p in params]
    ours = getattr(sl.optim, name)(params, master_weights=True, **options)
    theirs = getattr(torch.optim, name)(plain, **options)
    for _ in range(100):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        for p, q in zip(params, plain, strict=True):
            master = ours.state[p]["master_param"]
            assert torch.equal(p, master.to(dtype))
            torch.testing.assert_close(master, q.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_in_every_layout(dtype):
    """Contiguous, channels_last, misaligned, strided, empty; NaN wherever the mask is 0; against float64."""
    g = torch.Generator("cuda").manual_seed(5)
    store = torch.randn(40 * 33 + 1, generator=g, device="cuda").to(dtype)
    params = [
        store[1:].view(40, 33),
        torch.randn(64, 48, 3, 3, generator=g, device="cuda").to(dtype).to(memory_format=torch.channels_last),
        torch.randn(70, 90, generator=g, device="cuda").to(dtype).t(),
        torch.empty(0, 5, device="cuda", dtype=dtype),
    ]
    keep = [torch.rand(p.shape, generator=g, device="cuda") < 0.3 for p in params]
    words = [reference.bitmask_pack(k) for k in keep]
    for p, k in zip(params, keep, strict=True):
        p[~k] = math.nan
    grads = [torch.randn_like(p).masked_fill_(~k, math.nan) for p, k in zip(params, keep, strict=True)]
    states = [[torch.rand_like(p) + 0.1 for p in params] for _ in range(3)]
    options = {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-6,
        "weight_decay": 0.1,
        "decoupled": True,
        "maximize": False,
    }
    wanted = [[t.double() for t in tensors] for tensors in (params, *states)]
    for i in range(4):
        lists = (t[i] for t in wanted[1:])
        reference.masked_adam_(wanted[0][i], grads[i].double(), *lists, words[i], step=3, **options)
    masked_optim.masked_adam_(params, grads, *states, words, step=3, **options)
    tolerance = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip((params, *states), wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_a_step_over_more_than_two_to_the_31_weights():
    size = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("needs 21 GB of device memory")
    p = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(p)
    words = torch.zeros(1, size // 32, dtype=torch.int32, device="cuda")
    words[0, -1] = -1
    grad[-32:] = 1
    masked_optim.masked_sgd_([p], [grad], [], [words], lr=0.5)
    assert (p[-32:] == -0.5).all() and p.count_nonzero() == 32


def test_a_first_step_or_adam_without_capturable_is_refused():
    _, _, _, train = pair("SGD", OPTIMIZERS[0][1])
    with pytest.raises(RuntimeError, match="the first step cannot be captured"):
        capture(train)
    torch.cuda.synchronize()
    _, _, _, train = pair("Adam", {"lr": 1e-3})
    warm_up(train)
    with pytest.raises(RuntimeError, match=r"capturable=True"):
        capture(train)
    torch.cuda.synchronize()


def test_checkpoints_move_between_devices():
    model, optimizer, _, train = pair(*OPTIMIZERS[2])
    train()
    train()
    twin = copy.deepcopy(model).cpu()
    there = sl.optim.AdamW(twin.parameters(), lr=1e-3, capturable=True)
    there.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step()
    there.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_follows_eager(mode):
    """reduce-overhead: inductor's own CUDA graphs around the ops; masks change between steps."""
    losses = []
    for compiled in (True, False):
        model, (x, y) = network(), data()
        optimizer = sl.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

        def loss_of(x, y, model=model):
            return F.cross_entropy(model(x), y)

        forward = torch.compile(loss_of, mode=mode, fullgraph=True) if compiled else loss_of
        losses.append([])
        for step in range(8):
            if step == 4:
                sl.prune(model, density=0.05)
            optimizer.zero_grad()
            loss = forward(x, y)
            losses[-1].append(loss.detach().clone())
            loss.backward()
            optimizer.step()
        for layer in model:
            assert not hasattr(layer, "mask") or (layer.weight[~layer.mask.to_dense()] == 0).all()
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-4)
