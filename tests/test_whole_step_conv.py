"""Training networks of convolutions in C++ against training through the modules."""

import pytest
import torch
from test_whole_step import assert_alike, both_ways, data
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.training import whole_step

SHAPE = (3, 8, 10)


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


@pytest.fixture(autouse=True)
def always(monkeypatch, request):
    """Whether it would be faster or not."""
    if "rule" not in request.node.name:
        monkeypatch.setattr(whole_step, "_why_slower", lambda *_: None)


def convolutions(norm=False):
    """Like conv-2 of the papers, on small images."""
    norms = [nn.BatchNorm2d(6), nn.BatchNorm1d(7)] if norm else [nn.Identity(), nn.Identity()]
    return [
        nn.Conv2d(3, 6, 3, padding=1, bias=not norm),
        norms[0],
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * 20, 7, bias=not norm),  # Adam would make noise of a bias that does not matter
        norms[1],
        nn.ReLU(),
        nn.Linear(7, 5),
    ]


def strided():
    return [
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool2d((4, 5)),
        nn.Flatten(),
        nn.Linear(8, 5),
    ]


def network(modules, density=1.0, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(*modules)
    for m in model.modules():
        m.reset_parameters() if hasattr(m, "reset_parameters") else None
    if density < 1:
        sl.prune(sl.sparsify(model), density=density)
    return model


@pytest.mark.parametrize("density", [1.0, 0.4, 0.05])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "options", [{"lr": 2e-3}, {"optimizer": "sgd", "lr": 0.01, "optimizer_options": {"momentum": 0.9}}]
)
def test_losses_are_those_of_the_module_path(isa, norm, density, options):
    if norm and "optimizer" not in options:  # without a larger eps Adam divides the rounding of a gradient by itself
        options = options | {"optimizer_options": {"eps": 1e-3}}
    modules, ours = both_ways(network(convolutions(norm), density), SHAPE, **options)
    assert_alike(modules, ours)
    for a, b in zip(ours[0].buffers(), modules[0].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [2, 17, 64, 100])
def test_batches_of_any_size(batch):
    for modules in (convolutions(), strided()):
        assert_alike(*both_ways(network(modules, 0.4), SHAPE, batch_size=batch, budget=30, optimizer="sgd", lr=0.01))


def test_a_snapshot_and_the_rest_of_the_way():
    """BatchNorm's statistics and its count of batches are part of the model at every stop."""
    options = {"batch_size": 60, "budget": 40, "evaluate_every": 15, "optimizer": "sgd", "lr": 0.05}
    x, y = data(shape=SHAPE)
    trainer = sl.Trainer((x.view(-1, *SHAPE), y), **options)
    model, until = network(strided(), 0.4), network(strided(), 0.4)
    history = trainer.fit(model, seed=2, snapshot_at=17)
    trainer.fit(until, seed=2, budget=17)
    assert until[1].num_batches_tracked == 17 and model[1].num_batches_tracked == 40
    assert all(torch.equal(history.snapshot[k], v) for k, v in until.state_dict().items())
    trainer.fit(until, seed=2, start_at=17)
    assert all(torch.equal(p, q) for p, q in zip(until.state_dict().values(), model.state_dict().values(), strict=True))


def test_same_bits_again_and_for_any_number_of_threads():
    outcomes = []
    x, y = data(shape=(3, 16, 16))
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            modules = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
            modules += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 100), nn.ReLU(), nn.Linear(100, 5)]
            model = network(modules, 0.3)
            pair = x.view(-1, 3, 16, 16), y
            history = sl.Trainer(pair, pair, budget=5, batch_size=100).fit(model, seed=1)
            outcomes.append((history.records, [p.detach().clone() for p in model.state_dict().values()]))
        finally:
            torch.set_num_threads(1)
    for records, parameters in outcomes[1:]:
        assert records == outcomes[0][0]
        assert all(torch.equal(p, q) for p, q in zip(parameters, outcomes[0][1], strict=True))


def test_why_not():
    def reason(modules, shape=SHAPE, **options):
        x, y = data(shape=shape)
        return sl.Trainer((x.view(-1, *shape), y), **options).why_not_whole_step(network(modules)) or ""

    assert reason(convolutions(True)) == ""
    assert "its outputs are images" in reason([nn.Conv2d(3, 5, 3)])
    assert "expected 3 channels" in reason(convolutions(), (2, 8, 10))
    assert "expected images" in reason(convolutions(), (240,))
    assert "its kernel is larger" in reason([nn.Conv2d(3, 5, 9), nn.Flatten(), nn.Linear(5, 5)])
    assert "one value a channel" in reason([nn.Flatten(), nn.Linear(240, 5), nn.BatchNorm1d(5)], batch_size=1)
    assert "padding_mode" in reason([nn.Conv2d(3, 5, 3, padding_mode="circular"), nn.Flatten(), nn.Linear(240, 5)])
    upside = [nn.Conv2d(3, 5, 3), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(240, 5)]
    assert "Upsample is not known" in reason(upside)


def test_the_rule_leaves_wide_dense_convolutions_to_a_library():
    def reason(channels, density):
        modules = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        x, y = data(shape=SHAPE)
        model = network([*modules, nn.AvgPool2d((8, 10)), nn.Flatten(), nn.Linear(channels, 5)], density)
        return sl.Trainer((x.view(-1, *SHAPE), y)).why_not_whole_step(model)

    assert "large dense layers" in reason(128, 1.0)
    assert reason(128, 0.2) is None
    assert reason(64, 1.0) is None


def test_shared_convolutions_are_left_to_the_modules():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    x, y = data(shape=SHAPE)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Flatten(), nn.Linear(240, 5))
    assert "share a parameter" in sl.Trainer((x.view(-1, *SHAPE), y)).why_not_whole_step(model)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_weights_in_channels_last_stay_so(density):
    model = network(strided(), density).to(memory_format=torch.channels_last)
    modules, ours = both_ways(model, SHAPE, optimizer="sgd", lr=0.01)
    assert_alike(modules, ours)
    for a, b in zip(ours[0].parameters(), model.parameters(), strict=True):
        assert a.stride() == b.stride()
    assert not ours[0][0].weight.is_contiguous()
