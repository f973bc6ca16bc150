"""Masks of blocks and 2:4 masks on a GPU: what the small cases of test_parity.py do not reach."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparselottery as sl
from sparselottery.nn import semi_structured
from sparselottery.ops import dispatch, reference
from sparselottery.ops.block_linear import block_linear
from sparselottery.ops.masked_conv2d import masked_conv2d

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def triton(monkeypatch):
    """The kernels, whatever would be faster."""
    monkeypatch.setenv("SPARSELOTTERY_BACKEND", "triton")


def block_mask(shape, side, density=0.3):
    """bool of a weight's shape, in blocks of `side` outputs by `side` inputs (for each tap), cut off at the edges."""
    g = torch.Generator().manual_seed(side)
    live = torch.rand(-(-shape[0] // side), -(-shape[1] // side), *shape[2:], generator=g) < density
    live[-1] = False  # a row of blocks without survivors
    dense = live.repeat_interleave(side, 0).repeat_interleave(side, 1)[: shape[0], : shape[1]]
    return dense.contiguous().to(DEVICE)


def normal(*shape, seed, dtype):
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def assert_near(got, want, dtype):
    assert got.shape == want.shape and got.dtype == dtype
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * (1e-30 + want.norm())


def assert_linear_parity(x, weight, bias, keep, block):
    """y and all gradients against float64."""
    words = reference.bitmask_pack(keep)
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = block_linear(inputs[0], inputs[1], words, inputs[2], block=block, premasked=True)
    grad = normal(*y.shape, seed=9, dtype=x.dtype)
    dx, dw, db = torch.autograd.grad(y, inputs, grad)
    x64, w64, grad64 = x.double(), weight.double(), grad.double()
    assert_near(y, x64 @ w64.T + bias.double(), x.dtype)
    assert_near(dx, grad64 @ w64, x.dtype)
    assert_near(dw, (grad64.T @ x64) * keep, x.dtype)
    assert_near(db, grad64.sum(0), x.dtype)
    assert (dw[~keep] == 0).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [1, 17, 50, 100, 300])
def test_blocks(triton, dtype, side, batch):
    outputs, inputs = 330, 410
    keep = block_mask((outputs, inputs), side)
    weight = normal(outputs, inputs, seed=1, dtype=dtype) * keep
    x, bias = normal(batch, inputs, seed=2, dtype=dtype), normal(outputs, seed=3, dtype=dtype)
    assert_linear_parity(x, weight, bias, keep, (side, side))


@pytest.mark.parametrize("side", [16, 64, 128])
def test_whole_tiles(triton, side):
    """Sizes that the compiler may take to be multiples of 16."""
    keep = block_mask((512, 768), side)
    weight = normal(512, 768, seed=1, dtype=torch.bfloat16) * keep
    x, bias = normal(512, 768, seed=2, dtype=torch.bfloat16), normal(512, seed=3, dtype=torch.bfloat16)
    assert_linear_parity(x, weight, bias, keep, (side, side))


@pytest.mark.parametrize("layout", ["misaligned", "transposed"])
def test_any_layout(triton, layout):
    keep = block_mask((256, 192), 32)

    def change(t):
        if layout == "transposed" and t.ndim == 2:
            return t.t().contiguous().t()
        return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)

    weight = normal(256, 192, seed=1, dtype=torch.bfloat16) * keep
    x, bias = normal(100, 192, seed=2, dtype=torch.bfloat16), normal(256, seed=3, dtype=torch.bfloat16)
    assert_linear_parity(change(x), change(weight), change(bias), keep, (32, 32))


@pytest.mark.parametrize("alive", [False, True])
def test_all_dead_and_all_live(triton, alive):
    keep = torch.full((256, 192), alive, device=DEVICE)
    weight = normal(256, 192, seed=1, dtype=torch.bfloat16) * keep
    x, bias = normal(100, 192, seed=2, dtype=torch.bfloat16), normal(256, seed=3, dtype=torch.bfloat16)
    for side in (16, 64, 128):
        assert_linear_parity(x, weight, bias, keep, (side, side))


