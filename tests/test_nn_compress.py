"""compress: dead units first, parts of a model in C++, what can be done with the result (more of it: test_nn_explain.py)."""

import copy
import importlib
import io

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.nn import dead_units
from sparselottery.nn.compiled_mlp import CompiledMLP
from sparselottery.ops import dispatch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def prefer(monkeypatch, *winners):
    """What a stopwatch would say: the first of `winners` that is there is fastest, dense comes next."""

    def measure(candidates):
        for run in candidates.values():
            run()
        best = next((name for name in winners if name in candidates), "dense")
        return {name: 0.1 if name == best else 0.5 if name == "dense" else 1.0 for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measure)


def pruned(*layers, density=0.5):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    sl.prune(model, density=density, scope="layer")
    return model.eval()


def mlp():
    model = pruned(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    mask = model[0].mask.to_dense()
    mask[3:9] = False
    model[0].set_mask(mask)
    return model


@pytest.mark.parametrize("winner", ["dense", "smaller", "mixed", "compiled"])
def test_dead_units_go_first_and_the_plain_model_stays_a_candidate(monkeypatch, winner):
    prefer(monkeypatch, winner, "masked")
    model, x = mlp(), torch.randn(3, 12)
    small = sl.compress(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    hidden = {m.out_features for m in small.modules() if isinstance(m, nn.Linear)}
    assert hidden == ({20, 16, 4} if winner == "dense" else {14, 16, 4})
    assert model[0].out_features == 20
    assert isinstance(small, CompiledMLP) == (winner == "compiled")
    text = str(sl.explain(small))
    assert ("dead units: 6 of 20 outputs removed" in text) == (winner != "dense")


@pytest.mark.parametrize("winner", ["smaller", "mixed", "compiled", "resident"])
def test_another_default_device(monkeypatch, winner):
    """torch.set_default_device is for what the caller makes."""
    prefer(monkeypatch, winner, "masked", "slots")
    model, x = mlp(), torch.randn(3, 12)
    expected = model(x)
    with torch.device("meta"):
        small = sl.compress(model, x)
        found = small(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert "dead units: 6 of 20 outputs removed" in str(sl.explain(small))


@pytest.mark.parametrize("winner", ["smaller", "mixed", "compiled", "resident"])
def test_arguments_by_name_and_outputs_that_are_not_finite(monkeypatch, winner):
    prefer(monkeypatch, winner, "masked", "slots")
    model, x = mlp(), torch.randn(3, 12)
    small = sl.compress(model, {"input": x})
    torch.testing.assert_close(small(input=x), model(x), rtol=1e-5, atol=1e-6)
    x[1] = float("nan")
    small = sl.compress(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6, equal_nan=True)


class TwoParts(nn.Module):
    def __init__(self, peeks=False):
        super().__init__()
        self.peeks, self.scale = peeks, nn.Parameter(torch.ones(1))
        self.first, self.second = mlp(), pruned(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x):
        y = self.first(x) * self.scale
        if self.peeks:
            y = y + self.second[2].weight.sum()
        return self.second(y) + y


@pytest.mark.parametrize("peeks", [False, True])
def test_sequentials_inside_a_model_run_in_cpp(monkeypatch, peeks):
    prefer(monkeypatch, "compiled", "mixed")
    model, x = TwoParts(peeks).eval(), torch.randn(3, 12)
    small = sl.compress(model, x)
    parts = (small.first, small.second)
    assert [isinstance(part, CompiledMLP) for part in parts] == [not peeks, not peeks]
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    if not peeks:
        assert str(sl.explain(small)).count("in C++ with the whole network") == 5
    prefer(monkeypatch)
    assert not any(isinstance(m, (CompiledMLP, sl.MaskedLinear)) for m in sl.compress(model, x).modules())


def test_a_model_whose_own_code_counts_on_sizes_keeps_them(monkeypatch):
    class Sizes(TwoParts):
        def forward(self, x):
            return self.second(self.first(x)) * self.first[0].out_features

    prefer(monkeypatch, "smaller", "mixed", "masked")
    model, x = Sizes().eval(), torch.randn(3, 12)
    small = sl.compress(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert small.first[0].out_features == 20


def test_an_elimination_that_changes_the_function_is_not_taken(monkeypatch):
    def breaks(model, args, kwargs):
        model[2].bias.data += 1
        return {"2": "broken"}

    module = importlib.import_module("sparselottery.nn.compress")  # sl.nn.compress is the function
    monkeypatch.setattr(module, "remove_dead_units_", breaks)
    prefer(monkeypatch, "smaller", "mixed")
    model, x = mlp(), torch.randn(3, 12)
    torch.testing.assert_close(sl.compress(model, x)(x), model(x))


def test_convolutional_networks_run_resident(monkeypatch):
    prefer(monkeypatch, "resident", "cpu")
    layers = (
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    model, x = pruned(*layers), torch.randn(4, 2, 8, 8)
    small = sl.compress(model, x)
    assert isinstance(small, sl.Resident) and not any(small.where().values())
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    rows = sl.explain(small).rows
    assert {row.backend for row in rows} == {"cpu (resident)"}
    assert all(row.note.startswith("in C++ with the whole network; compress, in µs: resident 1e+05") for row in rows)
    small = sl.compress(nn.Sequential(model, nn.Softmax(1)), x)
    assert small.where() == dict.fromkeys([f"0.{i}" for i in range(6)]) | {"1": "Softmax is not known to it"}


def test_nothing_dead_nothing_done():
    model = pruned(nn.Linear(8, 8), nn.Linear(8, 8), density=0.9)
    assert dead_units.remove_dead_units_(model, (torch.randn(2, 8),)) == {}


FORMS = ["smaller", "mixed", "compiled", "resident"]


def compressed(monkeypatch, form):
    prefer(monkeypatch, form, "masked")
    model, x = mlp(), torch.randn(3, 12)
    return sl.compress(model, x), x


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_loaded_and_copied(monkeypatch, form):
    small, x = compressed(monkeypatch, form)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(small)):
        assert type(other) is type(small) and torch.equal(other(x), small(x))
        assert str(sl.explain(other)) == str(sl.explain(small))
    other = copy.deepcopy(small)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_exported_and_traced(monkeypatch, form):
    small, x = compressed(monkeypatch, form)
    expected = small(x)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-6)
    assert program.module()(torch.randn(7, 12)).shape == (7, 4)
    with torch.no_grad():
        traced = torch.jit.trace(small, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-6)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected, rtol=1e-5, atol=1e-6)


def test_densified_it_is_plain_torch(monkeypatch):
    small, x = compressed(monkeypatch, "compiled")
    expected = small(x)
    plain = sl.densify(small)
    program = torch.export.export(plain, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("sparselottery" in target for target in targets)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    model, x = mlp().to(dtype), torch.randn(3, 12, dtype=dtype)
    small = sl.compress(model, x)
    assert small(x).dtype is dtype and all(p.dtype is dtype for p in small.parameters())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(small(x), model(x), rtol=8 * eps, atol=8 * eps)
