"""Learned masks over untrained weights: sampling, gradients, the ticket, the driver and the command."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery import cli
from sparselottery.tickets import supermask
from sparselottery.tickets.store import Store


def make_model(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    centres = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    return centres[y] + 0.5 * torch.randn(count, 8, generator=generator), y


def trainer(**options):
    data = blobs(120, 0), blobs(40, 1), blobs(60, 2)
    return sl.Trainer(*data, **({"batch_size": 20, "lr": 0.01, "budget": 60, "evaluate_every": 20} | options))


def learner(**options):
    return trainer(lr=0.1, **options)


def prepared(seed=0, **options):
    return supermask.learn_masks(sl.sparsify(make_model(seed)), **options)


def scores(model, i=0):
    return model[i].parametrizations.weight[0].scores


# ---- the networks that learn ----


def test_only_scores_are_trained():
    model = prepared()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f"{i}.parametrizations.weight.0.scores" for i in (0, 2, 4)]
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("scores")}
    learner()(model, seed=0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(scores(model, i).abs().max() > 0.5 for i in (0, 2, 4))


@pytest.mark.parametrize("weights", ["constant", "init"])
def test_the_weights_that_are_masked(weights):
    model, plain = prepared(weights=weights), make_model(0)
    for i in (0, 2, 4):
        initial = plain[i].weight.detach()
        expected = initial.std(correction=0) * initial.sign() if weights == "constant" else initial
        torch.testing.assert_close(model[i].parametrizations.weight.original.detach(), expected)
        assert torch.equal(model[i].bias, plain[i].bias)


def test_masks_are_sampled_in_training_and_fixed_in_evaluation():
    model = prepared(weights="init")
    with torch.no_grad():
        scores(model).copy_(torch.linspace(-2, 2, 256).view(32, 8))
    initial = make_model(0)[0].weight.detach()
    torch.manual_seed(0)
    kept = torch.stack([(model.train()[0].weight != 0).float() for _ in range(4000)])
    expected = scores(model).detach().sigmoid()
    assert (kept.mean(0) - expected).abs().max() < 5 * 0.5 / 4000**0.5
    model.eval()
    assert torch.equal(model[0].weight, torch.where(scores(model) > 0, initial, 0))
    supermask.sampling(model, True)
    assert not torch.equal(model[0].weight, model[0].weight)
    supermask.sampling(model, False)
    assert torch.equal(model[0].weight, model[0].weight)


def test_the_gradient_goes_straight_through_the_sample():
    """d loss / d s = d loss / d (w m) * w * sigmoid'(s), whatever the sample was."""
    model = prepared(weights="init")
    with torch.no_grad():
        scores(model).copy_(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    x, y = blobs(10, 5)
    torch.manual_seed(1)
    with torch.nn.utils.parametrize.cached():
        effective = model[0].weight
        effective.retain_grad()
        F.cross_entropy(model(x), y).backward()
    p = scores(model).detach().sigmoid()
    torch.testing.assert_close(scores(model).grad, effective.grad * make_model(0)[0].weight.detach() * p * (1 - p))


def test_edge_popup_keeps_the_largest_scores():
    model = prepared(method="edge-popup", density=0.3, weights="init")
    initial = make_model(0)[0].weight.detach()
    order = scores(model).detach().abs().flatten().argsort(descending=True)
    mask = torch.zeros(256, dtype=torch.bool)
    mask[order[: round(0.3 * 256)]] = True
    for training in (True, False):
        assert torch.equal(model.train(training)[0].weight, torch.where(mask.view(32, 8), initial, 0))
    with torch.nn.utils.parametrize.cached():
        effective = model[0].weight
        effective.retain_grad()
        effective.square().sum().backward()
    torch.testing.assert_close(scores(model).grad, effective.grad * initial * scores(model).detach().sign())


def test_rescaling():
    model = prepared(rescale=True, weights="init").eval()
    with torch.no_grad():
        scores(model).fill_(-1)
        scores(model)[:4, :4] = 1
    initial = make_model(0)[0].weight.detach()
    torch.testing.assert_close(model[0].weight[:4, :4], initial[:4, :4] * 16)
    assert model[0].weight[4:].eq(0).all()


@pytest.mark.parametrize(
    "options", [{}, {"rescale": True}, {"method": "edge-popup", "density": 0.2, "weights": "init"}]
)
def test_the_ticket_is_the_network(options):
    model = prepared(**options)
    fit = learner()
    fit(model, seed=0)
    ticket = supermask.learned_ticket(model)
    applied = ticket.apply(make_model(3))
    x = blobs(30, 7)[0]
    torch.testing.assert_close(applied(x), model.eval()(x))
    state = model.state_dict()
    if "rescale" not in options:
        assert torch.equal(ticket.initial["0.weight"], state["0.parametrizations.weight.original"])
    assert ticket.density < 1 and all(isinstance(layer, sl.MaskedLinear) for layer in applied[::2])
    if "density" in options:
        assert [m.count for m in ticket.masks.values()] == [round(0.2 * m.numel) for m in ticket.masks.values()]


def test_a_convolution_with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    supermask.learn_masks(sl.sparsify(model))
    x, y = torch.randn(30, 1, 6, 6), torch.arange(30) % 3
    sl.Trainer((x, y), batch_size=10, budget=6, lr=0.1)(model)
    assert model[1].running_mean.abs().sum() > 0 and model[1].weight.eq(1).all()
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    applied = supermask.learned_ticket(model).apply(other).eval()
    torch.testing.assert_close(applied(x), model.eval()(x))


# ---- the driver ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("supermask")
    return sl.supermask(make_model, trainer(), fit_masks=learner(), densities=(0.6, 0.3), seeds=2, out=out)


def test_untrained_weights_are_far_above_chance(finished):
    methods = finished.to_json()["methods"]
    assert finished.to_json()["chance"] == 0.25
    assert methods["learned"]["test_accuracy"]["mean"] > 0.8 > methods["random-mask"]["test_accuracy"]["mean"]
    assert set(methods) == {"learned", "sampled", "criterion", "random-mask", "untrained", "dense"}
    for found in methods.values():
        for figure in ("test_accuracy", "density"):
            assert len(found[figure]["values"]) == 2 and found[figure]["ci95"] >= 0
    assert methods["random-mask"]["density"] == methods["learned"]["density"]
    assert (
        json.loads(json.dumps(finished.to_json(), allow_nan=False))["test_accuracy"]
        == methods["learned"]["test_accuracy"]
    )


def test_what_is_told_is_what_the_tickets_do(finished):
    methods, fit = finished.to_json()["methods"], trainer()
    for i in (0, 1):
        for level, name in ((1, "learned"), (2, "criterion")):
            ticket = finished.ticket(level, i)
            history = fit(ticket.apply(make_model(9)), seed=0, budget=0)
            assert history.final_test_accuracy == methods[name]["test_accuracy"]["values"][i]
            assert ticket.density == methods[name]["density"]["values"][i]
        learned, initial = finished.ticket(1, i), make_model(i)[2].weight.detach()
        constant = initial.std(correction=0) * initial.sign()
        torch.testing.assert_close(learned.initial["2.weight"], constant)
    assert finished.found["level"] == 1 and finished.levels[1]["density"] == methods["learned"]["density"]["mean"]
    Store(finished.run, create=False).verify()


def test_the_criterion_is_asked_of_the_trained_network(finished):
    model, fit = sl.sparsify(make_model(0)), trainer()
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, seed=0)
    job = json.loads((finished.run / "jobs" / "seed0-level00-ticket.json").read_text())["criterion"]
    density = (0.6, 0.3)[job["chosen"]]
    arguments = {"scope": "layer", "rates": {"output": 0.5}, "criterion": "large-final-same-sign", "initial": initial}
    sl.prune(model, density=density, **arguments)
    assert finished.ticket(2, 0).masks == {str(i): model[i].mask for i in (0, 2, 4)}
    accuracies = [tried["validation_accuracy"] for tried in job["tried"]]
    assert accuracies[job["chosen"]] == max(accuracies)


