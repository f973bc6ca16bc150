"""decode_linear on a GPU: against float64, dirty scratch, other streams, CUDA graphs, and what compress makes of it."""

import math

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery import _ext
from sparselottery.nn import DecodeLinear
from sparselottery.ops import bitmask, dispatch
from sparselottery.ops import decode_linear as op

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not hasattr(_ext._C, "cuda_decode_linear"), reason="needs an extension built with nvcc for this GPU"
    ),
]

HALVES = [torch.float16, torch.bfloat16]
STREAM_BUSY = 50_000_000  # cycles


def draw(rows, columns, density, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g, device="cuda") < density
    return torch.randn(rows, columns, generator=g, device="cuda").to(dtype), mask


def agrees(y, x, weight, mask, bias=None):
    """Within the rounding of float32 sums and of the result; see tests/test_host_cuda_decode.py."""
    dense = weight.double().masked_fill(~mask, 0)
    want, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    bound = torch.finfo(x.dtype).eps / 2 * want.abs() + 2**-22 * math.sqrt(x.shape[-1] + 1) * size + 2**-24
    error = (y.double() - want).abs()
    assert y.dtype == x.dtype and (error <= bound).all(), f"{(error / bound).max()} times the bound"


@pytest.mark.parametrize("format", op.FORMATS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 1000), (4096, 4096), (1000, 14336), (11008, 520)], ids=str)
def test_against_float64(shape, dtype, format):
    for density in (0.0, 0.02, 0.1, 0.5, 1.0):
        weight, mask = draw(*shape, density, dtype)
        weight[~mask] = math.nan  # must not be read
        packed = op.pack(weight, bitmask.pack(mask), format)
        assert torch.equal(op.unpack(packed), weight.masked_fill(~mask, 0))
        for batch in (1, 3, 8, 17, 64, 128):
            bias = torch.randn(shape[0], device="cuda").to(dtype) if batch != 3 else None
            store = torch.randn(batch * shape[1] + 1, device="cuda").to(dtype)
            x = store[batch % 2 :][: batch * shape[1]].view(batch, shape[1])  # odd batches: misaligned
            y = op.decode_linear(x, packed, bias)
            agrees(y, x, weight, mask, bias)
            assert torch.equal(y, op.decode_linear(x, packed, bias)), "two runs differ"


@pytest.mark.parametrize("format", op.FORMATS)
def test_strided_inputs_and_inputs_that_are_not_finite(format):
    weight, mask = draw(300, 200, 0.2, torch.bfloat16)
    packed = op.pack(weight, bitmask.pack(mask), format)
    x = torch.randn(200, 6, device="cuda").bfloat16().T
    agrees(op.decode_linear(x, packed), x, weight, mask)
    x = x.contiguous()
    x[2, 7] = math.inf
    y = op.decode_linear(x, packed)
    kept = mask[:, 7]
    assert torch.equal(y[2, kept], (math.inf * weight[kept, 7].float()).bfloat16()) and y[:2].isfinite().all()


@pytest.mark.parametrize("format", op.FORMATS)
def test_dirty_scratch_and_output(format):
    weight, mask = draw(64, 4096, 0.1, torch.float16)  # few rows: tiles split the columns
    packed = op.pack(weight, bitmask.pack(mask), format)
    x = torch.randn(16, 4096, device="cuda").half()
    parts = (packed.starts, packed.codes, packed.values)
    arguments = (op.FORMATS[format], 64, 4096, packed.values.shape[0], *(t.data_ptr() for t in parts))
    size = _ext._C.cuda_decode_linear_scratch(arguments, 16)
    assert format != "tiles" or size > 0
    for garbage in (0, 0x7E, 0xFF):  # 0xff..: NaN
        scratch = torch.full((size + 4096,), garbage, dtype=torch.uint8, device="cuda")
        y = torch.full((16, 64), math.nan, dtype=torch.float16, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        code = _ext.DTYPE_CODES[torch.float16]
        _ext._C.cuda_decode_linear(arguments, code, x.data_ptr(), 0, y.data_ptr(), 16, scratch.data_ptr(), stream)
        agrees(y, x, weight, mask)
        assert (scratch[-4096:] == garbage).all()


@pytest.mark.parametrize("format", op.FORMATS)
def test_on_another_stream_and_in_a_graph(format):
    weight, mask = draw(500, 1024, 0.1, torch.bfloat16)
    packed = op.pack(weight, bitmask.pack(mask), format)
    x, fresh = (torch.full((9, 1024), v, device="cuda").bfloat16() for v in (math.nan, 1.0))
    fresh.copy_(torch.randn(9, 1024, device="cuda"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(STREAM_BUSY)
        x.copy_(fresh)
        agrees(op.decode_linear(x, packed), x, weight, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.decode_linear(x, packed)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        assert torch.equal(y, op.decode_linear(x, packed))
        agrees(y, x, weight, mask)


@pytest.mark.parametrize("winner", op.FORMATS)
def test_compressed_model(monkeypatch, tmp_path, winner):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64)).cuda().bfloat16()
    sl.prune(model, density=0.1)

    def measure(candidates):
        for run in candidates.values():
            run()
        return {name: 0.5 if name in (winner, "mixed") else 1.0 for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measure)
    x = torch.randn(16, 512, device="cuda").bfloat16()
    small = sl.compress(model, x)
    assert isinstance(small[0], DecodeLinear) and small[0].format == winner
    assert sl.explain(small).rows[0].backend == f"cuda ({winner})"
    for batch in (16, 1, 200):  # more than the kernels take: a transient dense weight
        torch.testing.assert_close(small(x[:1].expand(batch, -1)), model(x[:1].expand(batch, -1)), rtol=2e-2, atol=2e-2)
