"""dispatch: the order of decision, the margin, the cache file and its mishaps, the bound on measuring."""

import json
import multiprocessing
import os
import time

import pytest
import torch

import sparselottery as sl
from sparselottery import _ext
from sparselottery.ops import dispatch, reference
from sparselottery.ops import masked_linear as op
from sparselottery.ops.masked_linear import masked_linear

KEY = ("forward", (64, 64), "float32", 13, 16, 1, "cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def waits(seconds, log=None, name=None):
    def run():
        if log is not None:
            log.append(name)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def refuse():
    raise AssertionError("must not be called")


def choose(candidates, key=KEY, rule=refuse):
    return dispatch.choose("test_op", key, candidates, rule=rule)


def test_the_faster_one_is_chosen_and_remembered():
    assert dispatch.lookup("test_op", KEY) is None
    assert choose({"dense": waits(2e-3), "cpu": waits(1e-4)}) == "cpu"
    assert dispatch.lookup("test_op", KEY) == "cpu"
    assert choose({"dense": refuse, "cpu": refuse}) == "cpu"
    (row,) = dispatch.table()
    assert row["op"] == "test_op" and row["shape"] == (64, 64) and row["batch"] == 16 and row["backend"] == "cpu"
    assert row["density"] == pytest.approx(0.1, rel=0.1) and row["source"] == "measured"
    assert row["us"]["dense"] > 1900 and row["us"]["cpu"] >= 100


def test_dense_wins_unless_beaten_by_the_margin():
    assert dispatch.fastest({"dense": 1.0, "cpu": 1.0 - dispatch.MARGIN / 2}) == "dense"
    assert dispatch.fastest({"dense": 1.0, "cpu": 1.0 - dispatch.MARGIN * 2}) == "cpu"
    assert dispatch.fastest({"dense": 1.0, "cpu": 0.9, "triton": 0.5}) == "triton"


def test_reference_is_never_measured():
    assert choose({"dense": refuse, "reference": refuse}) == "dense"


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "reference")
    assert dispatch.lookup("test_op", KEY) is None and dispatch.lookup("test_op", None) is None
    assert choose({"dense": refuse, "reference": refuse}) == "reference"
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"SPARSELOTTERY_BACKEND=triton: test_op .* can run on: dense, cpu"):
        choose({"dense": refuse, "cpu": refuse})


def test_an_unknown_backend_is_one_error_everywhere(monkeypatch):
    layer, convolution = sl.MaskedLinear(80, 80), sl.MaskedConv2d(32, 32, 3)
    for masked in (layer, convolution):
        sl.prune(masked, density=0.5)
    param = torch.nn.Parameter(torch.ones(5))
    calls = [
        lambda: dispatch.lookup("test_op", KEY),
        lambda: dispatch.lookup("test_op", None),
        lambda: choose({"dense": refuse}),
        lambda: dispatch.decided("test_op", KEY, refuse),
        lambda: layer(torch.ones(4, 80)),
        lambda: convolution(torch.ones(2, 32, 5, 5)),
        lambda: sl.global_topk([torch.ones(5)], 2),
        lambda: sl.prune(layer, density=0.2),
        lambda: sl.explain(layer),
    ]
    for make in (sl.optim.SGD, sl.optim.Adam):
        param.grad = torch.ones(5)
        calls.append(make([param], lr=0.1).step)
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "bogus")
    says = "^SPARSELOTTERY_BACKEND=bogus: expected one of dense, cpu, triton, cuda, reference$"
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()
    assert layer.density == 0.5


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_ops_that_are_no_layers_ignore_a_backend_they_lack(monkeypatch, name):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", name)
    (mask,), _ = sl.global_topk([torch.arange(5.0)], 2)
    assert mask.to_dense().tolist() == [False, False, False, True, True]
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    sl.optim.SGD([param], lr=0.5).step()
    assert param.tolist() == [0.5] * 5


