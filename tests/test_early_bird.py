"""Early-Bird: which channels and weights a mask keeps, when the ticket is drawn, what it refuses."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery.experiments import models
from sparselottery.tickets.early_bird import EarlyBird


def network(seed=0):
    return models.make("conv-bn-4", (1, 8, 8), 10, seed=seed)  # BatchNorm of 16, 16, 32 and 32 channels


def with_gammas(model, *gammas):
    for layer, gamma in zip((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), gammas, strict=True):
        layer.weight.data.copy_(torch.as_tensor(gamma, dtype=torch.float32))
    return model


def random_gammas(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in (16, 16, 32, 32)]


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
def test_channels_of_largest_gamma_over_all_layers_survive(density):
    gammas = random_gammas(0)
    bird = EarlyBird(density=density)
    bird.update(with_gammas(network(), *gammas))
    keep = round(density * 96)
    threshold = torch.cat(gammas).abs().sort(descending=True).values[keep - 1]
    assert list(bird.masks) == ["bn1", "bn2", "bn3", "bn4"]
    for gamma, mask in zip(gammas, bird.masks.values(), strict=True):
        assert torch.equal(mask.to_dense(), gamma.abs() >= threshold)
    assert sum(mask.count for mask in bird.masks.values()) == keep


def test_weights_of_largest_magnitude_survive_plain_or_masked():
    model = models.make("lenet-300-100", (1, 8, 8), 10, seed=1)
    everything = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])
    threshold = everything.abs().sort(descending=True).values[round(0.2 * len(everything)) - 1]
    plain, masked = EarlyBird(0.2, "unstructured"), EarlyBird(0.2, "unstructured")
    plain.update(model)
    for name in ("fc1", "fc2", "output"):
        assert torch.equal(plain.masks[name].to_dense(), model.get_submodule(name).weight.abs() >= threshold)
    masked.update(sl.sparsify(copy.deepcopy(model)))
    assert masked.masks == plain.masks
    assert not any(isinstance(m, sl.MaskedLinear) for m in model.modules())  # it only looks


def test_distances_are_normalized_hamming_distances_between_all_epochs():
    bird = EarlyBird(density=0.5, threshold=0.01)
    masks = []
    for seed in range(7):
        bird.update(with_gammas(network(), *random_gammas(seed % 4)))
        masks.append(torch.cat([m.to_dense() for m in bird.masks.values()]))
    expected = torch.tensor([[(a != b).double().mean().item() for a in masks] for b in masks])
    assert bird.distances.shape == (7, 7) and bird.epochs == 7
    torch.testing.assert_close(bird.distances, expected.double())
    assert bird.distances[0, 4] == 0 and bird.distances[0, 1] > 0.2


def moving(bird, changes):
    """Update the bird with masks that differ from the first in so many channels, epoch by epoch: when was it drawn?"""
    places = torch.randperm(96, generator=torch.Generator().manual_seed(0))  # every layer has some of the best half
    for count in changes:
        ranked = torch.arange(196.0, 100.0, -1)
        ranked[48 - count : 48] -= 100  # that many leave the best half, as many others move up
        if bird.update(with_gammas(network(), *ranked[places].split([16, 16, 32, 32]))):
            return bird.epoch
    return None


@pytest.mark.parametrize(
    "changes, threshold, window, epoch",
    [
        ([0, 0, 0, 0, 0], 0.1, 5, 5),  # the queue must be full first
        ([40, 0, 0, 0, 0, 0], 0.1, 5, 6),  # the first mask has left the queue by then
        ([40, 30, 20, 10, 4, 4, 4, 4], 0.1, 3, 7),  # 2 * (10 - 4) / 96 is above 0.1: epochs 5 to 7
        ([0, 4, 8, 12, 16, 20, 24], 0.1, 2, 2),  # neighbours alone: 8 / 96
        ([0, 4, 8, 12, 16, 20, 24], 0.1, 5, None),  # but it drifts
        ([3, 0], 0.0625, 2, None),  # 6 / 96: the distance has to be below the threshold
    ],
)
def test_the_ticket_is_drawn_when_the_whole_queue_is_near_the_newest_mask(changes, threshold, window, epoch):
    bird = EarlyBird(density=0.5, window=window, threshold=threshold)
    assert moving(bird, changes) == epoch == bird.epoch
    assert bird.drawn == (epoch is not None) == (bird.ticket is not None)


def test_the_drawn_ticket_stays_while_later_epochs_are_recorded():
    model = with_gammas(network(), *random_gammas(0))
    bird = EarlyBird(window=2, initial=network(seed=9))
    assert [bird.update(model), bird.update(model)] == [False, True]
    ticket, scores = bird.ticket, bird.scores
    assert bird.update(with_gammas(model, *random_gammas(1))) is True
    assert (bird.epoch, bird.epochs, bird.distances.shape) == (2, 3, (3, 3)) and bird.distances[2, 1] > 0.2
    assert bird.ticket is ticket and torch.equal(scores["bn1"], random_gammas(0)[0].abs())
    assert ticket.masks != bird.masks


def test_a_ticket_rewinds_to_the_initial_values_or_goes_on_from_where_it_was_drawn():
    model = network()
    begin = copy.deepcopy(model.state_dict())
    rewinding, alive, going_on = (
        EarlyBird(window=2, initial=model),
        EarlyBird(window=2, initial=model.state_dict()),
        EarlyBird(window=2),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))  # what training would do, behind the state_dict that was handed over
    for bird in (rewinding, alive, going_on):
        assert not bird.update(model) and bird.update(model)
    now = model.state_dict()
    for key in begin:
        assert torch.equal(rewinding.ticket.initial[key], begin[key]) and torch.equal(
            alive.ticket.initial[key], begin[key]
        )
        assert torch.equal(going_on.ticket.initial[key], now[key])
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert going_on.ticket.initial["conv1.weight"].any()  # a copy


def test_the_ticket_applied_silences_the_channels(tmp_path):
    bird = EarlyBird(window=2)
    model = with_gammas(network(), *random_gammas(3))
    bird.update(model), bird.update(model)
    ticket = sl.Ticket.load(bird.ticket.save(tmp_path / "bird.safetensors"))
    assert ticket.distance(bird.ticket) == 0 and ticket.count == 48 and ticket.total == 96
    silent = ticket.apply(network(seed=5))
    for name, mask in ticket.masks.items():
        layer, dead = silent.get_submodule(name), ~mask.to_dense()
        assert not layer.weight[dead].any() and not layer.bias[dead].any()
        assert torch.equal(layer.weight[~dead], model.get_submodule(name).weight[~dead])
    assert type(silent.conv1) is nn.Conv2d


def test_an_unstructured_ticket_is_one_like_any_other():
    model = models.make("lenet-300-100", (1, 8, 8), 10)
    bird = EarlyBird(0.1, "unstructured", window=2)
    bird.update(model), bird.update(model)
    masked = bird.ticket.apply(models.make("lenet-300-100", (1, 8, 8), 10, seed=2))
    assert bird.ticket.count == round(0.1 * bird.ticket.total) and bird.scores is None
    assert masked.fc1.mask == bird.ticket.masks["fc1"]


def test_penalty_is_l1_on_gamma():
    model = with_gammas(network(), *random_gammas(0))
    bird = EarlyBird(l1=0.01)
    penalty = bird.penalty(model)
    assert penalty.item() == pytest.approx(0.01 * torch.cat(random_gammas(0)).abs().sum().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(model.bn2.weight.grad, 0.01 * random_gammas(0)[1].sign())
    assert model.conv1.weight.grad is None
    assert EarlyBird(structure="unstructured").penalty(model).item() == 0 == EarlyBird(l1=0).penalty(model).item()


def test_it_works_in_a_plain_loop_and_stops_early():
    x, y = torch.randn(60, 1, 8, 8), torch.randint(10, (60,))
    torch.manual_seed(0)
    model = network()
    bird = EarlyBird(density=0.5, threshold=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + bird.penalty(model)).backward()
        optimizer.step()
        if bird.update(model):
            break
    assert bird.drawn and 5 <= bird.epoch == bird.epochs < 30
    assert pickle.loads(pickle.dumps(bird)).ticket.distance(bird.ticket) == 0  # goes into a checkpoint


def test_a_layer_that_would_be_emptied_keeps_its_best_channel_and_a_warning_says_so():
    small = torch.full((16,), 0.01)
    small[11] = 0.02
    gammas = [small, torch.ones(16), torch.ones(32), 0.001 * torch.arange(32)]
    bird = EarlyBird(density=0.5)
    with pytest.warns(UserWarning, match=r"density 0\.5 would empty bn1, bn4; each keeps its best channel"):
        bird.update(with_gammas(network(), *gammas))
    assert bird.guarded == ("bn1", "bn4")
    assert sum(m.count for m in bird.masks.values()) == 48
    assert bird.masks["bn1"].to_dense().nonzero().tolist() == [[11]]
    assert bird.masks["bn4"].to_dense().nonzero().tolist() == [[31]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bird.update(with_gammas(network(), *gammas))  # told once


def test_making_room_for_one_layer_may_empty_another():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(4))
    for layer, gamma in zip(model, ([0.1, 0.2], [0.3, 0.4], [1.0, 2, 3, 4]), strict=True):
        layer.weight.data.copy_(torch.tensor(gamma))
    bird = EarlyBird(density=0.375)  # 3 of 8
    with pytest.warns(UserWarning):
        bird.update(model)
    assert [m.to_dense().int().tolist() for m in bird.masks.values()] == [[0, 1], [0, 1], [0, 0, 0, 1]]


def test_excluded_layers_are_neither_ranked_nor_punished():
    model = with_gammas(network(), *random_gammas(0))
    bird = EarlyBird(exclude=["bn1"], l1=1.0)
    bird.update(model)
    assert list(bird.masks) == ["bn2", "bn3", "bn4"] and sum(m.count for m in bird.masks.values()) == 40
    assert bird.penalty(model).item() == pytest.approx(
        sum(g.abs().sum().item() for g in random_gammas(0)[1:]), rel=1e-5
    )


def test_a_compiled_or_parallel_model_is_the_network_inside_it():
    model = with_gammas(network(), *random_gammas(0))
    bird = EarlyBird(window=2)
    bird.update(model)
    assert bird.update(nn.DataParallel(model)) and list(bird.ticket.masks) == ["bn1", "bn2", "bn3", "bn4"]
    assert bird.penalty(torch.compile(model)).item() > 0


def test_nan_in_gamma_is_told_by_name():
    gammas = random_gammas(0)
    gammas[2][5] = float("nan")
    bird = EarlyBird()
    with pytest.raises(ValueError, match=r"bn3\.weight: holds NaN, which has no rank"):
        bird.update(with_gammas(network(), *gammas))
    assert bird.epochs == 0  # nothing was recorded


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"density": 0}, ValueError, "density: expected a fraction above 0 and below 1 to keep, got 0"),
        ({"density": 1}, ValueError, "density: expected a fraction above 0 and below 1 to keep, got 1"),
        ({"density": float("nan")}, ValueError, "density: expected a fraction"),
        ({"density": "half"}, TypeError, "density: expected a number, got str"),
        ({"structure": "block:4x4"}, ValueError, "structure: expected one of channel, unstructured, got 'block:4x4'"),
        ({"window": 1}, ValueError, "window: expected at least 2 masks to compare, got 1"),
        ({"window": 2.5}, TypeError, "window: expected an int, got float"),
        ({"threshold": 0}, ValueError, "threshold: expected a distance above 0 and up to 1, got 0"),
        ({"threshold": 1.5}, ValueError, "threshold: expected a distance above 0 and up to 1, got 1.5"),
        ({"threshold": None}, TypeError, "threshold: expected a number, got NoneType"),
        ({"l1": -1}, ValueError, "l1: expected a finite factor of at least 0, got -1"),
        ({"l1": float("inf")}, ValueError, "l1: expected a finite factor"),
        ({"initial": [1]}, TypeError, "initial: expected a state_dict or an nn.Module, got list"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        EarlyBird(**arguments)


def test_models_that_cannot_be_ranked_are_refused():
    with pytest.raises(ValueError, match="model: expected BatchNorm layers with a scale γ"):
        EarlyBird().update(models.make("lenet-300-100", (1, 8, 8), 10))
    with pytest.raises(ValueError, match="model: expected BatchNorm layers with a scale γ"):
        EarlyBird().penalty(nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match="model: expected linear or convolutional layers"):
        EarlyBird(structure="unstructured").update(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"density: 0\.02 keeps 2 of 96, fewer than the 4 layers"):
        EarlyBird(density=0.02).update(network())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        EarlyBird().update(3)
    with pytest.raises(ValueError, match="exclude: no module is called 'bn9'"):
        EarlyBird(exclude="bn9").update(network())
    with pytest.raises(ValueError, match="bird: expected at least one update"):
        EarlyBird().ticket_of(network())


def test_another_model_in_the_middle_is_refused():
    bird = EarlyBird()
    bird.update(with_gammas(network(), *random_gammas(0)))
    with pytest.raises(
        ValueError, match=r"model: expected the layers of the first update, but bn1 was \(16,\) and is None"
    ):
        bird.update(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(sl.TicketError, match="initial: missing"):
        EarlyBird(initial={"fc.weight": torch.zeros(3, 3)}).update(with_gammas(network(), *random_gammas(0)))


@pytest.mark.parametrize("structure", ["channel", "unstructured"])
def test_a_mask_that_settles_since_nothing_changes_is_told(structure):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(1, 2, 8))
    still, moving = (sl.EarlyBird(0.5, structure, window=2) for _ in range(2))
    assert not still.update(model) and not moving.update(model)
    with pytest.warns(UserWarning, match="settled, but no (scale γ|weight) has changed"):
        assert still.update(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moving.update(model)
