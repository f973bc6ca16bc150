"""Whole neurons pruned by a score: how many, which, and that the pruned ones are out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.experiments import models
from sparselottery.pruning import neurons
from sparselottery.pruning.wiring import wiring


def seeded(make, *arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments)


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3),
        nn.Conv2d(6, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(45, 8), nn.Sigmoid(), nn.Linear(8, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.output = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return F.log_softmax(self.output(x + self.c(self.b(x).relu())), -1)


class Branching(Residual):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


SHAPES = {convnet: (2, 6, 6), Residual: (4,), Branching: (4,)}


def scores(model, names=None):
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.rand(len(v), generator=generator) for name, v in neurons.magnitudes(model).items()}
    return {name: v for name, v in found.items() if names is None or name in names}


# ---- how many and which ----


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [1.0, 0.77, 0.5, 0.31, 0.1, 0.001])
def test_exactly_the_asked_number(scope, density):
    model = seeded(convnet)
    given = scores(model)
    report = sl.prune_neurons(model, given, density=density, scope=scope)
    assert report.outputs == ("10",) and list(report.kept) == ["0", "5", "8"]
    assert report.total == 19 and report.count == max(3, round(density * 19))
    assert all(kept.any() for kept in report.kept.values())
    for name, kept in report.kept.items():
        assert given[name][kept].min() >= given[name][~kept].max() if kept.any() and not kept.all() else True
        rows = model.get_submodule(name).mask.to_dense().flatten(1).any(1)
        assert torch.equal(rows, kept)
        if scope == "layer":
            assert abs(int(kept.sum()) - max(1, density * len(kept))) <= 1
    assert report.weight_density == pytest.approx(
        sum(m.mask.count for m in masked(model)) / sum(m.mask.numel for m in masked(model))
    )
    if density == 1:
        assert report.weight_density == 1


def masked(model):
    return [layer for _, layer in sl.pruning.masked_modules(model)]


def test_global_ranks_layers_together_but_empties_none():
    model = seeded(convnet)
    low = {"0": torch.zeros(6), "5": torch.arange(5.0) + 1, "8": torch.arange(8.0) + 1}
    report = sl.prune_neurons(model, low, density=7 / 19, scope="global")
    assert report.kept["0"].tolist() == [True] + [False] * 5  # its best, ties to the lowest index
    assert report.kept["5"].tolist() == [False] * 3 + [True] * 2
    assert report.kept["8"].tolist() == [False] * 4 + [True] * 4


def test_again_and_never_back():
    model = seeded(convnet)
    first = sl.prune_neurons(model, scores(model), density=0.6)
    turned = {name: -values for name, values in scores(model).items()}  # those that are out would now be the best
    second = sl.prune_neurons(model, turned, density=0.4)
    assert second.count == round(0.4 * 19)
    assert all(not (second.kept[name] & ~first.kept[name]).any() for name in first.kept)
    assert all(torch.equal(v, neurons.kept_neurons(model, second.kept)[n]) for n, v in second.kept.items())
    with pytest.raises(ValueError, match=r"density: 0.9 asks for 5 of 6 neurons in 0, but .* are left"):
        sl.prune_neurons(model, turned, density=0.9)


# ---- out means out ----


@pytest.mark.parametrize("make", [convnet, Residual, Branching])
def test_a_pruned_neuron_gives_the_same_for_every_input(make):
    model = seeded(make).eval()
    report = sl.prune_neurons(model, scores(model), density=0.4)
    outputs = {}
    for name in report.kept:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
    model(torch.randn(20, *SHAPES[make]))
    for name, kept in report.kept.items():
        values = outputs[name].transpose(0, 1).flatten(1)
        assert (values[~kept] == 0).all() and (values[kept] != 0).any(1).all()
        assert (model.get_submodule(name).bias[~kept] == 0).all()


def test_nothing_reads_a_pruned_neuron():
    """Whatever it gave, in training too: no output changes and it gets no gradient; the network without it is the same."""
    model = seeded(convnet)
    report = sl.prune_neurons(model, scores(model), density=0.5)
    assert wiring(model).followed == {"0", "5", "8"}
    x = torch.randn(20, 2, 6, 6)
    model.eval()
    before = model(x)
    for name, kept in report.kept.items():
        with torch.no_grad():
            model.get_submodule(name).bias[~kept] = 5.0
    with torch.no_grad():
        model[1].bias[~report.kept["0"]] = -3.0
    assert torch.equal(model(x), before)
    model.train()(x).square().sum().backward()
    for name, kept in report.kept.items():
        assert (model.get_submodule(name).bias.grad[~kept] == 0).all()
    first, second, hidden = (report.kept[name] for name in ("0", "5", "8"))
    small = nn.Sequential(
        nn.Conv2d(2, int(first.sum()), 3, padding=1), nn.BatchNorm2d(int(first.sum())), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.3), nn.Conv2d(int(first.sum()), int(second.sum()), 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(9 * int(second.sum()), int(hidden.sum())), nn.Sigmoid(), nn.Linear(int(hidden.sum()), 3),
    ).eval()  # fmt: skip
    state = model.eval().state_dict()
    wide = second.repeat_interleave(9)
    cut = {
        "0.weight": state["0.weight"][first], "0.bias": state["0.bias"][first],
        **{f"1.{key}": state[f"1.{key}"][first] for key in ("weight", "bias", "running_mean", "running_var")},
        "1.num_batches_tracked": state["1.num_batches_tracked"],
        "5.weight": state["5.weight"][second][:, first], "5.bias": state["5.bias"][second],
        "8.weight": state["8.weight"][hidden][:, wide], "8.bias": state["8.bias"][hidden],
        "10.weight": state["10.weight"][:, hidden], "10.bias": state["10.bias"],
    }  # fmt: skip
    small.load_state_dict(cut)
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_stays_out_while_it_trains():
    model = seeded(convnet)
    optimizer = sl.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.01)
    x, y = torch.randn(30, 2, 6, 6), torch.arange(30) % 3
    for step in range(6):
        if step == 3:
            report = sl.prune_neurons(model, scores(model), density=0.5, optimizer=optimizer)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, kept in report.kept.items():
        layer = model.get_submodule(name)
        assert (layer.weight.flatten(1)[~kept] == 0).all() and (layer.bias[~kept] == 0).all()
        assert (layer.weight.flatten(1)[kept] != 0).any(1).all()


def test_packed_layers_stay_packed():
    plain, packed = seeded(convnet), seeded(convnet)
    given = scores(plain)
    sl.pack(sl.sparsify(packed))
    first, second = (sl.prune_neurons(m, given, density=0.5) for m in (plain, packed))
    assert all(torch.equal(first.kept[name], second.kept[name]) for name in given if name in first.kept)
    assert isinstance(packed[0], sl.PackedConv2d)
    x = torch.randn(5, 2, 6, 6)
    assert torch.allclose(plain.eval()(x), packed.eval()(x), atol=1e-5)


# ---- wiring ----


def test_wiring_of_the_networks_here():
    lenet = wiring(models.make("lenet-300-100", (1, 8, 8), 10))
    assert lenet.readers == {"fc1": ("fc2",), "fc2": ("output",), "output": ()}
    assert lenet.followed == {"fc1", "fc2"} and lenet.outputs == {"output"}
    conv = wiring(models.make("conv-4", (1, 8, 8), 10))
    assert conv.readers["conv4"] == ("fc1",) and conv.outputs == {"output"} and len(conv.followed) == 6
    resnet = wiring(models.make("resnet-20", (3, 16, 16), 10))
    assert resnet.readers["blocks.0.conv1"] == ("blocks.0.conv2",) and "blocks.0.conv1" in resnet.followed
    assert not {"conv", "blocks.0.conv2"} & resnet.followed and resnet.outputs == {"output"}
    assert (
        len(resnet.after["blocks.0.conv1"]) == 2 and len(resnet.after["blocks.0.conv2"]) == 1
    )  # BatchNorm, then a sum


def test_wiring_with_a_sum_and_without_a_trace():
    known = wiring(Residual())
    assert known.followed == {"b"} and known.outputs == {"output"}
    assert wiring(Branching()).outputs == {"output"} and not wiring(Branching()).readers
    assert wiring(nn.Linear(3, 2)).outputs == {""}


class Odd(nn.Module):
    """Uses of a convolution's channels that no columns of a reader belong to."""

    def __init__(self, use, reader):
        super().__init__()
        self.conv, self.use, self.reader = nn.Conv2d(1, 4, 3, padding=1), use, reader

    def forward(self, x):
        return self.reader(self.use(self.conv(x)))