def test_reproducible_uses_the_rule_and_no_stopwatch():
    choose({"dense": waits(2e-3), "cpu": waits(1e-4)})
    with dispatch.reproducible():
        assert dispatch.is_reproducible() and dispatch.lookup("test_op", KEY) is None
        assert choose({"dense": refuse, "cpu": refuse}, rule=lambda: "dense") == "dense"
        with dispatch.reproducible():
            assert choose({"dense": refuse, "cpu": refuse}, rule=lambda: "cpu") == "cpu"
        assert choose({"dense": refuse}, rule=lambda: "cpu") == "dense"
    assert not dispatch.is_reproducible() and dispatch.lookup("test_op", KEY) == "cpu"


def test_measurements_survive_the_process():
    choose({"dense": waits(2e-3), "cpu": waits(1e-4)})
    dispatch.clear()
    assert choose({"dense": refuse, "cpu": refuse}) == "cpu"
    assert dispatch.table()[0]["source"] == "cached"


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose({"dense": refuse, "cpu": refuse}) == "dense"
    assert dispatch.table() == []


def test_other_candidates_are_measured_again():
    choose({"dense": waits(2e-3), "cpu": waits(1e-4)})
    dispatch.clear()
    assert choose({"dense": waits(2e-3), "cpu": waits(1e-3), "triton": waits(1e-4)}) == "triton"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"decisions": 3}', '{"decisions": [{"op": 1}, 7, {"op": "test_op", "key": "x", "us": {}}]}'],
)
def test_a_damaged_file_is_measured_again(text):
    choose({"dense": waits(2e-3), "cpu": waits(1e-4)})
    dispatch.cache_file().write_text(text)
    dispatch.clear()
    assert choose({"dense": waits(1e-4), "cpu": waits(2e-3)}) == "dense"
    assert json.loads(dispatch.cache_file().read_text())["decisions"][0]["backend"] == "dense"


@pytest.mark.parametrize("key", ["garbage(", "5", "(1, 2, 3, 'x')"])
def test_a_record_with_a_foreign_key_is_left_out(key):
    record = {"op": "op", "key": key, "backend": "dense", "us": {"dense": 1.0}}
    dispatch.cache_file().parent.mkdir(parents=True, exist_ok=True)
    dispatch.cache_file().write_text(json.dumps({"decisions": [record]}))
    assert dispatch.table() == []


def test_another_build_of_the_extension_measures_anew(monkeypatch):
    runs = []
    candidates = {"dense": waits(1e-4, runs, "dense"), "cpu": waits(1e-5, runs, "cpu")}
    assert dispatch.choose("masked_linear", KEY, candidates, rule=refuse) == "cpu" and runs
    monkeypatch.setattr(_ext, "build_stamp", lambda: "other kernels")
    dispatch.clear()
    runs.clear()
    assert dispatch.choose("masked_linear", KEY, candidates, rule=refuse) == "cpu" and runs
    dispatch.clear()
    runs.clear()
    assert dispatch.choose("masked_linear", KEY, candidates, rule=refuse) == "cpu" and not runs


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path / "file" / "below"))
    assert choose({"dense": waits(2e-3), "cpu": waits(1e-4)}) == "cpu"
    assert dispatch.lookup("test_op", KEY) == "cpu"


def _measure_in_another_process(folder, number):
    os.environ["SPARSELOTTERY_CACHE"] = folder
    for i in range(5):
        key = ("forward", (number, i), *KEY[2:])
        dispatch.choose("test_op", key, {"dense": waits(1e-5), "cpu": waits(1e-6)}, rule=refuse)


