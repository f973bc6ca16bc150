"""resident: layers that are faster one by one run so, which is measured once and said."""

import threading

import pytest
import residents
import torch
from residents import convnet, gradients, mlp, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparselottery as sl
from sparselottery.nn import resident_choice
from sparselottery.ops import dispatch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


@pytest.fixture
def calls(monkeypatch):
    return residents.note_calls(monkeypatch)


def stopwatch(monkeypatch, winner):
    """It says that this way is faster; returns the measurements that are asked of it, each made once."""
    asked = []

    def measure(candidates):
        for run in candidates.values():
            run()
        asked.append(list(candidates))
        return {name: 1.0 if name == winner else 2.0 for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measure)
    return asked


def count(asked):
    """Of those between C++ and layers, not of single layers' kernels."""
    return asked.count([resident_choice.IN_CPP, resident_choice.LAYERS])


@pytest.mark.parametrize("winner", [resident_choice.IN_CPP, resident_choice.LAYERS])
@pytest.mark.parametrize("training", [False, True])
def test_the_faster_way_is_taken(monkeypatch, winner, training):
    stopwatch(monkeypatch, winner)
    x = torch.randn(6, 3, 16, 16)
    ours, model = sl.resident(convnet()), convnet()
    for a, b in zip(gradients(ours, x, training=training), gradients(model, x, training=training), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))
    why = "the layers by themselves are faster (forward and backward, batch 6)"
    in_cpp = winner == resident_choice.IN_CPP
    assert set(ours.where().values()) == {None if in_cpp else why}
    rows = sl.explain(ours).rows
    assert all((row.backend == "cpu (resident)") == in_cpp for row in rows)
    assert all((f"not resident: {why}" in row.note) == (not in_cpp) for row in rows)
    assert why in repr(ours) or in_cpp


def test_measured_once_for_each_kind_of_input_and_kept(monkeypatch):
    asked = stopwatch(monkeypatch, resident_choice.LAYERS)

    def use(model):
        for _ in range(2):
            for batch in (3, 60, 64):  # the last two are one bucket
                model(torch.randn(batch, 20))
            with torch.no_grad():
                model(torch.randn(3, 20))
            model(torch.randn(3, 20).requires_grad_())

    ours = sl.resident(mlp(density=0.3))
    use(ours)
    assert count(asked) == 4
    use(sl.resident(mlp(density=0.3, seed=1)))
    assert count(asked) == 4, "another one with as many survivors"
    dispatch.clear()
    use(sl.resident(mlp(density=0.3)))
    assert count(asked) == 4, "read from the file"
    sl.prune(ours, density=0.05)
    use(ours)
    assert count(asked) == 8, "another density"


@pytest.mark.parametrize("grad", [True, False])
def test_measuring_leaves_no_trace(monkeypatch, grad):
    """Neither statistics nor gradients nor random numbers move, and hooks hear nothing."""
    asked, heard = stopwatch(monkeypatch, resident_choice.IN_CPP), []
    ours, model = (m.train() for m in (sl.resident(convnet()), convnet()))
    for p in ours.parameters():
        p.register_hook(lambda g: heard.append("gradient") or g)
        p.register_post_accumulate_grad_hook(lambda p: heard.append("accumulated"))
    state, x = torch.get_rng_state(), torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    versions = [p._version for p in ours.parameters()]
    with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(heard.append, lambda t: t):
        ours(x)
        model(x)
    assert count(asked) == 1
    assert torch.equal(torch.get_rng_state(), state) and "gradient" not in heard and "accumulated" not in heard
    assert all(p.grad is None for p in ours.parameters())
    assert versions == [p._version for p in ours.parameters()]
    for (name, a), b in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    if grad:
        again = len(heard)
        with torch.autograd.graph.saved_tensors_hooks(heard.append, lambda t: t):
            ours(x)
            model(x)
        assert len(heard) == 2 * again, "as many saved tensors as in the call that measured"


def test_checkpointing_and_inference_mode(monkeypatch):
    stopwatch(monkeypatch, resident_choice.LAYERS)
    ours, x = sl.resident(mlp()), torch.randn(7, 20, requires_grad=True)
    expected = torch.autograd.grad(nn.Sequential.forward(ours, x).sum(), x)[0]
    found = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False).sum(), x)[0]
    torch.testing.assert_close(found, expected)
    with torch.inference_mode():
        fresh = sl.resident(mlp())
        torch.testing.assert_close(fresh(x), nn.Sequential.forward(ours, x))


def test_forced_and_reproducible_choices_need_no_stopwatch(monkeypatch, calls):
    monkeypatch.setattr(dispatch, "measure", lambda _: pytest.fail("measured"))
    several, alone = sl.resident(mlp(density=0.1)), sl.resident(mlp(density=0.1)[:1])
    dense, x = sl.resident(mlp(density=1.0)), torch.randn(4, 20)
    with dispatch.reproducible():
        for model, name in ((several, "record"), (alone, None), (dense, None)):
            calls.clear()
            model(x)
            assert calls[-1:] == ([name] if name else [])
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")
    for model in (several, alone, dense):
        model(x)
        assert calls[-1] == "record" and not any(model.where().values())


def test_layers_that_cpp_refuses_are_not_said_to_be_faster():
    ours = sl.resident(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.randn(2, 2, 9, 9))
    assert ours(torch.randn(2, 2, 4, 4)).shape == (2, 3)


def test_from_several_threads():
    ours, x = sl.resident(randomize(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)))), torch.randn(9, 20)
    expected, found = nn.Sequential.forward(ours, x), []
    threads = [threading.Thread(target=lambda: found.append(ours(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
