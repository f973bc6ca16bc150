"""sparselottery.optim against torch.optim: steps, schedulers, checkpoints, AMP, pruning in mid-training, bad input."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import masks, optim
from sparselottery.ops import reference

PAIRS = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("Adam", {"lr": 1e-2}),
    ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    (
        "AdamW",
        {
            "lr": torch.tensor(1e-2, dtype=torch.float64),
            "betas": (0.8, 0.9),
            "eps": 1e-6,
            "amsgrad": True,
            "maximize": True,
        },
    ),
]
IDS = ["-".join([name, *(k for k in options if k != "lr")]) for name, options in PAIRS]


class Owner:
    """What a masked layer is to an optimizer."""

    def __init__(self, param, keep):
        self.param = param
        masks.attach(param, self)
        self.prune(keep)

    def prune(self, keep):
        self.keep = keep
        self.weight_mask = reference.bitmask_pack(keep)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, density=0.3, shapes=((12, 40), (6, 4, 3, 3))):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        shapes = [*shapes, (12,), ()]
        self.weights = nn.ParameterList([torch.randn(s, generator=g).to(dtype) for s in shapes])
        keeps = [torch.rand(p.shape, generator=g) < density for p in self.weights[:2]]
        self.owners = [Owner(p, k) for p, k in zip(self.weights, keeps, strict=False)]
        self.enforce()

    def enforce(self):
        with torch.no_grad():
            for owner in self.owners:
                owner.param[~owner.keep] = 0

    def assert_dead(self, optimizer):
        for owner in self.owners:
            assert (owner.param[~owner.keep] == 0).all()
            for value in optimizer.state[owner.param].values():
                if isinstance(value, torch.Tensor) and value.shape == owner.param.shape:
                    assert (value[~owner.keep] == 0).all()


def set_gradients(net, step, masked=True):
    g = torch.Generator().manual_seed(100 + step)
    for p in net.weights:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    for owner in net.owners:
        owner.param.grad[~owner.keep] = 0 if masked else math.nan


def assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name, options", PAIRS, ids=IDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_equals_torch_over_100_steps(name, options, dtype, tolerance):
    ours, theirs = Net(dtype), Net(dtype)
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    a = getattr(optim, name)(ours.parameters(), **options)
    b = getattr(torch.optim, name)(theirs.parameters(), **options)
    for step in range(100):
        set_gradients(ours, step, masked=False)
        set_gradients(theirs, step)
        a.step()
        b.step()
    assert_equal(ours, theirs, tolerance)
    ours.assert_dead(a)


@pytest.mark.parametrize("name, options", PAIRS, ids=IDS)
@pytest.mark.parametrize("there_and_back", [True, False])
def test_checkpoints_are_exchangeable_with_torch(name, options, there_and_back):
    """Half the steps with one of the two, the rest with the other, through a saved file."""
    classes = [getattr(optim, name), getattr(torch.optim, name)]
    first, second = classes if there_and_back else classes[::-1]
    ours, theirs = Net(torch.float64), Net(torch.float64)
    a, b = first(ours.parameters(), **options), classes[1](theirs.parameters(), **options)
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(a.state_dict(), file)
            file.seek(0)
            a = second(ours.parameters(), lr=7.0)
            a.load_state_dict(torch.load(file, weights_only=True))
        for net in (ours, theirs):
            set_gradients(net, step)
        a.step()
        b.step()
    assert_equal(ours, theirs, 1e-12)
    want, got = b.state_dict(), a.state_dict()
    assert [set(g) for g in got["param_groups"]] == [set(g) for g in want["param_groups"]]
    for i, state in want["state"].items():
        assert set(got["state"][i]) == set(state)
        for key, value in state.items():
            assert got["state"][i][key].dtype == value.dtype and got["state"][i][key].shape == value.shape


def test_pruning_in_mid_training_zeroes_weights_and_live_state():
    net = Net(density=0.9)
    optimizer = optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True)
    for step in range(3):
        set_gradients(net, step)
        optimizer.step()
    for owner in net.owners:
        owner.prune(owner.keep & (torch.arange(owner.keep.numel()).view(owner.keep.shape) % 7 == 0))
    assert any((o.param[~o.keep] != 0).any() for o in net.owners)
    set_gradients(net, 3, masked=False)
    optimizer.step()
    net.assert_dead(optimizer)


def test_a_mask_changed_in_place_is_noticed():
    net = Net(density=1.0)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    set_gradients(net, 0)
    optimizer.step()
    owner = net.owners[0]
    owner.keep[:] = False
    owner.weight_mask.zero_()
    set_gradients(net, 1)
    optimizer.step()
    assert (owner.param == 0).all() and (optimizer.state[owner.param]["momentum_buffer"] == 0).all()


def test_weights_written_between_steps_are_zeroed_again():
    net = Net(density=0.02)
    optimizer = optim.Adam(net.parameters())
    for step in range(3):
        set_gradients(net, step)
        optimizer.step()
        net.assert_dead(optimizer)
        with torch.no_grad():
            net.weights[0].fill_(1.0)
    assert (net.weights[0] == 1).all()


def test_a_revived_weight_starts_from_zero_state():
    net = Net(density=0.5)
    optimizer = optim.Adam(net.parameters())
    set_gradients(net, 0)
    optimizer.step()
    owner = net.owners[0]
    dead = ~owner.keep
    owner.prune(torch.ones_like(owner.keep))
    set_gradients(net, 1)
    optimizer.step()
    expected = 0.1 * owner.param.grad[dead]
    torch.testing.assert_close(optimizer.state[owner.param]["exp_avg"][dead], expected, rtol=1e-5, atol=1e-7)


def test_parameters_may_come_late_lack_gradients_or_move():
    ours, theirs = Net(torch.float64), Net(torch.float64)
    a = optim.Adam(list(ours.weights[:2]), lr=0.1)
    b = torch.optim.Adam(list(theirs.weights[:2]), lr=0.1)
    for step in range(8):
        for net, optimizer in ((ours, a), (theirs, b)):
            set_gradients(net, step)
            if step % 3 == 1:
                net.weights[0].grad = None
            if step == 4:
                optimizer.add_param_group({"params": list(net.weights[2:]), "lr": 0.01, "weight_decay": 0.1})
            if step == 6:
                net.weights[1].data = net.weights[1].data.clone()
            optimizer.step()
    assert_equal(ours, theirs, 1e-12)
    assert a.state[ours.weights[0]]["step"] == 5 and a.state[ours.weights[2]]["step"] == 4


def test_state_may_be_dropped_and_options_changed():
    ours, theirs = Net(torch.float64), Net(torch.float64)
    pair = [(ours, optim.SGD(ours.parameters(), lr=0.1)), (theirs, torch.optim.SGD(theirs.parameters(), lr=0.1))]
    for step in range(9):
        for net, optimizer in pair:
            if step == 3:
                optimizer.param_groups[0].update(momentum=0.9, weight_decay=0.1, lr=0.05)
            if step == 6:
                optimizer.state.clear()
            set_gradients(net, step)
            optimizer.step()
    assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_schedulers_drive_it(name):
    ours, theirs = Net(torch.float64), Net(torch.float64)
    rates = []
    for net, module in ((ours, optim), (theirs, torch.optim)):
        optimizer = getattr(module, name)(net.parameters(), lr=0.1)
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
        ]
        for step in range(9):
            set_gradients(net, step)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] != 0.1
    assert_equal(ours, theirs, 1e-12)


def test_closure_and_accumulated_gradients():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.SGD([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        for _ in range(2):
            (w * w).sum().backward()
        return (w * w).sum()

    assert optimizer.step(closure).item() == 5
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 2.0]) * (1 - 0.1 * 4))


def test_grad_scaler_unscales_and_skips_on_inf():
    results = []
    for module in (optim, torch.optim):
        net = Net()
        optimizer = module.Adam(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(4):
            set_gradients(net, step)
            loss = sum((p * p.grad).sum() for p in net.weights)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            for owner in net.owners:
                owner.param.grad[~owner.keep] = 0
            if step == 2:
                net.weights[2].grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128
        assert optimizer.state[net.weights[0]]["step"] == 3
        results.append(net)
    assert_equal(*results, 1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_alike(clone):
    w = nn.Parameter(torch.linspace(-1, 1, 50))
    optimizer = optim.AdamW([w], lr=0.1)
    w.grad = torch.ones(50)
    optimizer.step()
    other = clone(optimizer)
    (w2,) = other.param_groups[0]["params"]
    assert w2 is not w
    for parameter, o in ((w, optimizer), (w2, other)):
        parameter.grad = torch.linspace(0, 1, 50)
        o.step()
    assert torch.equal(w, w2)


def test_half_precision_and_mixed_groups():
    params = [nn.Parameter(torch.randn(8, 40, dtype=t)) for t in (torch.float32, torch.bfloat16, torch.float64)]
    owners = [Owner(p, torch.rand(8, 40) < 0.3) for p in params]
    optimizer = optim.AdamW(params, lr=0.1)
    twins = [nn.Parameter(torch.where(o.keep, p, 0).detach().clone()) for o, p in zip(owners, params, strict=True)]
    torch_optimizer = torch.optim.AdamW(twins, lr=0.1)
    for _ in range(5):
        for p, twin, o in zip(params, twins, owners, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = torch.where(o.keep, p.grad, 0)
        optimizer.step()
        torch_optimizer.step()
    for p, twin, o, tolerance in zip(params, twins, owners, (1e-5, 5e-2, 1e-12), strict=True):
        assert (p[~o.keep] == 0).all()
        torch.testing.assert_close(p, twin, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_of_another_model_is_refused():
    """Shapes are checked before an address leaves Python."""
    big, small = nn.Parameter(torch.ones(50, 50)), nn.Parameter(torch.ones(3, 3))
    donor = torch.optim.Adam([small])
    small.grad = torch.ones(3, 3)
    donor.step()
    optimizer = optim.Adam([big])
    optimizer.load_state_dict(donor.state_dict())
    big.grad = torch.ones(50, 50)
    with pytest.raises(ValueError, match=r"exp_avg\[0\]: expected \[50, 50\] on cpu like params\[0\], got \[3, 3\]"):
        optimizer.step()


def test_checkpoints_with_capturable_and_numeric_steps_load():
    p = nn.Parameter(torch.ones(4))
    donor = torch.optim.Adam([p])
    p.grad = torch.ones(4)
    donor.step()
    state = donor.state_dict()
    state["param_groups"][0]["capturable"] = True
    state["state"][0]["step"] = 1
    optimizer = optim.Adam([p])
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2 and optimizer.param_groups[0]["capturable"] is True


def test_works_when_compiled_around():
    w = nn.Parameter(torch.ones(40))
    optimizer = optim.Adam([w], lr=0.1)

    @torch.compile(backend="aot_eager")
    def train():
        optimizer.zero_grad()
        (w * w).sum().backward()
        optimizer.step()

    for _ in range(3):
        train()
    twin = nn.Parameter(torch.ones(40))
    torch_optimizer = torch.optim.Adam([twin], lr=0.1)
    for _ in range(3):
        torch_optimizer.zero_grad()
        (twin * twin).sum().backward()
        torch_optimizer.step()
    torch.testing.assert_close(w, twin)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: optim.Adam(p, lr=-1), "lr: expected a number of at least 0, got -1"),
        (lambda p: optim.Adam(p, lr=torch.ones(2)), "lr: expected a number or a tensor of one element"),
        (lambda p: optim.Adam(p, lr=math.nan), "lr: expected a number of at least 0, got nan"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), "betas: expected two numbers"),
        (lambda p: optim.AdamW(p, eps=-1), "eps: expected a number of at least 0"),
        (lambda p: optim.AdamW(p, weight_decay=-1), "weight_decay: expected a number of at least 0"),
        (lambda p: optim.SGD(p, differentiable=True), "differentiable: not supported by SGD; use torch.optim.SGD"),
        (lambda p: optim.SGD(p, momentum=-1), "momentum: expected a number of at least 0"),
        (lambda p: optim.SGD(p, nesterov=True), "nesterov: expected momentum > 0 and dampening 0"),
        (lambda p: optim.SGD([]), "empty parameter list"),
    ],
)
def test_bad_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: optim.Adam(p, betas=5), "betas: expected two numbers from 0 to below 1, got 5"),
        (lambda p: optim.AdamW(p, betas=("a", "b")), "betas: expected two numbers"),
        (lambda p: optim.Adam(p, eps=None), "eps: expected a number of at least 0, got None"),
        (lambda p: optim.SGD(p, lr="fast"), "lr: expected a number of at least 0, got 'fast'"),
        (lambda p: optim.SGD(p, momentum=[0.9]), "momentum: expected a number of at least 0"),
        (lambda p: optim.SGD(p, weight_decay=None), "weight_decay: expected a number of at least 0"),
    ],
)
def test_arguments_of_another_kind_are_named(make, says):
    with pytest.raises(TypeError, match=says):
        make([nn.Parameter(torch.ones(2))])


def test_sparse_gradients_and_complex_parameters_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="SGD: expected dense gradients"):
        optimizer.step()
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="Adam: expected real parameters"):
        optim.Adam([p]).step()


def test_foreach_and_fused_are_accepted():
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optim.SGD([p], lr=0.5, **options).step()
        assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_masked_layers_train_and_are_pruned(name):
    """With real layers: the same losses as torch.optim under the layers' own hooks, through a pruning in mid-training."""
    x, y = torch.randn(20, 30, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    losses = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = sl.sparsify(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 4)).double())
        options = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {"weight_decay": 0.1}
        optimizer = getattr(module, name)(model.parameters(), lr=0.01, **options)
        losses.append([])
        for step in range(12):
            if step == 4:
                sl.prune(model, density=0.3)
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        for layer in (model[0], model[2]):
            assert (layer.weight[~layer.mask.to_dense()] == 0).all()
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_state_that_moves_in_memory_is_followed(name):
    options = {"lr": 0.05} | ({"momentum": 0.9} if name == "SGD" else {})
    ours, theirs = Net(), Net()
    optimizers = getattr(optim, name)(ours.weights, **options), getattr(torch.optim, name)(theirs.weights, **options)
    old = []
    for step in range(4):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(net, step)
            optimizer.step()
            for value in (v for state in optimizer.state.values() for v in state.values() if v.ndim):
                moved = value.data.clone()
                old.append(value.data.fill_(math.nan))  # held, so that a stale address hits nothing else
                value.data = moved
        theirs.enforce()
    for p, q in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(p, q)
