"""ops/decode_cpu.py: a CPU's packed formats against float64, every instruction set; DecodeLinear and compress with them."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparselottery as sl
from sparselottery import _ext
from sparselottery.nn import DecodeLinear
from sparselottery.ops import bitmask, decode_cpu, dispatch, huge_pages
from sparselottery.ops import decode_linear as op

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
MASKS = ("random", "none", "all", "one", "empty row", "empty column", "full row", "full block")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    library = _ext.extension()
    try:
        library.cpu_set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.cpu_set_isa("auto")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


def draw_mask(kind, rows, columns, density, g):
    mask = torch.rand(rows, columns, generator=g) < density
    if kind in ("none", "one"):
        mask[:] = False
    if kind == "all":
        mask[:] = True
    if mask.numel():
        row, column = rows // 2, columns // 2
        if kind == "one":
            mask[row, column] = True
        elif kind == "empty row":
            mask[row] = False
        elif kind == "empty column":
            mask[:, column] = False
        elif kind == "full row":  # most of it finds no slot
            mask[row] = True
        elif kind == "full block":
            mask[:, :64] = True
    return mask


def draw(rows, columns, density=0.3, dtype=torch.float32, kind="random", seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = draw_mask(kind, rows, columns, density, g)
    return torch.randn(rows, columns, generator=g).to(dtype), mask, torch.randn(rows, generator=g).to(dtype)


def raw(packed, x, bias):
    """The kernel's y, each element of which it must have written, and nothing beside it."""
    batch, guard = x.shape[0], 37
    y = torch.full((batch * packed.rows + 2 * guard,), torch.nan)
    _ext.extension().cpu_decode_cpu(
        decode_cpu.FORMATS[packed.format],
        packed.rows,
        packed.columns,
        _ext.DTYPE_CODES[packed.values.dtype],
        *(t.data_ptr() for t in (packed.starts, packed.codes, packed.values, x)),
        0 if bias is None else bias.data_ptr(),
        y[guard:].data_ptr(),
        batch,
    )
    assert y[:guard].isnan().all() and y[y.numel() - guard :].isnan().all()
    return y[guard : y.numel() - guard].view(batch, packed.rows)


def agrees(y, x, weight, mask, bias):
    """Within the rounding of a sum in float32, in the worst case one more per term."""
    dense = weight.double().masked_fill(~mask, 0)
    want, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    assert ((y.double() - want).abs() <= (weight.shape[1] + 2) * 2.0**-24 * size).all()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 700),
    density=st.sampled_from([0.003, 0.02, 0.1, 0.5, 0.9]),
    kind=st.sampled_from(MASKS),
    dtype=st.sampled_from(list(BITS)),
    format=st.sampled_from(list(decode_cpu.FORMATS)),
    seed=st.integers(0, 1000),
)
def test_round_trip(rows, columns, density, kind, dtype, format, seed):
    """Bit for bit, with any bits as a value: NaNs, infinities, -0 and subnormals too."""
    g = torch.Generator().manual_seed(seed)
    mask, bits = draw_mask(kind, rows, columns, density, g), BITS[dtype]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, (rows, columns), generator=g).to(bits).view(dtype)
    packed = op.pack(weight, bitmask.pack(mask), format)
    assert torch.equal(op.unpack(packed).view(bits), weight.masked_fill(~mask, 0).view(bits))
    assert packed.values.dtype == dtype and packed.starts.dtype == torch.int32


@settings(max_examples=100, deadline=None, suppress_health_check=["function_scoped_fixture"])
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    density=st.sampled_from([0.003, 0.02, 0.1, 0.5, 0.9]),
    batch=st.integers(1, 9),
    kind=st.sampled_from(MASKS),
    dtype=st.sampled_from(list(BITS)),
    format=st.sampled_from(list(decode_cpu.FORMATS)),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity_property(isa, rows, columns, density, batch, kind, dtype, format, has_bias, seed):
    weight, mask, bias = draw(rows, columns, density, dtype, kind, seed)
    packed = op.pack(weight, bitmask.pack(mask), format)
    x = torch.randn(batch * columns + 1, generator=torch.Generator().manual_seed(seed))[1:].view(batch, columns)
    bias = bias.float() if has_bias else None
    agrees(raw(packed, x, bias), x, weight, mask, bias)


