"""Criteria of Deconstructing Lottery Tickets: each formula, signs, initial values, bad input."""

import re

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.pruning import criteria

# One layer of six weights: before and after training.
BEFORE = torch.tensor([[0.5, -0.1, 0.9, -0.3, 0.2, -0.7]])
AFTER = torch.tensor([[0.6, 0.4, 0.1, -0.8, 0.3, -0.2]])
# In the order of the weights, by hand from figure 3 of the paper.
SCORES = {
    "large-final": [0.6, 0.4, 0.1, 0.8, 0.3, 0.2],
    "small-final": [-0.6, -0.4, -0.1, -0.8, -0.3, -0.2],
    "large-init": [0.5, 0.1, 0.9, 0.3, 0.2, 0.7],
    "small-init": [-0.5, -0.1, -0.9, -0.3, -0.2, -0.7],
    "magnitude-increase": [0.1, 0.3, -0.8, 0.5, 0.1, -0.5],
    "movement": [0.1, 0.5, 0.8, 0.5, 0.1, 0.5],
    # final magnitudes .6 .4 .1 .8 .3 .2 have ranks 5 4 1 6 3 2; initial magnitudes in order are .1 .2 .3 .5 .7 .9
    "large-init-large-final": [0.5, 0.1, 0.1, 0.3, 0.2, 0.2],
    "small-init-small-final": [-0.7, -0.5, -0.9, -0.9, -0.3, -0.7],
}


def trained():
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(AFTER)
    return model, {"0.weight": BEFORE.clone()}


def survivors(model):
    return set(model[0].mask.to_dense().flatten().nonzero().flatten().tolist())


def ranked(model, initial, name):
    """The weights in the order in which the criterion would keep them."""
    order = []
    for keep in range(1, 7):
        copy = nn.Sequential(nn.Linear(6, 1, bias=False))
        copy.load_state_dict(model.state_dict())
        sl.prune(copy, density=keep / 6, criterion=name, initial=initial)
        new = survivors(copy) - set(order)
        assert len(new) == 1
        order.append(new.pop())
    return order


@pytest.mark.parametrize("name", list(SCORES))
def test_formula(name):
    model, initial = trained()
    layers = dict(sl.pruning.masked_modules(sl.sparsify(model)))
    scorer = criteria.scorer(name, model, layers, criteria.Evidence(initial=initial))
    (values,), by = scorer({"0": layers["0"].mask})
    values = values.abs() if by == "magnitude" else values
    torch.testing.assert_close(values.double(), torch.tensor([SCORES[name]], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", list(SCORES))
def test_signs_come_first_and_the_order_stays(name):
    model, initial = trained()
    order = ranked(model, initial, name)
    kept_sign = [i for i in order if BEFORE[0, i] * AFTER[0, i] > 0]
    changed = [i for i in order if i not in kept_sign]
    assert changed == [1], "the case has one weight that changed its sign"
    assert ranked(model, initial, name + "-same-sign") == kept_sign + changed
    assert ranked(model, initial, name + "-diff-sign") == changed + kept_sign


def test_a_zero_has_no_sign_to_keep():
    model, _ = trained()
    initial = {"0.weight": torch.tensor([[0.0, 0.1, 0.1, -0.1, 0.1, -0.1]])}
    assert ranked(model, initial, "large-final-same-sign")[-1] == 0


def test_sign_is_told_of_tiny_weights_too():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1e-30, 1e-30]]))
    sl.prune(model, density=0.5, criterion="large-final-same-sign", initial={"0.weight": torch.full((1, 2), 1e-30)})
    assert survivors(model) == {1}


