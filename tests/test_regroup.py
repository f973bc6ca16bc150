"""Structured masks from unstructured ones: refill, regroup, the search for blocks, reordered layers."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import MaskedLinear, masked_modules
from sparselottery.ops import block_linear
from sparselottery.pruning import coclusters


def planted(rows, columns, high, wide, blocks, seed=0, fill=1.0, noise=0.0):
    """A mask with dense blocks in an order that nobody is told, and that order."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.zeros(-(-rows // high), -(-columns // wide), dtype=torch.bool)
    grid.view(-1)[torch.randperm(grid.numel(), generator=generator)[:blocks]] = True
    dense = grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    kept = torch.rand(rows, columns, generator=generator) < torch.where(dense, fill, noise)
    p, q = torch.randperm(rows, generator=generator), torch.randperm(columns, generator=generator)
    return kept[p][:, q], dense[p][:, q]


def network(mask):
    torch.manual_seed(0)
    return nn.Sequential(
        MaskedLinear(mask.shape[1], mask.shape[0], mask=mask), nn.ReLU(), MaskedLinear(mask.shape[0], 4)
    )


# ---- the search ----


def test_planted_blocks_are_found_again():
    mask, _ = planted(96, 128, 16, 16, 12)
    found = coclusters.find(mask.unsqueeze(0), 16, 16, 12)
    assert found.covered == int(mask.sum()) and torch.equal(found.mask(16, 16)[0], mask)
    assert sorted(found.rows.tolist()) == list(range(96)) and sorted(found.columns.tolist()) == list(range(128))


@pytest.mark.parametrize(
    "rows, columns, high, wide, blocks", [(96, 128, 16, 16, 12), (70, 45, 8, 4, 30), (64, 64, 32, 1, 40)]
)
def test_noise_hides_few_of_them(rows, columns, high, wide, blocks):
    mask, dense = planted(rows, columns, high, wide, blocks, fill=0.8, noise=0.03)
    found = coclusters.find(mask.unsqueeze(0), high, wide, blocks)
    assert found.covered >= 0.9 * int((mask & dense).sum())


def test_the_count_is_what_the_blocks_cover():
    for seed in range(5):
        mask = torch.rand(2, 33, 29, generator=torch.Generator().manual_seed(seed)) < 0.3
        found = coclusters.find(mask, 8, 8, 9)
        blocks = found.mask(8, 8)
        assert found.covered == int((mask & blocks).sum()) and int(found.chosen.sum()) == 9
        in_order = blocks[:, found.rows][:, :, found.columns]
        assert torch.equal(in_order, found.chosen.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :33, :29])
        plain = coclusters._choose(mask, torch.arange(33), torch.arange(29), 8, 8, 9)
        assert found.covered > plain.covered, "reordering finds more than the order given"
        again = coclusters.find(mask, 8, 8, 9)
        assert torch.equal(again.rows, found.rows) and torch.equal(again.columns, found.columns)


# ---- regroup ----


def test_regroup_ends_in_blocks_of_the_reported_order():
    mask, dense = planted(96, 128, 16, 16, 12, fill=0.98, noise=0.005)
    model = network(mask)
    report = sl.regroup(model, structure="block:16x16")
    assert list(report.layers) == ["0"] and model[2].density == 1, "the last layer is left alone"
    layer = report.layers["0"]
    after = model[0].mask.to_dense()
    assert layer.before == int(mask.sum()) and layer.kept == int(after.sum()) == report.kept
    assert layer.shared == int((after & mask).sum()) and layer.covered == layer.shared / layer.before > 0.9
    assert abs(layer.kept - layer.before) <= 128, "as many weights, to half a block"
    tiles = after[layer.rows][:, layer.columns].reshape(6, 16, 8, 16)
    filled = tiles.float().mean((1, 3))
    assert set(filled.flatten().tolist()) == {0.0, 1.0} and int(filled.sum()) == round(layer.before / 256)
    assert 0 < layer.by_chance < layer.covered
    assert "covered" in str(report) and f"{report.covered:.1%}" in str(report)
    assert torch.equal(after, dense)