@pytest.mark.parametrize(
    ("use", "reader", "followed"),
    [
        (nn.ReLU(), nn.Conv2d(4, 2, 1), True),
        (nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.ReLU(), nn.Linear(4, 2), False),  # reads the last dimension of the image
        (nn.Flatten(), nn.Linear(64, 2), True),
        (nn.Flatten(2), nn.Linear(16, 2), False),
        (nn.LayerNorm(4), nn.Conv2d(4, 2, 1), False),
        (lambda x: x.flatten(1), nn.Linear(64, 2), True),
        (lambda x: x.view(x.size(0), -1), nn.Linear(64, 2), True),
        (lambda x: x.reshape(x.shape[0], -1), nn.Linear(64, 2), True),
        (lambda x: x.reshape(-1, 4), nn.Linear(4, 2), False),
        (lambda x: x.mean((2, 3)), nn.Linear(4, 2), True),
        (lambda x: x.mean(1).flatten(1), nn.Linear(16, 2), False),
        (lambda x: F.relu(x) * x, nn.Conv2d(4, 2, 1), False),
        (lambda x: F.max_pool2d(F.gelu(x), 2), nn.Conv2d(4, 2, 1), True),
        (lambda x: x[:, [1, 0, 2, 3]], nn.Conv2d(4, 2, 1), False),
        (lambda x: torch.cat([x, x], 1), nn.Conv2d(8, 2, 1), False),
    ],
)
def test_what_is_followed(use, reader, followed):
    model = seeded(Odd, use, reader)
    x = torch.randn(3, 1, 4, 4)
    assert model(x).shape[0] in (3, 12, 48)
    assert ("conv" in wiring(model).followed) is followed
    report = sl.prune_neurons(model, {"conv": torch.arange(4.0)}, density=0.5)
    assert (
        (model.reader.mask.density == 0.5) is followed
        if isinstance(model.reader, sl.MaskedLinear | sl.MaskedConv2d)
        else not followed
    )
    if followed:
        before = model(x)
        with torch.no_grad():
            model.conv.bias[~report.kept["conv"]] = 7.0
        assert torch.equal(model(x), before)


