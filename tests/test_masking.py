"""How the drivers find masks: criteria, at initialization or after training, schedules, learning-rate rewinding."""

import json
import re

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import cli
from sparselottery.tickets import masking


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


DATA = blobs(100, 0), blobs(40, 1), blobs(50, 2)


def trainer(**options):
    return sl.Trainer(*DATA, **({"batch_size": 20, "lr": 0.01, "budget": 20, "evaluate_every": 10} | options))


def plain(model, *, seed, budget):
    """A user's loop that does nothing."""
    return {"test_accuracy": 0.5}


ONE = {"seeds": 1, "controls": ()}


def masks_of(model):
    return {str(i): model[i].mask for i in (0, 2, 4)}


def test_imp_ranks_the_trained_weights_against_the_initial_ones():
    done = sl.imp(make_model, trainer(), rounds=1, rate=0.5, criterion="movement", **ONE)
    model = make_model(0)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    sl.sparsify(model)
    trainer()(model, seed=0)
    sl.prune(model, rate=0.5, scope="layer", rates={"output": 0.5}, criterion="movement", initial=initial)
    assert masks_of(model) == done.ticket(1).masks
    assert torch.equal(done.ticket(1).initial["0.weight"], initial["0.weight"])
    magnitude = sl.imp(make_model, trainer(), rounds=1, rate=0.5, **ONE)
    assert masks_of(model) != magnitude.ticket(1).masks


def test_initial_values_are_those_that_are_rewound_to():
    done = sl.imp(make_model, trainer(), rounds=1, rate=0.5, criterion="movement", rewind="10it", **ONE)
    model = sl.sparsify(make_model(0))
    rewound = trainer()(model, seed=0, snapshot_at=10).snapshot
    sl.prune(model, rate=0.5, scope="layer", rates={"output": 0.5}, criterion="movement", initial=rewound)
    assert masks_of(model) == done.ticket(1).masks


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow"])
def test_one_shot_asks_these_before_training(criterion):
    fit = trainer()
    done = sl.one_shot(make_model, fit, density=(0.5, 0.1), criterion=criterion, scope="global", **ONE)
    batch = masking.examples(fit, 0)
    for level, density in ((1, 0.5), (2, 0.1)):
        model = make_model(0)
        sl.prune(model, density=density, criterion=criterion, batch=batch)
        assert done.ticket(level).masks == masks_of(model), "each from the dense network, not from the level before"
        assert torch.equal(done.ticket(level).initial["0.weight"], make_model(0)[0].weight)


@pytest.mark.parametrize("loss", [None, nn.MSELoss()])
def test_what_asks_gradients_asks_the_loss_of_the_training(loss):
    """Of which cross-entropy is none of its own: grasp takes it at a temperature."""

    def fit(model, *, seed, budget):
        return {"test_accuracy": 0.5}

    assert masking.loss_of(fit) == {}
    fit.trainer = trainer() if loss is None else trainer(loss=loss)
    assert masking.loss_of(fit) == ({} if loss is None else {"loss": loss})


def test_imp_asks_these_of_trained_weights():
    fit = trainer()
    done = sl.imp(make_model, fit, rounds=1, rate=0.5, criterion="snip", scope="global", **ONE)
    model = sl.sparsify(make_model(0))
    fit(model, seed=0)
    sl.prune(model, rate=0.5, criterion="snip", batch=masking.examples(fit, 0))
    assert done.ticket(1).masks == masks_of(model)


def test_examples_are_ten_of_each_class():
    x, y = masking.examples(trainer(), 3)
    assert torch.equal(y.bincount(), torch.full((4,), 10)) and x.shape == (40, 8)
    again, other = masking.examples(trainer(), 3)[0], masking.examples(trainer(), 4)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    fits = [trainer(), trainer().fit]
    assert all(masking.trainer_of(fit).batch_size == 20 for fit in fits) and masking.trainer_of(plain) is None


