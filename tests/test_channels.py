"""Channel tickets made small: the outputs of the masked network, for networks of many shapes; what stays whole and why."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.experiments import models
from sparselottery.masks import Mask
from sparselottery.tickets import channels

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def randomized(model, seed=0):
    """As after training: no γ is 1, no β 0, no statistics those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in norms(model).values():
        if layer.affine:
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.data.copy_(torch.randn(layer.bias.shape, generator=generator))
        layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator))
        layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
    return model


def ticket_of(model, density=0.5, exclude=()):
    bird = sl.EarlyBird(density, window=2, exclude=exclude)
    bird.update(model), bird.update(model)
    return bird.ticket


def masked_of(model, ticket):
    return ticket.apply(copy.deepcopy(model))


def assert_same_outputs(model, ticket, small, x=X):
    masked = masked_of(model, ticket)
    for mode in (False, True):  # in training, the statistics of each batch are those of the kept channels alone
        outputs = masked.train(mode)(x), small.train(mode)(x)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def widths(model):
    return {name: layer.num_features for name, layer in norms(model).items()}


def weights(model):
    return sum(p.numel() for p in model.parameters())


class Wired(nn.Module):
    """A network whose forward is a function of its layers."""

    def __init__(self, wiring, **layers):
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.wiring(self, x)


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options)


def head(m, x):
    return m.out(x.mean((2, 3)))


def dense_block():
    def wiring(m, x):
        a = F.relu(m.bn0(m.conv0(x)))
        b = torch.cat([a, m.conv1(F.relu(m.bn1(a)))], 1)
        return head(m, F.relu(m.bn2(b)))

    return Wired(
        wiring, conv0=conv(3, 8), bn0=nn.BatchNorm2d(8), bn1=nn.BatchNorm2d(8), conv1=conv(8, 8), bn2=nn.BatchNorm2d(16),
        out=nn.Linear(16, 4),
    )  # fmt: skip


def depthwise():
    def wiring(m, x):
        x = F.relu6(m.bn1(m.conv1(x)))
        x = F.relu6(m.bn2(m.conv2(x)))
        return head(m, m.bn3(m.conv3(x)))

    return Wired(
        wiring, conv1=conv(3, 12), bn1=nn.BatchNorm2d(12), conv2=conv(12, 12, groups=12), bn2=nn.BatchNorm2d(12),
        conv3=conv(12, 10, 1), bn3=nn.BatchNorm2d(10), out=nn.Linear(10, 4),
    )  # fmt: skip


def flattened():
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 9), nn.BatchNorm1d(9),
        nn.ReLU(), nn.Linear(9, 4),
    )  # fmt: skip


