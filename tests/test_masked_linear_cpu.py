"""masked_linear on the CPU: parity at every shape and on every thread count. What it keeps: test_masked_linear_kept.py."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_samples import forward_on_cpu, sparse_sample

from sparselottery import _ext
from sparselottery.ops import dispatch, reference
from sparselottery.ops.masked_linear import masked_linear

DENSITIES = {"none": 0.0, "one": None, "sparse": 0.05, "half": 0.5, "all": 1.0}


@pytest.fixture(params=_ext.extension().cpu_isas())
def isa(request):
    _ext.extension().cpu_set_isa(request.param)
    yield request.param
    _ext.extension().cpu_set_isa("auto")


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "cpu")


def assert_parity(x, w, b, grad, keep, relu=False):
    """Forward and all gradients of the backend in force against float64."""
    words = reference.bitmask_pack(keep)
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    y = masked_linear(inputs[0], inputs[1], words, inputs[2], activation="relu" if relu else None)
    gradients = torch.autograd.grad(y, inputs, grad)
    wanted = reference.masked_linear(x.double(), w.double(), words, b.double())
    passes = (y > 0).double() if relu else 1.0  # what is 0 here but not there, for rounding, is as good as 0
    expected = reference.masked_linear_backward(grad.double() * passes, x.double(), w.double(), words)
    tolerance = 1e-5 if x.dtype == torch.float32 else 6e-3
    for ours, theirs in zip((y, *gradients), (wanted.relu() if relu else wanted, *expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == x.dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-6
    assert (gradients[1][~keep] == 0).all()


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (784, 300), (300, 100), (1100, 70), (64, 1040)], ids=str)
def test_cpu_parity(cpu, isa, shape, density):
    for batch in (1, 3, 16, 60):
        assert_parity(*sparse_sample(batch, *shape, density))


@pytest.mark.parametrize("gathers", [0, 1])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_one_sample_with_gathers_and_with_loads(cpu, isa, gathers, density):
    extension = _ext.extension()
    extension.cpu_set_gathers(gathers)
    try:
        for inputs in (1, 7, 33, 500):
            assert_parity(*sparse_sample(1, inputs, 19, density))
    finally:
        extension.cpu_set_gathers(-1)


def test_cpu_parity_at_every_tile_edge(cpu, isa):
    for batch in range(1, 131):
        assert_parity(*sparse_sample(batch, 70, 40, 0.2, seed=batch))


def special_mask(kind, shape, seed):
    g = torch.Generator().manual_seed(seed)
    keep = torch.zeros(shape, dtype=torch.bool)
    if kind == "all":
        keep[:] = True
    elif kind == "one":
        place = torch.randint(max(1, keep.numel()), (1,), generator=g)
        keep.view(-1)[place[: keep.numel()]] = True
    elif kind != "none":
        keep = torch.rand(shape, generator=g) < {"sparse": 0.03, "thin": 0.1}.get(kind, 0.5)
    if kind == "empty row" and shape[0]:
        keep[seed % shape[0]] = False
    if kind == "empty column" and shape[1]:
        keep[:, seed % shape[1]] = False
    return keep


@pytest.mark.parametrize("outputs", [1, 40])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_views_that_are_read_with_the_other_sign(cpu, batch, outputs):
    """As `.imag` of a conjugate is: the memory behind them holds -t."""
    *tensors, keep = sparse_sample(batch, 33, outputs, 0.5)
    x, w, b, grad = (torch._neg_view(-t) for t in tensors)
    assert x.is_neg() and grad.is_neg()
    assert_parity(x, w, b, grad, keep)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.one_of(st.integers(0, 70), st.sampled_from([1, 16, 32, 128])),
    inputs=st.integers(0, 300),
    outputs=st.integers(0, 90),
    mask=st.sampled_from(["none", "one", "all", "empty row", "empty column", "sparse", "thin"]),
    layout=st.sampled_from(["plain", "transposed", "padded", "expanded", "3-d", "element-aligned"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cpu_parity_property(cpu, isa, batch, inputs, outputs, mask, layout, dtype, relu, seed):
    x, w, b, grad, _ = (t.to(dtype) for t in sparse_sample(batch, inputs, outputs, 0, seed))
    keep = special_mask(mask, (outputs, inputs), seed)
    if layout == "transposed":
        x, grad, w = (t.t().contiguous().t() for t in (x, grad, w))
    elif layout == "padded":
        x, grad = (torch.cat([t, t], 1)[:, t.shape[1] :] for t in (x, grad))
    elif layout == "expanded" and batch:
        x, grad = (t[:1].expand(batch, -1) for t in (x, grad))
    elif layout == "3-d":
        x, grad = (torch.stack([t, t - 1]) for t in (x, grad))
    elif layout == "element-aligned":
        x, grad, w, b = (torch.cat([t.flatten()[:1], t.flatten()])[-t.numel() :].view(t.shape) for t in (x, grad, w, b))
    assert_parity(x, w, b, grad, keep, relu)


def test_cpu_is_the_same_for_any_number_of_threads(cpu, isa):
    before = torch.get_num_threads()
    x, w, b, grad, keep = sparse_sample(130, 700, 500, 0.1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            words = reference.bitmask_pack(keep)  # a new index, cut for this number of threads
            inputs = [t.clone().requires_grad_() for t in (x, w, b)]
            y = masked_linear(inputs[0], inputs[1], words, inputs[2])
            with torch.no_grad():
                single = masked_linear(x[0], w, words, b)
            results.append((y, single, *torch.autograd.grad(y, inputs, grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_cpu_writes_every_element(isa):
    """The kernel's outputs start as NaN; a pruned column of dX and a pruned row of Y must be written too."""
    x, w, b, grad, keep = sparse_sample(37, 90, 50, 0.1)
    words = reference.bitmask_pack(keep)
    plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *keep.shape)
    wanted = (reference.masked_linear(x, w, words, b), *reference.masked_linear_backward(grad, x, w, words))
    for tile in range(-1, 9):
        y, dx, dw, db = (torch.full_like(t, torch.nan) for t in wanted)
        weight = (w.data_ptr(), False, 0, True)
        plan.forward(*weight, x.data_ptr(), 90, 37, b.data_ptr(), y.data_ptr(), tile, True, False)
        torch.testing.assert_close(y, wanted[0].relu(), rtol=1e-4, atol=1e-5)
        y.fill_(torch.nan)
        plan.forward(*weight, x.data_ptr(), 90, 37, b.data_ptr(), y.data_ptr(), tile, False, True)
        addresses = (dx.data_ptr(), dw.data_ptr(), db.data_ptr())
        plan.backward(*weight, grad.data_ptr(), 50, x.data_ptr(), 90, 37, *addresses, tile, False)
        for ours, theirs in zip((y, dx, dw, db), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 8), (31, 9), (129, 17), (300, 70), (70, 300)], ids=str)
