"""float32 products on bfloat16 tensor cores: error against float64 beside cuBLAS float32's, every layout, the dispatcher."""

import pytest
import torch

import sparselottery as sl
from sparselottery import kernels
from sparselottery.ops import fp32_linear, reference
from sparselottery.ops.masked_linear import masked_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def errors(got, a, b):
    """Largest and root mean square error of a product a b^T, relative to |a||b|^T."""
    a, b = a.double(), b.double()
    error = (got.double() - a @ b.T) / (a.abs() @ b.abs().T)
    return error.abs().max().item(), error.square().mean().sqrt().item()


CASES = {
    "normal": lambda: (normal(1024, 4096), normal(768, 4096, seed=1)),
    "positive": lambda: (normal(512, 4096).abs(), normal(512, 4096, seed=1).abs()),
    "short": lambda: (normal(300, 33), normal(200, 33, seed=1)),
    "cancellation": lambda: (normal(256, 1024).repeat(1, 2) * torch.tensor([1.0, -1.0], device="cuda").repeat_interleave(1024),
                             normal(256, 2048, seed=1)),
    "badly scaled": lambda: (normal(256, 2048) * 10 ** (8 * normal(2048, seed=2).tanh()), normal(256, 2048, seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_no_larger_than_cublas_float32s(case):
    a, b = CASES[case]()
    assert not torch.backends.cuda.matmul.allow_tf32
    ours, theirs = errors(fp32_linear.forward(a, b, None), a, b), errors(a @ b.T, a, b)
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1], (ours, theirs)


@pytest.mark.parametrize(
    "rows, outputs, inputs", [(1, 1, 1), (5, 3, 2), (130, 129, 127), (1000, 333, 1030), (64, 4096, 16)]
)
def test_every_shape(rows, outputs, inputs):
    x, weight, bias, grad = (
        normal(rows, inputs),
        normal(outputs, inputs, seed=1),
        normal(outputs, seed=2),
        normal(rows, outputs),
    )
    for x_, weight_ in ((x, weight), (x.T.contiguous().T, weight.T.contiguous().T)):
        y = fp32_linear.forward(x_, weight_, bias)
        dx, dw = fp32_linear.backward(grad, x_, weight_)
        x64, w64, g64 = x.double(), weight.double(), grad.double()
        for got, want in ((y, x64 @ w64.T + bias.double()), (dx, g64 @ w64), (dw, g64.T @ x64)):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * (want.abs().max().item() + 1e-9))


def test_a_masked_layer_may_use_it(monkeypatch, tmp_path):
    """Allowed: it is among what is measured, and whatever is chosen is right. Not allowed: it is not."""
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    from sparselottery.ops import dispatch

    keep = normal(1024, 1024) > 0.8
    words, weight = reference.bitmask_pack(keep), (normal(1024, 1024, seed=1) * keep).requires_grad_()
    x = normal(2048, 1024, seed=2).requires_grad_()
    for allowed in (False, True):
        dispatch.clear()
        sl.allow_fp32_emulation(allowed)
        try:
            y = masked_linear(x, weight, words, premasked=True)
            dx, dw = torch.autograd.grad(y.square().mean(), (x, weight))
        finally:
            sl.allow_fp32_emulation(False)
        measured = [row["us"] for row in dispatch.table() if row["op"] == "masked_linear"]
        assert len(measured) == 2 and all(("bf16x6" in us) == (allowed and kernels.AVAILABLE) for us in measured)
        y64 = x.detach().double() @ weight.detach().double().T
        torch.testing.assert_close(y.detach().double(), y64, rtol=1e-5, atol=1e-4)
        assert (dw[~keep] == 0).all() and dx.isfinite().all()
    dispatch.clear()
