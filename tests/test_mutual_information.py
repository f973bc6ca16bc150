"""Mutual information of activations and labels: against scikit-learn, against distributions whose answer is known."""

import math

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparselottery as sl
from sparselottery.tickets import mutual_information as module


def of_values(values, labels, **arguments):
    """The bits of values `[N, units]` as the activations of a layer that hands its inputs on."""
    layer = nn.Linear(values.shape[1], values.shape[1], dtype=values.dtype)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return sl.mutual_information(nn.Sequential(layer), values, labels, **arguments)["0"]


def mixture(count, gap, seed=0):
    """Labels 0 and 1, values from N(-gap, 1) and N(gap, 1); and I(value; label) in bits by numerical integration."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    values = torch.randn(count, generator=generator, dtype=torch.float64) + gap * (2 * labels - 1)
    grid = np.linspace(-12 - gap, 12 + gap, 40001)
    densities = [np.exp(-0.5 * (grid - m) ** 2) / math.sqrt(2 * math.pi) for m in (-gap, gap)]
    both = 0.5 * (densities[0] + densities[1])
    known = sum(0.5 * np.trapezoid(p * np.log2(p / both), grid) for p in densities)
    return values, labels, float(known)


@pytest.mark.parametrize("bins", [2, 3, 8, 16])
def test_plug_in_is_scikit_learns_on_the_same_bins(bins):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(997, 6, generator=generator, dtype=torch.float64)
    values[:, 1] = values[:, 1].relu()
    values[:, 2] = (values[:, 2] * 2).round()
    values[:, 3] = 4.0
    values[:, 4] = values[:, 4].clamp(max=-0.5)
    labels = torch.randint(5, (997,), generator=generator)
    found = of_values(values, labels, bins=bins, correction="none")
    for unit in range(6):
        index = module.bin_indices(values[:, unit : unit + 1], module.quantile_edges(values[:, unit : unit + 1], bins))[
            0
        ]
        assert index.min() >= 0 and index.max() < bins
        assert found[unit] == pytest.approx(mutual_info_score(index, labels) / math.log(2), abs=1e-12)


@pytest.mark.parametrize(("gap", "tolerance"), [(0.0, 0.003), (0.5, 0.012), (1.0, 0.012), (2.0, 0.02)])
def test_gaussian_mixtures(gap, tolerance):
    """The known value, scikit-learn's estimate from nearest neighbours, and ours: all agree."""
    values, labels, known = mixture(20000, gap)
    found = of_values(values[:, None], labels, bins=16, sample=20000).item()
    assert found == pytest.approx(known, abs=tolerance)
    neighbours = mutual_info_classif(values[:2000, None], labels[:2000], random_state=0)[0] / math.log(2)
    assert found == pytest.approx(neighbours, abs=0.05)


def test_correction_takes_the_bias_away():
    """Of 200 examples, 10 classes and 4 bins: independent units, whose plug-in estimate is far from 0."""
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.randn(200, 500, generator=generator), torch.arange(200) % 10
    plain = of_values(values, labels, bins=4, correction="none").mean().item()
    assert plain == pytest.approx(27 / (400 * math.log(2)), rel=0.1)  # (bins - 1)(classes - 1) / 2 N
    corrected = of_values(values, labels, bins=4)
    assert corrected.mean().item() < 0.15 * plain + 0.01 and corrected.min() >= 0


def test_miller_madow_by_hand():
    table = torch.tensor([[[4, 0], [1, 3]]])
    joint = np.array([[4, 0], [1, 3]]) / 8
    expected = sum(p * math.log2(p / (joint[i].sum() * joint[:, j].sum())) for (i, j), p in np.ndenumerate(joint) if p)
    assert module.bits(table, "none").item() == pytest.approx(expected, abs=1e-15)
    assert module.bits(table).item() == pytest.approx(expected - (3 - 2 - 2 + 1) / 16 / math.log(2), abs=1e-15)
    assert module.bits(torch.tensor([[[2, 2], [2, 2]]])).item() == 0  # below 0 before


