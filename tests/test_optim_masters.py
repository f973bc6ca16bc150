"""sparselottery.optim with master weights, and with its step numbers on the device (capturable)."""

import copy
import io
import math

import pytest
import torch
from sync_counter import SyncCounter
from torch import nn

import sparselottery as sl
from sparselottery import masks, optim
from sparselottery.ops import reference

OPTIMIZERS = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    ("SGD", {"lr": 0.05}),
    ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
]
IDS = ["-".join([name, *(k for k in options if k != "lr")]) for name, options in OPTIMIZERS]
HALVES = [torch.bfloat16, torch.float16]
BACKENDS = ["", "reference"]


class Owner:
    """What a masked layer is to an optimizer."""

    def __init__(self, param, keep):
        self.keep, self.weight_mask = keep, reference.bitmask_pack(keep)
        masks.attach(param, self)


def network(dtype=torch.float32, density=0.3):
    """Parameters of many shapes, and for each the owner of its mask or None."""
    g = torch.Generator().manual_seed(0)
    params, owners = [], []
    for i, shape in enumerate([(12, 40), (6, 4, 3, 3), (12,), ()]):
        values = torch.randn(shape, generator=g)
        keep = torch.rand(shape, generator=g) < density if i < 2 else torch.ones(shape, dtype=torch.bool)
        params.append(nn.Parameter(torch.where(keep, values, 0).to(dtype)))
        owners.append(Owner(params[-1], keep) if i < 2 else None)
    return params, owners


def set_gradients(params, owners, step, dtype, dead):
    """Gradients of `dtype`, exactly representable in it whatever the parameters are; `dead` where the mask is 0."""
    g = torch.Generator().manual_seed(100 + step)
    for p, owner in zip(params, owners, strict=True):
        grad = torch.randn(p.shape, generator=g).to(dtype).to(p.dtype)
        p.grad = grad if owner is None else torch.where(owner.keep, grad, dead)


def twins(dtype):
    """Parameters of low precision with owners, and float32 ones with the same values."""
    params, owners = network(dtype)
    return params, owners, [nn.Parameter(p.detach().float()) for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=IDS)
def test_masters_are_torchs_float32_weights(monkeypatch, name, options, dtype, backend):
    """The parameter is torch.optim's float32 weight, rounded, after each of 100 steps."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    params, owners, plain = twins(dtype)
    ours = getattr(optim, name)(params, master_weights=True, **options)
    theirs = getattr(torch.optim, name)(plain, **options)
    for step in range(100):
        set_gradients(params, owners, step, dtype, math.nan)
        set_gradients(plain, owners, step, dtype, 0.0)
        ours.step()
        theirs.step()
        for p, q in zip(params, plain, strict=True):
            master = ours.state[p]["master_param"]
            assert master.dtype is torch.float32 and torch.equal(p, master.to(dtype))
            torch.testing.assert_close(master, q.detach(), rtol=2e-5, atol=2e-6)
    for p, owner in zip(params, owners, strict=True):
        for value in (p, *(v for k, v in ours.state[p].items() if k != "step")):
            assert owner is None or (value[~owner.keep] == 0).all()


def test_masters_keep_updates_that_the_parameter_cannot_show():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optim.SGD([p], lr=1e-3, master_weights=True)
    p.grad = torch.ones_like(p)
    for _ in range(10):
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master_param"], torch.full((4,), 0.99))
    assert torch.equal(p, torch.full((4,), 0.99).bfloat16())
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    plain.grad = torch.ones_like(plain)
    without = optim.SGD([plain], lr=1e-3)
    for _ in range(10):
        without.step()
    assert (plain == 1).all()


def test_float32_parameters_need_no_master():
    p = nn.Parameter(torch.ones(4))
    optimizer = optim.AdamW([p], master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert "master_param" not in optimizer.state[p]


def after(optimizer, params, owners, dtype, steps):
    for step in steps:
        set_gradients(params, owners, step, dtype, 0.0)
        optimizer.step()


@pytest.mark.parametrize("how", ["file", "deepcopy"])
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=IDS)
def test_checkpoints_keep_the_masters(name, options, how):
    """Half of the steps, a save and a load, the other half: the bits of an uninterrupted run."""
    cls, dtype = getattr(optim, name), torch.bfloat16
    params, owners = network(dtype)
    straight = cls(params, master_weights=True, **options)
    after(straight, params, owners, dtype, range(8))
    others, other_owners = network(dtype)
    optimizer = cls(others, master_weights=True, **options)
    after(optimizer, others, other_owners, dtype, range(4))
    state = optimizer.state_dict()
    if how == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    second = cls(others, lr=7.0, master_weights=True)
    second.load_state_dict(state)
    after(second, others, other_owners, dtype, range(4, 8))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in straight.state[p].items():
            assert torch.equal(value, second.state[q][key]) and value.dtype is second.state[q][key].dtype


def test_a_checkpoint_of_torch_gets_masters():
    params, owners = network(torch.bfloat16)
    donor = torch.optim.AdamW(params)
    after(donor, params, owners, torch.bfloat16, range(2))
    optimizer = optim.AdamW(params, master_weights=True)
    optimizer.load_state_dict(donor.state_dict())
    after(optimizer, params, owners, torch.bfloat16, range(2, 3))
    for p in params:
        assert all(v.dtype is torch.float32 for v in optimizer.state[p].values())
        assert torch.equal(p, optimizer.state[p]["master_param"].bfloat16())


def test_a_rewound_parameter_takes_its_master_along():
    """As when a ticket resets weights: the master of what was written is what was written, other masters keep their bits."""
    p = nn.Parameter(torch.linspace(-1, 1, 64).bfloat16())
    optimizer = optim.SGD([p], lr=1e-3, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = optimizer.state[p]["master_param"].clone()
    with torch.no_grad():
        p[:32] = 5.0
    optimizer.step()
    master = optimizer.state[p]["master_param"]
    assert (master[:32] == torch.tensor(5.0) - torch.tensor(1e-3)).all()
    torch.testing.assert_close(master[32:], before[32:] - 1e-3, rtol=0, atol=1e-7)


def test_masters_of_pruned_weights_are_zeroed():
    model = sl.sparsify(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))).bfloat16()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, master_weights=True)
    x = torch.randn(8, 40).bfloat16()
    for step in range(4):
        if step == 2:
            sl.prune(model, density=0.2)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for layer in (model[0], model[2]):
        dead = ~layer.mask.to_dense()
        assert dead.any()
        for key, value in optimizer.state[layer.weight].items():
            assert key == "step" or (value[dead] == 0).all(), key


def test_a_master_of_another_shape_is_refused():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = optim.SGD([p], master_weights=True)
    optimizer.state[p]["master_param"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"master_param: expected \[4\] like its parameter, got \[3\]"):
        optimizer.step()


def test_master_weights_is_a_bool():
    with pytest.raises(TypeError, match="master_weights: expected True or False, got 'yes'"):
        optim.SGD([nn.Parameter(torch.ones(2))], master_weights="yes")


# ---- capturable ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name, options", OPTIMIZERS[2:], ids=IDS[2:])
def test_capturable_steps_equal_the_others(monkeypatch, name, options, tensor_lr, backend):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    results = []
    for capturable in (True, False):
        params, owners = network()
        own = options | ({"lr": torch.tensor(options["lr"])} if tensor_lr else {})
        optimizer = getattr(optim, name)(params, capturable=capturable, **own)
        for step in range(30):
            if step == 10:
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": own["lr"] / 2})
            late = optimizer.param_groups[-1]["params"][0]
            late.grad = torch.ones_like(late) if step >= 10 else late.grad
            set_gradients(params, owners, step, torch.float32, math.nan)
            optimizer.step()
        results.append([*params, late.detach(), torch.stack([s["step"] for s in optimizer.state.values()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("name, options", OPTIMIZERS, ids=IDS)
def test_a_training_step_waits_for_nothing(monkeypatch, name, options, master_weights, backend):
    """Forward, loss, backward, step and zero_grad of masked layers; the rate is a tensor that a scheduler changes."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    model = sl.sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 10)))
    sl.prune(model, density=0.3)
    if master_weights:
        model.bfloat16()
    options = options | ({} if name == "SGD" else {"capturable": True}) | {"lr": torch.tensor(options["lr"])}
    optimizer = getattr(optim, name)(model.parameters(), master_weights=master_weights, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x = torch.randn(5, 2, 6, 6, dtype=model[0].weight.dtype)
    before = model[2].weight.detach().clone()

    def train():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(5)).backward()
        optimizer.step()

    train()
    train()
    with SyncCounter() as counter:
        train()
        train()
    assert counter.names == []
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(options["lr"].item())
    assert not torch.equal(before, model[2].weight)