@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_more_columns_than_16_bits_number(isa, format):
    weight, mask, bias = draw(3, 70_001, 0.05, kind="full row")
    packed = op.pack(weight, bitmask.pack(mask), format)
    x = torch.randn(2, 70_001)
    agrees(raw(packed, x, bias), x, weight, mask, bias)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_any_number_of_threads_gives_the_same_bits(isa, format, dtype):
    weight, mask, bias = draw(610, 1000, 0.5, dtype)
    packed = op.pack(weight, bitmask.pack(mask), format)
    x, threads, found = torch.randn(2, 1000), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(raw(packed, x, bias.float()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    agrees(found[0], x, weight, mask, bias.float())


@pytest.mark.parametrize("format", ["slots", "windows"])
def test_rows_of_a_kind_share_slots_and_the_rest_overflows(format):
    """A full row among sparse ones must not make slots for all of them."""
    mask = torch.rand(64, 640, generator=torch.Generator().manual_seed(0)) < 0.05
    mask[7] = True
    packed = op.pack(torch.randn(mask.shape), bitmask.pack(mask), format)
    steps, overflow = packed.starts[-1, :2].tolist()
    assert packed.starts[0, 2] == 7, "the fullest row comes first"
    assert overflow > 300 and 32 * steps < 2.5 * int(mask.sum())


def test_bytes_of_a_survivor():
    """What the formats are chosen for: at 10 % windows are nearly full, at 50 % a bit a weight is least."""
    for density, format, most in [
        (0.1, "slots", 8.5),
        (0.1, "windows", 6.2),
        (0.5, "windows", 5.4),
        (0.5, "bitmask", 4.3),
    ]:
        mask = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0)) < density
        packed = op.pack(torch.ones(mask.shape), bitmask.pack(mask), format)
        assert packed.nbytes < most * int(mask.sum())


def test_sizes_that_a_format_cannot_hold():
    slices = _ext.extension().cpu_decode_cpu_slices
    assert [slices(code, 33, 5) for code in (32, 33, 64)] == [2, 2, 5]
    with pytest.raises(ValueError, match=r"expected fewer than 2\^31 rows and 2\^27 columns, got \[2, 134217728\]"):
        slices(32, 2, 2**27)
    with pytest.raises(ValueError, match="unknown format 4"):
        slices(4, 2, 2)
    with pytest.raises(TypeError, match=r"weight: expected float32 or bfloat16, got torch\.float16"):
        op.pack(torch.zeros(2, 2).half(), bitmask.pack(torch.ones(2, 2, dtype=torch.bool)), "slots")


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_the_op_takes_what_a_linear_layer_takes(format, dtype):
    weight, mask, bias = draw(24, 70, 0.3, dtype)
    packed, dense = op.pack(weight, bitmask.pack(mask), format), weight.masked_fill(~mask, 0)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for shape in ((70,), (3, 70), (2, 5, 70), (0, 70), (200, 70)):
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(op.decode_linear(x, packed, bias), F.linear(x, dense, bias), **close)
    x = torch.randn(70, 6).to(dtype).t()
    torch.testing.assert_close(op.decode_linear(x, packed), F.linear(x, dense), **close)
    x = torch.randn(2, 70).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(op.decode_linear(x, packed).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(2, 70), **close)
    empty = op.pack(weight[:, :0], bitmask.pack(mask[:, :0]), format)
    assert torch.equal(op.decode_linear(x[:, :0].detach(), empty, bias), bias.expand(2, 24))
    with pytest.raises(ValueError, match=r"x: expected \[\*, 70\] for weight \[24, 70\], got \[2, 8\]"):
        op.decode_linear(x[:, :8], packed)


@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_as_a_torch_op(format):
    weight, mask, bias = draw(24, 70)
    packed, x = op.pack(weight, bitmask.pack(mask), format), torch.randn(3, 70)
    arguments = (x, packed.starts, packed.codes, packed.values, bias, op.CODES[format], 24, 70)
    torch.library.opcheck(torch.ops.sparselottery.decode_linear.default, arguments)