def test_xor_constants_and_copies():
    """Either input of an XOR says nothing, the XOR itself everything, as does a copy of the label; a constant nothing."""
    a, b = torch.tensor([0, 0, 1, 1]).repeat(64), torch.tensor([0, 1, 0, 1]).repeat(64)
    label = a ^ b
    values = torch.stack([a, b, label, 1 - 2 * label, torch.full_like(a, 7), a + 2 * b], 1).float()
    found = of_values(values, label, correction="none")
    assert torch.allclose(found, torch.tensor([0, 0, 1, 1, 0, 1.0], dtype=torch.float64), atol=1e-12)
    assert found[4] == 0 and of_values(values, label)[4] == 0
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))  # XOR = relu(a + b) - 2 relu(a + b - 1)
    with torch.no_grad():
        network[0].weight.fill_(1), network[0].bias.copy_(torch.tensor([0.0, -1.0]))
        network[2].weight.copy_(torch.tensor([[1.0, -2.0]])), network[2].bias.zero_()
    bits = sl.mutual_information(network, torch.stack([a, b], 1).float(), label, correction="none")
    assert bits["2"].item() == pytest.approx(1, abs=1e-12)
    assert bits["0"][1].item() == pytest.approx(0.3112781, abs=1e-6)  # AND of two coins, and their XOR


def test_rare_values_keep_a_bin():
    """An activation that is 0 but for 2 % of the examples, and one that is saturated but for 2 %: both say the rare class."""
    labels = (torch.arange(1000) < 20).long()
    rare = labels.float() * torch.rand(1000, generator=torch.Generator().manual_seed(0)).add(0.5)
    values = torch.stack([rare, 1 - rare.clamp(max=1).ceil(), -rare], 1)
    known = -(0.02 * math.log2(0.02) + 0.98 * math.log2(0.98))
    found = of_values(values, labels, bins=8, correction="none")
    assert torch.allclose(found, torch.full((3,), known, dtype=torch.float64), atol=1e-9)


# ---- streaming ----


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(6 * 9, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4),
        )  # fmt: skip


def probe(count=300):
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.randn(count, 1, 6, 6, generator=generator) + labels[:, None, None, None] * 0.3, labels


@pytest.mark.parametrize("sample", [16384, 50])
def test_batches_do_not_matter(sample):
    """Counts are sums: the same bits however the probe set is cut, from a tensor or a loader, kept whole or sampled."""
    model, (x, y) = network(), probe()
    whole = sl.mutual_information(model, x, y, batch_size=1000, sample=sample)
    assert list(whole) == ["0", "5", "8"] and [len(v) for v in whole.values()] == [6, 12, 4]
    for other in (
        sl.mutual_information(model, x, y, batch_size=7, sample=sample),
        sl.mutual_information(model, DataLoader(TensorDataset(x, y), batch_size=64), sample=sample),
        sl.mutual_information(model, x, y, sample=sample),
    ):
        for name in whole:
            assert torch.allclose(whole[name], other[name], atol=0.02), name  # a rounding may move a value over an edge


def test_second_pass_counts_what_the_first_would():
    values, labels, _ = mixture(4000, 1.0)
    kept = of_values(values[:, None], labels, bins=8, sample=4000, batch_size=300)
    streamed = of_values(values[:, None], labels, bins=8, sample=3999, batch_size=300)
    assert kept.item() == pytest.approx(streamed.item(), abs=0.003) and kept.item() > 0.3


