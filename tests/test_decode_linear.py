"""ops/decode_linear.py: packing and unpacking, what is predicted, and the op where its kernels are not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparselottery import _ext
from sparselottery.ops import bitmask
from sparselottery.ops import decode_linear as op

HALVES = [torch.float16, torch.bfloat16]


def layer(rows, columns, density, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) < density
    return torch.randn(rows, columns, generator=g).to(dtype), mask


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 50),
    columns=st.integers(0, 700),
    density=st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(HALVES),
    format=st.sampled_from(list(op.FORMATS)),
    seed=st.integers(0, 1000),
)
def test_round_trip(rows, columns, density, dtype, format, seed):
    """Bit for bit, with any 16 bits as a value: NaNs, infinities, -0 and subnormals too."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) < density
    weight = torch.randint(-(2**15), 2**15, (rows, columns), generator=g).to(torch.int16).view(dtype)
    packed = op.pack(weight, bitmask.pack(mask), format)
    assert same_bits(op.unpack(packed), weight.masked_fill(~mask, 0))
    assert packed.values.dtype == dtype and packed.starts.dtype == torch.int32


@pytest.mark.parametrize("format", ["gap4", "gap8"])
def test_fillers_bridge_what_a_code_cannot_hold(format):
    reach = 16 if format == "gap4" else 256
    mask = torch.zeros(1, 5 * reach + 3, dtype=torch.bool)
    mask[0, [0, reach, 2 * reach + 1, 5 * reach + 2]] = True
    packed = op.pack(torch.full(mask.shape, 7.0).half(), bitmask.pack(mask), format)
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], -1) if format == "gap4" else packed.codes
    last = reach - 1  # a gap of `reach` still fits, the next longer one needs a filler, and so does 3 reach + 1 thrice
    assert codes.flatten().tolist() == [0, last, last, 0, last, last, last, 0]
    assert packed.values.flatten().tolist() == [7, 7, 0, 7, 0, 0, 0, 7]


def test_a_transposed_weight_and_wrong_arguments():
    weight, mask = layer(20, 30, 0.5)
    words = bitmask.pack(mask)
    packed = op.pack(weight.T.contiguous().T, words, "gap8")
    assert same_bits(op.unpack(packed), weight.masked_fill(~mask, 0))
    with pytest.raises(
        ValueError, match=r"format: expected one of gap4, gap8, tiles, slots, windows, bitmask, got 'gap2'"
    ):
        op.pack(weight, words, "gap2")
    with pytest.raises(TypeError, match=r"weight: expected float16 or bfloat16, got torch\.float32"):
        op.pack(weight.float(), words, "gap4")
    with pytest.raises(ValueError, match=r"weight: expected \[rows, columns\], got \[600\]"):
        op.pack(weight.flatten(), words, "gap4")
    with pytest.raises(ValueError, match=r"words: expected int32 \[20, 1\], got torch\.int32 \[1, 20\]"):
        op.pack(weight, words.T, "gap4")
    with pytest.raises(ValueError, match="weight: expected a dense tensor, got a meta tensor"):
        op.pack(weight.to("meta"), words, "gap4")
    with pytest.raises(ValueError, match=r"weight: expected a dense tensor, got torch\.sparse_coo"):
        op.pack(weight.to_sparse(), words, "gap4")
    for format in op.CODES:
        with pytest.raises(ValueError, match="words: expected 0 in the bits beyond column 30"):
            op.pack(weight.bfloat16(), words | 1 << 30, format)


@pytest.mark.parametrize("format", op.FORMATS)
@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.02])
def test_predicted_bytes(format, density):
    """Within 4 %: the gap after a row's last survivor, here up to a twentieth of all, needs no filler."""
    weight, mask = layer(512, 1024, density)
    packed = op.pack(weight, bitmask.pack(mask), format)
    assert packed.nbytes == pytest.approx(op.predicted_bytes(format, 512, 1024, density), rel=0.04)