def test_the_counter_sees_what_waits():
    with SyncCounter() as counter:
        x = torch.ones(3)
        float(x[0])
        bool(x[0])
        x.nonzero()
        torch.equal(x, x)
    assert counter.names == ["aten::_local_scalar_dense"] * 2 + ["aten::nonzero", "aten::equal"]


def test_capturable_checkpoints_of_torch_load_and_go_back():
    params, owners = network()
    donor = torch.optim.AdamW(params)
    after(donor, params, owners, torch.float32, range(2))
    optimizer = optim.AdamW(params, capturable=True)
    optimizer.load_state_dict(donor.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})
    after(optimizer, params, owners, torch.float32, range(2, 4))
    back = torch.optim.AdamW(params)
    back.load_state_dict(optimizer.state_dict())
    assert all(state["step"] == 4 and state["step"].dtype is torch.float32 for state in back.state.values())


class TestCapture:
    """What can be tried of a CUDA graph's capture without a GPU: what is refused, and what is kept alive."""

    @pytest.fixture(autouse=True)
    def capturing(self, monkeypatch):
        self.active = False
        monkeypatch.setattr(optim, "_is_captured", lambda params: self.active)

    def test_the_first_step_is_refused(self):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        self.active = True
        for optimizer in (optim.SGD([p], momentum=0.9), optim.AdamW([p], capturable=True)):
            with pytest.raises(RuntimeError, match="the first step cannot be captured"):
                optimizer.step()

    def test_adam_without_capturable_is_refused(self):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = optim.Adam([p])
        optimizer.step()
        self.active = True
        with pytest.raises(RuntimeError, match=r"Adam\.step: .* capturable=True"):
            optimizer.step()
        self.active = False
        optimizer.step()
        assert optimizer.state[p]["step"] == 2

    def test_what_a_replay_reads_lives_as_long_as_the_optimizer(self):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = optim.SGD([p], momentum=0.9)
        optimizer.step()
        self.active = True
        optimizer.step()
        ((plan, tables),) = optimizer._captured
        assert plan.params == [p] and len(tables) == 1
        assert copy.deepcopy(optimizer)._captured == []
