"""Activations of more than 2^31 elements, where an index of 32 bits would wrap: data at both ends, zeros between them.

Masks, thresholds, optimizers and blocks have their own tests of this in test_cuda_kernels.py, test_graphs.py and
test_structures.py.
"""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparselottery import _ext
from sparselottery.ops import decode_linear, fp32_linear, reference, sparse_linear
from sparselottery.ops.masked_conv2d import masked_conv2d
from sparselottery.ops.masked_linear import masked_linear

DEVICE = "cuda"
LIMIT = 2**31  # elements of the larger activation: more than these
SIDE = 4096  # features of the larger activation of a linear layer
ENDS = 300  # rows at the beginning and at the end that hold something
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of the norm
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_cuda_build = pytest.mark.skipif(
    not hasattr(_ext._C, "cuda_decode_linear"), reason="needs an extension built with nvcc for this GPU"
)


@pytest.fixture(autouse=True)
def one_at_a_time():
    """Of all processes that run these tests on this machine; and what was allocated is given back."""
    with open(Path(tempfile.gettempdir()) / "sparselottery-huge-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def need(count):
    """Skips where the device has no room for `count` bytes."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of free GPU memory")


def normal(*shape, seed, dtype):
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def at_both_ends(*shape, ends, seed, dtype):
    """Zeros, but for the first and the last `ends` of the first dimension."""
    made = torch.zeros(shape, device=DEVICE, dtype=dtype)
    made[:ends] = normal(ends, *shape[1:], seed=seed, dtype=dtype)
    made[-ends:] = normal(ends, *shape[1:], seed=seed + 1, dtype=dtype)
    return made


def both(t, ends):
    return torch.cat([t[:ends], t[-ends:]])


def assert_near(got, wanted):
    assert got.shape == wanted.shape and got.isfinite().all() and wanted.norm() > 0
    assert (got.double() - wanted).norm() <= TOLERANCE[got.dtype] * wanted.norm()


def masked(x, weight, words, bias, grad):
    """y, dX and dW∘M of the op."""
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = masked_linear(x, weight, words, bias, premasked=True)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def sparse(x, weight, words, bias, grad):
    return sparse_linear.forward(x, weight, words, bias), sparse_linear.backward_input(grad, weight, words), None


def emulated(x, weight, words, bias, grad):
    return fp32_linear.forward(x, weight, bias), *fp32_linear.backward(grad, x, weight)


LINEAR = [
    pytest.param("triton", masked, torch.bfloat16, 1, id="masked_linear triton"),
    pytest.param("cuda", sparse, torch.bfloat16, 1, id="sparse_linear 16 bits", marks=needs_cuda_build),
    pytest.param("cuda", sparse, torch.float32, 1, id="sparse_linear float32", marks=needs_cuda_build),
    pytest.param("triton", emulated, torch.float32, 1, id="fp32_linear"),
    # Its planes are added to pointers once and twice: here the second one, and not the first, is beyond 2^31.
    pytest.param("triton", emulated, torch.float32, 2, id="fp32_linear, planes of 2^30"),
]


@pytest.mark.parametrize("backend, op, dtype, part", LINEAR)
def test_linear(monkeypatch, backend, op, dtype, part):
    """x and dX are that large: one is read and the other written."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    inputs, outputs = SIDE, 64
    rows = LIMIT // part // SIDE + 2 * ENDS
    need(rows * SIDE * dtype.itemsize * (6 if op is emulated else 5))
    keep = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(0)) < 0.05
    keep[:, :32] = keep[:, -32:] = True
    keep = keep.to(DEVICE)
    weight = normal(outputs, inputs, seed=1, dtype=dtype) * keep
    bias = normal(outputs, seed=2, dtype=dtype)
    x = at_both_ends(rows, inputs, ends=ENDS, seed=3, dtype=dtype)
    grad = at_both_ends(rows, outputs, ends=ENDS, seed=5, dtype=dtype)
    y, dx, dw = op(x, weight, reference.bitmask_pack(keep), bias, grad)
    x64, grad64, weight64 = both(x.detach(), ENDS).double(), both(grad, ENDS).double(), weight.detach().double()
    assert_near(both(y, ENDS), x64 @ weight64.T + bias.double())
    assert_near(both(dx, ENDS), grad64 @ weight64)
    assert (y[ENDS:-ENDS] == bias).all() and not dx[ENDS:-ENDS].any()
    if dw is not None:
        assert_near(dw, grad64.T @ x64 if op is emulated else (grad64.T @ x64) * keep)


def test_conv2d(monkeypatch):
    """Forward and all gradients; x and y are both that large."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")
    channels, side, edge, ends = 64, 32, 64 if LIMIT > 2**20 else 4, 2
    images = LIMIT // (channels * edge * edge) + 2 * ends
    need(images * channels * edge * edge * 2 * 7)
    live = torch.rand(channels // side, channels // side, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    keep = live.repeat_interleave(side, 0).repeat_interleave(side, 1).to(DEVICE)
    weight = (normal(channels, channels, 3, 3, seed=1, dtype=torch.bfloat16) * keep).requires_grad_()

    def activations(seed):
        made = at_both_ends(images, edge, edge, channels, ends=ends, seed=seed, dtype=torch.bfloat16)
        return made.permute(0, 3, 1, 2)  # channels_last

    x, grad = activations(2).requires_grad_(), activations(4)
    y = masked_conv2d(x, weight, reference.bitmask_pack(keep), None, 1, 1, premasked=True)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    leaves = [t.detach().double().requires_grad_() for t in (both(x, ends), weight)]
    wanted = F.conv2d(*leaves, padding=1)
    wanted_dx, wanted_dw = torch.autograd.grad(wanted, leaves, both(grad, ends).double())
    assert_near(both(y.detach(), ends), wanted.detach())
    assert_near(both(dx, ends), wanted_dx)
    assert_near(dw, wanted_dw * keep)
    assert not y[ends:-ends].any() and not dx[ends:-ends].any()


@needs_cuda_build
@pytest.mark.parametrize("format, wide", [("tiles", "x"), ("gap8", "y")])
def test_decode(format, wide):
    """A row of x must fit into shared memory for the formats of gaps, so only their y can be that large."""
    batch, dtype = decode_linear.MAX_BATCH, torch.bfloat16
    large = LIMIT // batch + 2 * ENDS
    rows, columns = (16, large) if wide == "x" else (large, 64)
    need(10 * rows * columns + 4 * batch * large)
    keep = torch.zeros(rows, columns, dtype=torch.bool, device=DEVICE)
    end = torch.rand(2, ENDS, min(rows, columns), generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.1
    weight = torch.zeros(rows, columns, dtype=dtype, device=DEVICE)
    values = normal(*end.shape, seed=1, dtype=dtype)
    for of, held in ((keep, end), (weight, values * end)):
        of = of.t() if wide == "x" else of  # both ends of the larger side
        of[:ENDS], of[-ENDS:] = held[0], held[1]
    packed = decode_linear.pack(weight, reference.bitmask_pack(keep), format)
    x, bias = normal(batch, columns, seed=2, dtype=dtype), normal(rows, seed=3, dtype=dtype)
    y = decode_linear.decode_linear(x, packed, bias)
    if wide == "x":
        x64, weight64 = both(x.t(), ENDS).t().double(), both(weight.t(), ENDS).t().double()
        assert_near(y, x64 @ weight64.T + bias.double())
    else:
        assert_near(both(y.t(), ENDS).t(), x.double() @ both(weight, ENDS).double().T + both(bias, ENDS).double())
        assert (y[:, ENDS:-ENDS] == bias[ENDS:-ENDS]).all()
