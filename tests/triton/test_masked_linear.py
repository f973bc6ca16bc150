"""masked_linear's Triton kernels in the interpreter, against float64."""

import math

import pytest
import torch

from sparselottery.kernels import masked_linear
from sparselottery.ops import reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# rows, in, out: smaller than a tile, several tiles with ragged edges, whole tiles, one of everything
SHAPES = [(5, 7, 3), (150, 101, 150), (33, 270, 70), (128, 128, 128), (1, 1, 1)]


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    """A kernel must write all of what it was given."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def sample(rows, inputs, outputs, dtype=torch.float32, density=0.2, holes=True):
    g = torch.Generator().manual_seed(rows * 10007 + inputs * 101 + outputs)
    x, w, b, dy = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
        for s in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    keep = torch.rand(outputs, inputs, generator=g) < density
    if holes:  # whole tiles without survivors, and a whole block of outputs
        keep[:128, 64:] = False
        keep[128:] = False
    return x, w, b, dy, keep, reference.bitmask_pack(keep)


def assert_near(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * (1e-30 + want.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("holes", [True, False])
def test_forward_and_gradients_match_float64(shape, dtype, holes):
    x, w, b, dy, keep, words = sample(*shape, dtype, holes=holes)
    wm = w.double() * keep
    assert_near(masked_linear.forward(x, w, words, b), x.double() @ wm.T + b.double(), dtype)
    assert_near(masked_linear.backward_input(dy, w, words), dy.double() @ wm, dtype)
    dw = masked_linear.backward_weight(dy, x, words)
    assert_near(dw, (dy.double().T @ x.double()) * keep, dtype)
    assert (dw[~keep] == 0).all()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(density):
    x, w, b, dy, keep, words = sample(20, 70, 40, density=density, holes=False)
    wm = w.double() * keep
    assert_near(masked_linear.forward(x, w, words), x.double() @ wm.T, torch.float32)
    assert_near(masked_linear.forward(x, w, words, b), x.double() @ wm.T + b.double(), torch.float32)
    assert_near(masked_linear.backward_input(dy, w, words), dy.double() @ wm, torch.float32)
    assert_near(masked_linear.backward_weight(dy, x, words), (dy.double().T @ x.double()) * keep, torch.float32)


def test_dead_weights_may_hold_anything():
    x, w, b, dy, keep, words = sample(20, 70, 40)
    want = masked_linear.forward(x, w, words, b), masked_linear.backward_input(dy, w, words)
    w = torch.where(keep, w, math.nan)
    assert torch.equal(masked_linear.forward(x, w, words, b), want[0])
    assert torch.equal(masked_linear.backward_input(dy, w, words), want[1])


def test_any_strides_and_leading_dimensions():
    x, w, b, dy, _, words = sample(24, 70, 40)
    want = masked_linear.forward(x, w, words, b)
    dx, dw = masked_linear.backward_input(dy, w, words), masked_linear.backward_weight(dy, x, words)
    x, w, dy = (torch.stack([t.t(), torch.full_like(t.t(), math.nan)], 2)[:, :, 0].t() for t in (x, w, dy))
    assert x.stride() == (2, 48) and w.stride() == (2, 80)
    assert torch.equal(masked_linear.forward(x, w, words, b), want)
    assert torch.equal(masked_linear.backward_input(dy, w, words), dx)
    assert torch.equal(masked_linear.backward_weight(dy, x, words), dw)
    x3, dy3 = x.reshape(2, 3, 4, 70).transpose(0, 1), dy.reshape(2, 3, 4, 40).transpose(0, 1)
    assert torch.equal(masked_linear.forward(x3, w, words, b), want.view(2, 3, 4, 40).transpose(0, 1))
    torch.testing.assert_close(masked_linear.backward_weight(dy3, x3, words), dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 7, 5), (4, 0, 5), (4, 7, 0)])
def test_empty_sizes(rows, inputs, outputs):
    x, w, b, dy, _, words = sample(rows, inputs, outputs, holes=False)
    assert torch.equal(masked_linear.forward(x, w, words, b), b.expand(rows, outputs) if not inputs else x @ w.T + b)
    assert torch.equal(masked_linear.backward_input(dy, w, words), torch.zeros(rows, inputs))
    assert torch.equal(masked_linear.backward_weight(dy, x, words), torch.zeros(outputs, inputs))


def test_a_mask_changed_in_place_is_noticed():
    """The lists of live tiles are kept between calls."""
    x, w, _, _, keep, words = sample(20, 70, 40)
    masked_linear.forward(x, w, words)
    words.copy_(reference.bitmask_pack(~keep))
    assert_near(masked_linear.forward(x, w, words), x.double() @ (w.double() * ~keep).T, torch.float32)


def test_dead_tiles_are_listed_last_and_not_counted():
    keep = torch.zeros(130, 300, dtype=torch.bool)
    keep[5, 299] = keep[129, 64] = keep[129, 0] = True
    words = reference.bitmask_pack(keep)
    counts, lists = masked_linear._find_live_blocks(words, 128, 64, False)
    assert counts.tolist() == [1, 2] and lists.shape == (2, 5)
    assert lists[0, 0] == 4 and lists[1, :2].tolist() == [0, 1]
    counts, lists = masked_linear._find_live_blocks(words, 128, 64, True)
    assert counts.tolist() == [1, 1, 0, 0, 1] and lists[:, 0].tolist()[:2] == [1, 1] and lists[4, 0] == 0


def test_other_dtypes_are_refused():
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16 for Triton"):
        masked_linear.forward(x, torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 1, dtype=torch.int32))
