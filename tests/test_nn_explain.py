"""explain and compress: what is chosen, and that compressed models compute the same."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import masked_modules
from sparselottery.ops import dispatch, masked_linear


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 4)
    )
    sl.prune(model, density={"0": 0.05, "3": 0.02})
    return model


def rows(model):
    return {row.name: row for row in sl.explain(model).rows}


def test_every_layer_has_a_row_that_says_what_is_known():
    model = network()
    found = rows(model)
    assert list(found) == ["0", "3", "4"]
    assert found["0"].backend == found["3"].backend == "undecided" and "not yet measured" in found["0"].note
    assert found["4"].backend == "dense" and found["4"].note == "nothing is pruned"
    assert found["3"].shape == (64, 1024) and found["3"].density == model[3].density

    model(torch.randn(16, 8, 8, 8)).sum().backward()
    table = [row for row in dispatch.table() if row["op"] == "masked_conv2d"]
    found = rows(model)["0"]
    assert {row["direction"] for row in found.measurements} == {"forward", "backward"}
    assert all(row in table for row in found.measurements) and found.note == ""
    assert all(row["backend"] in found.backend for row in found.measurements)
    text = str(sl.explain(model))
    assert text.splitlines()[0].split()[:3] == ["layer", "kind", "weight"] and len(text.splitlines()) == 4
    assert "forward, batch 16: " in text and "5.03%" in text


def test_only_measurements_of_the_same_layer_count():
    model = network()
    model(torch.randn(16, 8, 8, 8))
    other = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 3))
    sl.prune(other, density={"0": 0.05, "1": 0.5, "2": 0.05})
    assert all(row.backend == "undecided" for row in sl.explain(other).rows)
    same = nn.Sequential(nn.Conv2d(8, 16, 3, padding="same"))
    sl.prune(same, density=0.05)
    assert sl.explain(same).rows[0].measurements == rows(model)["0"].measurements != []


def test_a_layer_that_goes_to_the_library_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "measure", lambda candidates: {name: 1 + (name == "dense") for name in candidates})
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    sl.prune(model, density=0.1)
    for call, backend in ((0.0, "cpu"), (9.0, "dense")):
        monkeypatch.setattr(dispatch, "CALL", {"forward": call, "backward": call})
        dispatch.changed()  # decisions that layers remember go
        for _ in range(2):  # measured; known
            model(torch.randn(4, 8, 9, 9)).sum().backward()
        (row,) = sl.explain(model).rows
        assert row.backend == backend and ("library's own layer" in row.note) == (backend == "dense")


def test_dense_layers_say_why(monkeypatch):
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv1d": Conv1D(4, 4),
            "lazy": nn.LazyLinear(3),
        }
    )
    found = rows(model)
    assert found["plain"].note.startswith("not masked") and found["norm"].note.startswith("its weight is computed")
    assert found["lazy"].shape == () and all(row.backend == "dense" for row in found.values())
    with torch.no_grad():
        model["plain"].weight[0] = 0
    assert rows(model)["plain"].density == 0.75
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "reference")
    assert str(sl.explain(model)).splitlines()[-1] == "SPARSELOTTERY_BACKEND=reference overrides what was measured."
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
        sl.explain([])


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_compress_computes_the_same_and_leaves_the_model_alone(form):
    model, x = network().train(), torch.randn(16, 8, 8, 8)
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    small = sl.compress(model, {"tensor": x, "tuple": (x,), "mapping": {"input": x}}[form])
    assert not small.training and model.training and small is not model
    assert not any(p.requires_grad for p in small.parameters()) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(list(masked_modules(model))) == 3
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("winner", ["dense", "masked"])
def test_compress_takes_what_was_faster(monkeypatch, winner):
    model, x = network(), torch.randn(4, 8, 8, 8)

    def measured(candidates):
        for run in candidates.values():
            run()
        return {name: 1.0 if name == "dense" else (0.5 if winner == "masked" else 0.99) for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measured)
    small = sl.compress(model, x)
    assert len(list(masked_modules(small))) == (3 if winner == "masked" else 0)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_compress_checks_the_whole(monkeypatch):
    model, x = network(), torch.randn(4, 8, 8, 8)
    slow = ("mixed", "resident")
    monkeypatch.setattr(
        dispatch, "measure", lambda c: {n: 1.1 if n in slow else 1.0 if n == "dense" else 0.5 for n in c}
    )
    assert not list(masked_modules(sl.compress(model, x))), "fast layers in a slow whole do not help"


def test_compress_layers_that_are_not_called_and_bad_input():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = sl.MaskedLinear(4, 4), sl.MaskedLinear(4, 4)

        def forward(self, x):
            return self.used(x)

    small = sl.compress(Unused(), torch.randn(2, 4))
    assert type(small.unused) is nn.Linear
    with pytest.raises(TypeError, match="example_input: expected a tensor, a tuple or a mapping, got int"):
        sl.compress(network(), 3)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
        sl.compress([], torch.ones(1))


class OnCuda(torch.Tensor):
    """Says that it is on a GPU: enough for a key and for explain, which look at no values."""

    device = property(lambda self: torch.device("cuda"))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)


@pytest.mark.parametrize("winners", [("bf16x6", "bf16x6"), ("cuda", "cuda"), ("cuda", "bf16x6")])
def test_backends_of_a_gpu_are_shown(monkeypatch, winners):
    monkeypatch.setattr(masked_linear.fp32_linear, "takes", lambda t: "bf16x6" in winners)
    layer = sl.MaskedLinear(256, 128)
    layer.set_mask(torch.arange(256 * 128).view(128, 256) % 17 == 0)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OnCuda))
    before = sl.explain(layer).rows[0]
    assert before.backend == "undecided" and before.measurements == []
    for direction, extra, winner in (("forward", (), winners[0]), ("backward", (True, True, True), winners[1])):
        x = torch.zeros(64, 256 if direction == "forward" else 128).as_subclass(OnCuda)
        key = masked_linear._key(direction, x, layer.weight, layer.weight_mask, True, *extra)
        assert key[6] == "cuda"
        monkeypatch.setattr(dispatch, "measure", lambda runs, best=winner: {n: 1.0 - (n == best) / 2 for n in runs})
        candidates = dict.fromkeys(("dense", "triton", "cuda", "bf16x6"), lambda: None)
        assert dispatch.choose(masked_linear.OP, key, candidates, rule=lambda: "dense") == winner
    row = sl.explain(layer).rows[0]
    both = f"forward: {winners[0]}, backward: {winners[1]}"
    assert row.backend == (winners[0] if winners[0] == winners[1] else both)
    assert [m["us"][winner] for m, winner in zip(row.measurements, winners, strict=True)] == [5e5, 5e5]
    assert f"forward, batch 64: {winners[0]} 5e+05" in str(sl.explain(layer))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(torch.Tensor))
    assert sl.explain(layer).rows[0].backend == "undecided", "a CPU layer is not run by what a GPU measured"
