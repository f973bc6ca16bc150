"""Tickets: what they hold, the file and how it is damaged, applying them."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import sparselottery as sl
from sparselottery.nn import masked_modules
from sparselottery.tickets.ticket import write_atomic


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10), nn.Linear(10, 3))


def pruned(density=0.2):
    model = network()
    initial = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    sl.prune(model, density=density)
    return model, initial


def same(a, b):
    assert a.masks == b.masks and list(a.initial) == list(b.initial)
    assert all(torch.equal(a.initial[k], b.initial[k]) and a.initial[k].dtype == b.initial[k].dtype for k in a.initial)


def test_a_ticket_holds_masks_and_the_whole_initial_state():
    model, initial = pruned()
    ticket = sl.Ticket.of(model, initial)
    assert list(ticket.masks) == ["0", "3", "4"] and list(ticket.initial) == list(initial)
    assert all(torch.equal(ticket.initial[k], initial[k]) for k in initial)
    assert ticket.count == round(0.2 * ticket.total) and ticket.total == 36 + 1440 + 30
    assert ticket.density == ticket.count / ticket.total and "density 0.1999" in repr(ticket)
    words = 4 * (4 + 10 * 5 + 3)
    assert ticket.nbytes == words + sum(t.numel() * t.element_size() for t in initial.values())
    initial["0.weight"].zero_()
    assert ticket.initial["0.weight"].any(), "a copy"
    same(ticket, sl.Ticket.of(model, sl.sparsify(network())))


def test_a_dead_layer_stays_out_of_later_changes():
    model, initial = pruned()
    ticket = sl.Ticket.of(model, initial)
    before = ticket.masks["3"]
    sl.prune(model, density=0.1)
    assert ticket.masks["3"] == before and model[3].mask != before


@pytest.mark.parametrize("target", ["plain", "masked", "other masks"])
def test_apply_gives_initial_weights_and_masks(target):
    model, initial = pruned()
    ticket = sl.Ticket.of(model, initial)
    other = network(seed=1)
    if target != "plain":
        sl.sparsify(other)
    if target == "other masks":
        sl.prune(other, density=0.01)
    parameters = list(other.parameters())
    assert ticket.apply(other) is other
    assert all(a is b for a, b in zip(other.parameters(), parameters, strict=True))
    for name, layer in masked_modules(other):
        assert layer.mask == ticket.masks[name] == model.get_submodule(name).mask
        assert torch.equal(layer.weight, initial[f"{name}.weight"] * layer.mask.to_dense())
    for key in ("0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(other.state_dict()[key], initial[key])
    same(ticket, sl.Ticket.of(other, initial))


def test_apply_masks_only_the_layers_of_the_ticket():
    model = network()
    sl.prune(model, density=0.3, exclude="4")
    other = sl.Ticket.of(model, network()).apply(network())
    assert type(other[4]) is nn.Linear and isinstance(other[3], sl.MaskedLinear)
    other = sl.sparsify(network())
    sl.prune(other, density=0.5)
    assert sl.Ticket.of(model, network()).apply(other)[4].density == 1


def test_distance():
    model, initial = pruned(0.5)
    a = sl.Ticket.of(model, initial)
    sl.prune(model, density=0.25)
    b = sl.Ticket.of(model, initial)
    assert a.distance(a) == 0 and a.distance(b) == b.distance(a) == (a.count - b.count) / a.total
    with pytest.raises(TypeError, match="other: expected a Ticket, got Mask"):
        a.distance(a.masks["3"])
    with pytest.raises(sl.TicketError, match="other: missing 0, 4"):
        a.distance(sl.Ticket({"3": a.masks["3"]}, a.initial))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: network()[:4], "model: missing 4.weight, 4.bias"),
        (lambda: nn.Sequential(*network(), nn.Linear(3, 3)), "model: unexpected 5.weight, 5.bias"),
        (
            lambda: nn.Sequential(*network()[:4], nn.Linear(10, 4)),
            "model: 4.weight: expected shape [3, 10], got [4, 10]",
        ),
        (Other, "model: missing 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 6 more"),
        (
            lambda: nn.Sequential(*network()[:4], nn.utils.parametrizations.weight_norm(nn.Linear(10, 3))),
            "model: missing 4.weight",
        ),
    ],
)
def test_apply_to_a_model_that_does_not_fit_changes_nothing(make, says):
    ticket = sl.Ticket.of(*pruned())
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sl.TicketError, match=re.escape(says)):
        ticket.apply(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_apply_to_a_layer_that_cannot_be_masked():
    class Own(nn.Linear):
        def forward(self, x):
            return x

    model = nn.Sequential(*network()[:4], Own(10, 3))
    with pytest.raises(sl.TicketError, match="model: 4 cannot be masked: Own has a forward of its own"):
        sl.Ticket.of(*pruned()).apply(model)
    assert not list(masked_modules(model))


def test_bad_arguments():
    model, initial = pruned()
    for arguments, error, says in (
        (([1], initial), TypeError, "model: expected an nn.Module, got list"),
        ((model, [1]), TypeError, "initial: expected a state_dict or an nn.Module, got list"),
        ((network(), initial), sl.TicketError, "masks: expected at least one, got none"),
        ((model, {k: v for k, v in initial.items() if k != "3.bias"}), sl.TicketError, "initial: missing 3.bias"),
        ((model, initial | {"x": torch.ones(1)}), sl.TicketError, "initial: unexpected x"),
        ((model, initial | {"3.bias": torch.ones(1)}), sl.TicketError, "initial: 3.bias: expected shape [10], got [1]"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            sl.Ticket.of(*arguments)
    assert issubclass(sl.TicketError, ValueError)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        sl.Ticket.of(model, initial).apply({})


# ---- the file ----


def test_file_round_trip(tmp_path):
    model, initial = pruned()
    ticket = sl.Ticket.of(
        model.bfloat16(), {k: v.bfloat16() if v.is_floating_point() else v for k, v in initial.items()}
    )
    path = tmp_path / "a.safetensors"
    assert ticket.save(path) == path and os.listdir(tmp_path) == ["a.safetensors"]
    same(sl.Ticket.load(path), ticket)
    again = tmp_path / "b.safetensors"
    sl.Ticket.load(str(path)).save(str(again))
    assert again.read_bytes() == path.read_bytes(), "equal tickets, equal bytes"
    stored = safetensors.torch.load_file(path)
    assert stored["mask.3"].dtype == torch.int32 and stored["mask.3"].shape == (10, 5), (
        "any safetensors reader opens it"
    )
    assert path.stat().st_size < ticket.nbytes + 2500


def test_a_single_layer_and_tied_weights(tmp_path):
    layer = nn.Linear(4, 4)
    sl.prune(layer, density=0.5)
    ticket = sl.Ticket.of(layer, nn.Linear(4, 4))
    ticket.save(tmp_path / "t")
    assert sl.Ticket.load(tmp_path / "t").apply(nn.Linear(4, 4)).mask == layer.mask

    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "e": nn.Embedding(64, 64)})
    model["b"].weight = model["a"].weight
    sl.prune(model, density=0.5, scope="layer")
    ticket = sl.Ticket.of(model, model)
    assert list(ticket.masks) == ["a"] and ticket.total == 4096
    ticket.save(tmp_path / "tied")
    assert (tmp_path / "tied").stat().st_size < 2 * 4096 * 4 + 3000
    loaded = sl.Ticket.load(tmp_path / "tied")
    same(loaded, ticket)
    assert loaded.initial["a.weight"] is loaded.initial["b.weight"] and loaded.nbytes == ticket.nbytes
    other = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "e": nn.Embedding(64, 64)})
    other["b"].weight = other["a"].weight
    loaded.apply(other)
    assert other["b"].weight is other["a"].weight and other["a"].mask == model["a"].mask


def test_a_flipped_bit_in_any_byte_is_found(tmp_path):
    layer = nn.Linear(3, 2)
    sl.prune(layer, density=0.5)
    sl.Ticket.of(layer, layer).save(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    path = tmp_path / "flipped"
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(sl.TicketError, match=re.escape(f"{path}: ")) as caught:
            sl.Ticket.load(path)
        assert "\n" not in str(caught.value)


def test_truncated_foreign_and_missing_files(tmp_path):
    ticket = sl.Ticket.of(*pruned())
    ticket.save(tmp_path / "t")
    data, path = (tmp_path / "t").read_bytes(), tmp_path / "broken"
    foreign = safetensors.torch.save({"mask.3": torch.ones(3)}, {"format": "pt"})
    for content in [data[:n] for n in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1)] + [
        data + b"0",
        foreign,
        b"PK\x03\x04" + b"\0" * 100,
        b"\xff" * 64,
    ]:
        path.write_bytes(content)
        with pytest.raises(sl.TicketError, match=re.escape(f"{path}: ")) as caught:
            sl.Ticket.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sl.Ticket.load(tmp_path / "nowhere")


def forged(data, change):
    """A ticket's file with other metadata, sealed with the SHA-256 that fits."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = change(json.loads(header["__metadata__"]["sparselottery"]) | {"sha256": "0" * 64})
    header["__metadata__"]["sparselottery"] = json.dumps(about, separators=(",", ":"))
    head = json.dumps(header, separators=(",", ":")).encode()
    data = len(head).to_bytes(8, "little") + head + data[8 + size :]
    start = data.index(b"0" * 64)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + 64 :]