def test_a_batch_of_the_users_and_a_loop_of_the_users(tmp_path):
    batch = DATA[0]
    done = sl.one_shot(
        make_model, plain, density=0.3, criterion="snip", batch=batch, scope="global", out=tmp_path, **ONE
    )
    model = make_model(0)
    sl.prune(model, density=0.3, criterion="snip", batch=batch)
    assert done.ticket(1).masks == masks_of(model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["steps"][0]["criterion"] == "snip" and len(config["batch"]) == 16
    with pytest.raises(ValueError, match="holds a run with batch"):
        sl.one_shot(
            make_model, plain, density=0.3, criterion="snip", batch=blobs(9, 9), scope="global", out=tmp_path, **ONE
        )


def by_position(name, layer):
    return torch.arange(layer.weight.numel(), dtype=torch.float32).view(layer.weight.shape)


def test_a_criterion_of_the_users_and_workers(tmp_path):
    done = sl.imp(
        make_model, trainer(), rounds=1, rate=0.5, criterion=by_position, seeds=2, controls=(), workers=2, out=tmp_path
    )
    kept = done.ticket(1).masks["0"].to_dense().flatten()
    assert kept[64:].all() and not kept[:64].any()
    assert json.loads((tmp_path / "config.json").read_text())["steps"][0]["criterion"].endswith(
        "test_masking.by_position"
    )


def test_random_depends_on_the_seed_alone():
    runs = [
        sl.imp(make_model, plain, rounds=2, rate=0.5, criterion="random", seeds=[s], controls=()) for s in (0, 0, 1)
    ]
    first, again, other = (run.ticket(2, seed) for run, seed in zip(runs, (0, 0, 1), strict=True))
    assert first.masks == again.masks and first.masks != other.masks
    before = runs[0].ticket(1).masks
    assert all(mask & before[name] == mask for name, mask in first.masks.items())


def test_runs_of_before_keep_their_config(tmp_path):
    sl.imp(make_model, plain, rounds=1, out=tmp_path, **ONE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["steps"][0]) == {"rate", "scope", "rates", "exclude"} and not {"batch", "schedule"} & set(config)


def test_density_in_rounds():
    done = sl.imp(make_model, plain, rounds=4, density=0.1, scope="global", **ONE)
    assert [level["density"] for level in done.levels] == [
        1.0, *(round(448 * 0.1 ** (i / 4)) / 448 for i in (1, 2, 3, 4))
    ]  # fmt: skip
    done = sl.imp(make_model, plain, rounds=3, density=0.2, **ONE)
    assert done.levels[-1]["density"] == round(0.2 * 448) / 448, "exactly, with the output layer slower"
    masks = done.ticket(3).masks
    assert masks["4"].density == pytest.approx(masks["0"].density ** 0.5, abs=0.02)


def test_learning_rate_rewinding():
    fit = trainer(milestones=(10,))
    done = sl.imp(
        make_model, fit, rounds=2, rate=0.5, rewind="lr", seeds=1, controls=("reinit", "random-mask", "shuffle")
    )
    model = sl.sparsify(make_model(0))
    for level in (0, 1, 2):
        history = fit(model, seed=0)  # the whole schedule again, from where the weights are
        entry = done.levels[level]["ticket"]
        assert entry["final_test_accuracy"]["values"] == [history.final_test_accuracy]
        if level == 0:
            trained = {k: v.clone() for k, v in model.state_dict().items()}
            assert all(torch.equal(v, trained[k]) for k, v in done.ticket(0).initial.items())
        if level < 2:
            sl.prune(model, rate=0.5, scope="layer", rates={"output": 0.5})
            ticket = done.ticket(level + 1)
            assert ticket.masks == masks_of(model)
            assert all(torch.equal(v, model.state_dict()[k]) for k, v in ticket.initial.items())
    assert not torch.equal(done.ticket(2).initial["0.bias"], trained["0.bias"])
    assert all(kind in done.levels[2] for kind in ("reinit", "random-mask", "shuffle"))


def test_movement_under_learning_rate_rewinding_is_since_the_round_began():
    done = sl.imp(make_model, trainer(), rounds=1, rate=0.5, rewind="lr", criterion="movement", **ONE)
    model = make_model(0)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    trainer()(sl.sparsify(model), seed=0)
    sl.prune(model, rate=0.5, scope="layer", rates={"output": 0.5}, criterion="movement", initial=initial)
    assert done.ticket(1).masks == masks_of(model)


def test_masks_of_gradual_pruning():
    fit = trainer(budget=40)
    done = sl.one_shot(make_model, fit, density=(0.5, 0.2), schedule="gradual", scope="global", **ONE)
    for level, density in ((1, 0.5), (2, 0.2)):
        model = sl.sparsify(make_model(0))
        fit(model, seed=0, schedule=sl.Gradual(density, begin=0, end=30, every=1))
        assert done.ticket(level).masks == masks_of(model)
        assert torch.equal(done.ticket(level).initial["2.weight"], make_model(0)[2].weight)
    once = sl.one_shot(make_model, fit, density=(0.5, 0.2), scope="global", **ONE)
    assert once.ticket(2).masks != done.ticket(2).masks
    kept = sl.one_shot(make_model, fit, density=0.2, schedule="gradual", rewind="lr", scope="global", **ONE).ticket(1)
    assert kept.masks == done.ticket(2).masks
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.initial.items())