def test_cpu_dense_products_under_the_mask(isa, shape):
    """The loops for a few samples, whatever batch and density; the weight holds NaN off the mask, the outputs start as NaN."""
    for batch in (1, 2, 3, 4, 5, 8, 13):
        x, w, b, grad, keep = sparse_sample(batch, *shape, 0.4, seed=batch)
        x, grad = (torch.cat([t, t], 1)[:, t.shape[1] :] for t in (x, grad))
        words = reference.bitmask_pack(keep)
        wanted = (reference.masked_linear(x, w, words, b), *reference.masked_linear_backward(grad, x, w, words))
        plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), *keep.shape)
        held = w.masked_fill(~keep, torch.nan)
        weight, y = (held.data_ptr(), False, 0, True), torch.full_like(wanted[0], torch.nan)
        for relu in (True, False):
            plan.forward(
                *weight, x.data_ptr(), x.stride(0), batch, b.data_ptr(), y.data_ptr(), -1, relu, False
            )  # fmt: skip
            torch.testing.assert_close(y, wanted[0].relu() if relu else wanted[0], rtol=1e-4, atol=1e-5)
        for asked in ((True, True), (True, False), (False, True)):
            dx, dw, db = (torch.full_like(t, torch.nan) for t in wanted[1:])
            plan.backward(
                *weight, grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), batch,
                dx.data_ptr() if asked[0] else 0, dw.data_ptr() if asked[1] else 0, db.data_ptr(), -1, False,
            )  # fmt: skip
            torch.testing.assert_close(db, wanted[3], rtol=1e-4, atol=1e-5)
            for i, (gradient, is_asked) in enumerate(zip((dx, dw), asked, strict=True)):
                if is_asked:
                    torch.testing.assert_close(gradient, wanted[1 + i], rtol=1e-4, atol=1e-5)
                else:
                    assert gradient.isnan().all()


def test_cpu_dense_products_refuse_what_they_cannot_do():
    words = reference.bitmask_pack(torch.ones(4, 4, dtype=torch.bool))
    plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), 4, 4)
    half, x, y = torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(1, 4), torch.ones(1, 4)
    with pytest.raises(ValueError, match="no dense product"):
        plan.forward(half.data_ptr(), True, 0, True, x.data_ptr(), 4, 1, 0, y.data_ptr(), -1, False, False)


