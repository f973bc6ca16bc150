"""The same demands on every product that has a kernel for GPUs: against float64 in each dtype, whatever lies in fresh memory,
misaligned and strided inputs, other streams, 1,000 replays of a CUDA graph.

What only one op can be asked (ties, formats, over 2^31 elements, optimizers) is in the other files.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparselottery import _ext
from sparselottery.ops import decode_linear, fp32_linear, reference
from sparselottery.ops.block_linear import block_linear
from sparselottery.ops.masked_conv2d import masked_conv2d
from sparselottery.ops.masked_linear import masked_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REPLAYS = 1000
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the norm


@dataclasses.dataclass(frozen=True)
class Subject:
    """`make(dtype)` returns (inputs that a caller may replace, function of them -> results, the same in float64)."""

    name: str
    make: Callable
    dtypes: tuple = FLOATS
    backend: str | None = None
    needs_build: bool = False


def normal(*shape, seed, dtype):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)


def random_mask(shape, density, side=1):
    """bool on the GPU: survivors at random places, or in blocks of `side` by `side` (for each tap of a convolution)."""
    g = torch.Generator().manual_seed(side)
    live = torch.rand(-(-shape[0] // side), -(-shape[1] // side), *shape[2:], generator=g) < density
    live[0, 0] = True
    dense = live.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return dense[: shape[0], : shape[1]].contiguous().to("cuda")


def layer(op, plain, x_shape, weight_shape, keep):
    """Forward and all gradients of a masked layer."""

    def make(dtype):
        words = reference.bitmask_pack(keep)
        weight = normal(*weight_shape, seed=1, dtype=dtype) * keep
        inputs = [normal(*x_shape, seed=2, dtype=dtype), weight, normal(weight_shape[0], seed=3, dtype=dtype)]
        with torch.no_grad():
            inputs.append(normal(*plain(*(t.double() for t in inputs)).shape, seed=4, dtype=dtype))

        def run(x, weight, bias, grad):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = op(*leaves[:2], words, leaves[2])
            return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

        def expected(x, weight, bias, grad):
            leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
            y = plain(*leaves)
            dx, dw, db = torch.autograd.grad(y, leaves, grad.double())
            return [y.detach(), dx, dw * keep, db]

        return inputs, run, expected

    return make


def linear(density, side=1):
    shape = (330, 410)
    keep = random_mask(shape, density, side)

    def op(x, weight, words, bias):
        if side == 1:
            return masked_linear(x, weight, words, bias, premasked=True)
        return block_linear(x, weight, words, bias, block=(side, side), premasked=True)

    return layer(op, torch.nn.functional.linear, (150, 410), shape, keep)


def convolution(side):
    shape = (70, 50, 3, 3)

    def op(x, weight, words, bias):
        return masked_conv2d(x, weight, words, bias, 2, 1, premasked=True)

    def plain(x, weight, bias):
        return torch.nn.functional.conv2d(x, weight, bias, 2, 1)

    return layer(op, plain, (3, 50, 9, 7), shape, random_mask(shape, 0.3, side))


def emulated(dtype):
    inputs = [normal(150, 410, seed=1, dtype=dtype), normal(330, 410, seed=2, dtype=dtype)]
    inputs += [normal(330, seed=3, dtype=dtype), normal(150, 330, seed=4, dtype=dtype)]

    def run(x, weight, bias, grad):
        return [fp32_linear.forward(x, weight, bias), *fp32_linear.backward(grad, x, weight)]

    def expected(x, weight, bias, grad):
        x, weight, bias, grad = (t.double() for t in (x, weight, bias, grad))
        return [x @ weight.T + bias, grad @ weight, grad.T @ x]

    return inputs, run, expected


def decode(format):
    def make(dtype):
        keep = random_mask((330, 410), 0.1)
        weight = normal(330, 410, seed=1, dtype=dtype) * keep
        packed = decode_linear.pack(weight, reference.bitmask_pack(keep), format)

        def expected(x, bias):
            return [x.double() @ weight.double().T + bias.double()]

        inputs = [normal(9, 410, seed=2, dtype=dtype), normal(330, seed=3, dtype=dtype)]
        return inputs, lambda x, bias: [decode_linear.decode_linear(x, packed, bias)], expected

    return make


SUBJECTS = [
    Subject("masked_linear, triton", lambda dtype: linear(0.1)(dtype), backend="triton"),
    Subject("masked_linear, cuda", lambda dtype: linear(0.03)(dtype), backend="cuda", needs_build=True),
    *(
        Subject(f"block_linear, {side}", lambda dtype, side=side: linear(0.3, side)(dtype), backend="triton")
        for side in (16, 32, 64, 128)
    ),
    Subject("masked_conv2d", lambda dtype: convolution(1)(dtype), backend="triton"),
    Subject("masked_conv2d, blocks", lambda dtype: convolution(32)(dtype), backend="triton"),
    Subject("bf16x6", emulated, dtypes=(torch.float32,)),
    *(
        Subject(f"decode {name}", decode(name), dtypes=HALVES, needs_build=True)
        for name in decode_linear.FORMATS
    ),
]  # fmt: skip


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request, monkeypatch):
    chosen = request.param
    if chosen.needs_build and not hasattr(_ext._C, "cuda_decode_linear"):
        pytest.skip("needs an extension built with nvcc for this GPU")
    if chosen.backend:
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", chosen.backend)
    return chosen


def assert_near(got, wanted, dtype):
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype and ours.isfinite().all()
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * (1e-30 + theirs.norm())


def test_against_float64(subject):
    for dtype in subject.dtypes:
        inputs, run, expected = subject.make(dtype)
        got = run(*inputs)
        assert_near(got, expected(*inputs), dtype)
        assert all(torch.equal(a, b) for a, b in zip(got, run(*inputs), strict=True)), "two runs differ"


def test_whatever_lies_in_fresh_memory(subject, monkeypatch):
    """Results and scratch are allocated full of NaN and of large integers."""
    inputs, run, expected = subject.make(subject.dtypes[-1])
    run(*inputs)  # what is derived from a mask is made once

    def dirty(function):
        def made(*arguments, **options):
            tensor = function(*arguments, **options)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            return tensor.fill_(0x7B) if tensor.dtype in (torch.uint8, torch.int32, torch.int64) else tensor

        return made

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, dirty(getattr(owner, name)))
        got = run(*inputs)
    assert_near(got, expected(*inputs), subject.dtypes[-1])


def misaligned(t):
    return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)


def strided(t):
    """Every other element of something larger, the rest NaN."""
    return torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]


def transposed(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t


@pytest.mark.parametrize("change", [misaligned, strided, transposed], ids=lambda change: change.__name__)
def test_layouts(subject, change):
    for dtype in subject.dtypes:
        inputs, run, expected = subject.make(dtype)
        changed = [change(t) for t in inputs]
        assert all(torch.equal(a, b) for a, b in zip(changed, inputs, strict=True))
        assert_near(run(*changed), expected(*inputs), dtype)


def test_on_another_stream(subject):
    """Behind a long-running kernel: inputs are read when that stream gets there."""
    inputs, run, _ = subject.make(subject.dtypes[0])
    wanted = run(*inputs)
    late = [torch.zeros_like(t) for t in inputs]
    run(*late)  # compiled, and what is derived from a mask is made
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        got = run(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_thousand_replays_of_a_graph_are_bit_equal_to_eager(subject):
    inputs, run, _ = subject.make(subject.dtypes[-1])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)
    for replay in range(REPLAYS):
        if replay % 250 == 0:  # new data where the graph reads; 0 and NaN where it must write
            inputs[0].copy_(torch.randn_like(inputs[0]))
            wanted = [t.clone() for t in run(*inputs)]
            for t in outputs:
                t.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True)), replay