SHAPES = {
    "conv-bn-4": lambda: models.make("conv-bn-4", (3, 8, 8), 10),
    "resnet-20": lambda: models.make("resnet-20", (3, 8, 8), 10),
    "concatenation": dense_block,
    "depthwise": depthwise,
    "flattened": flattened,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_the_small_network_computes_what_the_masked_one_does(name, density):
    model = randomized(SHAPES[name]())
    before = copy.deepcopy(model.state_dict())
    ticket = ticket_of(model, density)
    small = sl.shrink(model, ticket, X)
    assert_same_outputs(model, ticket, small)
    assert weights(small) < (0.85 if density == 0.3 else 1) * weights(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # left as it was


def test_chains_lose_exactly_the_dropped_channels_and_keep_the_tickets_values():
    model = models.make("conv-bn-4", (1, 8, 8), 10)
    ticket = sl.EarlyBird(window=2, initial=models.make("conv-bn-4", (1, 8, 8), 10, seed=7))
    ticket.update(randomized(model)), ticket.update(model)
    ticket = ticket.ticket
    small = sl.shrink(models.make("conv-bn-4", (1, 8, 8), 10, seed=3), ticket, torch.zeros(1, 1, 8, 8))
    kept = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    assert widths(small) == {name: int(mask.sum()) for name, mask in kept.items()} and sum(widths(small).values()) == 48
    rewound = ticket.initial
    assert torch.equal(small.conv3.weight, rewound["conv3.weight"][kept["bn3"]][:, kept["bn2"]])
    assert torch.equal(small.output.weight, rewound["output.weight"][:, kept["bn4"].repeat_interleave(4)])
    assert torch.equal(small.bn2.weight, rewound["bn2.weight"][kept["bn2"]])
    assert all(type(small.get_submodule(n)) is type(model.get_submodule(n)) for n, _ in model.named_modules())


def test_a_channel_of_a_shortcut_goes_only_where_all_drop_it():
    model = models.make("resnet-20", (3, 8, 8), 10)
    ticket = ticket_of(randomized(model), 0.5)
    masks = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    stream = ["bn", "blocks.0.bn2", "blocks.1.bn2", "blocks.2.bn2"]
    for name in stream:
        masks[name][:5] = False
        masks[name][5:] = True
    masks["blocks.1.bn2"][0] = True  # one of them keeps it: then it stays for all
    ticket = sl.Ticket({name: Mask.from_dense(mask) for name, mask in masks.items()}, ticket.initial)
    small = sl.shrink(model, ticket, X)
    found = widths(small)
    assert [found[name] for name in stream] == [12] * 4
    assert all(found[n] == int(m.sum()) for n, m in masks.items() if n.endswith("bn1"))  # inside the blocks
    assert small.blocks[0].bn2.weight[0] == 0 == small.blocks[0].bn2.bias[0] and small.blocks[1].bn2.weight[0] != 0
    assert_same_outputs(model, ticket, small)


@pytest.mark.parametrize(
    "build, whole, why",
    [
        (lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)), "0", "input"),
        (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6)), "4", "output"),
        (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 4)), "1", "sees more than zeros"),
        (lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 8, groups=2), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)),
         "1", "grouped"),
        (lambda: Wired(lambda m, x: m.c(F.relu(m.bn(m.a(x)) + m.b(x))), a=conv(3, 8), b=conv(3, 8), bn=nn.BatchNorm2d(8),
                       c=conv(8, 4)), "bn", "sees more than zeros"),
    ],
)  # fmt: skip
def test_what_cannot_go_stays_and_the_outputs_are_right_all_the_same(build, whole, why):
    model = randomized(build())
    ticket = ticket_of(model, 0.5)
    with pytest.warns(UserWarning, match=rf"shrink: all channels stay in .*{whole} \(.*{why}"):
        small = sl.shrink(model, ticket, X)
    assert_same_outputs(model, ticket, small)
    assert widths(small)[whole] == widths(model)[whole] > ticket.masks[whole].count
    reasons = {name: group.stays for group in channels.groups_of(model, ticket, X) for name in group.places}
    assert why in reasons[whole]


def test_layers_that_are_not_pruned_stay_whole():
    model = randomized(models.make("conv-bn-4", (3, 8, 8), 10))
    ticket = ticket_of(model, exclude="bn2")
    small = sl.shrink(model, ticket, X)
    assert widths(small)["bn2"] == 16 and "bn2" not in ticket.masks
    assert_same_outputs(model, ticket, small)
    shared = randomized(models.make("resnet-20", (3, 8, 8), 10))
    ticket = ticket_of(shared, exclude="blocks.1.bn2")
    assert widths(sl.shrink(shared, ticket, X))["bn"] == 16


@pytest.mark.parametrize("name", ["conv-bn-4", "resnet-20"])
def test_widths_are_rounded_up_by_the_best_of_the_dropped(name):
    model = randomized(models.make(name, (3, 8, 8), 10))
    ticket = ticket_of(model, 0.4)
    wider = channels.rounded(ticket, model, X, 8)
    small = sl.shrink(model, ticket, X, round_to=8)
    assert all(width % 8 == 0 for width in widths(small).values())
    assert_same_outputs(model, wider, small)
    plain = widths(sl.shrink(model, ticket, X))
    assert all(0 <= width - plain[n] < 8 for n, width in widths(small).items())
    for layer in ("bn3", "bn4") if name == "conv-bn-4" else ("blocks.4.bn1",):
        gamma, before = model.get_submodule(layer).weight.abs(), ticket.masks[layer].to_dense()
        joined = wider.masks[layer].to_dense() & ~before
        left = ~wider.masks[layer].to_dense()
        assert joined.any() and left.any() and gamma[joined].min() > gamma[left].max()