FORGERIES = {
    "three fields become two": lambda a: a | {"masks": [m[:2] for m in a["masks"]]},
    "three fields become four": lambda a: a | {"masks": [[*m, 0] for m in a["masks"]]},
    "masks a mapping": lambda a: a | {"masks": {m[0]: m[1:] for m in a["masks"]}},
    "masks a number": lambda a: a | {"masks": 3},
    "no masks": lambda a: a | {"masks": []},
    "no initial": lambda a: {k: v for k, v in a.items() if k != "initial"},
    "initial of one field": lambda a: a | {"initial": [i[:1] for i in a["initial"]]},
    "a tensor that is not there": lambda a: a | {"masks": [[m[0], m[1], "mask.9"] for m in a["masks"]]},
    "a tensor that is a list": lambda a: a | {"initial": [[i[0], [1]] for i in a["initial"]]},
    "another shape": lambda a: a | {"masks": [[m[0], [7, 7], m[2]] for m in a["masks"]]},
    "a negative shape": lambda a: a | {"masks": [[m[0], [-1, 3], m[2]] for m in a["masks"]]},
    "a huge shape": lambda a: a | {"masks": [[m[0], [2**70], m[2]] for m in a["masks"]]},
    "a shape of words": lambda a: a | {"masks": [[m[0], "ab", m[2]] for m in a["masks"]]},
    "names that are numbers": lambda a: a | {"masks": [[3, *m[1:]] for m in a["masks"] if m[0] == "3"]},
    "weights for masks": lambda a: a | {"masks": [[m[0], m[1], "initial.3.weight"] for m in a["masks"]]},
    "another format": lambda a: a | {"format": 2},
    "no format": lambda a: {"sha256": a["sha256"]},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_sealed_files_of_another_structure(tmp_path, forgery):
    path, broken = tmp_path / "t", tmp_path / "broken"
    sl.Ticket.of(*pruned()).save(path)
    data = path.read_bytes()
    broken.write_bytes(forged(data, lambda about: about))
    same(sl.Ticket.load(broken), sl.Ticket.load(path))
    broken.write_bytes(forged(data, FORGERIES[forgery]))
    with pytest.raises(sl.TicketError, match=r"broken: (?!damaged)") as caught:
        sl.Ticket.load(broken)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "t"
    sl.Ticket.of(*pruned(0.5)).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sl.Ticket.of(*pruned(0.1)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "f", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_ticket_read_by_another_process_starts_the_same_network(tmp_path):
    model, initial = pruned()
    path = sl.Ticket.of(model, initial).save(tmp_path / "t")
    x = torch.arange(64.0).view(1, 1, 8, 8)
    want = sl.Ticket.load(path).apply(network()).eval()(x).sum().item()
    program = (
        "import sys, torch, sparselottery as sl; from torch import nn; m = nn.Sequential(nn.Conv2d(1, 4, 3),"
        " nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10), nn.Linear(10, 3)); sl.Ticket.load(sys.argv[1]).apply(m);"
        " print(m.eval()(torch.arange(64.0).view(1, 1, 8, 8)).sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    assert float(out) == pytest.approx(want, rel=1e-6)


class Awkward(nn.Module):
    """State that shares memory, and a buffer named as ours are in a module that is not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("weight_mask", torch.arange(3.0))
        self.register_buffer("square", torch.arange(64.0).reshape(8, 8))
        self.register_buffer("turned", self.square.t())
        self.register_buffer("part", self.square[2:4])


def test_initial_state_may_share_memory(tmp_path):
    model = Awkward()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    sl.prune(model, density=0.5)
    shared = {key: value for key, value in model.state_dict().items() if key in initial}
    held = sl.Ticket({"inner": model.inner.mask}, shared | {"inner.weight": initial["inner.weight"]})
    for ticket in (held, sl.Ticket.of(model, initial)):
        ticket.save(tmp_path / "t")
        loaded = sl.Ticket.load(tmp_path / "t")
        assert all(torch.equal(loaded.initial[key], value) for key, value in initial.items())
        assert sl.Ticket.load(tmp_path / "t").apply(Awkward()).inner.mask == model.inner.mask


def test_state_that_is_no_tensor_is_refused():
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"a": 1}

    model = Extra(nn.Linear(4, 4))
    sl.prune(model, density=0.5)
    with pytest.raises(sl.TicketError, match="_extra_state: expected a tensor, got dict"):
        sl.Ticket.of(model, model)
