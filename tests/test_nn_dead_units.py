"""Dead units: what goes, what has to stay, and that the rest computes the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparselottery as sl
from sparselottery.nn.dead_units import remove_dead_units_


def check(model, x, *more):
    """Remove from a copy; the outputs stay what they were, of other inputs and batches too. Returns copy and notes."""
    model = model.double().eval()
    small = copy.deepcopy(model)
    notes = remove_dead_units_(small, (x.double(), *more))
    for each in (x.double(), torch.randn(5, *x.shape[1:], dtype=torch.float64)):
        torch.testing.assert_close(small(each, *more), model(each, *more), rtol=1e-10, atol=1e-12)
    return small, notes


def zero(layer, rows=(), columns=()):
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        layer.weight[:, list(columns)] = 0


def widths(model):
    return [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("masked", [False, True])
def test_constants_go_into_the_bias_and_unread_units_go(masked):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    zero(model[0], rows=[1, 3])
    zero(model[2], columns=[3, 4])
    if masked:
        sl.sparsify(model)
        for layer in model[::2]:
            layer.set_mask(layer.weight != 0)
    small, notes = check(model, torch.randn(2, 6))
    assert widths(small) == [(2, 6), (4, 2), (3, 4)]
    assert notes["0"] == "3 of 5 outputs removed"
    assert notes["2"] == "3 of 5 inputs removed, 1 constant inputs are now in the bias" and "4" not in notes
    assert small[2].bias is not None and model[2].bias is None
    assert (small[0].in_features, small[0].out_features, small[2].in_features) == (6, 2, 2)
    found = {row.name: row.note for row in sl.explain(small).rows}
    assert found["0"].endswith("dead units: 3 of 5 outputs removed") and "dead units" not in found["4"]
    if masked:
        assert all(isinstance(layer, sl.MaskedLinear) for layer in small[::2])
        assert torch.equal(small[2].mask.to_dense(), small[2].weight != 0)


def test_what_falls_together():
    """A dead layer makes all before it unread and all after it constant."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Linear(7, 2))
    zero(model[2], rows=range(6))
    small, _ = check(model, torch.randn(3, 4))
    assert widths(small) == [(1, 4), (1, 1), (1, 1), (2, 1)]
    assert not small[5].weight.any()


def test_convolutions_with_batchnorm_pools_and_flatten():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(5 * 1),
        nn.Linear(5, 4),
    )
    zero(model[0], rows=[0])
    zero(model[4], rows=[2], columns=[5])
    for norm in (model[1], model[8]):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 1)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        model[1].weight[3] = 0
    small, notes = check(model, torch.randn(2, 3, 7, 7))
    assert widths(small) == [(3, 3), (4, 3), (4, 4)]  # without 0 (dead), 3 (scaled away), 5 (unread); 2 (dead)
    assert small[1].num_features == len(small[1].running_var) == 3 and small[8].num_features == 4
    assert notes["1"] == "3 of 6 channels removed" and set(notes) == {"0", "1", "4", "8", "9"}


@pytest.mark.parametrize(
    ("after", "folds"),
    [
        (nn.Conv2d(4, 3, 3), True),
        (nn.Conv2d(4, 3, 3, padding="valid"), True),
        (nn.Conv2d(4, 3, 1, padding="same"), True),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), True),
        (nn.Conv2d(4, 3, 3, padding=1), False),
        (nn.Conv2d(4, 3, 3, padding="same"), False),
        (nn.Conv2d(4, 3, 3, padding=(0, 1), stride=2), False),
        (nn.Sequential(nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 3, 2)), False),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(4, 3, 2)), False),
        (nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.MaxPool2d(2, padding=1), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), True),
        (nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 2)), True),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 3, 2)), False),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 3, 2)), False),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 2)), False),
        (nn.Sequential(nn.Softmax2d(), nn.Conv2d(4, 3, 2)), False),
        (nn.Linear(6, 3), False),  # mixes places, not channels
        (nn.Flatten(2), False),
        (nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Conv2d(4, 3, 2)), True),
    ],
)
def test_a_constant_channel_goes_where_it_is_constant_at_the_borders_too(after, folds):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), after)
    zero(model[0], rows=[1])
    small, _ = check(model, torch.randn(2, 2, 6, 6))
    assert small[0].out_channels == (3 if folds else 4)


def test_a_channel_that_is_zero_goes_through_padding():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 3, 3, padding=1)
    )
    zero(model[0], rows=[1, 2])
    with torch.no_grad():
        model[0].bias[1], model[0].bias[2] = -1, 1
    small, _ = check(model, torch.randn(2, 2, 6, 6))
    assert widths(small) == [(3, 2), (3, 3)], "the channel that is zero after ReLU goes, the one that is 1 stays"