def test_chunks_of_units_do_not_matter(monkeypatch):
    model, (x, y) = network(), probe()
    whole = sl.mutual_information(model, x, y)
    monkeypatch.setattr(module, "_CHUNK", 700)
    again = sl.mutual_information(model, x, y)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_only_counts_are_kept():
    """Memory: the sample is as large as asked for, whatever the probe set."""
    drawn = module._Drawn(10)
    for start in range(0, 100, 8):
        values = torch.arange(start, min(start + 8, 100)).float()[:, None]
        drawn.add({"layer": values}, len(values))
    assert not drawn.all and drawn.values["layer"].shape == (10, 1)
    assert torch.equal(drawn.values["layer"][:, 0].long(), drawn.order)
    places = torch.zeros(100)
    for seed in range(2000):
        drawn = module._Drawn(10)
        drawn.generator.manual_seed(seed)
        for start in (0, 30, 90):
            size = {0: 30, 30: 60, 90: 10}[start]
            drawn.add({"layer": torch.zeros(size, 1)}, size)
        places[drawn.order] += 1
    assert (places - 200).abs().max() < 6 * math.sqrt(180)  # each example as likely as any other


def test_the_model_is_left_as_it_was():
    model, (x, y) = network().train(), probe()
    model[6].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sl.mutual_information(model, x, y)
    assert model.training and not model[6].training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ---- which activation ----


def test_after_the_nonlinearity():
    """A unit below 0 for every example is silent after its ReLU, whether that is a module, a function or a method."""

    class Functional(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.a, self.b, self.call = nn.Linear(4, 3), nn.Linear(3, 2), call

        def forward(self, x):
            return self.b(self.call(self.a(x)))

    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    calls = (
        nn.ReLU(),
        nn.functional.relu,
        torch.relu,
        lambda v: v.relu_(),
        lambda v: nn.functional.hardtanh(v, 0.0, 9.0),
    )
    for call in calls:
        model = Functional(call)
        with torch.no_grad():
            model.a.weight.copy_(torch.eye(3, 4)), model.a.bias.copy_(torch.tensor([0.0, -1.0, 0.0]))
            model.a.weight[1, 1] = 0
            model.a.weight[1, 0] = 1  # tells the label as well as unit 0, but is negative
        bits = sl.mutual_information(model, x, y)
        assert bits["a"][0] > 0.9 and bits["a"][1] == 0
    untraceable = Functional(lambda v: v.relu() if v.sum() > -1e9 else v)
    untraceable.load_state_dict(model.state_dict())
    assert sl.mutual_information(untraceable, x, y)["a"][1] > 0.9  # the layer's own output, as documented


def test_channels_are_pooled_and_tokens_too():
    x, y = probe()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1), model[0].bias.zero_()
    relu = x.relu().flatten(1)
    for pool, pooled in (("mean", relu.mean(1)), ("max", relu.amax(1))):
        found = sl.mutual_information(model, x, y, bins=8, pool=pool)["0"]
        assert torch.allclose(found, of_values(pooled[:, None].double(), y, bins=8).expand(2), atol=1e-3)
        assert found[0] > 0.05
    tokens = nn.Linear(6, 3)
    found = sl.mutual_information(tokens, x.flatten(1, 2), y, bins=8)[""]
    assert torch.allclose(found, of_values(tokens(x.flatten(1, 2)).mean(1).detach(), y, bins=8), atol=0.02)


def test_masked_packed_and_transposed_layers():
    model, (x, y) = network(), probe()
    sl.prune(model, density=0.5)
    masked = sl.mutual_information(model, x, y)
    packed = sl.mutual_information(sl.pack(model), x, y)
    assert list(masked) == list(packed)
    assert all(torch.allclose(masked[name], packed[name], atol=0.02) for name in masked)
    conv1d = pytest.importorskip("transformers", reason="transformers is not installed").pytorch_utils.Conv1D(5, 6)
    assert sl.mutual_information(conv1d, x.flatten(1)[:, :6], y)[""].shape == (5,)


def test_shared_layers_and_unused_ones():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.layer(x))

    x, y = probe()
    assert {name: len(v) for name, v in sl.mutual_information(Twice(), x.flatten(1)[:, :6], y).items()} == {"layer": 6}