def test_columns_of_a_weight_that_two_layers_share_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)).relu())

    model = Tied()
    assert "a" not in wiring(model).followed
    sl.prune_neurons(model, {"a": torch.arange(4.0)}, density=0.5)
    assert isinstance(model.b, sl.MaskedLinear) is False or model.b.mask.density == 1


# ---- mistakes ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"density": 0}, ValueError, "density: expected a number above 0 and at most 1, got 0"),
        ({"density": 1.5}, ValueError, "density: expected a number above 0"),
        ({"density": math.nan}, ValueError, "density: expected a number above 0"),
        ({"density": "half"}, TypeError, "density: expected a number"),
        ({"density": True}, TypeError, "density: expected a number"),
        ({"scope": "block"}, ValueError, "scope: expected 'global' or 'layer'"),
        ({"scores": {"nothing": torch.ones(3)}}, ValueError, "no linear or convolutional layer"),
        ({"scores": {"1": torch.ones(6)}}, ValueError, "no linear or convolutional layer"),
        ({"scores": {"0": torch.ones(5)}}, ValueError, r"scores: expected \[6\] for 0, got \[5\]"),
        ({"scores": {"0": torch.ones(6, dtype=torch.int64)}}, TypeError, "floating-point scores for 0"),
        ({"scores": {"0": torch.tensor([1.0, math.nan, 0, 0, 0, 0])}}, ValueError, "0: holds NaN|NaN"),
        ({"scores": {"10": torch.ones(3)}}, ValueError, "whose units are not the outputs"),
        ({"scores": {}}, ValueError, "got none"),
        ({"scores": [1.0]}, TypeError, "scores: expected a mapping"),
        ({"optimizer": "adam"}, TypeError, "optimizer: expected"),
        ({"model": "convnet"}, TypeError, "model: expected"),
    ],
)
def test_mistakes(change, error, message):
    model = seeded(convnet)
    arguments = {"model": model, "scores": scores(model), "density": 0.5, **change}
    with pytest.raises(error, match=message) as caught:
        sl.prune_neurons(**arguments)
    assert "\n" not in str(caught.value)
    assert all(layer.mask.density == 1 for layer in masked(model))


def test_an_emptied_layer_is_refused():
    model = sl.sparsify(seeded(convnet))
    model[5].set_mask(sl.Mask.zeros(model[5].weight.shape))
    with pytest.raises(ValueError, match="5 has no neuron left"):
        sl.prune_neurons(model, scores(model), density=0.5)