@pytest.mark.parametrize("trains", [True, False])
def test_cpu_a_call_gives_the_same_bits_again(cpu, isa, trains):
    """Which loops run must not depend on what ran before: a resumed run repeats what an uninterrupted one did."""
    for batch, density in ((1, 0.1), (1, 0.3), (4, 0.15), (16, 0.3), (20, 0.5)):
        x, w, b, grad, keep = sparse_sample(batch, 300, 70, density)
        words = reference.bitmask_pack(keep)
        inputs = [t.clone().requires_grad_(trains) for t in (x, w, b)]
        results = []
        for _ in range(3):
            y = masked_linear(inputs[0], inputs[1], words, inputs[2])
            results.append((y, *(torch.autograd.grad(y, inputs, grad) if trains else ())))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one, two)


def test_cpu_large_gradient_is_streamed_to_every_element():
    inputs, outputs = 2052, 2048  # above 2**22 weights
    x, w, _, grad, keep = sparse_sample(2, inputs, outputs, 0.01)
    words = reference.bitmask_pack(keep)
    plan = _ext.extension().CpuMaskedLinearPlan(words.data_ptr(), outputs, inputs)
    dw = torch.full((outputs, inputs), torch.nan)
    weight = (w.data_ptr(), False, 0, False)
    plan.backward(*weight, grad.data_ptr(), outputs, x.data_ptr(), inputs, 2, 0, dw.data_ptr(), 0, 0, False)
    torch.testing.assert_close(dw, (grad.t() @ x) * keep)


def test_cpu_panels_of_more_than_16_bits(cpu):
    assert_parity(*sparse_sample(1, 70000, 3, 0.01))
    assert_parity(*sparse_sample(2, 3, 70000, 0.01))


# ---- bfloat16: computed in float32 ----


@pytest.mark.parametrize("batch", [1, 3, 16, 60])
def test_bfloat16_is_rounded_once(cpu, isa, batch):
    """y and the gradients are those of float32 on the same numbers, rounded: no sum is kept in 8 bits."""
    x, w, b, grad, keep = (t.bfloat16() if t.is_floating_point() else t for t in sparse_sample(batch, 300, 70, 0.2))
    words = reference.bitmask_pack(keep)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = masked_linear(inputs[0], inputs[1], words, inputs[2])
        results.append((y, *torch.autograd.grad(y, inputs, grad.to(dtype))))
    for half, full in zip(*results, strict=True):
        # A small batch takes another way to dW in float32; then sums may differ in their last bit before they are rounded.
        torch.testing.assert_close(half, full.bfloat16(), rtol=2**-7, atol=1e-6)
    weight = w.requires_grad_()
    for _ in range(2):  # values are gathered anew after a change
        torch.testing.assert_close(
            masked_linear(x, weight, words).float(), x.float() @ (w * keep).float().t(), rtol=0.01, atol=0.01
        )
        with torch.no_grad():
            weight.mul_(2)


def test_bfloat16_has_the_sparse_kernels_to_choose_from(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    x, w, b, grad, keep = (t.bfloat16() if t.is_floating_point() else t for t in sparse_sample(16, 300, 70, 0.05))
    masked_linear(x, w.requires_grad_(), reference.bitmask_pack(keep), b).backward(grad)
    rows = dispatch.table()
    dispatch.clear()
    assert [(row["direction"], row["dtype"], set(row["us"])) for row in rows] == [
        ("forward", "bfloat16", {"dense", "cpu"}),
        ("backward", "bfloat16", {"dense", "cpu"}),
    ]


def test_one_mask_for_weights_of_two_dtypes(cpu):
    x, w, _, _, keep = sparse_sample(5, 90, 50, 0.3)
    words = reference.bitmask_pack(keep)
    for weight in (w, w.bfloat16(), w, 2 * w.bfloat16()):
        got = forward_on_cpu(x.to(weight.dtype), weight, words).float()
        torch.testing.assert_close(got, x @ (weight.float() * keep).t(), rtol=0.02, atol=0.05)


# ---- nothing stale ----


def test_one_libgomp_that_follows_torch():
    """A second OpenMP pool would spin against torch's: in a fresh process there must be one, sized by set_num_threads."""
    code = """
import re, torch
from sparselottery._ext import extension
extension()
libraries = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib[gi]omp", line)}
assert len(libraries) == 1, libraries
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    assert extension().cpu_threads() == threads
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wrong_isa_is_an_error(monkeypatch):
    extension = _ext.extension()
    with pytest.raises(ValueError, match="cpu_set_isa: expected avx512, avx2, portable or auto, got 'sse9'"):
        extension.cpu_set_isa("sse9")
    monkeypatch.setenv("SPARSELOTTERY_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="SPARSELOTTERY_CPU_ISA: expected"):
        extension.cpu_set_isa("auto")
    monkeypatch.setenv("SPARSELOTTERY_CPU_ISA", "portable")
    extension.cpu_set_isa("auto")
    assert extension.cpu_isa() == "portable"
    monkeypatch.delenv("SPARSELOTTERY_CPU_ISA")
    extension.cpu_set_isa("auto")
