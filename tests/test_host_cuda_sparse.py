"""csrc/cuda/sparse_linear.cu executed on the CPU (tests/host_cuda) through the op's own Python, against float64."""

import ctypes

import pytest
import torch
from host_cuda import harness

from sparselottery.ops import bitmask, dispatch, masked_linear, reference, sparse_linear

# (batch, out, in): chunks of 64 columns, tiles of 128 of the batch, blocks of 32 rows here; ragged ends everywhere.
SHAPES = [(1, 1, 1), (5, 33, 70), (130, 32, 64), (128, 65, 129), (3, 100, 63), (0, 4, 9), (4, 0, 9)]


@pytest.fixture(scope="module")
def library():
    i64, pointer = harness.I64, harness.POINTER
    functions = {"sl_fill": [pointer, pointer, i64, pointer], "sl_product": [pointer] * 4 + [i64] * 3 + [pointer]}
    return harness.load("library_sparse.cpp", functions, kernels="sparse_linear")


@pytest.fixture
def host(library, monkeypatch):
    """The op's way to the kernels, which run here."""

    class Extension:
        @staticmethod
        def cuda_sparse_linear_fill(*arguments):
            assert library.sl_fill(*arguments[:-1]) is None

        @staticmethod
        def cuda_sparse_linear_product(*arguments):
            *rest, target, _ = arguments
            rows, _, batch = rest[-3:]
            ctypes.memset(target, 0xFF, 4 * rows * batch)  # NaN: everything must be written
            assert library.sl_product(*rest, target) is None

    monkeypatch.setattr(sparse_linear._ext, "extension", lambda: Extension)
    monkeypatch.setattr(sparse_linear.bitmask, "stream_of", lambda tensor: 0)


def sample(batch, outputs, inputs, density, seed=0):
    """x, weight (NaN where it is dead), bias, grad, words."""
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(outputs, inputs, generator=g) < density
    shapes = [(batch, inputs), (outputs, inputs), (outputs,), (batch, outputs)]
    x, weight, bias, grad = (torch.randn(s, generator=g) for s in shapes)
    return x, torch.where(keep, weight, torch.nan), bias, grad, reference.bitmask_pack(keep)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_dx(host, shape, density):
    x, weight, bias, grad, words = sample(*shape, density)
    y = sparse_linear.forward(x, weight, words, bias)
    dx = sparse_linear.backward_input(grad, weight, words)
    doubles = (x.double(), weight.double(), words)
    want_y = reference.masked_linear(*doubles, bias.double())
    want_dx = reference.masked_linear_backward(grad.double(), *doubles)[0]
    for got, want in ((y, want_y), (dx, want_dx)):
        assert got.is_contiguous() and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5)


def test_rows_at_the_extremes(host):
    """Nothing, everything, one weight at either end of a row and on either side of a chunk."""
    keep = torch.zeros(40, 200, dtype=torch.bool)
    keep[1] = True
    for row, column in {2: 0, 3: 199, 4: 63, 5: 64, 31: 127, 32: 128, 39: 191}.items():
        keep[row, column] = True
    words, (x, weight, bias, *_) = reference.bitmask_pack(keep), sample(140, 40, 200, 1.0)
    y = sparse_linear.forward(x, weight, words, bias)
    want = reference.masked_linear(x.double(), weight.double(), words, bias.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=1e-5)
    assert torch.equal(y[:, 0], bias[0].expand(140))


def test_dead_products_pass_nothing_on(host):
    x, weight, bias, _, words = sample(9, 20, 130, 0.1)
    keep = reference.bitmask_unpack(words, (20, 130))
    x[:, 7] = torch.nan
    y = sparse_linear.forward(x, weight, words, bias)
    assert torch.equal(y.isnan(), keep[:, 7].expand(9, 20))


@pytest.mark.parametrize("premasked", [False, True])
def test_masked_linear_runs_on_it(host, monkeypatch, premasked):
    """As on a CUDA device where it was measured faster: strided x and weight, more dimensions, all gradients."""
    monkeypatch.setattr(sparse_linear, "takes", lambda t, density: True)
    monkeypatch.setattr(dispatch, "lookup", lambda name, key: "cuda")
    x, weight, bias, grad, words = sample(12, 50, 90, 0.1)
    weight = (weight.nan_to_num(0.0) if premasked else weight).t().contiguous().t().requires_grad_()
    x = x.t().contiguous().t().view(3, 4, 90).requires_grad_()
    bias, grad = bias.requires_grad_(), grad.view(3, 4, 50)
    y = masked_linear.masked_linear(x, weight, words, bias, premasked=premasked)
    got = (y, *torch.autograd.grad(y, (x, weight, bias), grad))
    doubles = [t.detach().double() for t in (grad, x, weight)]
    want_y = reference.masked_linear(*doubles[1:], words, bias.detach().double())
    for a, b in zip(got, (want_y, *reference.masked_linear_backward(*doubles, words)), strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=2e-5, atol=1e-5)


def test_the_index_is_made_once_per_mask(host):
    *_, words = sample(4, 20, 130, 0.1)
    first = sparse_linear.index(words, (20, 130), False)
    assert sparse_linear.index(words, (20, 130), False) is first
    assert sparse_linear.index(words, (20, 130), True) is not first
    words[0] = 0
    places, entries, starts = sparse_linear.index(words, (20, 130), False)
    assert len(places) == len(entries) == bitmask.count(words) == starts[-1] and (places >= 130).all()


def test_where_it_is_a_candidate(monkeypatch):
    class Cuda:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(sparse_linear._ext, "why_no_cuda", lambda device: "not built with nvcc")
    assert not sparse_linear.takes(Cuda, 0.1)
    monkeypatch.setattr(sparse_linear._ext, "why_no_cuda", lambda device: None)
    assert sparse_linear.takes(Cuda, 0.1) and not sparse_linear.takes(Cuda, 0.5)
    assert not sparse_linear.takes(torch.ones(2), 0.1)
    calls = [lambda name=name: name for name in ("dense", "cpu", "triton", "reference", "bf16x6", "cuda")]
    monkeypatch.setattr(sparse_linear, "takes", lambda t, density: density < 0.2)
    assert masked_linear._candidates(torch.ones(2), 0.1, *calls)["cuda"]() == "cuda"
    assert "cuda" not in masked_linear._candidates(torch.ones(2), 0.9, *calls)


# ---- ThreadSanitizer: one host thread per CUDA thread ----


@pytest.fixture(scope="module")
def race_check():
    return harness.race_check("race_check_sparse.cpp", kernels="sparse_linear")


def test_no_races(race_check):
    status, output = race_check()
    assert status == 0, output


@pytest.mark.parametrize("site", list(harness.barriers("sparse_linear.cu")))
def test_every_barrier_is_needed(race_check, site):
    harness.check_is_needed(race_check, site)
