"""resident: which layers run in C++, and that nobody can tell otherwise."""

import copy
import io

import pytest
import residents
import torch
from residents import compare, convnet, mlp, randomize
from torch import nn

import sparselottery as sl
from sparselottery.nn.resident import Resident


@pytest.fixture(autouse=True)
def in_cpp(tmp_path, monkeypatch):
    residents.in_cpp_only(tmp_path, monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    return residents.note_calls(monkeypatch)


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