def test_scores_decide_what_joins_where_the_values_are_rewound():
    model = models.make("conv-bn-4", (1, 8, 8), 10)  # γ is 1 everywhere
    masks = {n: torch.zeros(m.num_features, dtype=torch.bool) for n, m in norms(model).items()}
    for mask in masks.values():
        mask[:7] = True
    ticket = sl.Ticket({n: Mask.from_dense(m) for n, m in masks.items()}, model.state_dict())
    scores = {n: torch.arange(len(m)).float() for n, m in masks.items()}
    wider = channels.rounded(ticket, model, torch.zeros(1, 1, 8, 8), 8, scores)
    assert [m.to_dense().nonzero().flatten().tolist()[-1] for m in wider.masks.values()] == [15, 15, 31, 31]
    first = channels.rounded(ticket, model, torch.zeros(1, 1, 8, 8), 8)
    assert [m.to_dense().nonzero().flatten().tolist() for m in first.masks.values()] == [list(range(8))] * 4
    assert [m.count for m in channels.rounded(ticket, model, torch.zeros(1, 1, 8, 8), 20).masks.values()] == [
        16,
        16,
        20,
        20,
    ]


@pytest.mark.parametrize("name", ["conv-bn-4", "resnet-20"])
def test_random_channels_make_a_network_of_the_same_shape(name):
    model = randomized(models.make(name, (3, 8, 8), 10))
    ticket = ticket_of(model)
    other = channels.random_channels(ticket, model, X, seed=4)
    assert {n: m.count for n, m in other.masks.items()} == {n: m.count for n, m in ticket.masks.items()}
    assert widths(sl.shrink(model, other, X)) == widths(sl.shrink(model, ticket, X))
    assert 0.2 < other.distance(ticket) < 0.8
    assert channels.random_channels(ticket, model, X, seed=4).masks == other.masks
    assert channels.random_channels(ticket, model, X, seed=5).masks != other.masks


def test_frozen_parameters_and_modes_are_kept_and_the_rest_trains():
    model = randomized(models.make("conv-bn-4", (3, 8, 8), 10)).train()
    model.conv1.weight.requires_grad_(False)
    model.bn2.eval()
    small = sl.shrink(model, ticket_of(model), X)
    assert [small.conv1.weight.requires_grad, small.conv2.weight.requires_grad] == [False, True]
    assert [small.bn2.training, small.bn3.training] == [False, True]
    F.cross_entropy(small(X), torch.arange(5)).backward()
    assert small.conv2.weight.grad.abs().sum() > 0 and small.conv1.weight.grad is None


def test_masked_layers_become_plain_ones():
    model = randomized(models.make("conv-bn-4", (3, 8, 8), 10))
    ticket = ticket_of(model)
    small = sl.shrink(sl.sparsify(copy.deepcopy(model)), ticket, X)
    assert type(small.conv1) is nn.Conv2d and type(small.output) is nn.Linear
    assert_same_outputs(model, ticket, small)


def test_tickets_that_do_not_fit_are_refused():
    model = randomized(models.make("conv-bn-4", (3, 8, 8), 10))
    ticket = ticket_of(model)
    emptied = sl.Ticket({**ticket.masks, "bn3": Mask.zeros([32])}, ticket.initial)
    with pytest.raises(sl.TicketError, match="ticket: drops every channel of bn3; each layer needs one"):
        sl.shrink(model, emptied, X)
    bird = sl.EarlyBird(structure="unstructured", window=2)
    bird.update(model), bird.update(model)
    with pytest.raises(sl.TicketError, match="expected masks of BatchNorm channels, but conv1 is no BatchNorm layer"):
        sl.shrink(model, bird.ticket, X)
    with pytest.raises(sl.TicketError, match="expected masks of BatchNorm channels, but bn1 is no"):
        sl.shrink(models.make("resnet-20", (3, 8, 8), 10), ticket, X)
    with pytest.raises(TypeError, match="example_input: expected a tensor or a tuple of arguments, got int"):
        sl.shrink(model, ticket, 3)
    with pytest.raises(ValueError, match="example_input: the model fails on it: RuntimeError"):
        sl.shrink(model, ticket, torch.zeros(1, 5, 8, 8))
    for value, error, message in ((0, ValueError, "at least 1, got 0"), (8.0, TypeError, "expected an int, got float")):
        with pytest.raises(error, match=f"round_to: expected {message}|round_to: {message}"):
            sl.shrink(model, ticket, X, round_to=value)
    with pytest.raises(ValueError, match=r"scores: expected \[16\] for bn1, got none"):
        sl.shrink(model, ticket, X, round_to=8, scores={})


def test_without_torch_pruning_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model = models.make("conv-bn-4", (3, 8, 8), 10)
    with pytest.raises(
        RuntimeError, match=r"channel tickets need Torch-Pruning .*: pip install 'sparselottery\[channels\]'"
    ):
        sl.shrink(model, ticket_of(randomized(model)), X)