def test_a_run_goes_on_and_ends_the_same(finished, tmp_path):
    class Killed(Exception):
        pass

    def kill(event):
        if event["event"] == "job" and event["done"] == 2:
            raise Killed

    arguments = {"fit_masks": learner(), "densities": (0.6, 0.3), "seeds": 2, "out": tmp_path}
    with pytest.raises(Killed):
        sl.supermask(make_model, trainer(), progress=kill, **arguments)
    assert not (tmp_path / "result.json").exists() and len(list((tmp_path / "jobs").glob("*.json"))) == 2
    sl.supermask(make_model, trainer(), **arguments)
    names = sorted(p.name for p in (tmp_path / "tickets").iterdir())
    assert names == sorted(p.name for p in (finished.run / "tickets").iterdir()) and len(names) == 6
    for name in names:
        assert (tmp_path / "tickets" / name).read_bytes() == (finished.run / "tickets" / name).read_bytes()
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (tmp_path, finished.run))
    assert ours == theirs
    (tmp_path / "tickets" / "seed0-level01.safetensors").write_bytes(b"damaged")
    again = sl.supermask(make_model, trainer(), **arguments)
    assert again.ticket(1, 0).masks == finished.ticket(1, 0).masks
    with pytest.raises(ValueError, match="holds a run with weights"):
        sl.supermask(make_model, trainer(), weights="init", **arguments)