def test_depthwise_channels_go_with_their_mask():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    zero(model[1], rows=[0])
    zero(model[3], columns=[2])
    sl.sparsify(model)
    model[1].set_mask(model[1].weight != 0)
    small, notes = check(model, torch.randn(2, 3, 5, 5))
    assert widths(small) == [(2, 3), (2, 1), (2, 2)] and small[1].groups == small[1].in_channels == 2
    assert notes["1"] == "2 of 4 channels removed" and isinstance(small[1], sl.MaskedConv2d)


class Stepping(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, how="whole"):
        if how == "whole":
            return self.body(x)
        if how == "steps":
            for module in self.body:
                x = module(x)
            return x
        if how == "slices":
            return self.body[2:](self.body[:2](x))
        return self.body(x) + self.body[2](self.body[0](x))


@pytest.mark.parametrize("how", ["whole", "steps", "slices", "both"])
def test_sequentials_that_others_reach_into_stay(how):
    model = Stepping(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))
    zero(model.body[0], rows=[0])
    _, notes = check(model, torch.randn(2, 3), how)
    assert bool(notes) == (how == "whole")


def test_what_is_shared_hooked_or_computed_stays():
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4))
        for layer in model[::2]:
            zero(layer, rows=[0])
        return model

    x = torch.randn(3, 4)
    assert widths(check(network(), x)[0]) == [(3, 4), (3, 3), (4, 3)]
    hooked = network()
    hooked[2].register_forward_hook(lambda *args: None)
    assert not check(hooked, x)[1]
    hooked = network()
    hooked[3].register_forward_pre_hook(lambda *args: None)
    assert widths(check(hooked, x)[0]) == [(3, 4), (4, 3), (4, 4)]
    tied = network()
    tied[2].weight = tied[0].weight
    assert not check(tied, x)[1]
    twice = network()
    assert not check(nn.Sequential(twice[0], twice[1], twice[0], twice[1], twice[2]), x)[1]
    activation = network()
    assert widths(check(nn.Sequential(activation[0], activation[1], activation[2], activation[1]), x)[0]) == [
        (3, 4),
        (4, 3),
    ]
    normed = network()
    nn.init.normal_(normed[2].weight)
    nn.utils.parametrizations.weight_norm(normed[2])
    assert not check(normed, x)[1]
    nested = nn.Sequential(nn.Sequential(*network()[:3]), network()[3], network()[4])
    assert widths(check(nested, x)[0]) == [(3, 4), (3, 3), (4, 3)]
    nested[0].register_forward_hook(lambda *args: None)
    assert not check(nested, x)[1]


def test_batchnorm_that_takes_statistics_of_the_batch_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    zero(model[0], rows=[0])
    assert not check(model, torch.randn(3, 4))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_keep_their_dtype(dtype):
    model = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    zero(model[0], rows=[2, 5])
    x, small = torch.randn(4, 8, dtype=dtype), copy.deepcopy(model)
    remove_dead_units_(small, (x,))
    assert widths(small) == [(7, 8), (7, 7), (3, 7)] and all(p.dtype is dtype for p in small.parameters())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(small(x), model(x), rtol=8 * eps, atol=8 * eps)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20))
def test_any_network_computes_the_same(seed):
    """Random chains of everything, with random dead rows and columns."""
    draw = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (), generator=draw))

    channels, side, modules = 2, 10, []  # of which three blocks leave one pixel at least
    for _ in range(3):
        out, pad = 2 + pick(4), pick(2)
        modules.append(nn.Conv2d(channels, out, 1 + 2 * pick(2), padding=pad, bias=bool(pick(2))))
        channels = out
        modules += [[], [nn.BatchNorm2d(out)], [nn.Conv2d(out, out, 3, padding=1, groups=out)]][pick(3)]
        modules += [[], [nn.ReLU()], [nn.Sigmoid()], [nn.Hardtanh()]][pick(4)]
        modules += [[], [nn.MaxPool2d(2, padding=pick(2), stride=1)], [nn.AvgPool2d(2, padding=pick(2), stride=1)]][
            pick(3)
        ]
    with torch.no_grad():
        features = nn.Sequential(*modules, nn.Flatten())(torch.zeros(2, 2, side, side)).shape[1]
    modules += [nn.Flatten(), nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)]
    model = nn.Sequential(*modules)
    with torch.no_grad():
        for module in model.modules():
            for p in module._parameters.values():
                if p is not None:
                    p.copy_(torch.randn(p.shape, generator=draw))
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight[torch.rand(len(module.weight), generator=draw) < 0.3] = 0
                module.weight[:, torch.rand(module.weight.shape[1], generator=draw) < 0.2] = 0
            elif isinstance(module, nn.BatchNorm2d):
                module.weight[torch.rand(len(module.weight), generator=draw) < 0.3] = 0
                module.running_mean.copy_(torch.randn(len(module.weight), generator=draw))
    check(model, torch.randn(2, 2, side, side, generator=draw))
