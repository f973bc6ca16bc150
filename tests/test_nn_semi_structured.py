"""2:4 layers without a GPU: which masks and layers have the form, what compress and explain do, saving and copying.

torch compresses weights on GPUs only, so its compression is stood in for; tests/gpu/test_structures.py has the real one.
"""

import copy
import io

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.nn import semi_structured
from sparselottery.nn.semi_structured import SemiStructuredLinear
from sparselottery.ops import dispatch, reference


class StandIn(torch.Tensor):
    """What torch's compressed tensors do here: multiply, and become dense again."""

    def to_dense(self):
        return self.as_subclass(torch.Tensor).clone()


@pytest.fixture
def gpu(monkeypatch):
    """As if this machine's weights were on a GPU that has the form."""
    monkeypatch.setattr(semi_structured, "_why_not", lambda weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda t: t.clone().as_subclass(StandIn))


def pruned(structure="2:4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    sl.prune(model, structure=structure)
    return model


def winner(monkeypatch, name):
    monkeypatch.setattr(dispatch, "measure", lambda c: {n: 0.5 if n in (name, "mixed") else 1.0 for n in c})


def test_masks_of_two_of_four():
    counts = torch.tensor([bin(i).count("1") for i in range(16)])
    for pattern in range(16):
        for place in range(8):  # any nibble of the word, the sign bit's too
            nibbles = [0b0101] * 8
            nibbles[place] = pattern
            value = sum(n << 4 * i for i, n in enumerate(nibbles))
            words = torch.tensor([[value - 2**32 if value >= 2**31 else value]], dtype=torch.int32)
            assert semi_structured.is_two_of_four(words) == bool(counts[pattern] <= 2), (pattern, place)
    words = torch.zeros(3, 2, dtype=torch.int32)
    assert semi_structured.is_two_of_four(words)
    words[2, 1] = -1
    assert not semi_structured.is_two_of_four(words), "a mask changed in place is looked at again"


def test_what_has_no_form_says_why():
    model = pruned()
    assert semi_structured.why_not(model[0]) == "needs a CUDA device, the weight is on cpu"
    assert semi_structured.why_not(sl.MaskedConv2d(4, 4, 1)) == "only linear layers have one, not MaskedConv2d"
    note = "2:4, no semi-structured form: needs a CUDA device, the weight is on cpu"
    assert all(note in row.note for row in sl.explain(model).rows if row.kind == "MaskedLinear")
    model = nn.Sequential(nn.Linear(64, 64))
    sl.prune(model, density=0.5)
    assert "2:4" not in str(sl.explain(model))


def test_other_masks_have_no_form(gpu):
    layer = pruned("3:4")[0]
    assert semi_structured.why_not(layer) == "the mask keeps more than 2 of 4 neighbours somewhere"
    assert semi_structured.why_not(pruned("1:4")[0]) is None


def test_compress_takes_the_form_where_it_is_faster(gpu, monkeypatch):
    model, x = pruned(), torch.randn(5, 64)
    winner(monkeypatch, "2:4")
    small = sl.compress(model, x)
    assert [type(m) for m in small] == [SemiStructuredLinear, nn.ReLU, SemiStructuredLinear]
    torch.testing.assert_close(small(x), model(x))
    row = sl.explain(small).rows[0]
    assert row.density == 0.5 and row.shape == (32, 64) and row.backend.startswith("2:4")
    assert row.note.startswith("compress, in µs: 2:4 5e+05, dense 1e+06, masked 1e+06")


@pytest.mark.parametrize("name, kind", [("dense", nn.Linear), ("masked", sl.MaskedLinear)])
def test_compress_leaves_the_form_where_it_is_slower(gpu, monkeypatch, name, kind):
    model, x = pruned(), torch.randn(5, 64)
    winner(monkeypatch, name)
    small = sl.compress(model, x)
    assert type(small[0]) is kind
    torch.testing.assert_close(small(x), model(x))
    if kind is nn.Linear:
        assert "2:4 1e+06" in sl.explain(small).rows[0].note, "explain says what was measured"


def test_a_slow_whole_becomes_plain(gpu, monkeypatch):
    model, x = pruned(), torch.randn(5, 64)
    monkeypatch.setattr(dispatch, "measure", lambda c: {n: 0.5 if n == "2:4" else 1.0 for n in c})
    small = sl.compress(model, x)
    assert [type(m) for m in small] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(small(x), model(x))


def test_what_torch_refuses_stays_as_it_is(gpu, monkeypatch):
    def refuse(weight):
        raise RuntimeError("no kernel for this\nand a long trace")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    model, x = pruned(), torch.randn(5, 64)
    winner(monkeypatch, "dense")
    small = sl.compress(model, x)
    assert type(small[0]) is nn.Linear
    assert sl.explain(small).rows[0].note.endswith("no 2:4 form: no kernel for this")


def test_saved_loaded_copied_and_moved(gpu, monkeypatch):
    model, x = pruned(), torch.randn(5, 64)
    winner(monkeypatch, "2:4")
    small = sl.compress(model, x)
    want = small(x)
    plain = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    plain.load_state_dict(small.state_dict())
    torch.testing.assert_close(plain(x), want)
    twin = copy.deepcopy(small)
    assert type(twin[0]) is SemiStructuredLinear and torch.equal(twin(x), want)
    twin.load_state_dict({name: value * 2 for name, value in small.state_dict().items()})
    torch.testing.assert_close(twin[0](x), small[0](x) * 2)
    assert torch.equal(small(x), want)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    monkeypatch.undo()  # this machine again: no GPU
    assert [type(m) for m in twin.double()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert twin[0].weight.dtype == torch.float64 and (twin[0].weight == 0).double().mean() == 0.5
    file.seek(0)
    assert type(torch.load(file, weights_only=False)[0]) is nn.Linear


def test_words_of_the_reference_agree():
    for density in (0.3, 0.02):
        keep = torch.rand(40, 72, generator=torch.Generator().manual_seed(1)) < density
        want = bool((keep.view(40, -1, 4).sum(2) <= 2).all())
        assert semi_structured.is_two_of_four(reference.bitmask_pack(keep)) == want
