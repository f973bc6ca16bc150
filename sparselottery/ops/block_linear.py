"""Linear layer with a mask of blocks as an op: y = x (W∘M)ᵀ + b, with dX = dY (W∘M), dW∘M and db.

What `masked_linear` computes, for masks whose survivors come in blocks of 16 and more: on a GPU only blocks with survivors
are loaded and multiplied, and of dW only they are computed. Source: block-sparse products as in Gale et al. 2022
(MegaBlocks, section 5), with the weight left dense in memory. Backends: reference; dense; triton
(kernels/block_linear.py). On a CPU it is `masked_linear`, with its choice of backends.

A weight off the mask counts as +0. Where x or dY holds inf or NaN, blocks without survivors do not pass it on.
"""

import os

import torch
from torch import Tensor

from . import bitmask, derived, dispatch, reference
from . import masked_linear as masked
from .library import LIBRARY, autocasts, check_tensors, is_plain, transformed

OP = "block_linear"
SIDES = (128, 64, 32, 16)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks once, too
_DENSEST = 0.75  # of the weight's area in strips of 64 rows: above, nothing is left to gain
_FRAYED = 1.1  # how much more area blocks of some size may cover than the smallest do, and still be the mask's blocks

LIBRARY.define(
    "block_linear(Tensor x, Tensor weight, Tensor words, Tensor? bias, int[2] block, bool premasked) -> Tensor"
)
LIBRARY.define(
    "block_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, int[2] block, bool premasked,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)


# ---- what is known of a mask ----


def find_block(words: Tensor, shape: tuple[int, int]) -> tuple[int, int] | None:
    """The blocks that a mask's survivors come in: the largest square of `SIDES` that covers few dead weights, else None.

    None too where so many blocks live that dense is as fast. Asked once per mask: it waits for the device.
    """
    kept = derived.of(words)
    if "block" not in kept:
        kept["block"] = _find_block(words, tuple(shape))
    return kept["block"]


def _find_block(words, shape):
    if 0 in shape or words.is_inference():
        return None
    sizes = [*((side, side) for side in SIDES), (64, 16), (16, 64)]
    *areas, along, across = torch.stack(
        [_area(derived.live_blocks(words, shape, *s), shape, *s) for s in sizes]
    ).tolist()
    if max(along, across) > _DENSEST * shape[0] * shape[1]:
        return None
    side = next(side for side, area in zip(SIDES, areas, strict=True) if area <= _FRAYED * areas[-1])
    return side, side


def _area(live, shape, rows, columns):
    """How many weights live blocks cover: a scalar tensor."""
    high = torch.full((live.shape[0], 1), rows, device=live.device)
    wide = torch.full((1, live.shape[1]), columns, device=live.device)
    high[-1:] -= -shape[0] % rows
    wide[:, -1:] -= -shape[1] % columns
    return (live * high * wide).sum()


def blocks_for(x: Tensor, words: Tensor, shape: tuple[int, int]) -> tuple[int, int] | None:
    """`find_block` where `x` is on a device that has a kernel for blocks; else None, and nothing is looked at."""
    return None if _goes_elsewhere(x) else find_block(words, shape)


def _bits(words):
    kept = derived.of(words)
    if "count" not in kept:
        kept["count"] = bitmask.count(words)
    return kept["count"]


def index(words: Tensor, shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, product: str) -> tuple:
    """What the kernel of a product ("y", "dX", "dW") reads of a mask; made once and kept with it."""
    kept = derived.of(words)
    key = ("block_linear", tuple(shape), tuple(block), dtype, product)
    if key not in kept:
        kept[key] = _make_index(words, tuple(shape), tuple(block), dtype, product)
    return kept[key]


def _make_index(words, shape, block, dtype, product):
    module = _triton()
    if product == "dX":
        strip, unit = tiles = module.tiling(block[::-1], dtype)
        return module.strips(derived.live_blocks(words, shape, unit, strip).t(), tiles, dtype)
    strip, unit = tiles = module.tiling(block, dtype)
    live = derived.live_blocks(words, shape, strip, unit)
    if product == "y":
        return module.strips(live, tiles, dtype)
    return module.chunks(live, tiles, dtype, int(_area(live, shape, strip, unit)) != _bits(words))


# ---- triton ----


def _triton():
    from ..kernels import block_linear

    return block_linear


def _triton_forward(x, weight, words, bias, block, premasked):
    module, shape = _triton(), tuple(weight.shape)
    rows = masked._rows(x)
    weight = masked._masked(weight, words, premasked)
    y = module.forward(rows, weight, index(words, shape, block, x.dtype, "y"), bias)
    return y.view(*x.shape[:-1], shape[0])


def _triton_backward(grad, x, weight, words, block, premasked, output_mask):
    module, shape, rows = _triton(), tuple(weight.shape), masked._rows(grad)
    dx = dw = None
    if output_mask[0]:
        weight = masked._masked(weight, words, premasked)
        dx = module.backward_input(rows, weight, index(words, shape, block, grad.dtype, "dX"))
        dx = dx.view(*grad.shape[:-1], shape[1])
    if output_mask[1]:
        dw = module.backward_weight(rows, masked._rows(x), words, index(words, shape, block, grad.dtype, "dW"))
    db = rows.sum(0) if output_mask[2] else None
    return tuple(masked._none(grad) if g is None else g for g in (dx, dw, db))


# ---- the choice ----


def _goes_elsewhere(t):
    """A CPU has no kernel for blocks; Triton's interpreter is for tests: it runs when it is asked for."""
    return not t.is_cuda and not (_INTERPRETED and dispatch.forced() == "triton")


def _key(direction, t, weight, words, block, *extra):
    """dispatch's key; None where only dense can win."""
    batch = t.numel() // t.shape[-1] if t.numel() else 0
    if batch == 0 or words.is_inference():
        return None
    density = _bits(words) / max(1, weight.numel())
    return (
        direction,
        tuple(weight.shape),
        str(t.dtype)[6:],
        dispatch.density_bucket(density),
        dispatch.batch_bucket(batch),
        torch.get_num_threads(),
        t.device.type,
        tuple(block),
        *extra,
    )


def _choose(direction, key, t, candidates, triton):
    """The candidate to run. Without a stopwatch that is dense: where blocks win is not yet known of any device."""
    name = dispatch.lookup(OP, key)
    if name is None or name not in candidates:
        from .. import kernels

        if kernels.AVAILABLE and t.dtype in _triton().DTYPES:
            candidates["triton"] = triton
        if name not in candidates:
            name = dispatch.choose(OP, key or (direction,), candidates, rule=lambda: "dense")
    return candidates[name]()


def runs_dense(x: Tensor, weight: Tensor, words: Tensor, block, wanted: tuple[bool, bool, bool] | None) -> bool | None:
    """Whether the layer does best to call the library directly, as in `masked_linear.runs_dense`."""
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.dtype is not weight.dtype or x.device != weight.device:
        return None  # the op says what is wrong
    keys = [_key("forward", x, weight, words, block, True)]
    if wanted is not None and (wanted[0] or wanted[1]):
        keys.append(_key("backward", x, weight, words, block, True, *wanted))
    return dispatch.goes_to_library(OP, [(key, lambda: "dense") for key in keys])


# ---- the ops ----


def _forward(x, weight, words, bias, block, premasked):
    if _goes_elsewhere(x):
        return masked._forward(x, weight, words, bias, premasked)
    candidates = {
        "dense": lambda: masked._dense(x, weight, words, bias, premasked),
        "reference": lambda: reference.masked_linear(x, weight, words, bias),
    }
    key = _key("forward", x, weight, words, block, premasked)
    return _choose(
        "forward", key, x, candidates, lambda: _triton_forward(x, weight, words, bias, tuple(block), premasked)
    )


def _backward(grad, x, weight, words, block, premasked, output_mask):
    if _goes_elsewhere(grad):
        return masked._backward(grad, x, weight, words, premasked, output_mask)
    candidates = {
        "dense": lambda: masked.dense_backward(grad, x, weight, words, premasked, output_mask),
        "reference": lambda: masked._reference_backward(grad, x, weight, words, output_mask),
    }
    key = None
    if output_mask[0] or output_mask[1]:
        # grad has the batch, dtype and device of x, but not its width.
        key = _key("backward", grad, weight, words, block, premasked, *output_mask)
    return _choose(
        "backward",
        key,
        grad,
        candidates,
        lambda: _triton_backward(grad, x, weight, words, tuple(block), premasked, output_mask),
    )


LIBRARY.impl("block_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("block_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::block_linear")
def _(x, weight, words, bias, block, premasked):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("sparselottery::block_linear_backward")
def _(grad, x, weight, words, block, premasked, output_mask):
    shapes = ((*grad.shape[:-1], weight.shape[1]), weight.shape, (weight.shape[0],))
    return tuple(grad.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, output_mask, strict=True))


class _BlockLinear(torch.autograd.Function):
    # forward takes ctx: with a setup_context apart, `apply` inspects forward's signature on each call.
    @staticmethod
    def forward(ctx, x, weight, words, bias, block, premasked):
        ctx.arguments = block, premasked
        # As F.linear does, keep x only where dW will be asked for.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), weight, words)
        op = _forward if is_plain(x, weight) else torch.ops.sparselottery.block_linear
        return op(x, weight, words, bias, block, premasked)

    @staticmethod
    def backward(ctx, grad):
        x, weight, words = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable torch
            gradients = masked.differentiable_backward(grad, x, weight, words, wanted)
        else:
            op = _backward if is_plain(grad, weight) else torch.ops.sparselottery.block_linear_backward
            gradients = op(grad, x, weight, words, *ctx.arguments, wanted)
        dx, dw, db = (g if asked else None for g, asked in zip(gradients, wanted, strict=True))
        return dx, dw, None, db, None, None


def block_linear(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None = None,
    *,
    block: tuple[int, int],
    premasked: bool = False,
) -> Tensor:
    """Apply a linear layer whose weight survives in blocks.

    Args:
        x: `[*, in_features]`, floating point; any strides.
        weight: `[out_features, in_features]`, the dtype and device of `x` (under autocast: any that F.linear takes).
        words: int32 `[out_features, ceil(in_features / 32)]`; bit i of word w keeps column 32 w + i. Any mask is computed
            right; one that is not made of such blocks gains less.
        bias: `[out_features]` or None.
        block: rows and columns of the mask's blocks, which start at multiples of them. Multiples of 16 gain most.
        premasked: the caller's promise that `weight` is 0 wherever the mask is; it spares a masked copy.

    Returns:
        `[*, out_features]`. The gradient of `weight` is zero wherever the mask is. Differentiable twice;
        in forward mode and under `torch.func`'s transforms too, where it is computed in plain torch.

    Raises:
        TypeError: not a tensor; a dtype that is not floating point, or that differs between arguments; `block` is not a
            pair of ints.
        ValueError: a shape or device that does not fit, a block without rows or columns; the message names the argument.
    """
    check_tensors(x, weight, words, bias)
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(type(side) is int for side in block):
        raise TypeError(f"block: expected a pair of ints, rows and columns, got {block!r}")
    if min(block) < 1:
        raise ValueError(f"block: expected at least 1 row and 1 column, got {tuple(block)}")
    if autocasts(x.device):
        x, weight, bias = masked._autocast(x, weight, bias)
    masked._check(x, weight, words, bias)
    if transformed():
        return reference.masked_linear(x, weight, words, bias)
    arguments = (x, weight, words, bias, tuple(block), premasked)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _BlockLinear.apply(*arguments)
    return torch.ops.sparselottery.block_linear(*arguments)