def test_values():
    mask, _ = planted(64, 64, 16, 16, 5, fill=0.9)
    model = network(mask)
    trained = model[0].weight.detach().clone()
    full = torch.randn(64, 64)
    other = copy.deepcopy(model)
    sl.regroup(model)
    after = model[0].mask.to_dense()
    expected = torch.where(mask & after, trained, 0)
    assert torch.equal(model[0].weight, expected), "survivors keep their values, refilled ones start from 0"
    sl.regroup(other, weights={"0.weight": full, "2.weight": other[2].weight})
    assert torch.equal(other[0].weight, torch.where(after, full, 0))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_reordered_layers_compute_the_same(kind):
    mask, _ = planted(64, 96, 16, 16, 5, fill=0.95)
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(96, 64), torch.randn(5, 7, 96)
    elif kind == "conv":
        layer, x = nn.Conv2d(96, 64, 3, padding=1, bias=False), torch.randn(3, 96, 5, 4)
        mask = mask[:, :, None, None].expand(64, 96, 3, 3).clone()
        mask[:, :, 0, 1] = False
    else:
        layer, x, mask = Conv1D(64, 96), torch.randn(5, 96), mask.t().contiguous()
        nn.init.normal_(layer.bias)
    model = nn.ModuleDict({"first": sl.sparsify(layer), "last": sl.sparsify(nn.Linear(4, 2))})
    model["first"].set_mask(mask)
    report = sl.regroup(model)
    weight, before = model["first"].weight, model["first"](x)
    assert report.reorder(model) is model and model["first"].inner.weight is weight
    torch.testing.assert_close(model["first"](x), before, rtol=1e-5, atol=1e-5)
    inner = model["first"].inner
    matrix = inner.mask.to_dense()
    matrix = matrix.t() if kind == "conv1d" else matrix if kind == "linear" else matrix[:, :, 2, 1]
    tiles = matrix.reshape(4, 16, 6, 16)
    assert torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))
    model["first"](x).square().sum().backward()
    assert weight.grad[~inner.mask.to_dense()].eq(0).all() and weight.grad.any()


def test_kernels_see_the_blocks_of_a_reordered_layer():
    mask, _ = planted(256, 256, 16, 16, 9, fill=0.95)
    model = network(mask)
    report = sl.regroup(model)
    assert block_linear.find_block(model[0].weight_mask, (256, 256)) is None
    report.reorder(model)
    assert block_linear.find_block(model[0].inner.weight_mask, (256, 256)) == (16, 16)


def test_a_reordered_network_trains_like_the_other():
    mask, _ = planted(48, 32, 16, 16, 3, fill=0.95)
    model, y = network(mask), torch.arange(20) % 4
    x = torch.randn(20, 32)
    report = sl.regroup(model, weights=network(torch.ones_like(mask)).state_dict())
    other = report.reorder(copy.deepcopy(model))
    for net in (model, other):
        optimizer = sl.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(other.state_dict())
    again = report.reorder(copy.deepcopy(model))
    again.load_state_dict(state)
    assert torch.equal(again(x), other(x))


def test_nothing_to_find_is_an_error_and_changes_nothing():
    for seed in range(8):
        mask = torch.rand(64, 96, generator=torch.Generator().manual_seed(seed)) < 0.15
        model = network(mask)
        weight = model[0].weight.detach().clone()
        with pytest.raises(
            ValueError, match=r"0: found no blocks of 16x16: 4 of them cover .* of the survivors, and up to "
        ):
            sl.regroup(model, structure="block:16x16")
        assert torch.equal(model[0].mask.to_dense(), mask) and torch.equal(model[0].weight, weight)


def test_one_layer_without_blocks_stops_all():
    mask, _ = planted(64, 64, 16, 16, 5)
    model = nn.Sequential(
        MaskedLinear(64, 64, mask=mask),
        MaskedLinear(64, 64, mask=torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.15),
        MaskedLinear(64, 3),
    )
    with pytest.raises(ValueError, match="1: found no blocks"):
        sl.regroup(model)
    assert torch.equal(model[0].mask.to_dense(), mask)
    report = sl.regroup(model, exclude=("1", "2"))
    assert list(report.layers) == ["0"] and report.covered == 1.0


# ---- refill ----


