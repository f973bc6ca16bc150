"""csrc/cuda/sparse_linear_half.cu executed on the CPU (tests/host_cuda) through the op's own Python, against float64."""

import ctypes
import math

import pytest
import torch
from host_cuda import harness

from sparselottery.ops import dispatch, masked_linear, reference, sparse_linear

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library():
    i64, pointer = harness.I64, harness.POINTER
    functions = {
        "sl_fill": [pointer] * 6 + [i64, i64, harness.BOOL, pointer],
        "sl_product": [harness.INT] + [pointer] * 4 + [i64] + [pointer] * 3 + [i64] * 4 + [pointer],
    }
    return harness.load("library_sparse_half.cpp", functions, kernels="sparse_linear_half")


@pytest.fixture
def host(library, monkeypatch):
    """The op's way to the kernels, which run here."""

    class Extension:
        @staticmethod
        def cuda_sparse_linear_half_fill(*arguments):
            *rest, values, _ = arguments
            ctypes.memset(values, 0xFF, 512 * rest[6])  # NaN: everything must be written
            assert library.sl_fill(*rest, values) is None

        @staticmethod
        def cuda_sparse_linear_half_product(*arguments):
            *rest, y, _ = arguments
            rows, _, batch, _ = rest[-4:]
            ctypes.memset(y, 0xFF, 2 * rows * batch)
            assert library.sl_product(*rest, y) is None

    monkeypatch.setattr(sparse_linear._ext, "extension", lambda: Extension)
    monkeypatch.setattr(sparse_linear.bitmask, "stream_of", lambda tensor: 0)


