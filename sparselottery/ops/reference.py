"""Plain-torch versions of every op: slow, obvious, and what each backend is tested against.

A mask is int32 words `[rows, ceil(columns / 32)]`. A tensor of two or more dimensions has one row per index of its
first dimension and the rest flattened into columns; a tensor of fewer dimensions is a single row. Bit i of word w keeps
column 32 w + i, and the bits past the last column are zero.
"""

import math

import torch
from torch import Tensor

WORD_BITS = 32


def rows_columns(shape) -> tuple[int, int]:
    """How a tensor of this shape lies in a mask: (rows, columns)."""
    shape = tuple(shape)
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def words_shape(shape) -> tuple[int, int]:
    """The shape of the int32 words that mask a tensor of `shape`."""
    rows, columns = rows_columns(shape)
    return rows, -(-columns // WORD_BITS)


# ---- bitmask ----


def bitmask_pack(dense: Tensor) -> Tensor:
    """bool `[*]` -> int32 words."""
    rows, columns = rows_columns(dense.shape)
    words = words_shape(dense.shape)[1]
    bits = torch.zeros(rows, words * WORD_BITS, dtype=torch.int64, device=dense.device)
    bits[:, :columns] = dense.reshape(rows, columns)
    packed = (bits.view(rows, words, WORD_BITS) << torch.arange(WORD_BITS, device=dense.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def bitmask_unpack(words: Tensor, shape) -> Tensor:
    """int32 words -> bool of `shape`."""
    shape = tuple(shape)
    _, columns = rows_columns(shape)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    bits = words.unsqueeze(-1).bitwise_right_shift(shifts) & 1
    return bits.flatten(1)[:, :columns].bool().reshape(shape)


def bitmask_count(words: Tensor) -> Tensor:
    """How many bits are set: int64 scalar tensor."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1).bitwise_right_shift(shifts) & 1).sum(dtype=torch.int64)


def bitmask_hamming(a: Tensor, b: Tensor) -> Tensor:
    """In how many bits two masks of one shape differ: int64 scalar tensor."""
    return bitmask_count(a ^ b)


def bitmask_apply_(tensor: Tensor, words: Tensor) -> Tensor:
    """Write +0 wherever the mask is 0, in place (also over NaN and inf)."""
    return tensor.masked_fill_(~bitmask_unpack(words, tensor.shape), 0)


# ---- global_topk ----


def global_topk(
    scores: list[Tensor], keep: int, eligible: list[Tensor] | None = None, signed: bool = False
) -> tuple[list[Tensor], float]:
    """Masks (bool) of exactly `keep` survivors over all tensors: the largest |score| (signed: the largest score).

    Ties go to the lowest flat index in list order. `eligible`: bool tensors; the others never survive. Returns the
    masks and the key of the smallest survivor (+inf when none survives).
    """
    keys = [(s.detach().double() if signed else s.detach().double().abs()).flatten() + 0.0 for s in scores]
    flat = torch.cat(keys) if keys else torch.empty(0, dtype=torch.float64)
    allowed = torch.cat([e.flatten() for e in eligible]) if eligible else torch.ones_like(flat, dtype=torch.bool)
    candidates = allowed.nonzero().flatten()
    order = torch.sort(flat[candidates], descending=True, stable=True).indices[:keep]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[candidates[order]] = True
    threshold = float(flat[candidates[order[-1]]]) if keep else math.inf
    masks = [m.view(s.shape) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]
    return masks, threshold


# ---- masked_linear, masked_conv2d ----


def masked_linear(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    """x `[*, in]`, weight `[out, in]` -> `[*, out]`; a weight off the mask is +0 whatever it holds (NaN too)."""
    return torch.nn.functional.linear(x, torch.where(bitmask_unpack(words, weight.shape), weight, 0), bias)


def masked_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad `[*, out]` -> (dX `[*, in]`, dW∘M `[out, in]`, db `[out]`)."""
    keep = bitmask_unpack(words, weight.shape)
    batch = grad.shape[:-1].numel()
    rows, inputs = grad.reshape(batch, weight.shape[0]), x.reshape(batch, weight.shape[1])
    return grad @ torch.where(keep, weight, 0), torch.where(keep, rows.T @ inputs, 0), rows.sum(0)


def masked_conv2d(
    x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> Tensor:
    """x `[N, C, H, W]`, weight `[out, C / groups, kH, kW]` -> `[N, out, H', W']`; stride, padding, dilation: pairs."""
    weight = torch.where(bitmask_unpack(words, weight.shape), weight, 0)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def masked_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, words: Tensor, stride, padding, dilation, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad `[N, out, H', W']` -> (dX, dW∘M, db)."""
    keep = bitmask_unpack(words, weight.shape)
    weight = torch.where(keep, weight, 0)
    dx = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding, dilation, groups)
    dw = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding, dilation, groups)
    return dx, torch.where(keep, dw, 0), grad.sum((0, 2, 3))


# ---- masked_optim: one step for survivors only; dead weights and their state become (and stay) 0 ----


def _survivors(words, param) -> Tensor:
    """bool of the parameter's shape; all True where there is no mask."""
    return torch.ones_like(param, dtype=torch.bool) if words is None else bitmask_unpack(words, param.shape)


def masked_sgd_(
    param, grad, momentum_buffer, words, *, lr, momentum, dampening, weight_decay, nesterov, maximize, first
) -> None:
    """torch.optim.SGD's step at the survivors; `momentum_buffer`: None where momentum is 0, `first`: its first use."""
    keep = _survivors(words, param)
    g = torch.where(keep, -grad if maximize else grad, 0)
    if weight_decay:  # not always: 0 * inf would be NaN
        g = torch.where(keep, g + weight_decay * param, 0)
    if momentum:
        momentum_buffer.copy_(torch.where(keep, g if first else momentum * momentum_buffer + (1 - dampening) * g, 0))
        g = g + momentum * momentum_buffer if nesterov else momentum_buffer
    param.copy_(torch.where(keep, param - lr * g, 0))


def masked_adam_(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    words,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
    maximize,
) -> None:
    """torch.optim.Adam's (decoupled: AdamW's) step `step` (from 1) at the survivors; `max_exp_avg_sq`: AMSGrad's."""
    keep = _survivors(words, param)
    g = torch.where(keep, -grad if maximize else grad, 0)
    p = torch.where(keep, param, 0)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + weight_decay * p
    exp_avg.copy_(torch.where(keep, exp_avg + (1 - beta1) * (g - exp_avg), 0))
    exp_avg_sq.copy_(torch.where(keep, beta2 * exp_avg_sq + (1 - beta2) * g * g, 0))
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq.copy_(torch.where(keep, torch.maximum(max_exp_avg_sq, exp_avg_sq), 0))
        second = max_exp_avg_sq
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps  # `step` may be a tensor
    param.copy_(torch.where(keep, p - lr / (1 - beta1**step) * exp_avg / denominator, 0))


# ---- packed: the survivors' values in row-major order <-> the dense weight ----


def packed_expand(values: Tensor, words: Tensor, shape) -> Tensor:
    """values `[count]` -> dense tensor of `shape`, +0 wherever the mask is 0."""
    keep = bitmask_unpack(words, shape)
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def packed_gather(dense: Tensor, words: Tensor) -> Tensor:
    """The survivors of a dense tensor `[*]` -> values `[count]`."""
    return dense.masked_select(bitmask_unpack(words, dense.shape))


# ---- fp32_linear: a float32 product from six of the nine products of bfloat16 parts ----


def bf16_parts(matrix: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is the float32 `matrix`, the largest first (exactly, unless a part underflows)."""
    parts, rest = [], matrix.float()
    for _ in range(3):
        finite = rest.isfinite()
        largest = torch.finfo(torch.bfloat16).max
        part = torch.where(finite, rest.clamp(-largest, largest), rest).bfloat16()
        parts.append(part)
        rest = torch.where(finite, rest - part.float(), 0)
    return parts


def bf16x6_matmul(a: Tensor, b: Tensor, *, block: int = 32, step: int = 16) -> Tensor:
    """a `[M, K]` times b `[N, K]` transposed in float32, as tensor cores do it that truncate their sums.

    The exact sum of `step` products and what was there before is cut to float32 (toward zero); after `block` products a float32
    addition, rounded to nearest, joins it to the result.
    """
    (a0, a1, a2), (b0, b1, b2) = ([p.double() for p in bf16_parts(t)] for t in (a, b))
    result = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[1], block):
        part = torch.zeros_like(result)
        for x, y in ((a1, b1), (a0, b2), (a2, b0), (a0, b1), (a1, b0), (a0, b0)):
            for first in range(start, min(start + block, a.shape[1]), step):
                last = min(first + step, start + block)
                part = _toward_zero(part.double() + x[:, first:last] @ y[:, first:last].T)
        result += part
    return result


def _toward_zero(exact: Tensor) -> Tensor:
    """float64 -> float32, truncated."""
    rounded = exact.float()
    too_far = rounded.double().abs() > exact.abs()
    return torch.where(too_far, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