def test_where_the_kernels_are_not(monkeypatch):
    assert op.why_dense(torch.device("cpu"), "slots", 10) is None
    assert "run on a CPU, the weight is on cuda" in op.why_dense(torch.device("cuda", 0), "bitmask", 10)
    module, dense = layer("slots")
    x = torch.randn(2, 70)
    expected = F.linear(x, dense, module.bias)
    monkeypatch.setattr(_ext, "WHY_NOT", "no compiler")
    assert module.why_dense() == "the extension is missing: no compiler"
    assert torch.equal(module(x), expected)


def test_large_tensors_lie_in_huge_pages():
    large = torch.randn(300_000)
    there = huge_pages.settled(large)
    assert torch.equal(there, large) and there.data_ptr() % (2 << 20) == 0
    assert huge_pages.settled(there) is there
    small, meta = torch.randn(100), torch.empty(10**6, device="meta")
    assert huge_pages.settled(small) is small and huge_pages.settled(meta) is meta
    file = io.BytesIO()
    torch.save(there, file)
    assert len(file.getvalue()) < large.nbytes + 4096


# ---- the module ----


def layer(format="slots", rows=24, columns=70, density=0.3, dtype=torch.float32, seed=0):
    weight, mask, bias = draw(rows, columns, density, dtype, seed=seed)
    packed = op.pack(weight, bitmask.pack(mask), format)
    return DecodeLinear(packed, bias, density=float(mask.double().mean())), weight.masked_fill(~mask, 0)


@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_a_layer_is_saved_copied_traced_exported_and_transformed(format):
    module, dense = layer(format, 900, 1000)
    x = torch.randn(2, 1000)
    expected = module(x)
    torch.testing.assert_close(expected, F.linear(x, dense, module.bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(module(x.view(2, 1, 1000)), expected.view(2, 1, 900))
    assert torch.equal(module(x[0]), module(x[:1])[0])
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other, _ = layer("slots" if format == "bitmask" else "bitmask", 900, 1000, 0.6, seed=1)
    other.load_state_dict(module.state_dict())
    for again in (copy.deepcopy(module), torch.load(file, weights_only=False), other):
        assert torch.equal(again(x), expected) and again.format == format
        assert again.values.data_ptr() % (2 << 20) == 0
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "sparselottery::decode_linear" in str(traced.graph)
        assert torch.equal(traced(x), expected)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(module)(x[:, None])[:, 0], expected, rtol=1e-4, atol=1e-4)
        tangent = torch.func.jvp(module, (x,), (x,))[1]
    torch.testing.assert_close(tangent, F.linear(x, dense), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    (row,) = sl.explain(module).rows
    assert row.backend == f"cpu ({format})" and row.note == "packed for decoding"


@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_gradients_autocast_dtypes_and_plain_torch(format):
    module, dense = layer(format)
    x = torch.randn(2, 70, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(2, 70))
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    half, wide = copy.deepcopy(module).bfloat16(), copy.deepcopy(module).double()
    assert half.why_dense() is None and half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), module(x), rtol=3e-2, atol=6e-2)
    assert wide.why_dense() == "the decode kernels take float32 and bfloat16, the values are torch.float64"
    torch.testing.assert_close(wide(x.double()), F.linear(x.double(), dense.double(), module.bias.double()))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 like the weight"):
        module(x.double())
    plain = sl.densify(nn.Sequential(module))[0]
    assert (
        type(plain) is nn.Linear
        and torch.equal(plain.weight, dense)
        and list(plain.state_dict())
        == [
            "bias",
            "weight",
        ]
    )


def test_a_bias_that_was_converted_or_replaced_is_looked_at():
    """The values are buffers: what goes over the parameters alone leaves them as they are."""
    module, dense = layer()
    x, bias = torch.randn(2, 70), module.bias.detach().clone()
    module.bias.data = torch.stack([bias, bias], 1)[:, 0]
    torch.testing.assert_close(module(x), F.linear(x, dense, bias))
    module.bias = nn.Parameter(torch.complex(bias, -bias).conj().imag, requires_grad=False)
    torch.testing.assert_close(module(x), F.linear(x, dense, bias))
    module.bias = nn.Parameter(bias[:5].clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"bias: expected \[24\] for weight \[24, 70\], got \[5\]"):
        module(x)
    module.bias = nn.Parameter(bias.bfloat16(), requires_grad=False)
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32 like the weight, got torch\.bfloat16"):
        module(x)
    module.bias = nn.Parameter(bias.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="bias: expected device cpu like the weight, got meta"):
        module(x)


