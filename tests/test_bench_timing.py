"""How the benchmark takes times: percentiles, the pinned thread, backends by force, turns. Speeds are not tested."""

import gc
import os

import pytest
import torch

from sparselottery.bench import timing


def test_percentiles():
    assert timing.percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert timing.percentiles([6, 1, 2, 5, 3, 4]) == (2.0, 3.5, 5.0)


def test_pinned_puts_everything_back():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(KeyError), timing.pinned() as core:
        assert torch.get_num_threads() == 1 and os.sched_getaffinity(0) == {core} and not gc.isenabled()
        raise KeyError
    assert torch.get_num_threads() == threads and os.sched_getaffinity(0) == cores and gc.isenabled()


@pytest.mark.parametrize("before", [None, "dense"])
def test_backend_is_forced_and_put_back(monkeypatch, before):
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    if before:
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", before)
    with timing.backend("cpu"):
        assert os.environ["SPARSELOTTERY_BACKEND"] == "cpu"
    with timing.backend(None):
        assert "SPARSELOTTERY_BACKEND" not in os.environ
    assert os.environ.get("SPARSELOTTERY_BACKEND") == before


def test_interleave_takes_turns_and_counts_inputs():
    order = []
    runs = {name: (lambda i, name=name: order.append(name), None) for name in "ab"}
    times = timing.interleave(runs, seconds=0.01)
    assert times["a"].rounds == times["b"].rounds >= timing.MIN_ROUNDS
    turns = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert len(turns) > timing.MIN_ROUNDS
    for t in times.values():
        assert 0 < t.p20 <= t.p50 <= t.p80
