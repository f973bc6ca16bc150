"""prune: exact counts, scopes, rates, criteria, structures, bad input."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import masked_modules
from sparselottery.pruning import PruneReport, scope


def lenet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def convnet():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 8, 3),
            "conv2": nn.Conv2d(8, 8, 3),
            "fc": nn.Linear(72, 20),
            "norm": nn.LayerNorm(20),
            "out": nn.Linear(20, 10),
        }
    )


def kept(model):
    return {name: int(layer.weight.count_nonzero()) for name, layer in masked_modules(model)}


def masks(model):
    return {name: layer.mask.to_dense() for name, layer in masked_modules(model)}


@pytest.mark.parametrize("density", [0, 1, 0.5, 0.2, 0.8**7, 1 / 3, 1e-3])
@pytest.mark.parametrize("how", ["density", "sparsity"])
def test_global_magnitude_is_exact(density, how):
    model = lenet()
    weights = torch.cat([m.weight.detach().abs().flatten() for m in model if isinstance(m, nn.Linear)])
    total, want = 50200, round((density if how == "density" else 1 - (1 - density)) * 50200)
    report = sl.prune(model, **{how: density if how == "density" else 1 - density})
    assert (report.kept, report.total) == (want, total) and sum(kept(model).values()) == want
    assert {name: r.kept for name, r in report.layers.items()} == kept(model)
    assert report.density == want / total
    flat = torch.cat([m.flatten() for m in masks(model).values()])
    order = torch.sort(weights, descending=True, stable=True).indices
    assert set(flat.nonzero().flatten().tolist()) == set(order[:want].tolist())
    assert report.threshold == (weights[order[want - 1]].item() if want else math.inf)


def test_layer_scope_gives_each_layer_the_density_and_the_sum_exactly():
    model = lenet()
    report = sl.prune(model, density=0.123, scope="layer")
    assert report.kept == round(0.123 * 50200)
    for name, layer in masked_modules(model):
        total = layer.weight.numel()
        assert abs(report.layers[name].kept - 0.123 * total) < 1
        magnitudes = layer.weight.detach().abs().flatten()
        assert magnitudes[magnitudes > 0].min() == report_minimum(lenet(), name, report.layers[name].kept)


def report_minimum(model, name, count):
    return model.get_submodule(name).weight.detach().abs().flatten().sort(descending=True).values[count - 1]


def test_ties_go_to_the_lowest_index_in_the_order_of_the_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.ones_(layer.weight)
    sl.prune(model, density=20 / 32)
    assert masks(model)["0"].all() and masks(model)["1"].flatten().tolist() == [True] * 4 + [False] * 12


def test_rounds_never_regrow_and_count_the_survivors():
    model = lenet()
    left = 50200
    for _ in range(12):
        before = masks(model) if left < 50200 else None
        report = sl.prune(model, rate=0.2)
        assert report.kept == round(left * 0.8)
        left = report.kept
        with torch.no_grad():
            for _, layer in masked_modules(model):
                layer.weight.add_(torch.randn_like(layer.weight))  # training
        if before:
            assert all(not (after & ~before[name]).any() for name, after in masks(model).items())
    assert abs(left / 50200 - 0.8**12) < 1e-3


def test_the_rates_of_the_paper():
    model = lenet()
    for n in range(1, 4):
        report = sl.prune(model, rate=0.2, scope="layer", rates={"output": 0.5})
        for name, factor in (("0", 0.8), ("2", 0.8), ("4", 0.9)):
            layer = report.layers[name]
            assert abs(layer.kept - factor**n * layer.total) <= n
    model = convnet()
    report = sl.prune(model, rate=0.2, rates={"conv": 0.5, "output": 0.5})
    conv = report.layers["conv1"].total + report.layers["conv2"].total
    assert report.layers["conv1"].kept + report.layers["conv2"].kept + report.layers["out"].kept == round(
        0.9 * (conv + 200)
    ), "in global scope layers of equal rate compete"
    assert report.layers["fc"].kept == round(0.8 * 1440)


def test_rates_with_a_density_follow_many_small_rounds():
    model = lenet()
    report = sl.prune(model, density=0.2, scope="layer", rates={"output": 0.5})
    assert report.kept == 10040
    hidden = report.layers["0"].density
    assert math.isclose(report.layers["2"].density, hidden, abs_tol=1e-3)
    assert math.isclose(report.layers["4"].density, hidden**0.5, abs_tol=1e-3)
    report = sl.prune(model, density=0.002, scope="layer", rates={"output": 0.5, "0": 1})
    assert report.kept == 100 and all(r.kept for r in report.layers.values())


def test_names_beat_output_beats_kinds_and_zero_freezes():
    report = sl.prune(convnet(), rate=0.5, scope="layer", rates={"linear": 0.2, "output": 0.4, "conv*": 0, "conv2": 1})
    got = {name: r.density for name, r in report.layers.items()}
    assert got["conv1"] == 1 and got["conv2"] == 0.5
    assert math.isclose(got["fc"], 0.9, abs_tol=1e-3) and math.isclose(got["out"], 0.8, abs_tol=5e-3)
    frozen = sl.prune(convnet(), density=0.5, rates={"conv": 0})
    assert frozen.layers["conv1"].density == frozen.layers["conv2"].density == 1 and frozen.kept == round(
        0.5 * frozen.total
    )


def test_density_of_single_layers():
    model = convnet()
    report = sl.prune(model, density={"fc": 0.25, "out": 1 / 3})
    assert {n: r.kept for n, r in report.layers.items()} == {"conv1": 216, "conv2": 576, "fc": 360, "out": 67}


def test_exclude_may_be_a_generator():
    model, other = convnet(), convnet()
    report = sl.prune(model, density=0.1, exclude=(name for name in ("conv1", "out")))
    assert report.layers == sl.prune(other, density=0.1, exclude=("conv1", "out")).layers
    assert "out" not in report.layers and "conv1" not in report.layers


def test_exclude_is_neither_pruned_nor_counted():
    model = convnet()
    report = sl.prune(model, density=0.1, exclude=(nn.Conv2d, "out"))
    assert report.layers.keys() == {"fc"} and report.kept == 144 and type(model["conv1"]) is nn.Conv2d
    report = sl.prune(model, density=0.5, exclude="fc")
    assert "fc" not in report.layers and int(model["fc"].weight.count_nonzero()) == 144


def test_criteria():
    first, second = lenet(), lenet()
    for model in (first, second):
        sl.prune(model, density=0.3, criterion="random", generator=torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(masks(first).values(), masks(second).values(), strict=True))
    assert sum(kept(first).values()) == 15060
    share = first[0].density
    assert abs(share - 0.3) < 0.02 and abs(first[2].density - 0.3) < 0.02, "random prunes all layers alike"

    model = lenet()
    initial = {
        name: layer.weight.detach().clone() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.add_(torch.randn_like(layer.weight) / 10)

    def movement(name, layer):
        return (layer.weight - initial[name]).abs()

    want = torch.cat([movement(n, model.get_submodule(n)).flatten() for n in initial])
    scores = {n: movement(n, model.get_submodule(n)).detach() for n in initial}
    sl.prune(model, density=0.1, criterion=movement)
    flat = torch.cat([m.flatten() for m in masks(model).values()])
    assert want[flat].min() >= want[~flat].max()
    other = lenet()
    sl.prune(other, density=0.1, criterion=scores)
    assert torch.equal(torch.cat([m.flatten() for m in masks(other).values()]), flat)


def test_scores_may_be_negative_and_dead_weights_stay_dead():
    model = nn.Sequential(nn.Linear(4, 4))
    sl.prune(model, density=0.5)
    before = masks(model)["0"]
    scores = torch.where(before, -5.0, 100.0)
    sl.prune(model, density=0.25, criterion={"0": scores})
    assert (masks(model)["0"] & ~before).sum() == 0 and masks(model)["0"].sum() == 4


# ---- structures ----


def matrices(name, tensor):
    """The matrices `[outputs, inputs]` that block structures cut up: for convolutions one per group and tap."""
    if name == "c":
        return [tensor.t()]
    if tensor.ndim == 2:
        return [tensor]
    groups = 2 if name == "grouped" else 1
    return [part[:, :, i, j] for part in tensor.chunk(groups) for i in range(3) for j in range(3)]


@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("high, wide", [(4, 4), (2, 8), (64, 3), (1, 1)])
def test_blocks(density, high, wide):
    model = nn.ModuleDict(
        {"a": nn.Linear(10, 7), "b": nn.Conv2d(5, 6, 3), "grouped": nn.Conv2d(10, 6, 3, groups=2), "c": Conv1D(9, 5)}
    )
    weights = {n: m.weight.detach().clone() for n, m in model.items()}
    sl.prune(model, density=density, structure=f"block:{high}x{wide}")
    sums, lives = [], []
    for name, mask in masks(model).items():
        for matrix, weight in zip(matrices(name, mask), matrices(name, weights[name].double().abs()), strict=True):
            for i in range(0, matrix.shape[0], high):
                for j in range(0, matrix.shape[1], wide):
                    block = matrix[i : i + high, j : j + wide]
                    assert block.all() or not block.any()
                    sums.append(weight[i : i + high, j : j + wide].sum().item()), lives.append(bool(block.any()))
    assert sum(lives) == round(density * len(lives))
    assert min(s for s, a in zip(sums, lives, strict=True) if a) >= max(
        s for s, a in zip(sums, lives, strict=True) if not a
    )


def test_blocks_of_equal_sums_go_by_index():
    model = nn.Sequential(nn.Linear(100, 70), nn.Conv2d(4, 4, 2))
    with torch.no_grad():
        model[0].weight.zero_(), model[1].weight.zero_()
    report = sl.prune(model, density={"0": 0.5, "1": 0.25}, structure="block:64x64")
    dense = masks(model)
    assert dense["0"][:64].all() and not dense["0"][64:].any(), "two of four blocks, whatever their size"
    assert dense["1"][:, :, 0, 0].all() and dense["1"].sum() == 16, "one block of four: the first tap"
    assert report.layers["0"].kept == 6400 and report.layers["1"].kept == 16


def test_channels_count_outputs_and_keep_earlier_zeros():
    model = nn.ModuleDict({"a": nn.Linear(10, 8), "b": nn.Conv2d(2, 6, 3), "out": nn.Linear(4, 4)})
    sl.prune(model, density=0.6, exclude="out")
    before = masks(model)
    sl.prune(model, density=0.5, structure="channel", exclude="out", scope="layer")
    for name, count in (("a", 4), ("b", 3)):
        mask = masks(model)[name].flatten(1)
        assert int(mask.any(1).sum()) == count
        assert torch.equal(mask, before[name].flatten(1) & mask.any(1, keepdim=True))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (1, 2), (8, 8)])
def test_n_of_m(n, m):
    model = nn.ModuleDict({"a": nn.Linear(24, 8), "b": nn.Conv2d(8, 3, 3), "c": Conv1D(6, 8)})
    weights = {n: m.weight.detach().clone() for n, m in model.items()}
    report = sl.prune(model, structure=f"{n}:{m}")
    assert report.kept == report.total * n // m
    for name, mask in masks(model).items():
        rows, values = (mask.t(), weights[name].t()) if name == "c" else (mask, weights[name])
        groups, values = rows.reshape(-1, m), values.reshape(-1, m).abs()
        assert (groups.sum(1) == n).all()
        top = torch.zeros_like(groups).scatter(1, values.topk(n, dim=1).indices, True)
        assert torch.equal(groups, top)


def test_n_of_m_ties_go_by_index_and_nothing_regrows():
    model = nn.ModuleDict({"a": nn.Linear(12, 8), "c": Conv1D(6, 8)})
    with torch.no_grad():
        model["a"].weight.fill_(-1)
    sl.prune(model, structure="2:4")
    assert torch.equal(masks(model)["a"], torch.tensor([True, True, False, False]).repeat(8, 3))
    model["a"].set_mask(torch.zeros(8, 12, dtype=torch.bool))
    assert sl.prune(model, structure="1:4").layers["a"].kept == 0, "never regrows"


# ---- bad input ----

BAD = [
    (dict(), ValueError, "density, sparsity, rate: expected exactly one of them, got none"),
    (dict(density=0.5, rate=0.2), ValueError, "expected exactly one of them, got density, rate"),
    (dict(density=1.5), ValueError, "density: expected a number from 0 to 1, got 1.5"),
    (dict(sparsity=-0.1), ValueError, "sparsity: expected a number from 0 to 1, got -0.1"),
    (dict(rate=float("nan")), ValueError, "rate: expected a number from 0 to 1, got nan"),
    (dict(density="0.5"), TypeError, "density: expected a number from 0 to 1, got str"),
    (dict(density=True), TypeError, "density: expected a number from 0 to 1, got bool"),
    (dict(density=0.5, scope="local"), ValueError, "scope: expected 'global' or 'layer', got 'local'"),
    (dict(density=0.5, criterion="l2"), ValueError, "criterion: expected 'magnitude', 'random', "),
    (dict(density=0.5, criterion=3), TypeError, "criterion: expected 'magnitude', 'random', "),
    (dict(density=0.5, criterion={"0": torch.ones(300, 64)}), ValueError, "criterion: no scores for 2, 4"),
    (
        dict(density=0.5, criterion=lambda n, m: m.bias),
        ValueError,
        "criterion: expected scores [300, 64] for 0, got [300]",
    ),
    (
        dict(density=0.5, criterion=lambda n, m: m.weight > 0),
        TypeError,
        "criterion: expected floating-point scores for 0",
    ),
    (dict(density=0.5, structure="blocks"), ValueError, "structure: expected 'unstructured', 'channel', 'block:RxC'"),
    (dict(density=0.5, structure="4:2"), ValueError, "structure: expected 'unstructured'"),
    (dict(density=0.5, structure=4), TypeError, "structure: expected 'unstructured'"),
    (dict(density=0.5, structure="2:4"), ValueError, "structure: 2:4 says how many survive"),
    (dict(structure="3:7"), ValueError, "structure: 3:7 needs inputs in multiples of 7, 0 has 64; exclude='0'"),
    (dict(rate=0.5, rates={"fc9": 0.5}), ValueError, "rates: no prunable layer is called 'fc9'"),
    (dict(rate=0.5, rates={"output": -1}), ValueError, "rates['output']: expected a factor of at least 0, got -1"),
    (dict(rate=0.5, rates={"output": "half"}), TypeError, "rates['output']: expected a number, got str"),
    (dict(rate=0.5, rates=[0.5]), TypeError, "rates: expected a mapping such as {'output': 0.5}, got list"),
    (dict(rate=0.5, rates={"2": 3}), ValueError, "rates: 0.5 * 3.0 prunes more than all of 2"),
    (dict(density=0.1, rates={"0": 0}), ValueError, "layers with rate 0 alone keep 19200"),
    (dict(density={"9": 0.5}), ValueError, "density: no prunable layer is called '9'"),
    (dict(density={"0": 2}), ValueError, "density['0']: expected a number from 0 to 1, got 2"),
    (dict(density=0.5, exclude=nn.Linear), ValueError, "model: expected a linear or convolutional layer"),
    (dict(density=0.5, exclude=5), TypeError, "exclude: expected names or classes, got int"),
    (dict(density=0.5, optimizer=[]), TypeError, "optimizer: expected a torch.optim.Optimizer, got list"),
]


@pytest.mark.parametrize("arguments, error, says", BAD, ids=[b[2][:60] for b in BAD])
def test_bad_arguments_say_so_and_prune_nothing(arguments, error, says):
    model = lenet()
    with pytest.raises(error, match=re.escape(says)) as caught:
        sl.prune(model, **arguments)
    assert "\n" not in str(caught.value)
    assert all(layer.density == 1 for _, layer in masked_modules(model))


def test_density_above_the_present_one():
    model = lenet()
    sl.prune(model, density=0.2)
    before = kept(model)
    for arguments in (
        dict(density=0.3),
        dict(sparsity=0.5),
        dict(density=0.3, scope="layer"),
        dict(density={"2": 0.9}),
    ):
        with pytest.raises(ValueError, match="prune never regrows"):
            sl.prune(model, **arguments)
    assert kept(model) == before
    with pytest.raises(ValueError, match=r"in 2, but \d+ are left"):  # above in one layer only
        sl.prune(model, density=0.2, scope="layer")
    assert kept(model) == before
    assert sl.prune(model, density=0.2).kept == 10040, "the same density again changes nothing"
    assert kept(model) == before


@pytest.mark.parametrize("structure", ["unstructured", "block:2x2", "channel"])
def test_nan_names_the_parameter(structure):
    model = lenet()
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight: holds NaN"):
        sl.prune(model, density=0.5, structure=structure)
    with pytest.raises(ValueError, match=r"2\.weight: holds NaN"):
        sl.prune(model, structure="2:4")
    assert all(layer.density == 1 for _, layer in masked_modules(model))


def test_report_prints_one_row_per_layer():
    report = sl.prune(lenet(), density=0.5)
    assert isinstance(report, PruneReport)
    lines = str(report).splitlines()
    assert len(lines) == 5 and lines[0].split() == ["layer", "kept", "of", "density"]
    assert lines[-1].split() == ["all", "25100", "50200", "50.00%"]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.floats(0, 1), st.sampled_from([0, 0.1, 0.5, 1, 2])), min_size=1, max_size=6
    ),
    st.floats(0, 1),
    st.booleans(),
)
def test_shares_add_up(layers, target, rated):
    groups = [scope.Group([str(i)], f, total, round(total * d)) for i, (total, d, f) in enumerate(layers)]
    total, count = sum(g.total for g in groups), sum(g.count for g in groups)
    try:
        keep = scope.to_density(groups, target, rated)
    except ValueError:
        asked = round(target * total)
        frozen = sum(g.count for g in groups if g.factor == 0)
        assert asked > count or (rated and asked < frozen) or any(target * g.total >= g.count for g in groups)
    else:
        assert keep == round(target * total) == sum(g.keep for g in groups)
        assert all(0 <= g.keep <= g.count for g in groups)
        if rated:
            assert all(g.keep == g.count for g in groups if g.factor == 0)