@pytest.mark.parametrize("format", decode_cpu.FORMATS)
def test_no_bias(monkeypatch, format):
    prefer(monkeypatch, format, "mixed")
    model, x = nn.Sequential(nn.Linear(128, 96, bias=False)), torch.randn(2, 128)
    sl.prune(model, density=0.2)
    small = sl.compress(model, x)
    assert isinstance(small[0], DecodeLinear) and small[0].bias is None and list(small.parameters()) == []
    again = DecodeLinear(small[0].packed, density=0.2)
    for found in (small(x), copy.deepcopy(small)(x), again(x)):
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_inputs_that_are_no_dense_tensor():
    module, _ = layer()
    x = torch.randn(2, 70)
    with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
        module(None)
    for other in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()):
        with pytest.raises(ValueError, match=r"x: expected a dense tensor, got layout torch\.\w+"):
            module(other)
    assert torch.equal(module(torch._efficientzerotensor(2, 70)), module(torch.zeros(2, 70)))


@pytest.mark.parametrize("missing", [["starts", "codes", "values"], ["_extra_state"], ["codes"]])
def test_a_part_of_a_packed_weight_is_not_loaded(missing):
    """Codes that are read as those of another format lead out of the buffers."""
    module, dense = layer("slots")
    other, _ = layer("bitmask", density=0.6, seed=1)
    state = {name: value for name, value in other.state_dict().items() if name not in missing}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="expected starts, codes, values, _extra_state together, got"):
            module.load_state_dict(state, strict=strict)
    module.load_state_dict({"bias": torch.ones(24)}, strict=False)
    x = torch.randn(2, 70)
    torch.testing.assert_close(module(x), F.linear(x, dense, torch.ones(24)))


def test_shared_memory_stays_shared():
    module, dense = layer("bitmask", 600, 1000)
    assert module.values.nbytes > 600_000 and not module.values.is_shared()
    module.share_memory()
    assert module.codes.is_shared() and module.values.is_shared() and module.bias.is_shared()
    x = torch.randn(2, 1000)
    torch.testing.assert_close(module(x), F.linear(x, dense, module.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", op.CODES)
def test_packing_under_another_default_device(format):
    weight, mask, _ = draw(24, 70, dtype=torch.bfloat16)
    words = bitmask.pack(mask)
    with torch.device("meta"):
        packed = op.pack(weight, words, format)
        assert torch.equal(op.unpack(packed), weight.masked_fill(~mask, 0))


# ---- compress ----


def prefer(monkeypatch, *winners):
    """What a stopwatch would say: the first of `winners` that is there is fastest, dense comes next."""
    calls = []

    def measure(candidates):
        for run in candidates.values():
            run()
        calls.append(set(candidates))
        best = next((name for name in winners if name in candidates), "dense")
        return {name: 0.1 if name == best else 0.5 if name == "dense" else 1.0 for name in candidates}

    monkeypatch.setattr(dispatch, "measure", measure)
    return calls


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("winner", [*decode_cpu.FORMATS, "masked", "dense"])
def test_compress_takes_the_fastest_form(monkeypatch, winner, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 90), nn.Tanh(), nn.Linear(90, 10)).to(dtype).eval()
    sl.prune(model, density=0.3, scope="layer")
    calls, x = prefer(monkeypatch, winner, "mixed"), torch.randn(2, 130).to(dtype)
    small = sl.compress(model, x)
    assert {"dense", "masked", *decode_cpu.FORMATS} in calls
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(small(x), model(x), rtol=8 * eps, atol=8 * eps)
    if winner in decode_cpu.FORMATS:
        assert all(type(small[i]) is DecodeLinear and small[i].format == winner for i in (0, 2))
        rows = sl.explain(small).rows
        assert all(row.backend == f"cpu ({winner})" for row in rows)
        assert rows[0].note.startswith(f"compress, in µs: {winner} 1e+05, ")
    else:
        assert not any(isinstance(m, DecodeLinear) for m in small.modules())
    calls.clear()
    sl.compress(model, torch.randn(9, 130).to(dtype))
    assert {"dense", "masked"} in calls
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "dense")
    calls.clear()
    sl.compress(model, x)
    assert {"dense", "masked"} in calls