def test_large_init_large_final_keeps_a_quadrant():
    """A weight survives where both magnitudes are above one and the same percentile: the authors' way to choose alpha."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30))
    initial = {"0.weight": torch.randn(30, 40)}
    with torch.no_grad():
        model[0].weight.mul_(100)  # alpha makes up for it
    final = model[0].weight.detach().abs().flatten()
    sl.prune(model, density=0.25, criterion="large-init-large-final", initial=initial)
    mask = model[0].mask.to_dense().flatten()
    ranks = torch.stack([final.argsort().argsort(), initial["0.weight"].abs().flatten().argsort().argsort()]).amin(0)
    assert ranks[mask].min() > ranks[~mask].max() - 1 and int(mask.sum()) == 300


def test_percentiles_are_those_of_the_survivors():
    model, initial = trained()
    sl.prune(model, density=5 / 6)  # without 0.1, the third
    sl.prune(model, density=1 / 6, criterion="large-init-large-final", initial=initial)
    assert survivors(model) == {0}, (
        "its final magnitude has rank 4 of 5, so the 0.5 of rank 4 of the others' initial ones"
    )


def test_the_layers_compete_by_their_scores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6))
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(torch.randn_like(layer.weight) / 3)
    moved = torch.cat([(layer.weight - initial[f"{i}.weight"]).abs().flatten() for i, layer in enumerate(model)])
    report = sl.prune(model, density=0.3, criterion="movement", initial=initial)
    kept = torch.cat([layer.mask.to_dense().flatten() for layer in model])
    assert report.kept == round(0.3 * 128) == int(kept.sum())
    assert moved[kept].min() >= moved[~kept].max()


def test_initial_may_be_a_model_and_a_masked_state():
    model, initial = trained()
    before = sl.sparsify(nn.Sequential(nn.Linear(6, 1, bias=False)))
    before.load_state_dict(initial)
    sl.prune(model, density=0.5, criterion="movement", initial=before)
    other, _ = trained()
    sl.prune(other, density=0.5, criterion="movement", initial=before.state_dict())
    assert survivors(model) == survivors(other) and len(survivors(model)) == 3


def test_magnitude_is_large_final():
    (model, _), (other, _) = trained(), trained()
    sl.prune(model, density=0.5), sl.prune(other, density=0.5, criterion="large-final")
    assert survivors(model) == survivors(other) == {0, 1, 3}


def test_blocks_take_criteria():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    initial = {"0.weight": torch.randn(8, 8)}
    moved = (model[0].weight.detach() - initial["0.weight"]).abs().double()
    sl.prune(model, density=0.25, criterion="movement", initial=initial, structure="block:4x4")
    sums = moved.reshape(2, 4, 2, 4).sum((1, 3))
    kept = model[0].mask.to_dense().reshape(2, 4, 2, 4).any(3).any(1)
    assert kept.sum() == 1 and kept.flatten()[sums.argmax()]


def test_every_name_is_listed_and_works():
    assert len(set(criteria.NAMES)) == len(criteria.NAMES)
    for name in criteria.NAMES:
        model, initial = trained()
        batch = (torch.randn(3, 6), torch.zeros(3, dtype=torch.int64))
        report = sl.prune(model, density=0.5, criterion=name, initial=initial, batch=batch)
        assert report.kept == 3


BAD = [
    (dict(criterion="largest"), ValueError, "criterion: expected 'magnitude', 'random', 'large-final', "),
    (dict(criterion="random-same-sign"), ValueError, "'movement' (each also with -same-sign or -diff-sign), 'snip'"),
    (dict(criterion="movement"), ValueError, "initial: expected the state_dict of before training"),
    (dict(criterion="large-final-same-sign"), ValueError, "initial: expected the state_dict of before training"),
    (dict(criterion="movement", initial=3), TypeError, "initial: expected a state_dict or an nn.Module, got int"),
    (dict(criterion="movement", initial={}), ValueError, "initial: expected a tensor '0.weight', got none"),
    (
        dict(criterion="movement", initial={"0.weight": torch.ones(2, 6)}),
        ValueError,
        "initial: expected [1, 6] for '0.weight', got [2, 6]",
    ),
    (
        dict(criterion="movement", initial={"0.weight": torch.full((1, 6), float("nan"))}),
        ValueError,
        "0.weight: holds NaN, which has no rank",
    ),
    (dict(criterion="magnitude", rounds=2), ValueError, "rounds: expected 1 but for snip, grasp, synflow"),
    (dict(criterion="snip", rounds=0), ValueError, "rounds: expected at least 1, got 0"),
    (dict(criterion="snip", rounds="2"), TypeError, "rounds: expected an int, got str"),
]


@pytest.mark.parametrize("arguments, error, text", BAD)
def test_bad_input(arguments, error, text):
    model, _ = trained()
    with pytest.raises(error, match=re.escape(text)):
        sl.prune(model, density=0.5, **arguments)
    assert torch.equal(model[0].weight, AFTER), "nothing was pruned"