def random_mask(rows, columns, density, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def check(keep, batch, dtype, *, seed=0):
    """Forward with and without a bias, and dX, of a weight that is NaN where it is dead."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = keep.shape
    shapes = [(batch, columns), (rows, columns), (rows,), (batch, rows)]
    x, weight, bias, grad = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    weight = torch.where(keep, weight, torch.nan)
    words, dense = reference.bitmask_pack(keep), torch.where(keep, weight, 0).double()
    for got, left, right, add in (
        (sparse_linear.forward(x, weight, words, bias), x.double(), dense.t(), bias.double()),
        (sparse_linear.forward(x, weight, words, None), x.double(), dense.t(), torch.zeros(rows).double()),
        (sparse_linear.backward_input(grad, weight, words), grad.double(), dense, torch.zeros(columns).double()),
    ):
        want = left @ right + add
        # float32 sums of products that are exact in float32, then one rounding to the dtype.
        size = left.abs() @ right.abs() + add.abs()
        bound = torch.finfo(dtype).eps / 2 * want.abs() + 2**-22 * math.sqrt(left.shape[1] + 1) * size + 2**-24
        assert got.is_contiguous() and got.dtype is dtype and got.shape == want.shape
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"{error.max()} over {bound[error > bound]}"


# (batch, out, in): strips of 16 rows, 64 rows a block here, groups of 16 columns, chunks of 192, tiles of 128 of the batch.
@pytest.mark.parametrize("density", [0.0, 0.02, 0.05, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (8, 33, 70), (65, 16, 192), (128, 70, 193), (3, 100, 401), (0, 4, 9), (4, 0, 9), (4, 9, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forward_and_dx(host, dtype, shape, density):
    check(random_mask(*shape[1:], density), shape[0], dtype)


@pytest.mark.parametrize("batch", [1, 7, 8, 65, 128, 137])
def test_ragged_batches(host, batch):
    check(random_mask(50, 210, 0.05), batch, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_at_the_extremes(host, dtype):
    """Nothing, everything, one weight at either end of a row and on either side of a chunk; a strip of nothing."""
    keep = torch.zeros(70, 400, dtype=torch.bool)
    keep[1] = True
    for row, column in {2: 0, 3: 399, 4: 191, 5: 192, 31: 383, 32: 384, 69: 390}.items():
        keep[row, column] = True
    check(keep, 9, dtype)
    keep[:] = False
    keep[69, 399] = True
    check(keep, 9, dtype)


def test_rows_that_share_columns_share_strips(host):
    """Rows of 10 kinds, shuffled: in order of kind they need a fraction of the groups, and results go where they belong."""
    kinds = random_mask(10, 400, 0.05)
    keep = kinds[torch.randperm(160, generator=torch.Generator().manual_seed(1)) % 10]
    words = reference.bitmask_pack(keep)
    index = sparse_linear.half_index(words, (160, 400), False)
    plain = sparse_linear._groups(keep, None)
    assert len(index.strips) < 0.4 * len(plain.strips)
    assert sorted(index.order.tolist()) == list(range(160))
    check(keep, 20, torch.bfloat16)


def test_what_a_group_holds():
    """Every survivor is in a group of its strip and chunk, no column twice; what 8 lanes read at once is mostly in different
    banks, and never in fewer than a random order's."""
    keep = random_mask(100, 500, 0.05)
    index = sparse_linear.half_index(reference.bitmask_pack(keep), (100, 500), False)
    chunks, starts, seen = 3, index.starts.tolist(), torch.zeros(112, 500, dtype=torch.bool)
    turns = 0
    for strip in range(7):
        for chunk in range(chunks):
            first, last = starts[strip * chunks + chunk : strip * chunks + chunk + 2]
            columns = index.columns[first:last].flatten()
            assert (index.strips[first:last] == strip).all()
            live = columns[columns >= 0].long()
            assert len(live.unique()) == len(live) > len(columns) - 16 and (live // 192 == chunk).all()
            seen[16 * strip : 16 * strip + 16, live] = True
            turns += sum(int(torch.bincount(eight % 8).max()) for eight in columns.clamp(min=192 * chunk).split(8))
    assert seen[:100][keep].all()
    assert turns < 1.8 * 2 * len(index.strips)  # a random order takes 2.6 a load


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_spreads_no_further_than_in_a_dense_product(host, value):
    keep = random_mask(40, 210, 0.05)
    x, weight = torch.ones(9, 210).bfloat16(), torch.ones(40, 210).bfloat16()
    x[4, 7] = value
    y = sparse_linear.forward(x, weight, reference.bitmask_pack(keep), None)
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    assert not y[4, keep[:, 7]].isfinite().any()


@pytest.mark.parametrize("premasked", [False, True])
def test_masked_linear_runs_on_it(host, monkeypatch, premasked):
    """As on a CUDA device where it was measured faster: strided x and weight, more dimensions, all gradients."""
    monkeypatch.setattr(sparse_linear, "takes", lambda t, density: True)
    monkeypatch.setattr(dispatch, "lookup", lambda name, key: "cuda")
    g = torch.Generator().manual_seed(0)
    keep = random_mask(50, 90, 0.05)
    x, weight, bias, grad = (torch.randn(s, generator=g).half() for s in ((12, 90), (50, 90), (50,), (12, 50)))
    words = reference.bitmask_pack(keep)
    weight = (weight * keep if premasked else weight).t().contiguous().t().requires_grad_()
    x = x.t().contiguous().t().view(3, 4, 90).requires_grad_()
    bias, grad = bias.requires_grad_(), grad.view(3, 4, 50)
    y = masked_linear.masked_linear(x, weight, words, bias, premasked=premasked)
    got = (y, *torch.autograd.grad(y, (x, weight, bias), grad))
    doubles = [t.detach().double() for t in (grad, x, weight)]
    want_y = reference.masked_linear(*doubles[1:], words, bias.detach().double())
    for a, b in zip(got, (want_y, *reference.masked_linear_backward(*doubles, words)), strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=2e-3, atol=5e-3)


def test_the_index_is_made_once_per_mask():
    words = reference.bitmask_pack(random_mask(20, 130, 0.05))
    first = sparse_linear.half_index(words, (20, 130), False)
    assert sparse_linear.half_index(words, (20, 130), False) is first
    assert sparse_linear.half_index(words, (20, 130), True) is not first
    words[:] = 0
    assert len(sparse_linear.half_index(words, (20, 130), False).strips) == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_where_it_is_a_candidate(monkeypatch, dtype):
    cuda = type("Cuda", (), {"is_cuda": True, "dtype": dtype, "device": torch.device("cuda", 0)})
    monkeypatch.setattr(sparse_linear._ext, "why_no_cuda", lambda device: "not built with nvcc")
    assert not sparse_linear.takes(cuda, 0.01)
    monkeypatch.setattr(sparse_linear._ext, "why_no_cuda", lambda device: None)
    taken = [sparse_linear.takes(cuda, dispatch.bucket_density(dispatch.density_bucket(d))) for d in (0.02, 0.05, 0.06)]
    assert taken == [True, True, False]
    assert not sparse_linear.takes(torch.ones(2, dtype=dtype), 0.01)


def test_bad_calls_are_refused(library):
    store = torch.zeros(64, dtype=torch.int16)
    p = store.data_ptr()
    for dtype, x, padded, message in ((0, p, 8, b"bfloat16 or float16"), (3, p, 12, b"multiple of 8"),
                                      (3, p, 0, b"batch or more"), (3, p + 2, 8, b"multiples of 16 bytes")):  # fmt: skip
        assert message in library.sl_product(dtype, p, p, p, p, 0, p, x, 0, 1, 1, 4, padded, p)


# ---- ThreadSanitizer: one host thread per CUDA thread ----


@pytest.fixture(scope="module")
def race_check():
    return harness.race_check("race_check_sparse_half.cpp", kernels="sparse_linear_half")


def test_no_races(race_check):
    status, output = race_check()
    assert status == 0, output


@pytest.mark.parametrize("site", list(harness.barriers("sparse_linear_half.cu", "tensor_core.cuh")))
def test_every_barrier_is_needed(race_check, site):
    harness.check_is_needed(race_check, site)