def test_refill_keeps_the_channels_with_most_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(10, 12), nn.Linear(12, 4))
    full = {name: value.clone() for name, value in model.state_dict().items()}
    sl.prune(model, density=0.3, exclude="3", scope="layer")
    sl.sparsify(model)
    before = {name: layer.mask for name, layer in masked_modules(model)}
    left = {name: layer.weight.detach().abs().flatten(1).sum(1) for name, layer in masked_modules(model)}
    report = sl.refill(model, weights=full)
    assert list(report.layers) == ["0", "2"] and report.structure == "channel"
    for name, size in (("0", 18), ("2", 10)):
        layer = model.get_submodule(name)
        rows = layer.mask.to_dense().flatten(1)
        keep = round(before[name].count / size)
        assert torch.equal(rows.all(1), rows.any(1)) and int(rows.all(1).sum()) == keep
        assert set(rows.all(1).nonzero().flatten().tolist()) == set(left[name].topk(keep).indices.tolist())
        mask = layer.mask.to_dense()
        assert torch.equal(layer.weight, torch.where(mask, full[f"{name}.weight"], 0))
        found = report.layers[name]
        assert (found.before, found.kept, found.total) == (before[name].count, keep * size, mask.numel())
        assert found.shared == (before[name] & layer.mask).count and found.rows is None
    assert abs(report.kept - report.before) <= 9 + 5


def test_refill_keeps_one_channel_at_least():
    mask = torch.zeros(6, 10, dtype=torch.bool)
    mask[4, 1] = True
    model = network(mask)
    assert sl.refill(model).layers["0"].kept == 10 and model[0].mask.to_dense()[4].all()


def test_refill_of_a_transposed_layer():
    model = nn.ModuleDict({"a": Conv1D(6, 10), "last": nn.Linear(2, 2)})
    sl.prune(model, density=0.4, exclude="last")
    sl.sparsify(model)
    sl.refill(model)
    columns = model["a"].mask.to_dense()
    assert torch.equal(columns.all(0), columns.any(0)) and int(columns.all(0).sum()) == 2


def test_the_way_of_a_ticket():
    mask, _ = planted(64, 64, 16, 16, 5, fill=0.9)
    model = network(mask)
    ticket = sl.Ticket.of(model, network(torch.ones_like(mask)).state_dict())
    model = ticket.apply(network(torch.ones_like(mask)))
    sl.regroup(model, weights=ticket.initial)
    structured = sl.Ticket.of(model, ticket.initial)
    again = structured.apply(network(torch.ones_like(mask)))
    assert torch.equal(again[0].weight, model[0].weight) and again[0].mask == model[0].mask


# ---- bad input ----


def pruned():
    return network(planted(64, 64, 16, 16, 5)[0])


@pytest.mark.parametrize("function", [sl.refill, sl.regroup])
@pytest.mark.parametrize(
    "model, arguments, error, text",
    [
        (
            lambda: nn.Linear(3, 3),
            {},
            ValueError,
            "model: expected pruned masked layers besides those that are excluded",
        ),
        (lambda: 3, {}, TypeError, "model: expected an nn.Module, got int"),
        (pruned, {"exclude": "9"}, ValueError, "exclude: no module is called '9'"),
        (pruned, {"exclude": ()}, ValueError, "2: expected a pruned layer, got one that keeps everything"),
        (pruned, {"weights": [1]}, TypeError, "weights: expected a state_dict, got list"),
        (pruned, {"weights": {}}, ValueError, "weights: expected [64, 64] for the weight of '0', got none"),
        (pruned, {"weights": {"0.weight": torch.ones(3)}}, ValueError, "for the weight of '0', got [3]"),
        (
            lambda: network(torch.zeros(4, 4, dtype=torch.bool)),
            {},
            ValueError,
            "0: expected weights that are left, got none",
        ),
    ],
)
def test_bad_input(function, model, arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        function(model(), **arguments)


def test_bad_input_of_regroup():
    for structure in ("channel", "unstructured", "2:4"):
        with pytest.raises(ValueError, match="structure: expected blocks such as 'block:16x16'"):
            sl.regroup(pruned(), structure=structure)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=2), nn.Conv2d(32, 4, 1))
    sl.prune(model, density=0.2)
    with pytest.raises(ValueError, match="0: expected a convolution without groups to regroup, got 2"):
        sl.regroup(model)


def test_bad_input_of_reorder():
    model = pruned()
    report = sl.refill(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"report: expected that of sl\.regroup"):
        report.reorder(model)
    report = sl.regroup(copy.deepcopy(model))
    model[0].set_mask(torch.eye(64) > 0)
    with pytest.raises(ValueError, match="model: expected the regrouped layer '0' with"):
        report.reorder(model)
