"""What happens to kept and to pruned weights: values by hand, and the controls made of them."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import sparselottery as sl
from sparselottery.tickets.actions import freeze_pruned, frozen_if_growing, kept_weights

MASK = torch.tensor([[True, True, False], [False, True, True]])
START = torch.tensor([[0.5, -1.0, 2.0], [-0.25, 0.75, -3.0]])


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def ticket():
    model = sl.sparsify(make_model())
    with torch.no_grad():
        model[0].weight.copy_(START)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].set_mask(MASK)
    return sl.Ticket.of(model, state)


def kept(found):
    return found.initial["0.weight"][MASK]


def test_rewind_changes_nothing():
    found = kept_weights(ticket(), "rewind")
    assert all(torch.equal(found.initial[k], v) for k, v in ticket().initial.items())


def test_signed_constant_is_the_layers_standard_deviation():
    found = kept_weights(ticket(), "constant")
    deviation = ((START - START.mean()) ** 2).mean().sqrt()
    torch.testing.assert_close(kept(found), deviation * torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert torch.equal(found.initial["0.weight"][~MASK], START[~MASK])
    assert torch.equal(found.initial["0.bias"], ticket().initial["0.bias"])
    assert found.masks == ticket().masks


def test_reshuffle_permutes_the_kept_values():
    found = kept_weights(ticket(), "reshuffle", signs="random", seed=3)
    assert sorted(kept(found).tolist()) == sorted(START[MASK].tolist())
    signed = kept_weights(ticket(), "reshuffle", seed=3)
    assert sorted(kept(signed).abs().tolist()) == sorted(START[MASK].abs().tolist())
    assert torch.equal(kept(signed).sign(), START[MASK].sign())
    assert torch.equal(kept(signed).abs(), kept(found).abs())


def test_reinit_draws_from_all_of_the_layer():
    drawn = [kept(kept_weights(ticket(), "reinit", signs="random", seed=s)) for s in range(20)]
    assert all(set(values.tolist()) <= set(START.flatten().tolist()) for values in drawn)
    assert set().union(*(values.tolist() for values in drawn)) == set(START.flatten().tolist()), (
        "pruned ones' values too"
    )
    signed = kept(kept_weights(ticket(), "reinit", seed=5))
    assert torch.equal(signed.sign(), START[MASK].sign()) and torch.equal(signed.abs(), drawn[5].abs())


def test_random_signs_of_a_constant_come_from_the_layer():
    signs = {tuple(kept(kept_weights(ticket(), "constant", signs="random", seed=s)).sign().tolist()) for s in range(20)}
    assert len(signs) > 3
    assert torch.equal(
        kept(kept_weights(ticket(), "constant", signs="random", seed=1)),
        kept(kept_weights(ticket(), "constant", signs="random", seed=1)),
    )


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, sl.optim.AdamW])
def test_pruned_weights_stay_at_their_initial_values(make):
    model = freeze_pruned(make_model(7), ticket())
    assert torch.equal(model[0].weight, START) and isinstance(model[0], nn.Linear)
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert torch.equal(model[0].weight[~MASK], START[~MASK])
    assert (model[0].weight[MASK] != START[MASK]).any()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight[~MASK], START[~MASK])


def test_the_kept_learn_as_beside_a_constant():
    """The gradient of a kept weight is that of the dense network, where the others stand still."""
    model, dense = freeze_pruned(make_model(7), ticket()), make_model(7)
    dense.load_state_dict(ticket().initial)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    for net in (model, dense):
        F.cross_entropy(net(x), y).backward()
    gradient = model[0].parametrizations.weight.original.grad
    torch.testing.assert_close(gradient, torch.where(MASK, dense[0].weight.grad, 0))


def test_frozen_only_if_growing():
    final = {"0.weight": torch.tensor([[0.4, -2.0, 2.5], [-0.1, 0.75, 1.0]])}
    values = frozen_if_growing({"0.weight": START}, final)
    expected = torch.tensor([[0.0, -1.0, 2.0], [0.0, 0.75, 0.0]])
    assert torch.equal(values["0.weight"], expected)
    model = freeze_pruned(make_model(), ticket(), {**ticket().initial, **values})
    assert torch.equal(model[0].weight, torch.where(MASK, START, expected))


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    return torch.randn(count, 3, generator=generator) + 2.0 * y[:, None], y


@pytest.mark.parametrize("replicas", [1, 4])
def test_controls(replicas, tmp_path):
    trainer = sl.Trainer(blobs(40, 0), blobs(20, 1), blobs(30, 2), batch_size=10, budget=8, evaluate_every=4, lr=0.05)
    controls = ("constant", "frozen")
    done = sl.imp(make_model, trainer, rounds=1, rate=0.5, seeds=2, controls=controls, replicas=replicas, out=tmp_path)
    for seed in (0, 1):
        ticket = done.ticket(1, seed)
        constant = kept_weights(ticket, "constant").apply(make_model())
        frozen = freeze_pruned(make_model(), ticket)
        for kind, model in (("constant", constant), ("frozen", frozen)):
            history = trainer(model, seed=seed)
            got = json.loads((tmp_path / "jobs" / f"seed{seed}-level01-{kind}.json").read_text())["history"]["records"]
            assert [r["validation_loss"] for r in got] == pytest.approx([r.validation_loss for r in history.records])
            assert done.levels[1][kind]["final_test_accuracy"]["values"][seed] == history.final_test_accuracy
    from sparselottery.report import write_report

    page = write_report(tmp_path).read_text()
    assert "signed constant" in page and "pruned at init" in page


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: kept_weights(3, "constant"), TypeError, "ticket: expected a sl.Ticket, got int"),
        (
            lambda: kept_weights(ticket(), "zero"),
            ValueError,
            "action: expected one of rewind, reinit, reshuffle, constant",
        ),
        (
            lambda: kept_weights(ticket(), "reinit", signs="no"),
            ValueError,
            "signs: expected one of initial, random, got 'no'",
        ),
        (lambda: freeze_pruned(make_model(), None), TypeError, "ticket: expected a sl.Ticket, got NoneType"),
        (
            lambda: freeze_pruned(make_model(), ticket(), {}),
            ValueError,
            "values: expected a tensor [2, 3] for 0.weight",
        ),
        (lambda: freeze_pruned(nn.Linear(2, 2), ticket()), ValueError, "model: missing 0.weight"),
        (
            lambda: frozen_if_growing({"a": torch.ones(2)}, {"a": torch.ones(3)}),
            ValueError,
            "final: expected a with shape [2] as in initial",
        ),
        (
            lambda: sl.imp(make_model, sl.Trainer(blobs(9, 0)), rounds=1, rewind="lr", controls=("frozen",)),
            ValueError,
            "controls: expected none of constant, frozen with rewind 'lr'",
        ),
    ],
)
def test_mistakes(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
