"""Biases and masks with strides of their own, which no kernel reads, in the interpreter."""

import pytest
import torch
from torch.nn import functional as F

from sparselottery.kernels import fp32_linear
from sparselottery.ops import reference
from sparselottery.ops.block_linear import block_linear
from sparselottery.ops.masked_conv2d import masked_conv2d
from sparselottery.ops.masked_linear import masked_linear


def strided(t):
    """Every other element of something larger."""
    return torch.stack([t, torch.full_like(t, 77)], -1)[..., 0]


CHANGES = {"strided": strided, "expanded": lambda t: t if t.dtype == torch.int32 else t[:1].expand(t.shape)}


def blocks(shape):
    live = torch.rand(shape[0] // 16, shape[1] // 16, *shape[2:], generator=torch.Generator().manual_seed(0)) < 0.5
    return live.repeat_interleave(16, 0).repeat_interleave(16, 1)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", [masked_linear, lambda *a, **o: block_linear(*a, block=(16, 16), **o)])
def test_linear_layers(monkeypatch, op, change):
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    keep = blocks((64, 80))
    x, weight, bias = draw(9, 80), draw(64, 80) * keep, CHANGES[change](draw(64))
    words = CHANGES[change](reference.bitmask_pack(keep))
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = op(x, weight, words, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    _, dw = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(dw, torch.ones(64, 9) @ x * keep, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_convolutions(monkeypatch, change):
    from sparselottery.kernels import masked_conv2d as kernel

    keep = blocks((32, 16, 3, 3))
    x, weight, bias = draw(2, 16, 6, 6), draw(32, 16, 3, 3) * keep, CHANGES[change](draw(32))
    words = CHANGES[change](reference.bitmask_pack(keep))
    y = kernel.forward(x, weight, words, bias, (1, 1), (1, 1), (1, 1), 1)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        masked_conv2d(x, weight, words, bias, padding=1).isfinite(), torch.ones_like(y, dtype=torch.bool)
    )


@pytest.mark.parametrize("change", CHANGES)
def test_float32_through_bfloat16(change):
    x, weight, bias = draw(9, 40), draw(20, 40), CHANGES[change](draw(20))
    torch.testing.assert_close(fp32_linear.forward(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
