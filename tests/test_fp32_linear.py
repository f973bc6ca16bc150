"""float32 products from bfloat16 parts: the parts, the error against float64 beside a float32 product's, the switch."""

import os
import subprocess
import sys

import pytest
import torch

import sparselottery as sl
from sparselottery.ops import dispatch, fp32_linear, reference
from sparselottery.ops import masked_linear as op


def numbers(count=200_000):
    """float32 of every exponent and any mantissa, both signs; no inf, no NaN."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=g, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    return values[values.isfinite()]


def test_parts_add_up_exactly():
    x = numbers()
    parts = reference.bf16_parts(x)
    total = sum(p.double() for p in reversed(parts))
    normal = x.abs() >= 2.0**-109  # below, the last part is under bfloat16's smallest number, 2^-133
    assert torch.equal(total[normal].float(), x[normal]) and torch.equal(total[normal], x[normal].double())
    assert ((total - x.double()).abs() <= 2.0**-134).all()
    assert all(p.isfinite().all() for p in parts)


def test_parts_of_what_is_no_number():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4028235e38, 0.0])
    first, second, third = reference.bf16_parts(x)
    assert first[:2].tolist() == [torch.inf, -torch.inf] and first[2].isnan()
    assert (second[:3] == 0).all() and (third[:3] == 0).all()
    assert torch.equal((first.double() + second.double() + third.double())[3:], x[3:].double())


def float32_matmul(a, b):
    """A float32 product as a GPU's ordinary units do it: one fused multiply-add after the other along K.

    The product of two float32 numbers is exact in float64, and the sum's second rounding moves it in 2^-29 of all cases.
    """
    result = torch.zeros(a.shape[0], b.shape[0])
    for k in range(a.shape[1]):
        result = (result.double() + a[:, k : k + 1].double() * b[:, k].double()).float()
    return result


def cases():
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    m, n, k = 48, 40, 1024
    yield "normal", normal(m, k), normal(n, k)
    yield "positive", torch.rand(m, k, generator=g), torch.rand(n, k, generator=g)
    yield "short", normal(m, 17), normal(n, 17)
    yield "long", normal(8, 16384), normal(8, 16384)
    scales = 10.0 ** (torch.rand(k, generator=g) * 24 - 12)
    yield "columns badly scaled", normal(m, k) * scales, normal(n, k) / scales
    yield "rows badly scaled", normal(m, k) * 10.0 ** torch.linspace(-15, 15, m)[:, None], normal(n, k)
    wide = 10.0 ** (torch.rand(m, k, generator=g) * 12 - 6)
    yield "entries badly scaled", normal(m, k) * wide, normal(n, k)
    a, b = normal(m, k), normal(n, k)
    yield "cancellation", torch.cat([a, -a * (1 + 1e-6 * normal(m, k))], 1), torch.cat([b, b], 1)
    yield "a mean far from zero", normal(m, k) + 100, normal(n, k)
    yield "tiny", normal(m, k) * 1e-18, normal(n, k) * 1e-17
    yield "sparse", normal(m, k), normal(n, k) * (torch.rand(n, k, generator=g) < 0.05)


@pytest.mark.parametrize("name, a, b", list(cases()), ids=[case[0] for case in cases()])
def test_the_error_is_no_larger_than_a_float32_products(name, a, b):
    """Relative to sum |a||b|, which bounds what any summation can lose; largest and root mean square over all results."""
    exact = a.double() @ b.double().T
    scale = a.double().abs() @ b.double().abs().T
    scale[scale == 0] = 1
    errors = [((c.double() - exact) / scale).abs() for c in (reference.bf16x6_matmul(a, b), float32_matmul(a, b))]
    (largest, theirs), (mean, their_mean) = (
        [f(e).item() for e in errors] for f in (torch.max, lambda e: e.square().mean().sqrt())
    )
    assert mean <= their_mean, f"rms {mean:.3g} against float32's {their_mean:.3g}"
    assert largest <= theirs, f"largest {largest:.3g} against float32's {theirs:.3g}"


def test_six_products_are_needed():
    """The check can fail: with three products (the two largest kinds) the error is far above float32's."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(20, 256, generator=g), torch.randn(20, 256, generator=g)
    (a0, a1, _), (b0, b1, _) = ([p.double() for p in reference.bf16_parts(t)] for t in (a, b))
    three = a0 @ b0.T + a0 @ b1.T + a1 @ b0.T
    exact = a.double() @ b.double().T
    assert (three - exact).abs().max() > 5 * (float32_matmul(a, b) - exact).abs().max()


@pytest.fixture
def switch():
    yield
    sl.allow_fp32_emulation(False)


def test_the_switch(switch, monkeypatch):
    class Cuda:
        is_cuda, dtype = True, torch.float32

    monkeypatch.setattr(fp32_linear.kernels, "AVAILABLE", True, raising=False)
    assert not fp32_linear.takes(Cuda)
    before = dispatch.state()
    sl.allow_fp32_emulation()
    assert fp32_linear.takes(Cuda) and dispatch.state() != before
    assert not fp32_linear.takes(torch.ones(2))
    torch.backends.cuda.matmul.allow_tf32 = True  # monkeypatch cannot: the attribute is computed
    try:
        assert not fp32_linear.takes(Cuda)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    sl.allow_fp32_emulation(False)
    assert not fp32_linear.takes(Cuda)
    with pytest.raises(TypeError, match="allowed: expected True or False, got 'on'"):
        sl.allow_fp32_emulation("on")


@pytest.mark.parametrize("value, allowed", [("1", True), ("0", False), ("", False)])
def test_the_environment_sets_it(value, allowed):
    code = "from sparselottery.ops import fp32_linear; print(fp32_linear._allowed)"
    environment = os.environ | {"SPARSELOTTERY_FP32_EMULATION": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(allowed)


def test_decisions_with_and_without_it_are_kept_apart(monkeypatch):
    weight, words = torch.ones(100, 100), torch.full((100, 4), -1, dtype=torch.int32)
    x = torch.ones(8, 100)
    assert op._key("forward", x, weight, words) is None  # nothing is pruned: only dense can win
    monkeypatch.setattr(fp32_linear, "takes", lambda t: True)
    key = op._key("forward", x, weight, words)
    assert key[-1] == "bf16x6"
    calls = [lambda name=name: name for name in ("dense", "cpu", "triton", "reference", "bf16x6", "cuda")]
    assert op._candidates(x, 1.0, *calls)["bf16x6"]() == "bf16x6"
