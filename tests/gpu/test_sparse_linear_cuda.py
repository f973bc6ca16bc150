"""The kernels for masks of high sparsity on a GPU: forward and dX against float64, repeatable, other streams."""

import pytest
import torch

from sparselottery import _ext
from sparselottery.ops import reference, sparse_linear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(_ext._C, "cuda_sparse_linear_product"), reason="needs an extension built with nvcc for this GPU"
    ),
]


def sample(batch, outputs, inputs, density):
    g = torch.Generator("cuda").manual_seed(0)
    keep = torch.rand(outputs, inputs, generator=g, device="cuda") < density
    shapes = [(batch, inputs), (outputs, inputs), (outputs,), (batch, outputs)]
    x, weight, bias, grad = (torch.randn(s, generator=g, device="cuda") for s in shapes)
    return x, torch.where(keep, weight, torch.nan), bias, grad, reference.bitmask_pack(keep)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 33, 70), (300, 1000, 777), (4096, 1024, 2048), (129, 257, 65)], ids=str
)
def test_forward_and_dx(shape, density):
    x, weight, bias, grad, words = sample(*shape, density)
    for weight_ in (weight, weight.t().contiguous().t()):
        y, dx = sparse_linear.forward(x, weight_, words, bias), sparse_linear.backward_input(grad, weight_, words)
        want_y = reference.masked_linear(x.double(), weight.double(), words, bias.double())
        want_dx = reference.masked_linear_backward(grad.double(), x.double(), weight.double(), words)[0]
        torch.testing.assert_close(y.double(), want_y, rtol=2e-5, atol=2e-4)
        torch.testing.assert_close(dx.double(), want_dx, rtol=2e-5, atol=2e-4)
    assert all(torch.equal(sparse_linear.forward(x, weight, words, bias), y) for _ in range(5))


def test_on_another_stream():
    x, weight, bias, _, words = sample(500, 300, 400, 0.1)
    want = sparse_linear.forward(x, weight, words, bias)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        assert torch.equal(sparse_linear.forward(late, weight, words, bias), want)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 33, 70), (300, 1000, 777), (4096, 1024, 2048), (129, 257, 65)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype, shape, density):
    x, weight, bias, grad, words = (t if t.dtype is torch.int32 else t.to(dtype) for t in sample(*shape, density))
    for weight_ in (weight, weight.t().contiguous().t()):
        y, dx = sparse_linear.forward(x, weight_, words, bias), sparse_linear.backward_input(grad, weight_, words)
        want_y = reference.masked_linear(x.double(), weight.double(), words, bias.double())
        want_dx = reference.masked_linear_backward(grad.double(), x.double(), weight.double(), words)[0]
        # Rounding of a result, and of sums of up to 2048 products in float32.
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), want_y, rtol=rtol, atol=2e-4)
        torch.testing.assert_close(dx.double(), want_dx, rtol=rtol, atol=2e-4)
    assert all(torch.equal(sparse_linear.forward(x, weight, words, bias), y) for _ in range(5))


def test_16_bits_in_a_graph_with_new_weights():
    x, weight, bias, _, words = (t if t.dtype is torch.int32 else t.bfloat16() for t in sample(500, 300, 400, 0.05))
    sparse_linear.forward(x, weight, words, bias)  # makes the index, which cannot be made in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear.forward(x, weight, words, bias)
    weight.mul_(2)
    graph.replay()
    assert torch.equal(y, sparse_linear.forward(x, weight, words, bias))
