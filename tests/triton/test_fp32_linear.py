"""fp32_linear's Triton kernels in the interpreter: exact parts, products against float64, and masked_linear's way to them."""

import pytest
import torch

from sparselottery.kernels import fp32_linear
from sparselottery.ops import dispatch, masked_linear, reference
from sparselottery.ops import fp32_linear as op


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 33), (3, 1030), (1, 1), (2, 16)])
def test_parts_are_the_references(shape):
    x = normal(*shape)
    x.view(-1)[0] = torch.finfo(torch.float32).max
    x[-1, -1] = -torch.inf if x.numel() > 1 else x[-1, -1]
    for matrix in (x, x.t().contiguous().t()):
        got = fp32_linear.parts(matrix)
        assert got.shape[2] % 16 == 0 and (got[:, :, shape[1] :] == 0).all()
        for part, want in zip(got, reference.bf16_parts(matrix), strict=True):
            assert torch.equal(part[:, : shape[1]], want)


@pytest.mark.parametrize("rows, outputs, inputs", [(130, 40, 50), (7, 129, 33), (1, 1, 1), (16, 144, 64)])
def test_products_keep_float32s_accuracy(rows, outputs, inputs):
    x, weight, bias, grad = (
        normal(rows, inputs),
        normal(outputs, inputs, seed=1),
        normal(outputs, seed=2),
        normal(rows, outputs, seed=3),
    )
    x64, weight64, grad64 = x.double(), weight.double(), grad.double()
    y = fp32_linear.forward(x, weight, bias)
    dx, dw = fp32_linear.backward(grad, x, weight)
    wanted = (x64 @ weight64.T + bias.double(), grad64 @ weight64, grad64.T @ x64)
    for got, want in zip((y, dx, dw), wanted, strict=True):
        assert got.dtype is torch.float32 and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)
    assert fp32_linear.backward(grad, None, weight)[1] is None and fp32_linear.backward(grad, x, None)[0] is None


def test_nothing_lies_between_the_planes():
    """Every product reads its parts only: memory around them is NaN, and results are written over NaN."""
    x, weight = normal(9, 20), normal(6, 20, seed=1)
    a, b = (fp32_linear.parts(t) for t in (x, weight))
    framed = []
    for t in (a, b):
        frame = torch.full((3, t.shape[1] + 7, t.shape[2] + 32), torch.nan, dtype=torch.bfloat16)
        frame[:, 3 : 3 + t.shape[1], 16 : 16 + t.shape[2]] = t
        framed.append(frame[:, 3 : 3 + t.shape[1], 16 : 16 + t.shape[2]])
    y = fp32_linear.matmul(*framed, (9, 6), 20)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-6, atol=1e-6)


def test_empty_products():
    assert fp32_linear.forward(normal(0, 5), normal(3, 5)).shape == (0, 3)
    y = fp32_linear.forward(torch.empty(4, 0), torch.empty(3, 0), torch.arange(3.0))
    assert torch.equal(y, torch.arange(3.0).expand(4, 3))


@pytest.mark.parametrize("premasked", [False, True])
def test_masked_linear_runs_on_it(monkeypatch, premasked):
    """As on a CUDA device where it was allowed and measured faster."""
    monkeypatch.setattr(op, "takes", lambda t: True)
    monkeypatch.setattr(dispatch, "lookup", lambda name, key: "bf16x6")
    keep = normal(70, 90) > 0.8
    words = reference.bitmask_pack(keep)
    weight = torch.where(keep, normal(70, 90, seed=1), 0.0 if premasked else torch.nan).requires_grad_()
    x, bias = normal(4, 5, 90, seed=2).requires_grad_(), normal(70, seed=3).requires_grad_()
    y = masked_linear.masked_linear(x, weight, words, bias, premasked=premasked)
    grad = normal(4, 5, 70, seed=4)
    got = (y, *torch.autograd.grad(y, (x, weight, bias), grad))
    doubles = [t.detach().double() for t in (grad, x, weight)]
    want_y = reference.masked_linear(doubles[1], doubles[2], words, bias.detach().double())
    wanted = (want_y, *reference.masked_linear_backward(*doubles, words))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=3e-6, atol=3e-6)
