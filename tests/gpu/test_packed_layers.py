"""Packed parameters on a GPU: kernels against the reference, layers against float64 and against masked layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.ops import packed, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(0,), (1,), (1000,), (5, 33), (70, 64), (64, 3, 3, 3), (4, 0), (2, 100_003), (3000, 1000)]


def sample(shape, density=0.3, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(0)
    keep = torch.rand(shape, generator=g, device="cuda") < density
    return torch.randn(shape, generator=g, device="cuda").to(dtype), keep, reference.bitmask_pack(keep)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape, density, dtype):
    dense, keep, words = sample(shape, density, dtype)
    values = packed.gather(dense, words)
    assert torch.equal(values, dense[keep])
    back = packed.expand(values, words, shape)
    assert torch.equal(back, torch.where(keep, dense, 0)) and not torch.signbit(back[~keep]).any()


def test_misaligned_strided_and_odd_values():
    dense, keep, words = sample((64, 16, 3, 3))
    dense[::3], dense[1::5] = math.nan, -0.0
    store = torch.cat([dense.new_zeros(1), dense.flatten()])
    for view in (store[1:].view(64, 16, 3, 3), dense.to(memory_format=torch.channels_last), dense.transpose(2, 3)):
        values = packed.gather(view, words)
        assert torch.equal(values.view(torch.int32), view[keep].view(torch.int32))
    shifted = torch.cat([values.new_zeros(1), values])[1:]
    assert torch.equal(packed.expand(shifted, words, dense.shape).nan_to_num(), view.where(keep, 0).nan_to_num())


def test_more_than_2_to_the_31_elements():
    shape = (70_000, 31_000)
    needed = math.prod(shape) * 2 * 2.5
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    words = torch.zeros(shape[0], -(-shape[1] // 32), dtype=torch.int32, device="cuda")
    words[::7, ::5] = 0x10204081
    words[-1, -1] = 1 << 7
    count = packed.bitmask.count(words)
    values = torch.randn(count, device="cuda").to(torch.bfloat16)
    dense = packed.expand(values, words, shape)
    assert dense[-1, 31_000 - 31_000 % 32 + 7] == values[-1]
    assert torch.equal(packed.gather(dense, words, count), values)


def test_without_kernels_plain_torch_does_it():
    """What a build without nvcc does."""
    dense, keep, words = sample((70, 333))
    values = packed._gather(dense, words, int(keep.sum()))
    assert torch.equal(values, dense[keep])
    assert torch.equal(packed._expand(values, words, dense.shape), torch.where(keep, dense, 0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_against_float64(kind, dtype, tolerance):
    layer = nn.Linear(130, 70) if kind == "linear" else nn.Conv2d(16, 24, 3, padding=1)
    layer = layer.to("cuda", dtype)
    sl.prune(layer, density=0.2)
    sl.pack(layer)
    x = torch.randn((9, 130) if kind == "linear" else (4, 16, 12, 12), device="cuda").to(dtype)
    if kind == "conv":
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = layer.dense_weight().detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = layer(x)
    plain = F.linear if kind == "linear" else lambda *a: F.conv2d(*a, padding=1)
    want = plain(wide, weight, layer.bias.detach().double())
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    for got, expected in (
        (y, want),
        (x.grad, wide.grad),
        (layer.values.grad, weight.grad[layer.mask.to_dense()]),
    ):
        assert got.dtype == dtype and (got.double() - expected).norm() <= tolerance * (1 + expected.norm())


def test_training_memory_at_90_percent():
    """Parameters, gradients and Adam's state of a large layer, as the allocator sees them."""
    warm = nn.Linear(4096, 4096, bias=False, device="cuda")  # cuBLAS takes its workspace
    warm(torch.randn(8, 4096, device="cuda")).sum().backward()
    del warm
    before = torch.cuda.memory_allocated()
    layer = nn.Linear(4096, 4096, bias=False, device="cuda")
    sl.prune(layer, sparsity=0.9)
    sl.pack(layer)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    x = torch.randn(8, 4096, device="cuda")
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    del x
    assert (torch.cuda.memory_allocated() - before) / 4096**2 < 2


def test_work_is_done_on_the_current_stream():
    dense, keep, words = sample((1000, 1000))
    late = torch.zeros_like(dense)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(dense)
        values = packed.gather(late, words)
        back = packed.expand(values, words, dense.shape)
    stream.synchronize()
    assert torch.equal(back, torch.where(keep, dense, 0))


@pytest.mark.skipif(
    not hasattr(_ext._C, "cuda_packed_expand"), reason="needs an extension built with nvcc for this GPU"
)
def test_in_a_cuda_graph():
    layer = nn.Linear(256, 128, device="cuda")
    sl.prune(layer, density=0.1)
    sl.pack(layer)
    x = torch.randn(16, 256, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # counts the mask, once
        for _ in range(3):
            layer(x).square().sum().backward()
            layer.zero_grad(set_to_none=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.square().sum().backward()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            layer.values.add_(seed)
            layer.values.grad.zero_()
        graph.replay()
        want = layer(x)
        torch.testing.assert_close(y, want)
        (expected,) = torch.autograd.grad(want.square().sum(), layer.values)
        torch.testing.assert_close(layer.values.grad, expected)
