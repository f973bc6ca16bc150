"""DecodeLinear and how compress chooses it. The kernels are in test_host_cuda_decode.py; here the op computes densely."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import DecodeLinear
from sparselottery.ops import bitmask, decode_linear, dispatch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def layer(format="gap8", rows=24, columns=70, density=0.3, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) < density
    weight = torch.randn(rows, columns, generator=g).to(dtype) * mask
    bias = torch.randn(rows, generator=g).to(dtype)
    packed = decode_linear.pack(weight, bitmask.pack(mask), format)
    return DecodeLinear(packed, bias, density=float(mask.double().mean())), weight


@pytest.mark.parametrize("format", decode_linear.FORMATS)
def test_computes_what_the_dense_layer_does(format):
    module, weight = layer(format)
    x = torch.randn(3, 5, 70).bfloat16()
    assert torch.equal(module.weight, weight)
    assert torch.equal(module(x), nn.functional.linear(x, weight, module.bias))
    assert f"format={format}, density=0.3" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_other_dtypes_and_autocast():
    module, weight = layer()
    x = torch.randn(4, 70)
    want = nn.functional.linear(x.bfloat16(), weight, module.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), want)
    with torch.autocast("cpu", torch.float16):
        assert module(x).dtype == torch.float16
    wide = copy.deepcopy(module).float()
    torch.testing.assert_close(wide(x), nn.functional.linear(x, weight.float(), module.bias.float()))
    assert "the values are torch.float32" in wide.why_dense()
    with pytest.raises(TypeError, match=r"x: expected torch\.bfloat16 like the weight"):
        module(x)


def test_state_dict_brings_its_own_sizes_and_format():
    module, weight = layer("gap8")
    other, _ = layer("tiles", density=0.6, seed=1)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.format == "gap8" and torch.equal(other.weight, weight) and other.density == module.density
    narrow, _ = layer(columns=69)
    with pytest.raises(RuntimeError, match=r"values: expected a weight \[24, 69\], got \[24, 70\]"):
        narrow.load_state_dict(module.state_dict())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(256, 64), Conv1D(48, 64), nn.Linear(48, 4)

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu()))


def network():
    torch.manual_seed(0)
    model = Network().bfloat16()
    sl.prune(model, density={"first": 0.1, "middle": 0.3})
    return model


def measured(seconds):
    """A stand-in for dispatch.measure: runs everything once and answers with these times (1 for what is not named)."""

    def measure(candidates):
        for run in candidates.values():
            run()
        measured.calls.append(set(candidates))
        return {name: seconds.get(name, 1.0) for name in candidates}

    measured.calls = []
    return measure


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    candidates = decode_linear.candidates
    monkeypatch.setattr(decode_linear, "why_dense", lambda *_: None)
    monkeypatch.setattr(decode_linear, "candidates", lambda *arguments: candidates(*arguments[:4], "cuda"))
    monkeypatch.setattr(  # with no kernel here: the dense weight
        decode_linear,
        "_cuda",
        lambda x, *rest: nn.functional.linear(x, decode_linear._unpack(*rest[:3], *rest[4:]), rest[3]),
    )


@pytest.mark.parametrize("winner", ["gap4", "gap8", "tiles", "masked", "dense"])
def test_compress_takes_the_fastest_form(monkeypatch, as_on_a_gpu, winner):
    model, x = network(), torch.randn(9, 256).bfloat16()
    monkeypatch.setattr(dispatch, "measure", measured({winner: 0.5, "mixed": 0.5}))
    before = copy.deepcopy(model.state_dict())
    small = sl.compress(model, x)
    assert {"dense", "masked", "gap4", "gap8", "tiles"} in measured.calls
    kinds = {name: type(getattr(small, name)) for name in ("first", "middle")}
    if winner in decode_linear.FORMATS:
        assert set(kinds.values()) == {DecodeLinear}
        assert small.first.format == winner and small.first.density == model.first.density
        assert small.first.weight.shape == (64, 256) and small.middle.weight.shape == (48, 64)
        row = {row.name: row for row in sl.explain(small).rows}["first"]
        assert row.backend == f"cpu ({winner})" and row.shape == (64, 256)
        assert row.note.startswith(f"compress, in µs: {winner} 5e+05, ")
    elif winner == "masked":
        assert all(isinstance(getattr(small, name), type(getattr(model, name))) for name in kinds)
    else:
        assert kinds == {"first": nn.Linear, "middle": Conv1D}
        note = sl.explain(small).rows[0].note
        assert note.startswith("compress, in µs: dense 5e+05, masked 1e+06, ")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(small(x), model.eval()(x), rtol=3e-2, atol=3e-2)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again(x), small(x))


def test_compress_offers_only_what_may_win(monkeypatch, as_on_a_gpu):
    model = network()
    monkeypatch.setattr(dispatch, "measure", measured({"gap4": 0.5, "mixed": 1.5}))
    small = sl.compress(model, torch.randn(1, 256).bfloat16())
    assert {"dense", "masked", "gap4", "gap8"} in measured.calls, "one row would waste the tensor cores"
    assert type(small.first) is nn.Linear, "fast layers in a slow whole do not help"
    torch.testing.assert_close(small(x := torch.randn(2, 256).bfloat16()), model.eval()(x), rtol=3e-2, atol=3e-2)
    for arguments, dtype in (((200, 256), torch.bfloat16), ((2, 256), torch.float32)):
        sl.compress(model.to(dtype), torch.randn(arguments).to(dtype))
        assert {"dense", "masked"} in measured.calls and not any("gap4" in call for call in measured.calls[-4:])
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")
    measured.calls.clear()
    sl.compress(model.bfloat16(), torch.randn(1, 256).bfloat16())
    assert not any("gap4" in call for call in measured.calls)


def test_a_build_without_cuda_is_told(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(decode_linear, "why_dense", lambda *_: "the extension was built without CUDA")
    monkeypatch.setattr(dispatch, "measure", measured({"dense": 0.5}))
    model = network()
    small = sl.compress(nn.Sequential(model, nn.Identity()), torch.randn(2, 256).bfloat16())
    assert "the extension was built without CUDA" in sl.explain(small).rows[0].note


def test_a_format_of_a_gpu_says_why_it_is_dense_on_a_cpu():
    (row,) = sl.explain(layer()[0]).rows
    assert row.backend == "dense" and row.shape == (24, 70)
    assert row.note == "unpacked for each call: the decode kernels need a CUDA device, the weight is on cpu"