@pytest.mark.parametrize(
    "changed, kind, message",
    [
        ({"criterion": "largest"}, ValueError, "criterion: expected 'magnitude', 'random', 'large-final'"),
        ({"criterion": {}}, TypeError, "criterion: expected a name or a callable"),
        ({"criterion": "snip", "fit": plain}, ValueError, "batch: expected (x, y) for criterion 'snip'; only of a"),
        ({"batch": DATA[0]}, ValueError, "batch: expected None for a criterion that puts no data through"),
        ({"criterion": "snip", "rewind": "lr"}, ValueError, "rewind: expected 'init' or a step with 'snip'"),
        ({"schedule": "cubic"}, ValueError, "schedule: expected one of once, gradual, got 'cubic'"),
        ({"schedule": "gradual", "fit": plain}, TypeError, "schedule: 'gradual' needs a fit that takes schedule="),
        ({"schedule": "gradual", "criterion": "snip"}, ValueError, "criterion: expected one that looks at weights"),
        ({"density": 0}, ValueError, "density: expected fractions between 0 and 1, falling, got 0"),
        ({"density": 1.0}, ValueError, "density: expected fractions between 0 and 1, falling, got 1.0"),
    ],
)
def test_mistakes(changed, kind, message):
    arguments = {"make_model": make_model, "fit": trainer(), "density": 0.5, "seeds": 1} | changed
    with pytest.raises(kind, match=re.escape(message)):
        sl.one_shot(**arguments)


TINY = ["--seeds", "1", "--budget", "20it", "--controls", "", "--workers", "1", "--no-speed", "--no-report", "--json"]


@pytest.mark.parametrize(
    "argv, densities",
    [
        (["imp", "--rounds", "2", "--density", "0.1", "--criterion", "large-final-same-sign"], [1, 0.1**0.5, 0.1]),
        (["imp", "--rounds", "1", "--rewind", "lr", "--criterion", "magnitude-increase"], None),
        (["one-shot", "--densities", "0.3", "--criterion", "snip"], [1, 0.3]),
        (["one-shot", "--densities", "0.3", "--schedule", "gradual"], [1, 0.3]),
    ],
)
def test_commands(argv, densities, tmp_path, capsys):
    assert cli.main([*argv, *TINY, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    if densities:
        assert [level["density"] for level in result["levels"]] == pytest.approx(densities, abs=1e-4)
    assert len(result["levels"]) == 2 + (densities is not None and len(densities) == 3)


@pytest.mark.parametrize(
    "argv, text",
    [
        (["imp", "--density", "1"], "density: expected a fraction between 0 and 1, got 1.0"),
        (["imp", "--density", "0.1", "--rate", "0.3"], "rate: expected none with --density"),
        (["imp", "--criterion", "snap"], "invalid choice: 'snap'"),
        (["one-shot", "--criterion", "snip", "--rewind", "lr"], "rewind: expected 'init' or a step"),
    ],
)
def test_mistakes_on_the_command_line(argv, text, tmp_path, capsys):
    try:
        status = cli.main([*argv, "--out", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and text in error and error.count("\n") == 1