def test_exclude_and_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, *, values):
            return self.b(self.a(values).tanh())

    x, y = probe()
    batches = [({"values": x[i : i + 50].flatten(1)[:, :6]}, y[i : i + 50]) for i in range(0, 300, 50)]
    assert list(sl.mutual_information(Keywords(), batches, exclude="b")) == ["a"]


def test_transformers_and_bfloat16():
    """Names of every projection; a layer that sees examples and tokens as one axis is told apart."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    batches = [({"input_ids": part}, part[:, 0] % 3) for part in ids.split(20)]
    found = sl.mutual_information(model.to(torch.bfloat16), batches)
    assert len(found["bert.encoder.layer.0.intermediate.dense"]) == 12 and len(found["classifier"]) == 3
    assert all(bits.dtype == torch.float64 and bits.isfinite().all() for bits in found.values())

    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x.flatten(0, 1))

    x, y = probe()
    with pytest.raises(ValueError, match="layer: expected activations of 256 examples, got 1536; exclude='layer'"):
        sl.mutual_information(Merged(), x[:, 0], y)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probe_inputs": torch.empty(0, 1, 6, 6), "probe_labels": torch.empty(0).long()}, ValueError, "empty probe set"),
        ({"probe_inputs": [], "probe_labels": None}, ValueError, "empty probe set"),
        ({"probe_labels": torch.zeros(300, dtype=torch.int64)}, ValueError, r"at least two classes, got only \[0\]"),
        ({"probe_labels": torch.zeros(299, dtype=torch.int64)}, ValueError, "expected one for each"),
        ({"probe_labels": torch.zeros(300)}, TypeError, "expected integers, got torch.float32"),
        ({"probe_labels": torch.zeros(300, 2, dtype=torch.int64)}, ValueError, r"expected \[N\]"),
        ({"probe_labels": None}, TypeError, "probe_labels: expected a tensor of integers"),
        ({"probe_inputs": iter([]), "probe_labels": None}, TypeError, "iterated twice"),
        ({"probe_inputs": 3, "probe_labels": None}, TypeError, "probe_inputs: expected a tensor with labels"),
        ({"probe_inputs": [torch.ones(3)], "probe_labels": None}, TypeError, "expected pairs"),
        ({"probe_inputs": torch.full((300, 1, 6, 6), math.nan)}, ValueError, "0: activations hold NaN"),
        ({"probe_inputs": torch.full((300, 1, 6, 6), math.inf)}, ValueError, "0: activations hold NaN|infinity"),
        ({"bins": 1}, ValueError, "bins: expected at least 2"),
        ({"bins": 2.0}, TypeError, "bins: expected an int"),
        ({"sample": 1}, ValueError, "sample: expected at least 2"),
        ({"correction": "none at all"}, ValueError, "correction: expected one of"),
        ({"pool": "median"}, ValueError, "pool: expected one of"),
        ({"exclude": "nothing"}, ValueError, "no module is called"),
        ({"exclude": "*"}, ValueError, "found none"),
        ({"model": "network"}, TypeError, "model: expected a torch.nn.Module"),
    ],
)  # fmt: skip
def test_mistakes(change, error, message):
    x, y = probe()
    model = network().train()
    arguments = {"model": model, "probe_inputs": x, "probe_labels": y, **change}
    with pytest.raises(error, match=message) as caught:
        sl.mutual_information(**arguments)
    assert "\n" not in str(caught.value)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_a_stream_that_changes():
    class Fickle:
        def __init__(self):
            self.asked = 0

        def __iter__(self):
            self.asked += 1
            x, y = probe()
            yield x[: 300 - 100 * (self.asked - 1)], y[: 300 - 100 * (self.asked - 1)]

    with pytest.raises(ValueError, match="gave other examples the second time"):
        sl.mutual_information(network(), Fickle(), sample=100)