def test_more_than_31_bits_of_elements(triton):
    rows, inputs, outputs = 2**31 // 4096 + 300, 4096, 64
    needed = 3 * rows * inputs * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    keep = block_mask((outputs, inputs), 64, 0.2)
    keep[:, -64:] = keep[:, :64] = True
    weight = normal(outputs, inputs, seed=1, dtype=torch.bfloat16) * keep
    x = torch.zeros(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
    x[-300:] = normal(300, inputs, seed=2, dtype=torch.bfloat16)
    x.requires_grad_()
    y = block_linear(x, weight, reference.bitmask_pack(keep), block=(64, 64), premasked=True)
    assert_near(y[-300:], x[-300:].detach().double() @ weight.double().T, torch.bfloat16)
    grad = torch.zeros_like(y)
    grad[-300:] = normal(300, outputs, seed=3, dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert_near(dx[-300:], grad[-300:].double() @ weight.double(), torch.bfloat16)
    assert not dx[:300].any()


def test_a_graph_of_a_layer_replays_bit_for_bit(triton):
    layer = sl.MaskedLinear(512, 512, mask=block_mask((512, 512), 64), device=DEVICE, dtype=torch.bfloat16)
    x = normal(256, 512, seed=1, dtype=torch.bfloat16).requires_grad_()
    grad = normal(256, 512, seed=2, dtype=torch.bfloat16)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)

    want = [t.clone() for t in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for _ in range(3):
        for t in outputs:
            t.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, want, strict=True))


def test_a_layer_measures_blocks_and_dense_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELOTTERY_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSELOTTERY_BACKEND", raising=False)
    dispatch.clear()
    layer = sl.MaskedLinear(1024, 1024, mask=block_mask((1024, 1024), 64, 0.1), device=DEVICE, dtype=torch.bfloat16)
    x = normal(2048, 1024, seed=1, dtype=torch.bfloat16)
    assert_near(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()), torch.bfloat16)
    row = sl.explain(layer).rows[0]
    assert set(row.measurements[0]["us"]) == {"dense", "triton"} and row.measurements[0]["op"] == "block_linear"
    dispatch.clear()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_convolutions_with_blocks(triton, dtype, side):
    shape = (270, 290, 3, 3)
    keep = block_mask(shape, side)
    weight = (normal(*shape, seed=1, dtype=dtype) * keep).to(memory_format=torch.channels_last)
    x = normal(2, 290, 9, 7, seed=2, dtype=dtype).to(memory_format=torch.channels_last)
    bias, words = normal(270, seed=3, dtype=dtype), reference.bitmask_pack(keep)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(x, weight, words, bias, 2, 1, premasked=True)
    grad = normal(*y.shape, seed=4, dtype=dtype)
    got = y, *torch.autograd.grad(y, inputs, grad)
    arguments = (2, 2), (1, 1), (1, 1), 1
    x64, w64, b64, grad64 = (t.detach().double() for t in (x, weight, bias, grad))
    want = (
        reference.masked_conv2d(x64, w64, words, b64, *arguments),
        *reference.masked_conv2d_backward(grad64, x64, w64, words, *arguments),
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_near(ours, theirs, dtype)
    assert (got[2][~keep] == 0).all()


# ---- 2:4 ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", ["2:4", "1:4"])
def test_semi_structured_layers(monkeypatch, dtype, structure):
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).to(DEVICE, dtype)
    sl.prune(model, structure=structure)
    x = normal(33, 256, seed=1, dtype=dtype)
    monkeypatch.setattr(dispatch, "measure", lambda c: {n: 0.5 if n in ("2:4", "mixed") else 1.0 for n in c})
    small = sl.compress(model, x)
    assert all(isinstance(small[i], semi_structured.SemiStructuredLinear) for i in (0, 2)), str(sl.explain(small))
    want = copy.deepcopy(sl.densify(copy.deepcopy(model))).double()(x.double())
    with torch.no_grad():
        assert_near(small(x), want, dtype)
        assert torch.equal(small[0].dense_weight(), model[0].weight)
        twin = copy.deepcopy(small)
        assert torch.equal(twin(x), small(x))
        sl.densify(model).load_state_dict(small.state_dict())
        assert_near(model(x), want, dtype)
        assert type(twin.float()[0]) is nn.Linear


def test_shapes_and_dtypes_without_the_form_say_why():
    for layer, reason in [
        (nn.Linear(64, 64, device=DEVICE), "needs float16 or bfloat16, got float32"),
        (nn.Linear(64, 40, device=DEVICE, dtype=torch.float16), "needs outputs in multiples of 32 and inputs of 64"),
    ]:
        model = nn.Sequential(layer)
        sl.prune(model, structure="2:4")
        assert reason in sl.explain(model).rows[0].note
        assert type(sl.compress(model, torch.zeros(4, 64, device=DEVICE, dtype=layer.weight.dtype))[0]) is not (
            semi_structured.SemiStructuredLinear
        )