def test_formats_worth_measuring():
    def first(density, batch):
        return next(iter(op.candidates(4096, 4096, density, batch)), None)

    assert [first(d, 1) for d in (0.5, 0.2, 0.1, 0.05, 0.02)] == ["gap4", "gap4", "gap8", "gap8", "gap8"]
    assert first(0.1, 64) == "tiles" and set(op.candidates(4096, 4096, 0.1, 16)) == set(op.FORMATS)
    assert first(1.0, 1) is None, "more bytes than the dense weight"
    assert op.candidates(4096, 4096, 0.1, 129) == op.candidates(4096, 4096, 0.1, 0) == []


@pytest.mark.parametrize("format", op.FORMATS)
def test_without_its_kernels_the_op_is_a_dense_layer(format):
    weight, mask = layer(24, 70, 0.3)
    packed, bias = op.pack(weight, bitmask.pack(mask), format), torch.randn(24).bfloat16()
    dense = weight.masked_fill(~mask, 0)
    for shape in ((70,), (3, 70), (2, 5, 70), (0, 70), (200, 70)):
        x = torch.randn(shape).bfloat16()
        assert torch.equal(op.decode_linear(x, packed, bias), F.linear(x, dense, bias))
    x = torch.randn(2, 70).bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(op.decode_linear(x, packed).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(2, 70), rtol=2e-2, atol=2e-2)


def test_wrong_inputs_are_named():
    weight, mask = layer(6, 9, 0.5)
    with pytest.raises(ValueError, match="format: expected one of gap4, gap8"):
        op.pack(weight, bitmask.pack(mask), ["gap4"])
    packed = op.pack(weight, bitmask.pack(mask), "gap4")
    x = torch.randn(2, 9).bfloat16()
    for arguments, kind, says in [
        ((x[:, :8],), ValueError, r"x: expected \[\*, 9\] for weight \[6, 9\], got \[2, 8\]"),
        ((x.float(),), TypeError, r"x: expected torch\.bfloat16 like the weight, got torch\.float32"),
        (([1.0],), TypeError, r"x: expected a tensor, got list"),
        ((x, x[0]), ValueError, r"bias: expected \[6\] for weight \[6, 9\], got \[9\]"),
        ((x, x[0, :6].float()), TypeError, r"bias: expected torch\.bfloat16 like the weight"),
        ((x.to("meta"),), ValueError, r"x: expected device cpu like the weight, got meta"),
    ]:
        with pytest.raises(kind, match=says):
            op.decode_linear(arguments[0], packed, *arguments[1:])


@pytest.mark.parametrize("format", op.FORMATS)
def test_as_a_torch_op(format):
    weight, mask = layer(24, 70, 0.3)
    packed = op.pack(weight, bitmask.pack(mask), format)
    x, bias = torch.randn(3, 70).bfloat16(), torch.randn(24).bfloat16()
    arguments = (x, packed.starts, packed.codes, packed.values, bias, op.FORMATS[format], 24, 70)
    torch.library.opcheck(torch.ops.sparselottery.decode_linear.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return op.decode_linear(x, packed, bias)

    with torch.no_grad():
        assert torch.equal(compiled(x), op.decode_linear(x, packed, bias))


def test_the_reason_for_a_dense_layer_is_told(monkeypatch):
    assert "need a CUDA device, the weight is on cpu" in op.why_dense(torch.device("cpu"), "gap4", 10)
    gpu = torch.device("cuda", 0)

    class Built:
        cuda_archs = "80;90a"
        cuda_decode_linear = None

    def reason(extension, capability, columns=10, format="gap4"):
        op._why_not.cache_clear()
        _ext.why_no_cuda.cache_clear()
        monkeypatch.setattr(_ext, "_C", extension)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(op, "_max_columns", lambda device: 1000)
        return op.why_dense(gpu, format, columns)

    class Without:
        cuda_archs = None

    with pytest.warns(RuntimeWarning, match="has no CUDA kernels"):
        assert "this build of sparselottery has no CUDA kernels" in reason(Without, (9, 0))
    with pytest.warns(RuntimeWarning, match="this GPU has 7.5"):
        assert "built for compute capability 8.0 on, this GPU has 7.5" in reason(Built, (7, 5))
    assert reason(Built, (9, 0)) is None and reason(Built, (8, 0)) is None
    assert "larger than shared memory (1000)" in reason(Built, (9, 0), 1001)
    assert reason(Built, (9, 0), 1001, "tiles") is None
    op._why_not.cache_clear()
    _ext.why_no_cuda.cache_clear()