def test_processes_share_the_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_measure_in_another_process, args=(str(tmp_path), n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(dispatch.table()) == 10


def test_measuring_is_interleaved_and_bounded():
    log = []
    dispatch.measure({"dense": waits(1e-5, log, "d"), "cpu": waits(1e-5, log, "c")})
    assert "".join(log) == "dc" * (len(log) // 2) and 6 <= len(log) // 2 <= 26
    log.clear()
    dispatch.measure({"dense": waits(4e-3, log, "d"), "cpu": waits(4e-3, log, "c")})
    assert "".join(log) == "dc" * 6  # only microseconds are taken more often
    start = time.perf_counter()
    log.clear()
    seconds = dispatch.measure({"dense": waits(0.2, log, "d"), "cpu": waits(0.2, log, "c")})
    assert log == ["d", "c"] and time.perf_counter() - start < 5  # slow ones run once
    assert seconds["dense"] >= 0.2


def test_a_failing_candidate_is_not_hidden():
    with pytest.raises(AssertionError, match="must not be called"):
        choose({"dense": waits(1e-5), "cpu": refuse})
    assert dispatch.lookup("test_op", KEY) is None


def test_buckets():
    batches = [dispatch.batch_bucket(b) for b in range(1, 2000)]
    assert all(b <= bucket <= 1.25 * b for b, bucket in enumerate(batches, 1)) and batches == sorted(batches)
    assert dispatch.batch_bucket(60) == 64 and dispatch.batch_bucket(128) == 128
    for density in (1.0, 0.5, 0.1, 0.02, 1e-4):
        assert dispatch.bucket_density(dispatch.density_bucket(density)) == pytest.approx(density, rel=0.1)
    assert dispatch.bucket_density(dispatch.density_bucket(0.0)) == 0


def record(direction, **us):
    """A measurement of `test_op` that came out like this, and its key."""
    key = (direction, *KEY[1:])
    dispatch.choose("test_op", key, {name: waits(t * 1e-6) for name, t in us.items()}, rule=refuse)
    dispatch._records["test_op", repr(key)]["us"] = {name: float(t) for name, t in us.items()}
    return key, refuse


def test_a_layer_goes_to_the_library_unless_both_passes_together_pay_for_their_calls(monkeypatch):
    monkeypatch.setattr(dispatch, "CALL", {"forward": 100e-6, "backward": 100e-6})
    assert dispatch.goes_to_library("test_op", [(KEY, refuse)]) is None  # not measured yet
    forward, backward = record("forward", dense=900, cpu=700), record("backward", dense=500, cpu=9000)
    assert dispatch.goes_to_library("test_op", [forward]) is False  # saves 200, costs 100
    # The forward pass saves less than the two calls cost, though its own call pays.
    assert dispatch.goes_to_library("test_op", [forward, backward]) is True
    dispatch._records["test_op", repr(forward[0])]["us"]["cpu"] = 300.0
    assert dispatch.goes_to_library("test_op", [forward, backward]) is False
    dispatch.clear()
    assert dispatch.goes_to_library("test_op", [record("forward", dense=100, cpu=900)]) is True


def test_a_layer_goes_to_the_library_by_the_rule_and_never_against_the_environment(monkeypatch):
    forward, backward = ((direction, *KEY[1:]) for direction in ("forward", "backward"))
    with dispatch.reproducible():
        for names, answer in ((("cpu", "cpu"), False), (("cpu", "dense"), True), (("dense", "dense"), True)):
            calls = [(key, lambda name=name: name) for key, name in zip((forward, backward), names, strict=True)]
            assert dispatch.goes_to_library("test_op", calls) is answer
    assert dispatch.goes_to_library("test_op", [(None, refuse)]) is True  # only dense can win
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")
    assert dispatch.goes_to_library("test_op", [(None, refuse)]) is None


@pytest.fixture
def sparse_layer(monkeypatch):
    """A masked layer whose forward and backward pass are known to be fastest on the sparse kernels; grad, and its mask."""
    layer = sl.nn.MaskedLinear(120, 70)
    layer.set_mask(torch.rand(70, 120) < 0.1)
    monkeypatch.setattr(dispatch, "measure", lambda candidates: {name: float(name == "dense") for name in candidates})
    for _ in range(2):  # measured; known
        layer(torch.randn(16, 120, requires_grad=True)).sum().backward()
    layer.zero_grad()
    assert layer._call[1] == (False, ("cpu", "cpu"))
    return layer


def as_dense(layer, x):
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    y = torch.nn.functional.linear(x, weight, bias)
    return y, weight, bias


def test_a_prepared_call_is_the_layer(sparse_layer):
    layer, x = sparse_layer, torch.randn(16, 120, requires_grad=True)
    y = layer(x)
    assert type(y.grad_fn).__name__ == "_PreparedBackward"
    wanted, weight, bias = as_dense(layer, x)
    torch.testing.assert_close(y, wanted)
    grad = torch.randn(16, 70)
    dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    expected = torch.autograd.grad(wanted, (x, weight, bias), grad)
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(dw, expected[1] * layer.mask.to_dense())
    torch.testing.assert_close(db, expected[2])
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert first.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_a_prepared_call_notices_what_has_changed(sparse_layer):
    layer, x = sparse_layer, torch.randn(16, 120)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), as_dense(layer, x)[0])
    layer.set_mask(torch.rand(70, 120) < 0.1)
    torch.testing.assert_close(layer(x), as_dense(layer, x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x)
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32 like x"):
        layer(x)
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32 like x"):
        layer(x)


def test_a_prepared_call_gives_way_to_who_watches_the_op(sparse_layer):
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(16, 120)
    with Watch(), torch.no_grad():
        sparse_layer(x)
    assert any("masked_linear" in name for name in seen)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(sparse_layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ sparse_layer.weight.t())


def test_an_op_measures_without_disturbing_its_user():
    x, w, b = torch.randn(64, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True), torch.randn(80)
    keep = torch.rand(80, 96) < 0.1
    words = reference.bitmask_pack(keep)
    state = torch.random.get_rng_state()
    before = w.detach().clone()
    masked_linear(x, w, words, b).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(w, before)
    torch.testing.assert_close(w.grad, (torch.ones(80, 64) @ x.detach()) * keep)  # once, not once per candidate
    rows = {row["direction"]: row for row in dispatch.table()}
    assert set(rows) == {"forward", "backward"}
    assert all(set(row["us"]) == {"dense", "cpu"} for row in rows.values())


def test_reproducible_runs_are_equal_bit_for_bit():
    x, w = torch.randn(64, 300), torch.randn(200, 300)
    words = reference.bitmask_pack(torch.rand(200, 300) < 0.05)
    results = []
    for _ in range(2):
        dispatch.clear()
        with dispatch.reproducible():
            leaf = w.clone().requires_grad_()
            y = masked_linear(x, leaf, words)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert dispatch.table() == []


@pytest.mark.parametrize(
    "direction, shape, density, batch, name",
    [
        ("forward", (300, 784), 0.1, 60, "cpu"),
        ("forward", (300, 784), 0.5, 60, "dense"),
        ("backward", (300, 784), 0.02, 1, "dense"),
        ("forward", (300, 784), 0.02, 1, "cpu"),
        ("forward", (100, 300), 0.02, 1, "dense"),
    ],
)
def test_the_rule_of_masked_linear(direction, shape, density, batch, name):
    key = (direction, shape, "float32", dispatch.density_bucket(density), batch, 1, "cpu", True)
    for isa in _ext.extension().cpu_isas():
        _ext.extension().cpu_set_isa(isa)
        assert op.rule(key) == ("dense" if isa == "portable" and density > 0.09 else name)
    _ext.extension().cpu_set_isa("auto")
    assert op.rule((*key[:6], "cuda", True)) == "dense"


def test_a_backend_that_a_gpu_is_not_made_for_is_left_out_with_a_warning():
    class OutOfResources(Exception):
        """As Triton's."""

    OutOfResources.__module__ = "triton.runtime.errors"

    def fails():
        raise OutOfResources("out of resources: shared memory\nmore")

    with pytest.warns(UserWarning, match=r"the triton backend failed and is not used here \(OutOfResources: out of"):
        seconds = dispatch.measure({"dense": lambda: None, "triton": fails, "cuda": lambda: None})
    assert set(seconds) == {"dense", "cuda"}
    with pytest.raises(OutOfResources):
        dispatch.measure({"dense": fails, "triton": lambda: None})
