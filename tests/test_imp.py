"""Iterative and one-shot pruning: levels, rewinding, controls, what users may hand in."""

import copy
import functools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import report
from sparselottery.experiments import models
from sparselottery.tickets.controls import random_mask, reinit, shuffle
from sparselottery.tickets.result import found_level, interval


def make_model(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    return centres[y] + 0.8 * torch.randn(count, 8, generator=generator), y


def other_model(seed):
    return nn.Sequential(nn.Linear(9, 4))


def few_outputs(seed):
    return nn.Sequential(nn.Linear(8, 3))


def no_mean(output, y):
    return nn.functional.cross_entropy(output, y, reduction="none")


DATA = blobs(100, 0), blobs(40, 1), blobs(50, 2)


def trainer(**options):
    return sl.Trainer(*DATA, **({"batch_size": 20, "lr": 0.01, "budget": 20, "evaluate_every": 5} | options))


def ticket_masks(result, level, seed=0):
    return {name: mask.to_dense() for name, mask in result.ticket(level, seed).masks.items()}


@pytest.fixture(scope="module")
def result():
    return sl.imp(make_model, trainer(), rounds=3, rate=0.5, seeds=2)


def test_levels_have_the_promised_shape(result):
    assert [e["density"] for e in result.levels] == pytest.approx(
        [1, (64 + 128 + 48) / 448, (32 + 64 + 36) / 448, (16 + 32 + 27) / 448]  # output at half rate
    )
    assert "reinit" not in result.levels[0]
    for entry in result.levels:
        for kind in ("ticket", "reinit", "random-mask", "shuffle")[: 1 if entry["level"] == 0 else 4]:
            for figure in ("test_accuracy", "early_stop_iteration", "validation_loss", "final_test_accuracy"):
                assert len(entry[kind][figure]["values"]) == 2
                assert entry[kind][figure]["mean"] == pytest.approx(statistics.fmean(entry[kind][figure]["values"]))
    printed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert printed["levels"] == result.levels and printed["run"] is None
    assert set(result.tickets) == {(level, seed) for level in range(4) for seed in range(2)}


def test_each_level_is_pruned_from_the_trained_one_before_and_rewound():
    """The whole procedure once more by hand, with torch alone."""
    done = sl.imp(make_model, trainer(), rounds=2, rate=0.5, seeds=[3], controls=())
    masks = [torch.ones_like(make_model(3)[i].weight, dtype=torch.bool) for i in (0, 2, 4)]
    for level in range(3):
        model = make_model(3)
        ticket = done.ticket(level, 3)
        for i, mask in zip((0, 2, 4), masks, strict=True):
            assert torch.equal(ticket.masks[str(i)].to_dense(), mask)
            assert torch.equal(ticket.initial[f"{i}.weight"] * mask, model[i].weight * mask)
        sl.sparsify(model)
        ticket.apply(model)
        history = trainer()(model, seed=3)
        assert history.final_test_accuracy == done.levels[level]["ticket"]["final_test_accuracy"]["mean"]
        for i, mask, rate in zip((0, 2, 4), masks, (0.5, 0.5, 0.25), strict=True):
            keep = round(int(mask.sum()) * (1 - rate))
            magnitude = model[i].weight.detach().abs().where(mask, -1.0).flatten()
            mask.view(-1)[:] = False
            mask.view(-1)[magnitude.topk(keep).indices] = True


def test_the_same_again_and_other_seeds_differ(result):
    again = sl.imp(make_model, trainer(), rounds=3, rate=0.5, seeds=2)
    assert again.levels == result.levels
    masks, same, other = ticket_masks(result, 3), ticket_masks(again, 3), ticket_masks(result, 3, seed=1)
    assert all(torch.equal(masks[n], same[n]) for n in masks)
    assert not all(torch.equal(masks[n], other[n]) for n in masks)


def test_several_workers_give_what_one_gives(result):
    several = sl.imp(make_model, trainer(), rounds=3, rate=0.5, seeds=2, workers=2)
    assert several.levels == result.levels
    assert all(several.tickets[key].read_bytes() == path.read_bytes() for key, path in result.tickets.items())


def test_lenet_densities_are_the_papers():
    model = functools.partial(models.make, "lenet-300-100", (1, 28, 28), 10)
    done = sl.imp(model, lambda model, *, seed, budget: {"test_accuracy": 1.0}, rounds=21, seeds=1, controls=())
    percent = [100 * e["density"] for e in done.levels]
    for level, expected in ((3, 51.3), (7, 21.1), (12, 7.0), (15, 3.6), (21, 1.0)):  # figure 3 of the paper
        assert percent[level] == pytest.approx(expected, abs=0.06)
    kept = {name: mask.count for name, mask in done.ticket(1).masks.items()}
    assert kept == {"fc1": 188_160, "fc2": 24_000, "output": 900}  # the output layer at half the rate


def test_global_scope_and_a_target_density():
    done = sl.imp(make_model, trainer(), density=0.2, rate=0.4, seeds=1, controls=(), scope="global")
    assert [e["density"] for e in done.levels] == pytest.approx([1, 269 / 448, 161 / 448, 97 / 448, 58 / 448], abs=1e-9)
    densities = [mask.density for mask in done.ticket(4).masks.values()]
    assert max(densities) > min(densities) + 0.01  # layers compete


def test_rewinding_to_a_step():
    done = sl.imp(make_model, trainer(), rounds=1, seeds=1, controls=("random-mask",), rewind="1ep2it")
    model = sl.sparsify(make_model(0))  # masked layers may round otherwise than plain ones do
    trainer()(model, seed=0, budget=7)
    ticket = done.ticket(1, 0)
    kept = ticket.masks["0"].to_dense()
    assert torch.equal(ticket.initial["0.weight"][kept], model[0].weight[kept])
    ticket.apply(model)
    history = trainer()(model, seed=0, start_at=7)
    assert history.records[0].iteration == 10
    assert history.test_accuracy == done.levels[1]["ticket"]["test_accuracy"]["mean"]


def test_controls_change_one_thing_each(result):
    ticket = result.ticket(2, 0)
    initial = dict(make_model(0).state_dict())
    for name, mask in ticket.masks.items():
        kept, key = mask.to_dense(), f"{name}.weight"
        other = random_mask(ticket, initial, seed=5)
        assert other.masks[name].count == mask.count and not torch.equal(other.masks[name].to_dense(), kept)
        fresh = reinit(ticket, dict(make_model(9).state_dict()))
        assert torch.equal(fresh.masks[name].to_dense(), kept)
        assert torch.equal(fresh.initial[key][kept], make_model(9).state_dict()[key][kept])
        mixed = shuffle(ticket, initial, seed=5)
        assert torch.equal(mixed.masks[name].to_dense(), kept)
        assert torch.equal(mixed.initial[key][kept].sort().values, initial[key][kept].sort().values)
        assert not torch.equal(mixed.initial[key][kept], initial[key][kept])
        again = random_mask(ticket, initial, seed=5)
        assert torch.equal(again.masks[name].to_dense(), other.masks[name].to_dense())


def test_controls_at_chosen_levels_and_repeated():
    done = sl.imp(make_model, trainer(), rounds=2, seeds=2, controls=("reinit",), control_levels=[2], repeats=3)
    assert "reinit" not in done.levels[1]
    values = done.levels[2]["reinit"]["validation_loss"]["values"]
    assert len(values) == 6 and len(set(values)) == 6


def test_one_shot_prunes_the_dense_network_once():
    done = sl.one_shot(make_model, trainer(), density=[0.5, 0.1], seeds=1, controls=("reinit",))
    assert [round(e["density"] * 448) for e in done.levels] == [448, 224, 45]
    model = make_model(0)
    trainer()(model, seed=0)
    for level in (1, 2):
        ticket = done.ticket(level)
        for i in (0, 2, 4):
            kept = ticket.masks[str(i)].to_dense()
            assert torch.equal(ticket.initial[f"{i}.weight"][kept], make_model(0)[i].weight[kept])
            trained = model[i].weight.detach().abs()
            assert trained[kept].min() > trained[~kept].max()
    assert {"ticket", "reinit"} <= set(done.levels[2])
    single = sl.one_shot(make_model, trainer(), density=0.1, seeds=1, controls=())
    assert all(torch.equal(ticket_masks(single, 1)[n], ticket_masks(done, 2)[n]) for n in "024")


@pytest.mark.parametrize("density", [[], 1.0, 0.0, [0.1, 0.2], [0.5, 0.5], None, "0.5", ["half"]])
def test_densities_that_cannot_be(density):
    with pytest.raises(ValueError, match="density: expected fractions between 0 and 1, falling"):
        sl.one_shot(make_model, trainer(), density=density)


# ---- what users hand in ----


def test_a_plain_loop_and_a_model_without_a_seed():
    """A fit that draws from every global generator is still repeatable."""
    seen = []

    def fit(model, *, seed, budget):
        import random

        import numpy as np

        seen.append(
            (model[0].weight[0, 0].item(), seed, budget, random.random(), np.random.rand(), torch.rand(()).item())
        )
        return {"test_accuracy": 0.5}

    runs = [
        sl.imp(lambda: nn.Sequential(nn.Linear(4, 4)), fit, rounds=1, seeds=[0, 7], controls=(), budget="3ep")
        for _ in "ab"
    ]
    assert len(seen) == 8 and seen[:4] == seen[4:] and {s[1] for s in seen} == {0, 7}
    assert seen[0][0] != seen[1][0] and all(s[2] == "3ep" for s in seen)
    assert runs[0].levels[1]["ticket"] == {
        "test_accuracy": {"mean": 0.5, "ci95": 0, "values": [0.5, 0.5]},
        "final_test_accuracy": {"mean": 0.5, "ci95": 0, "values": [0.5, 0.5]},
    }
    positional = sl.imp(lambda s: make_model(s), trainer(), rounds=0, seeds=1)
    assert torch.equal(positional.ticket().initial["0.weight"], make_model(0)[0].weight)


def test_validation_without_an_iteration_is_no_early_stop_at_0():
    def fit(model, *, seed, budget):
        return {"test_accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.25}

    done = sl.imp(make_model, fit, rounds=1, seeds=[0, 2**64 - 1], controls=("reinit",))
    assert "early_stop_iteration" not in done.levels[1]["ticket"]
    assert done.levels[1]["reinit"]["validation_loss"]["mean"] == 1 and done.found["level"] == 1
    lines = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(line["iteration"] is None and line["test_accuracy"] == 0.5 for line in lines)
    report.write_report(done.run)


ONE_MODEL = nn.Sequential(nn.Linear(4, 4))


def test_only_reinit_asks_for_seeds_that_were_not_named():
    prepared = {3: make_model(3), 5: make_model(5)}
    arguments = {"rounds": 1, "seeds": [3, 5], "fit": fine}
    done = sl.imp(lambda seed: copy.deepcopy(prepared[seed]), controls=("random-mask", "shuffle"), **arguments)
    assert torch.equal(done.ticket(0, 5).initial["0.weight"], prepared[5][0].weight)


def fine(model, *, seed, budget):
    return {"test_accuracy": 1.0}


class Halfway:
    """Claims to rewind, and returns no snapshot."""

    def __call__(self, model, *, seed, budget, snapshot_at=None, start_at=0):
        return {"test_accuracy": 1.0}


@pytest.mark.parametrize(
    "changed, kind, message",
    [
        ({"make_model": "lenet"}, TypeError, "make_model: expected a callable, got str"),
        ({"make_model": lambda: None}, TypeError, "make_model: expected it to return a torch.nn.Module, got NoneType"),
        ({"make_model": lambda: nn.ReLU()}, ValueError, "make_model: expected a model with Linear or Conv2d layers"),
        ({"make_model": lambda a, b: None}, TypeError, r"make_model: .* it needs \['a', 'b'\]"),
        ({"fit": 3}, TypeError, "fit: expected a callable, got int"),
        ({"fit": lambda model: None}, TypeError, r"fit: expected .* to take \(model, \*, seed, budget\)"),
        ({"fit": lambda model, seed, budget: 0.9}, TypeError, "expected it to return a sl.History or .*, got float"),
        (
            {"rewind": "5it"},
            TypeError,
            "rewind: '5it' needs a fit that takes snapshot_at= and start_at= .*fine does not",
        ),
        ({"rewind": "soon"}, ValueError, "rewind: expected iterations or a string"),
        ({"rewind": "5it", "fit": Halfway()}, TypeError, "Halfway took snapshot_at but returned no snapshot"),
        ({"rounds": None}, ValueError, "rounds: expected rounds, density or both, got neither"),
        ({"density": 0.5, "rate": 0.2}, ValueError, "rate: expected None with both rounds and density"),
        ({"density": 0}, ValueError, "density: expected a fraction between 0 and 1, got 0"),
        ({"density": 1}, ValueError, "density: expected a fraction between 0 and 1, got 1"),
        ({"rounds": -1}, ValueError, "rounds: expected at least 0, got -1"),
        ({"rounds": 1.5}, TypeError, "rounds: expected an int, got float"),
        ({"rate": 1.0}, ValueError, "rate: expected a fraction between 0 and 1, got 1.0"),
        ({"scope": "block"}, ValueError, "scope: expected"),
        ({"rates": {"head": 0.5}}, ValueError, "rates: .*'head'"),
        ({"rounds": None, "density": 1.5}, ValueError, "density: expected a fraction between 0 and 1"),
        (
            {"rounds": None, "density": 0.01, "rates": {"2": 0}},
            ValueError,
            "density: 0.01 cannot be reached at rate 0.2",
        ),
        ({"controls": ("reinit", "magic")}, ValueError, "controls: expected any of reinit, random-mask, shuffle"),
        ({"controls": "reinit"}, ValueError, "controls: expected any of"),
        ({"controls": None}, ValueError, "controls: expected any of .* got None"),
        ({"controls": ("reinit", "reinit")}, ValueError, "controls: expected each once"),
        ({"control_levels": [0]}, ValueError, "control_levels: expected levels from 1 to 1"),
        ({"control_levels": 1}, ValueError, "control_levels: expected levels from 1 to 1, got 1"),
        ({"rates": 0.5}, TypeError, "rates: expected a mapping such as .*, got float"),
        ({"exclude": "head"}, ValueError, "exclude: no module is called 'head'"),
        ({"make_model": lambda: make_model(0)}, ValueError, "make_model: gives the same initial values for every seed"),
        ({"make_model": lambda: ONE_MODEL}, ValueError, "make_model: expected a new model at every call"),
        ({"seeds": 0}, ValueError, "seeds: expected 1 to 10000 trials, or a list of seeds, got 0"),
        ({"seeds": 10**12}, ValueError, "seeds: expected 1 to 10000 trials"),
        (
            {"seeds": [0, 2**64]},
            ValueError,
            r"seeds\[1\]: expected a seed from 0 to 2\*\*64 - 1, got 18446744073709551616",
        ),
        ({"seeds": [-1]}, ValueError, r"seeds\[0\]: expected a seed from 0 to"),
        ({"seeds": "12"}, TypeError, "seeds: expected how many, or a list of ints"),
        ({"seeds": [1, 1]}, ValueError, "seeds: expected at least one and each once"),
        ({"seeds": [0.5]}, TypeError, r"seeds\[0\]: expected an int, got float"),
        ({"workers": 0}, ValueError, "workers: expected at least 1"),
        ({"repeats": 1.5}, TypeError, "repeats: expected an int, got float"),
        (
            {"workers": 2, "make_model": lambda seed: make_model(seed)},
            TypeError,
            "workers: more than 1 needs a make_model and a fit",
        ),
    ],
)
def test_mistakes_are_named(changed, kind, message):
    arguments = {"make_model": make_model, "fit": fine, "rounds": 1, "seeds": 2} | changed
    with pytest.raises(kind, match=message):
        sl.imp(**arguments)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "changed, kind, message",
    [
        (
            {"make_model": other_model},
            ValueError,
            r"model: does not fit the data, x \[100, 8\] with labels up to 3: mat1",
        ),
        ({"make_model": few_outputs}, ValueError, r"model: does not fit the data, .*: Target 3 is out of bounds"),
        ({"fit": trainer(lr=-1)}, ValueError, "lr: expected"),
        ({"fit": trainer(optimizer_options={"eps": 1, "moment": 2})}, TypeError, "moment"),
        ({"rewind": "21it"}, ValueError, "snapshot_at: expected a step from 0 to 20, got '21it'"),
        ({"budget": "2 weeks"}, ValueError, "budget: expected iterations or a string"),
        ({"fit": trainer(loss=no_mean)}, TypeError, r"loss: expected it to return a scalar tensor, got \[2\]"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder_behind(changed, kind, message, workers, tmp_path):
    arguments = {"make_model": make_model, "fit": trainer(), "rounds": 1, "seeds": 2} | changed
    with pytest.raises(kind, match=message):
        sl.imp(**arguments, workers=workers, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def failing(model, *, seed, budget):
    raise ZeroDivisionError("in the user's own fit")


def test_a_fit_that_fails_in_a_worker_is_shown():
    with pytest.raises(RuntimeError, match="in the user's own fit"):
        sl.imp(make_model, failing, rounds=1, seeds=2, workers=2)


def mistaken(model, *, seed, budget):
    raise ValueError("lr: expected less")


def test_a_mistake_is_the_same_error_in_a_worker():
    with pytest.raises(ValueError, match="lr: expected less") as caught:
        sl.imp(make_model, mistaken, rounds=1, seeds=2, workers=2)
    assert str(caught.value) == "lr: expected less"
    assert "in mistaken" in str(caught.value.__cause__)


UNGUARDED = """
import sys
sys.path.insert(0, sys.argv[2])
import sparselottery as sl
from test_imp import fine, make_model
sl.imp(make_model, fine, rounds=1, seeds=2, workers=2, out=sys.argv[1])
"""


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """Its workers import it, and would wait for the run folder that their parent holds."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "run", Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: a worker process died") and '__name__ == "__main__"' in last


def test_a_single_name_is_excluded():
    done = sl.imp(make_model, fine, rounds=1, seeds=1, controls=(), exclude="2")
    assert set(done.ticket(1).masks) == {"0", "4"}
    with pytest.raises(TypeError, match="rates: expected a mapping"):
        sl.one_shot(make_model, fine, density=0.5, seeds=1, rates=0.5)


def test_a_ticket_that_is_not_there(result):
    with pytest.raises(ValueError, match=r"level, seed: expected levels 0 to 3 and seeds \[0, 1\], got \(9, 0\)"):
        result.ticket(9)


# ---- statistics ----


def test_interval_is_students():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3 and found["ci95"] == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert interval([7]) == {"mean": 7.0, "ci95": None, "values": [7.0]}


def test_repeats_within_a_seed_are_no_independent_trials():
    found = interval([1.0, 3.0, 2.0, 4.0, 5.0, 7.0], repeats=2)  # seeds' means 2, 3, 6
    assert found["values"] == [1, 3, 2, 4, 5, 7]
    assert found["mean"] == pytest.approx(11 / 3) and found["ci95"] == pytest.approx(interval([2, 3, 6])["ci95"])
    assert interval([1.0, 2.0], repeats=2)["ci95"] is None


def test_repeats_are_grouped_by_seed():
    def fit(model, *, seed, budget):
        return {"test_accuracy": 0.25 * seed}

    done = sl.imp(make_model, fit, rounds=1, seeds=3, controls=("reinit",), repeats=2)
    reinit = done.levels[1]["reinit"]["test_accuracy"]
    assert reinit["values"] == [0, 0, 0.25, 0.25, 0.5, 0.5]
    assert reinit["ci95"] == pytest.approx(done.levels[1]["ticket"]["test_accuracy"]["ci95"])


def test_the_found_ticket_is_the_sparsest_no_worse_than_dense():
    def level(i, validation, test):
        figures = {"validation_accuracy": validation, "test_accuracy": test}
        return {"level": i, "ticket": {k: {"mean": v, "ci95": 0.02} for k, v in figures.items()}}

    levels = [level(0, 0.95, 0.9), level(1, 0.97, 0.9), level(2, 0.94, 0.5), level(3, 0.92, 0.99)]
    assert found_level(levels) == 2
    for entry in levels:
        del entry["ticket"]["validation_accuracy"]
    assert found_level(levels) == 3
    assert found_level([{"level": 0, "ticket": {}}]) == 0