def test_a_loop_of_the_users():
    def loop(model, *, seed, budget):
        x, y = blobs(60, 0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        model.train()
        for _ in range(10 if budget is None else budget):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return {"test_accuracy": (model.eval()(x).argmax(1) == y).float().mean().item()}

    done = sl.supermask(
        make_model, loop, densities=[0.5], seeds=1, method="edge-popup", density=0.4, criterion="movement"
    )
    assert done.to_json()["chance"] is None and "sampled" not in done.to_json()["methods"]
    assert done.ticket(1).density == pytest.approx(0.4, abs=0.01) and done.ticket(2).density == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.parametrize(
    "changed, kind, message",
    [
        ({"method": "magic"}, ValueError, "method: expected one of bernoulli, edge-popup, got 'magic'"),
        ({"weights": "trained"}, ValueError, "weights: expected one of constant, init, got 'trained'"),
        ({"density": 0.5}, ValueError, "density: expected None with bernoulli, which finds its own, got 0.5"),
        ({"method": "edge-popup", "density": 0}, ValueError, "density: expected a fraction between 0 and 1, got 0"),
        ({"method": "edge-popup", "density": 1}, ValueError, "density: expected a fraction between 0 and 1, got 1"),
        (
            {"method": "edge-popup", "density": "0.5"},
            TypeError,
            "density: expected a fraction between 0 and 1, got str",
        ),
        ({"densities": ()}, ValueError, "densities: expected fractions between 0 and 1, got ()"),
        ({"densities": (0.5, 1.0)}, ValueError, "densities: expected fractions between 0 and 1, got (0.5, 1.0)"),
        ({"criterion": "largest"}, ValueError, "criterion: expected 'magnitude', 'random'"),
        ({"seeds": 0}, ValueError, "seeds: expected 1 to 10000 trials"),
        ({"fit_masks": 3}, TypeError, "fit: expected a callable, got int"),
        ({"make_model": lambda: nn.ReLU()}, ValueError, "make_model: expected a model with Linear or Conv2d layers"),
    ],
)
def test_mistakes(changed, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        sl.supermask(**{"make_model": make_model, "fit": trainer(), "seeds": 1} | changed)


def test_mistakes_of_networks():
    with pytest.raises(ValueError, match="model: expected masked layers whose masks to learn, found none"):
        supermask.learn_masks(make_model(0))
    with pytest.raises(ValueError, match="model: expected a network of learn_masks, found no layer with scores"):
        supermask.learned_ticket(sl.sparsify(make_model(0)))


# ---- the command ----

TINY = ["--seeds", "2", "--budget", "60it", "--mask-budget", "60it", "--densities", "0.5", "--workers", "1"]


def test_the_command(tmp_path, capsys):
    assert cli.main(["supermask", *TINY, "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["run"].startswith(str(tmp_path)) and sl.Ticket.load(result["ticket"]).density < 1
    assert result["test_accuracy"]["mean"] > 0.3 > 0.1 == result["chance"]
    page = Path(result["report"]).read_text()
    assert "Masks alone, on untrained weights" in page and "large-final-same-sign" in page
    assert cli.main(["supermask", *TINY, "--out", str(tmp_path), "--no-report"]) == 0
    captured = capsys.readouterr()
    assert "4 of them done before" in captured.err
    assert "Untrained weights under a learned mask reach" in captured.out and "random mask" in captured.out


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--density", "0.5"], "density: expected None with bernoulli"),
        (["--densities", "2"], "densities: expected fractions between 0 and 1"),
        (["--mask-budget", "soon"], 'budget: expected iterations or a string such as "500it"'),
    ],
)
def test_mistakes_on_the_command_line(argv, text, tmp_path, capsys):
    try:
        status = cli.main(["supermask", *argv, "--out", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and text in error and error.count("\n") == 1
