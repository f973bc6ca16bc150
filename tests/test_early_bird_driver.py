"""Early-Bird over seeds: what a run leaves and says, that it resumes, what it costs, what users may hand in."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_imp import blobs
from torch import nn

import sparselottery as sl
from sparselottery.tickets import channels, early_bird_driver
from sparselottery.tickets.early_bird_driver import cost_of, weights_of

DATA = blobs(100, 0), blobs(40, 1), blobs(50, 2)


def make_model(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.BatchNorm1d(12),
            nn.ReLU(), nn.Linear(12, 4),
        )  # fmt: skip


def no_norm(seed):
    return nn.Sequential(nn.Linear(8, 4))


def trainer(**options):
    options = {"batch_size": 20, "optimizer": "sgd", "lr": 0.1, "budget": "6ep", "evaluate_every": 5} | options
    return sl.Trainer(*DATA, **options)


def search(fit=None, **options):
    options = {"seeds": 2, "window": 3, "threshold": 0.3, "controls": ()} | options
    return sl.early_bird(make_model, fit or trainer(), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return search(out=tmp_path_factory.mktemp("run") / "bird", controls=("random-mask",), seeds=3)


def job(result, name):
    return json.loads((result.run / "jobs" / f"{name}.json").read_text())


def test_a_run_says_what_was_drawn_when(finished):
    shown = finished.to_json()
    assert json.loads((finished.run / "result.json").read_text()) == {
        k: shown[k] for k in shown if k not in ("run", "ticket")
    }
    assert shown["ticket"] == str(finished.run / "tickets" / "seed0-level01.safetensors")
    assert shown["epochs"] == 6 and 3 <= shown["drawn_epoch"] <= 6 and len(shown["drawn_epochs"]["values"]) == 3
    distances = torch.tensor(shown["distances"])
    assert distances.shape == (6, 6) and torch.equal(distances, distances.T) and not distances.diagonal().any()
    drawn = shown["drawn_epoch"]
    rows = [distances[e - 1, e - 3 : e - 1].max() for e in range(3, drawn + 1)]
    assert rows[-1] < 0.3 and all(r >= 0.3 for r in rows[:-1])  # not before, and then at once
    dense, ticket = shown["levels"]
    assert shown["test_accuracy"] == ticket["ticket"]["test_accuracy"] and len(shown["test_accuracy"]["values"]) == 3
    assert set(ticket) >= {"ticket", "random-mask", "density"} and dense["density"] == 1
    assert shown["kept"]["mean"] == 0.5 and shown["macs"]["ticket"] < shown["macs"]["dense"]
    sl.Ticket.load(shown["ticket"])


def test_the_search_ends_where_the_ticket_is_drawn_but_for_the_heatmap(finished):
    assert job(finished, "seed0-level01-search")["epochs"] == 6
    for seed in (1, 2):
        found = job(finished, f"seed{seed}-level01-search")
        assert found["epochs"] == found["drawn_epoch"] == finished.to_json()["drawn_epochs"]["values"][seed]
        assert found["history"]["records"][-1]["iteration"] == 5 * found["drawn_epoch"]
    alone = search(heatmap=False, seeds=1).to_json()
    assert len(alone["distances"]) == alone["drawn_epoch"] and alone["epochs"] == 6


def test_what_was_trained_is_what_one_gets_by_hand(finished):
    own, model = trainer(), make_model(1)
    bird = sl.EarlyBird(window=3, threshold=0.3, initial=model)
    own(model, seed=1, penalty=bird.penalty, on_epoch=lambda model, epoch: bird.update(model))
    assert finished.ticket(1, 1).masks == bird.ticket.masks
    small = sl.shrink(make_model(1), bird.ticket, DATA[0][0][:2])
    history = own(small, seed=1)
    assert finished.levels[1]["ticket"]["test_accuracy"]["values"][1] == history.test_accuracy
    assert job(finished, "seed1-level01-ticket")["density"] == weights_of(small) / weights_of(model) < 0.5
    random = channels.random_channels(bird.ticket, make_model(1), DATA[0][0][:2], 1)
    history = own(sl.shrink(make_model(1), random, DATA[0][0][:2]), seed=1)
    assert finished.levels[1]["random-mask"]["test_accuracy"]["values"][1] == history.test_accuracy
    dense = make_model(1)
    assert finished.levels[0]["ticket"]["test_accuracy"]["values"][1] == own(dense, seed=1).test_accuracy


def test_costs_add_up(finished):
    cost = finished.to_json()["cost"]
    seconds = {key: cost[key]["seconds"]["values"] for key in ("dense", "search", "retrain", "early-bird", "imp")}
    assert all(v > 0 for values in seconds.values() for v in values)
    for dense, found, retrained, own, imp in zip(*seconds.values(), strict=True):
        assert own == pytest.approx(found + retrained) and imp == pytest.approx(5 * dense)
    assert cost["rounds"] == 4 and "computed as 5 dense trainings" in cost["how"]  # 0.8^4 < 0.5 < 0.8^3
    assert cost["ratio"]["imp / early-bird"]["seconds"] > 0


def outcome(seconds, joules, making=0.5):
    return {"cost": {"seconds": seconds, "joules": joules}, "making": making}


def test_energy_is_told_where_every_training_measured_it():
    energy = {"source": "NVML, H200", "why_not": None}
    dense, found, retrained = [outcome(10, 100.0)] * 2, [outcome(2, 20.0), outcome(4, 40.0)], [outcome(4, 40.0)] * 2
    cost = cost_of(0.3, dense, found, retrained, energy)
    assert cost["rounds"] == 6 and cost["imp"]["joules"]["mean"] == 700
    assert cost["early-bird"]["joules"]["values"] == [60, 80] and cost["energy"]["source"] == "NVML, H200"
    assert cost["ratio"]["early-bird / dense"] == {"seconds": 0.7, "joules": 0.7}
    assert cost["ratio"]["imp / early-bird"]["joules"] == 10
    cost = cost_of(0.8, dense, [outcome(2, None), outcome(4, 1.0)], retrained, energy)
    assert (
        cost["rounds"] == 1
        and cost["early-bird"]["joules"] is None
        and cost["ratio"]["early-bird / dense"]["joules"] is None
    )
    assert cost["early-bird"]["seconds"]["mean"] == 7


def test_a_run_goes_on_where_it_was(finished):
    before = {p.name: p.read_bytes() for p in (finished.run / "jobs").iterdir()}
    result = json.loads((finished.run / "result.json").read_text())
    (finished.run / "jobs" / "seed1-level01-ticket.json").unlink()
    (finished.run / "tickets" / "seed2-level01.safetensors").write_bytes(b"damaged")
    (finished.run / "result.json").unlink()
    events = []
    again = search(out=finished.run, controls=("random-mask",), seeds=3, progress=events.append)
    assert (events[0]["done"], events[0]["total"]) == (10, 12)
    assert [(e["seed"], e["kind"]) for e in events[1:]] == [(1, "ticket"), (2, "search")]
    for name, content in before.items():
        mine, other = (json.loads(c) for c in (content, (again.run / "jobs" / name).read_bytes()))
        assert mine["history"] == other["history"] and mine.get("tickets") == other.get("tickets")
    assert again.levels == result["levels"] and again.to_json()["distances"] == result["distances"]
    with pytest.raises(ValueError, match=r"out: .* holds a run with bird = .*; choose another folder"):
        search(out=finished.run, controls=("random-mask",), seeds=3, density=0.6)


def test_a_ticket_may_go_on_from_where_it_was_drawn():
    result = search(start="drawn", seeds=1, heatmap=False)
    own, model = trainer(), make_model(0)
    bird = sl.EarlyBird(window=3, threshold=0.3)
    own(model, seed=0, penalty=bird.penalty, on_epoch=lambda model, epoch: bird.update(model))
    ticket = result.ticket()
    assert all(torch.equal(ticket.initial[k], v) for k, v in bird.ticket.initial.items())
    assert not torch.equal(ticket.initial["0.weight"], make_model(0)[0].weight)


def test_unstructured_tickets_are_trained_masked():
    result = search(structure="unstructured", density=0.2, seeds=1, controls=("random-mask",))
    shown = result.to_json()
    assert shown["levels"][1]["density"] == pytest.approx(0.2, abs=0.01) and "macs" not in shown
    assert set(result.ticket().masks) == {"0", "3", "6"}
    assert "test_accuracy" in shown["levels"][1]["random-mask"]


def test_widths_rounded_on_request():
    result = search(round_to=4, seeds=1)
    assert all(mask.count % 4 == 0 for mask in result.ticket().masks.values())
    assert job(result, "seed0-level01-ticket")["kept"] == result.ticket().count >= 14


def test_a_search_without_a_ticket_says_so_and_trains_its_last_mask():
    shown = search(threshold=1e-6, window=6).to_json()
    assert shown["drawn_epoch"] is None and shown["drawn_epochs"] == {
        "mean": None,
        "ci95": None,
        "values": [None, None],
    }
    assert len(shown["distances"]) == 6 and "test_accuracy" in shown


def plain_loop(model, *, seed, budget, penalty=None, on_epoch=None):
    (x, y), _, test = DATA
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(budget):
        loss = F.cross_entropy(model(x), y) + (0 if penalty is None else penalty(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_epoch is not None and on_epoch(model, epoch + 1):
            break
    with torch.no_grad():
        return {"test_accuracy": (model(test[0]).argmax(1) == test[1]).float().mean()}


def deaf_loop(model, *, seed, budget, penalty=None, on_epoch=None):
    return {"test_accuracy": 0.5}


def test_any_loop_will_do():
    result = search(plain_loop, budget=8, example_input=torch.zeros(2, 8), seeds=1)
    shown = result.to_json()
    assert shown["epochs"] == 8 and shown["test_accuracy"]["mean"] > 0.4


def test_plans_pickle_for_workers():
    plan = early_bird_driver.Plan(
        make_model,
        trainer(),
        (0,),
        {"structure": "channel"},
        "init",
        None,
        (),
        None,
        torch.zeros(2, 8),
        True,
        True,
        None,
    )
    assert pickle.loads(pickle.dumps(plan)).jobs() == plan.jobs()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"window": 7}, ValueError, "window: expected at most the 6 epochs of a training, got 7"),
        ({"density": 0}, ValueError, "density: expected a fraction above 0 and below 1"),
        ({"density": 1}, ValueError, "density: expected a fraction above 0 and below 1"),
        ({"density": 0.03}, ValueError, r"density: 0\.03 keeps 1 of 28, fewer than the 2 layers"),
        ({"threshold": 2}, ValueError, "threshold: expected a distance"),
        ({"start": "end"}, ValueError, "start: expected one of init, drawn, got 'end'"),
        ({"controls": ("reinit",)}, ValueError, "controls: expected any of random-mask"),
        ({"round_to": 0}, ValueError, "round_to: expected at least 1, got 0"),
        ({"round_to": 8, "structure": "unstructured"}, ValueError, "round_to: expected none with unstructured"),
        ({"fit": lambda model, *, seed, budget: None}, TypeError, r"fit: expected .* to take penalty= and on_epoch="),
        ({"fit": plain_loop, "budget": 3}, TypeError, r"example_input: expected one, as .*plain_loop has no method example"),
        ({"fit": plain_loop, "budget": 2, "example_input": torch.zeros(2, 8), "seeds": 1}, ValueError,
         "window: expected at most the 2 epochs"),
        ({"fit": deaf_loop, "budget": 2, "example_input": torch.zeros(2, 8), "seeds": 1}, ValueError,
         r"fit: .*deaf_loop never called on_epoch"),
        ({"example_input": torch.zeros(2, 9)}, ValueError, "example_input: the model fails on it: RuntimeError"),
        ({"seeds": 0}, ValueError, "seeds: expected 1 to"),
        ({"exclude": "9"}, ValueError, "exclude: no module is called '9'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(options, error, message):
    with pytest.raises(error, match=message):
        search(**options)


def test_a_model_without_batchnorm_is_refused_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="model: expected BatchNorm layers with a scale γ"):
        sl.early_bird(no_norm, trainer(), seeds=1, window=3, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trainings_that_learn_nothing_are_told():
    with pytest.warns(
        UserWarning, match="no better than chance: dense of seed 0, 1; search of seed 0, 1; retrain of seed 0, 1"
    ):
        found = search(trainer(lr=1e-9)).to_json()
    assert found["collapsed"] == {"dense": [0, 1], "search": [0, 1], "retrain": [0, 1]}


def test_trainings_that_learn_are_not_warned_of(finished):
    assert finished.to_json()["collapsed"] == {"dense": [], "search": [], "retrain": []}
    assert early_bird_driver.warnings_of(finished.to_json()) == []
