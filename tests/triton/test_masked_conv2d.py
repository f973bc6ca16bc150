"""kernels/masked_conv2d under Triton's interpreter: parity with float64 and exact zeros off the mask."""

import pytest
import torch

from sparselottery.kernels import masked_conv2d as kernels
from sparselottery.ops import masked_conv2d as op
from sparselottery.ops import reference

# batch, in, out, height, width, kernel, stride, padding, dilation, groups
CASES = {
    "3x3": (2, 40, 70, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": (1, 33, 5, 5, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "first layer": (1, 3, 8, 9, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stride above the kernel": (1, 5, 4, 9, 10, (2, 2), (3, 3), (1, 0), (1, 1), 1),
    "pairs": (1, 4, 6, 9, 12, (2, 4), (2, 1), (0, 3), (3, 2), 1),
    "groups": (2, 12, 9, 6, 5, (3, 3), (2, 1), (1, 1), (1, 1), 3),
    "depthwise": (1, 4, 4, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "two blocks of groups": (1, 140, 132, 3, 3, (1, 1), (1, 1), (0, 0), (1, 1), 2),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def sample(case, dtype=torch.float32, density=0.2):
    n, inputs, outputs, height, width, kernel, stride, padding, dilation, groups = CASES[case]
    g = torch.Generator().manual_seed(n + inputs + outputs + height)
    x = torch.randn(n, inputs, height, width, generator=g)
    w = torch.randn(outputs, inputs // groups, *kernel, generator=g)
    b = torch.randn(outputs, generator=g)
    keep = torch.rand(w.shape, generator=g) < density
    y = torch.nn.functional.conv2d(x, w, b, stride, padding, dilation, groups)
    grad = torch.randn(y.shape, generator=g)
    return [t.to(dtype) for t in (x, w, b, grad)], keep, (stride, padding, dilation, groups)


def assert_parity(x, w, b, grad, keep, arguments, premasked=False):
    words = reference.bitmask_pack(keep)
    want = reference.masked_conv2d(x.double(), w.double(), words, b.double(), *arguments)
    want_dx, want_dw, _ = reference.masked_conv2d_backward(grad.double(), x.double(), w.double(), words, *arguments)
    y = kernels.forward(x, w, words, b, *arguments, premasked=premasked)
    dx = kernels.backward_input(grad, w, words, x.shape, *arguments, premasked=premasked)
    dw = kernels.backward_weight(grad, x, words, w.shape, *arguments)
    for got, wanted in ((y, want), (dx, want_dx), (dw, want_dw)):
        assert got.dtype == x.dtype and got.shape == wanted.shape
        assert torch.isfinite(got).all()
        assert (got.double() - wanted).norm() <= TOLERANCE[x.dtype] * (1 + wanted.norm())
    assert (dw[~keep] == 0).all()
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch):
    """Kernels must write all of what torch.empty gives them."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", nan_filled)


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case):
    tensors, keep, arguments = sample(case)
    assert_parity(*tensors, keep, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["first layer", "groups"])
def test_half_precision(case, dtype):
    tensors, keep, arguments = sample(case, dtype)
    assert_parity(*tensors, keep, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "offset"])
def test_any_strides(layout):
    (x, w, b, grad), keep, arguments = sample("groups")
    change = {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": lambda t: torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape),
    }[layout]
    assert_parity(change(x), change(w), b, change(grad), keep, arguments)


def test_premasked_channels_last_weight_is_read_in_place():
    (x, w, b, grad), keep, arguments = sample("first layer")
    w = (w * keep).to(memory_format=torch.channels_last)
    assert kernels._pack(w, reference.bitmask_pack(keep), False) is w
    assert_parity(x, w, b, grad, keep, arguments, premasked=True)


@pytest.mark.parametrize("survivors", ["none", "all", "one", "no filter 2", "no input channel 1"])
def test_special_masks(survivors):
    (x, w, b, grad), keep, arguments = sample("pairs", density=0.5)
    keep = {
        "none": torch.zeros_like(keep),
        "all": torch.ones_like(keep),
        "one": torch.zeros_like(keep).index_put_([torch.tensor([i]) for i in (3, 2, 1, 0)], torch.tensor(True)),
        "no filter 2": keep.index_fill(0, torch.tensor(2), False),
        "no input channel 1": keep.index_fill(1, torch.tensor(1), False),
    }[survivors]
    assert_parity(x, w, b, grad, keep, arguments)


def test_dead_weights_are_never_read():
    (x, w, b, _), keep, arguments = sample("first layer")
    words = reference.bitmask_pack(keep)
    want = kernels.forward(x, w, words, b, *arguments)
    assert torch.equal(kernels.forward(x, torch.where(keep, w, float("nan")), words, b, *arguments), want)


def test_dead_tiles_are_not_visited():
    keep = torch.zeros(128, 128, 3, 3, dtype=torch.bool)
    keep[70, 100, 1, 2] = True  # second block of outputs, fourth block of 32 inputs, tap 5
    words = reference.bitmask_pack(keep)
    first, tiles = kernels._forward_lists(words, keep.shape, (1, 1), (1, 1), 1, 64, 32, 32)
    assert first.tolist() == [0, 0, 1] and tiles.tolist() == [[0, 1, 5, 3]]
    assert kernels._weight_tiles(words, keep.shape, 1, 64, 32, 32)[0].tolist() == [[0, 1, 5, 3]]
    first, tiles = kernels._input_lists(words, keep.shape, (2, 2), (1, 1), (1, 1), 1, 32, 64, 64)
    # Tap (1, 2) meets only input pixels of even row and odd column.
    assert tiles.tolist() == [[0, 0, 5, 1]] and first.tolist() == [0] * (4 + 4) + [1] * (1 + 8)


def test_live_units_share_a_tile():
    keep = torch.zeros(130, 150, 1, 2, dtype=torch.bool)
    keep[0, [0, 40, 50, 100, 149], 0, 1] = True  # units 0, 2, 3, 6, 9 of 16 channels
    keep[129, 20, 0, 0] = True
    words = reference.bitmask_pack(keep)
    first, tiles = kernels._forward_lists(words, keep.shape, (0, 0), (1, 1), 1, 64, 64, 16)
    assert first.tolist() == [0, 2, 2, 3]
    assert tiles.tolist() == [[0, 1, 1, 0, 2, 3, 6], [0, 1, 1, 9, 10, 10, 10], [0, 0, 0, 1, 10, 10, 10]]
    (tiles,) = kernels._weight_tiles(words, keep.shape, 1, 64, 64, 16)
    assert tiles.tolist() == [[0, 0, 1, 0, 2, 3, 6], [0, 0, 1, 9, 10, 10, 10], [0, 2, 0, 1, 10, 10, 10]]


def blocks(shape, side, density):
    """bool of a weight's shape, in blocks of `side` outputs by `side` inputs for each tap."""
    g = torch.Generator().manual_seed(side)
    live = torch.rand(-(-shape[0] // side), -(-shape[1] // side), *shape[2:], generator=g) < density
    return live.repeat_interleave(side, 0).repeat_interleave(side, 1)[: shape[0], : shape[1]].contiguous()


@pytest.mark.parametrize("side, groups", [(16, 1), (32, 1), (64, 1), (128, 1), (16, 2)])
def test_masks_of_blocks(side, groups):
    g = torch.Generator().manual_seed(side)
    x, w, b = (
        torch.randn(s, generator=g) for s in ((1, 150 * groups, 4, 3), (140 * groups, 150, 2, 1), (140 * groups,))
    )
    keep = blocks(w.shape, side, 0.3)
    arguments = ((1, 1), (1, 0), (1, 1), groups)
    grad = torch.randn(torch.nn.functional.conv2d(x, w, b, *arguments).shape, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        assert_parity(*(t.to(dtype) for t in (x, w, b, grad)), keep, arguments)


@pytest.mark.parametrize(
    "side, size", [(16, (64, 64, 16)), (32, (64, 64, 32)), (64, (64, 64, 64)), (128, (128, 64, 64))]
)
def test_tiles_suit_the_mask(side, size):
    shape = (512, 512, 3, 3)
    words, sizes = reference.bitmask_pack(blocks(shape, side, 0.1)), kernels._sizes(512, 512, 64, True)
    chosen, _ = kernels._best(lambda *s: kernels._forward_lists(words, shape, (1, 1), (1, 1), 1, *s), sizes)
    assert chosen == size
    assert kernels._sizes(20, 512, 64, True) == [(32, 64, 64)] and kernels._sizes(512, 40, 64, True) == [
        (64, 64, 64),
        (128, 64, 64),
    ]


def test_empty_batch():
    (x, w, b, grad), keep, arguments = sample("first layer")
    assert_parity(x[:0], w, b, grad[:0], keep, arguments)


def test_lists_of_tiles_are_kept_from_call_to_call():
    (x, w, b, grad), keep, arguments = sample("first layer")
    words, plans = reference.bitmask_pack(keep), {}
    first = kernels.forward(x, w, words, b, *arguments, plans=plans)
    kernels.backward_input(grad, w, words, x.shape, *arguments, plans=plans)
    kernels.backward_weight(grad, x, words, w.shape, *arguments, plans=plans)
    assert len(plans) == 3
    before = {key: id(value) for key, value in plans.items()}
    assert torch.equal(kernels.forward(x, w, words, b, *arguments, plans=plans), first)
    assert {key: id(value) for key, value in plans.items()} == before


def test_the_op_calls_the_kernels_with_what_they_expect():
    (x, w, _, grad), keep, arguments = sample("groups")
    words = reference.bitmask_pack(keep)
    want = reference.masked_conv2d_backward(grad, x, w, words, *arguments)
    assert op._triton() is kernels
    for mask in ((True, True, True), (False, True, False)):
        got = op._triton_backward(kernels, grad, x, w, words, *arguments, False, mask)
        assert [g is not None for g in got] == list(mask)
        for g, wanted in zip(got, want, strict=True):
            if g is not None:
                torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-4)


def test_float64_is_refused():
    (x, w, b, _), keep, arguments = sample("first layer", torch.float64)
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16"):
        kernels.forward(x, w, reference.bitmask_pack(keep), b, *arguments)
