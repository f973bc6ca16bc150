"""Masked convolution in Triton: an implicit matrix product that visits only tiles with survivors.

A tile is a block of output channels by one filter tap by 64 input channels, in units of 64, 32 or 16 that need not lie
side by side: a mask of small blocks fills its tiles with live units only. Which tiles suit a mask (`_TILES`) is found once
from how many each size would take. Activations may have any strides
and are fast in channels_last; the weight is first copied, masked by its bits, into `[out, kH * kW, C / groups]`, so
that the product itself never looks at a mask. Gradients of the weight are masked where they are stored, and only live
tiles are computed. Nothing is added atomically: results repeat bit for bit.

Callers (ops/masked_conv2d.py) have checked their arguments; the dict `plans` keeps a
mask's lists of tiles from call to call.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .aot import AotCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = isinstance(tl.cdiv, InterpretedFunction)
# The gathering loop reads its shifts from memory first, which takes one stage off its pipeline.
_GATHER, _WEIGHT = {"num_warps": 8, "num_stages": 5}, {"num_warps": 8, "num_stages": 4}
# Of what the tensor cores can do, the part that a tile of (BN, UNIT) is thought to reach; smaller ones load more for each
# product. Not yet measured.
_TILES = {(128, 64): 1.0, (64, 64): 0.85, (64, 32): 0.75, (64, 16): 0.65}
_MOST_PIXELS = 2**29  # of a program's range: with those of an image before it, they are numbered in 32 bits
_PROGRAMS_WANTED = 512  # enough for every GPU; a constant, so that sums round alike on all of them


@triton.jit
def _channels(units, UNIT: tl.constexpr, DEPTH: tl.constexpr):
    """DEPTH channel numbers: those of DEPTH / UNIT units, one after the other."""
    within = tl.arange(0, DEPTH)
    if UNIT == DEPTH:
        return tl.load(units) * UNIT + within
    # Each unit starts at a multiple of its length: the compiler may load it in pieces of 16 bytes.
    return tl.max_contiguous(tl.multiple_of(tl.load(units + within // UNIT) * UNIT + within % UNIT, UNIT), UNIT)


@triton.jit
def mask_weight(weight, words, packed, ROWS, C, TAPS, KW, CW, so, sc, sh, sw, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """weight [out, C, kH, kW], any strides -> packed [out, kH * kW, C], +0 wherever the mask is 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    tap = i // C % TAPS
    o = i // C // TAPS
    alive = o < ROWS
    keep = alive
    if MASK:
        column = c * TAPS + tap
        word = tl.load(words + o * CW + column // 32, mask=alive, other=0)
        keep = alive & (((word >> (column % 32).to(tl.int32)) & 1) != 0)
    value = tl.load(weight + o * so + c * sc + tap // KW * sh + tap % KW * sw, mask=keep, other=0.0)
    tl.store(packed + i, value, mask=alive)


@triton.jit
def gather_product(
    source, packed, first, tiles, bias, target, N, ROWS, COLUMNS, K, M, TAPS,
    SOURCE_H, SOURCE_W, source_n, source_c, source_h, source_w, source_step_h, source_step_w,
    TARGET_H, TARGET_W, target_n, target_c, target_h, target_w, target_step_h, target_step_w,
    INPUT_GRADIENT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """target[n, :, i * target_step + phase] = sum over taps of source[n, :, i * source_step + shift] @ weight[tap].

    The forward pass gathers from x with the convolution's stride; the gradient of x gathers from the gradient of y with
    step 1, once for each phase of the stride, so that no tap is visited in vain. `tiles` [., 3 + BK / UNIT] int32 holds
    (row shift, column shift, tap, units of source channels); a unit past the last channel reads zeros. `first` says where
    the list of a (phase, block of target channels) starts.
    """
    block = tl.program_id(1)
    phase = tl.program_id(2)
    group = block // tl.cdiv(M, BN)
    rn = block % tl.cdiv(M, BN) * BN + tl.arange(0, BN)
    # Only scalars are divided in 64 bits: the rest of a row number fits 32.
    area = ROWS * COLUMNS
    start = tl.program_id(0).to(tl.int64) * BM
    image = start // area
    local = (start - image * area).to(tl.int32) + tl.arange(0, BM)
    n = image + local // area
    i = local % area // COLUMNS
    j = local % COLUMNS
    alive = n < N
    top = i * source_step_h
    left = j * source_step_w
    base = source + n * source_n + top.to(tl.int64) * source_h + left.to(tl.int64) * source_w
    base += group.to(tl.int64) * K * source_c
    acc = tl.zeros((BM, BN), tl.float32)
    at = phase * tl.num_programs(1) + block
    for t in range(tl.load(first + at), tl.load(first + at + 1)):
        tile = tiles + t * (3 + BK // UNIT)
        down = tl.load(tile)
        right = tl.load(tile + 1)
        tap = tl.load(tile + 2)
        rk = _channels(tile + 3, UNIT, BK)
        inside = (top + down >= 0) & (top + down < SOURCE_H) & (left + right >= 0) & (left + right < SOURCE_W)
        shift = down.to(tl.int64) * source_h + right.to(tl.int64) * source_w
        a = tl.load(
            base[:, None] + (shift + rk.to(tl.int64) * source_c)[None, :],
            mask=(alive & inside)[:, None] & (rk < K)[None, :],
            other=0.0,
        )
        if INPUT_GRADIENT:
            row = (group * K + rk).to(tl.int64) * TAPS + tap
            b = tl.load(packed + row[:, None] * M + rn[None, :], mask=(rk < K)[:, None] & (rn < M)[None, :], other=0.0)
        else:
            row = (group * M + rn).to(tl.int64) * TAPS + tap
            b = tl.load(packed + row[:, None] * K + rk[None, :], mask=(rn < M)[:, None] & (rk < K)[None, :], other=0.0)
            b = tl.trans(b)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    channel = (group * M + rn).to(tl.int64)
    if BIAS:
        acc += tl.load(bias + channel, mask=rn < M, other=0.0).to(tl.float32)[None, :]
    i = i * target_step_h + phase // target_step_w
    j = j * target_step_w + phase % target_step_w
    out = target + n * target_n + i.to(tl.int64) * target_h + j.to(tl.int64) * target_w
    written = alive & (i < TARGET_H) & (j < TARGET_W)
    tl.store(
        out[:, None] + (channel * target_c)[None, :],
        acc.to(target.dtype.element_ty),
        mask=written[:, None] & (rn < M)[None, :],
    )


@triton.jit
def weight_product(
    grad, x, words, tiles, dweight, N, OH, OW, H, W, C, O, TAPS, KW, CW, STEPS,
    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w, dw_split, dw_o, dw_c, dw_h, dw_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dW∘M of one live tile from STEPS * BM output pixels: grad [pixels, BN]ᵀ @ x [pixels, BK].

    `tiles` [., 3 + BK / UNIT] int32 holds (group, block of its output channels, tap, units of its input channels). Dead
    tiles are not visited: `dweight` starts as zeros.
    """
    tile = tiles + tl.program_id(0) * (3 + BK // UNIT)
    split = tl.program_id(1).to(tl.int64)
    group = tl.load(tile)
    rn = tl.load(tile + 1) * BN + tl.arange(0, BN)
    tap = tl.load(tile + 2)
    rk = _channels(tile + 3, UNIT, BK)
    own = rn < O
    rn += group * O
    down = tap // KW * dilation_h - padding_h
    right = tap % KW * dilation_w - padding_w
    area = OH * OW
    start = split * STEPS * BM
    image = start // area
    rest = (start - image * area).to(tl.int32)
    grad_columns = rn.to(tl.int64) * grad_c
    x_columns = (group * C + rk).to(tl.int64) * x_c
    acc = tl.zeros((BN, BK), tl.float32)
    for step in range(STEPS):
        local = rest + step * BM + tl.arange(0, BM)
        n = image + local // area
        i = local % area // OW
        j = local % OW
        alive = n < N
        a = tl.load(
            grad + (n * grad_n + i.to(tl.int64) * grad_h + j.to(tl.int64) * grad_w)[:, None] + grad_columns[None, :],
            mask=alive[:, None] & own[None, :],
            other=0.0,
        )
        i = i * stride_h + down
        j = j * stride_w + right
        inside = alive & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        b = tl.load(
            x + (n * x_n + i.to(tl.int64) * x_h + j.to(tl.int64) * x_w)[:, None] + x_columns[None, :],
            mask=inside[:, None] & (rk < C)[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    column = rk * TAPS + tap
    stored = own[:, None] & (rk < C)[None, :]
    word = tl.load(words + rn.to(tl.int64)[:, None] * CW + (column // 32)[None, :], mask=stored, other=0)
    keep = ((word >> (column % 32)[None, :]) & 1) != 0
    out = dweight + split * dw_split + tap // KW * dw_h + tap % KW * dw_w
    out += rn.to(tl.int64)[:, None] * dw_o + rk.to(tl.int64)[None, :] * dw_c
    tl.store(out, tl.where(keep, acc, 0.0).to(dweight.dtype.element_ty), mask=stored)


# ---- live tiles ----


def _live(words, weight_shape, groups, rows, columns):
    """bool [groups, blocks of `rows` output channels, taps, blocks of `columns` input channels]: any survivor there."""
    out, channels, kernel_h, kernel_w = weight_shape
    taps = kernel_h * kernel_w
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    bits = bits.flatten(1)[:, : channels * taps].reshape(groups, out // groups, channels, taps).transpose(2, 3)
    pad = (0, -channels % columns, 0, 0, 0, -(out // groups) % rows)
    bits = torch.nn.functional.pad(bits, pad)
    return bits.reshape(groups, -1, rows, taps, bits.shape[3] // columns, columns).amax((2, 5)) != 0


def _packed(live, depth):
    """Rows of live units, `depth` to a step: (index of each step's row, units [steps, depth]) from live [*, units].

    A row's last step is filled up with a unit past the edge.
    """
    rows = live.flatten(0, -2)
    counts = rows.sum(1)
    steps = (counts + depth - 1) // depth
    row, unit = rows.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=live.device) - (counts.cumsum(0) - counts)[row]
    owners = torch.repeat_interleave(torch.arange(len(rows), device=live.device), steps)
    units = torch.full((len(owners) * depth,), rows.shape[1], dtype=torch.int64, device=live.device)
    units[((steps.cumsum(0) - steps)[row]) * depth + place] = unit
    return owners, units.view(-1, depth)


def _lists(live, shifts, depth):
    """(first, tiles) for gather_product from live [phases, lists, taps, units] and shifts [phases, taps, 2]."""
    phases, lists, taps, _ = live.shape
    owner, units = _packed(live, depth)  # in order of (phase, list), as `first` counts them
    first = torch.zeros(phases * lists + 1, dtype=torch.int64, device=live.device)
    first[1:] = torch.bincount(owner // taps, minlength=phases * lists).cumsum(0)
    shift = shifts.to(live.device)[owner // (lists * taps), owner % taps]
    tiles = torch.cat([shift, (owner % taps)[:, None], units], 1)
    return first.to(torch.int32), tiles.to(torch.int32).contiguous()


def _forward_lists(words, weight_shape, padding, dilation, groups, BN, BK, UNIT):
    live = _live(words, weight_shape, groups, BN, UNIT).flatten(0, 1)
    h, w = torch.arange(weight_shape[2]), torch.arange(weight_shape[3])
    shifts = torch.cartesian_prod(h * dilation[0] - padding[0], w * dilation[1] - padding[1]).view(1, -1, 2)
    return _lists(live[None], shifts, BK // UNIT)


def _input_lists(words, weight_shape, stride, padding, dilation, groups, BN, BK, UNIT):
    """For each phase (row and column of an input pixel modulo the stride) the taps that meet an output pixel there."""
    live = _live(words, weight_shape, groups, UNIT, BN).permute(0, 3, 2, 1).flatten(0, 1)
    h, w = torch.arange(weight_shape[2]), torch.arange(weight_shape[3])
    steps = torch.tensor(stride)
    phases = torch.cartesian_prod(torch.arange(stride[0]), torch.arange(stride[1])).view(-1, 1, 2)
    offsets = torch.cartesian_prod(padding[0] - h * dilation[0], padding[1] - w * dilation[1]).view(1, -1, 2)
    meets = ((phases + offsets) % steps == 0).all(-1).to(live.device)
    return _lists(
        live[None] & meets[:, None, :, None], (phases + offsets).div(steps, rounding_mode="floor"), BK // UNIT
    )


def _weight_tiles(words, weight_shape, groups, BN, BK, UNIT):
    live = _live(words, weight_shape, groups, BN, UNIT)
    _, blocks, taps, _ = live.shape
    owner, units = _packed(live, BK // UNIT)
    place = torch.stack([owner // (blocks * taps), owner // taps % blocks, owner % taps], 1)
    return (torch.cat([place, units], 1).to(torch.int32).contiguous(),)


def _best(build, sizes):
    """((BN, BK, UNIT), lists) of the sizes whose tiles take the least time: the last of build(*sizes) holds the tiles."""
    made = {size: build(*size) for size in sizes}

    def cost(size):
        return len(made[size][-1]) * size[0] * size[1] / _TILES[size[0], size[2]]

    best = min(made, key=cost) if len(made) > 1 else sizes[0]
    return best, made[best]


def _kept(plans, key, build):
    """build(), or what it gave for this key before. `plans`: a dict that lives as long as the mask, or None."""
    if plans is None:
        return build()
    if key not in plans:
        plans[key] = build()
    return plans[key]


# ---- launches ----


def _precision(dtype):
    """fp32 as the library's convolution does it: TF32 where allowed, else three TF32 products (fp32 accuracy)."""
    return "tf32" if dtype != torch.float32 or torch.backends.cudnn.allow_tf32 else "tf32x3"


def _upcast(t):
    return INTERPRETED and t.dtype == torch.bfloat16  # the interpreter's bf16 products are wrong (triton#11584)


def _block(channels, most=64):
    """The power of two that covers `channels`, from 16 (the least of a tensor core) to `most`."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def _sizes(rows, columns, depth, wide):
    """The tile sizes (BN, BK, UNIT) that come into question for `rows` target and `columns` source channels."""
    BN, BK = _block(rows), _block(columns, depth)
    sizes = [(BN, BK, BK)]
    if BN == 64 and columns > BK:
        sizes += [(BN, BK, unit) for unit in (32, 16) if unit < BK]
    if wide and rows > 64 and BK == 64:
        sizes.append((128, BK, BK))
    return sizes


def _depth(dtype):
    """How many source channels (dW: pixels) a step takes; more of fp32 would spill registers."""
    return 32 if dtype == torch.float32 else 64


def _check(t):
    if t.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16 for Triton, got {t.dtype}")
    if t.shape[2] * t.shape[3] > 2**30:
        raise ValueError(f"x: expected at most 2**30 pixels an image, got {t.shape[2]} x {t.shape[3]}")


def _pack(weight, words, masked):
    """The weight as gather_product reads it; a channels_last one that needs no mask already lies so."""
    out, channels, kernel_h, kernel_w = weight.shape
    if not masked and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    packed = torch.empty(out, kernel_h * kernel_w, channels, dtype=weight.dtype, device=weight.device)
    if packed.numel():
        with torch.cuda.device_of(weight):
            mask_weight[(triton.cdiv(packed.numel(), 1024),)](
                weight, words.contiguous(), packed, out, channels, kernel_h * kernel_w, kernel_w, words.shape[1],
                *weight.stride(), MASK=masked, BLOCK=1024,
            )  # fmt: skip
    return packed


def _gather(source, packed, lists, bias, target, groups, taps, stride, gradient, size):
    """Launch gather_product: source is x and target y, or (gradient) source is dY and target dX."""
    n, source_channels, height, width = source.shape
    channels, target_h, target_w = target.shape[1] // groups, *target.shape[2:]
    step, phases = ((1, 1), stride) if gradient else (stride, (1, 1))
    rows, columns = triton.cdiv(target_h, phases[0]), triton.cdiv(target_w, phases[1])
    BM, (BN, BK, UNIT) = 128, size
    grid = (triton.cdiv(n * rows * columns, BM), groups * triton.cdiv(channels, BN), phases[0] * phases[1])
    if 0 not in grid:
        with torch.cuda.device_of(source):
            gather_product[grid](
                source, packed, *lists, bias, target, n, rows, columns, source_channels // groups, channels, taps,
                height, width, *source.stride(), *step, target_h, target_w, *target.stride(), *phases,
                INPUT_GRADIENT=gradient, BIAS=bias is not None, PRECISION=_precision(source.dtype),
                UPCAST=_upcast(source), BM=BM, BN=BN, BK=BK, UNIT=UNIT, **_GATHER,
            )  # fmt: skip
    return target


def forward(x, weight, words, bias, stride, padding, dilation, groups, *, premasked=False, plans=None):
    """y `[N, out, H', W']` in channels_last from x `[N, C, H, W]`; pairs for stride, padding and dilation."""
    _check(x)
    (n, _, height, width), (out, _, kernel_h, kernel_w) = x.shape, weight.shape
    size = [
        (edge + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i, edge in enumerate((height, width))
    ]
    y = torch.empty(n, out, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes = _sizes(out // groups, weight.shape[1], _depth(x.dtype), x.dtype != torch.float32)
    size, lists = _kept(
        plans,
        ("triton forward", weight.shape, padding, dilation, groups, *sizes),
        lambda: _best(lambda *size: _forward_lists(words, weight.shape, padding, dilation, groups, *size), sizes),
    )
    packed = _pack(weight, words, not premasked)
    bias = None if bias is None else bias.contiguous()  # the kernel knows no stride of it
    return _gather(x, packed, lists, bias, y, groups, kernel_h * kernel_w, stride, False, size)


def backward_input(grad, weight, words, input_shape, stride, padding, dilation, groups, *, premasked=False, plans=None):
    """dX `[N, C, H, W]` (`input_shape`) in channels_last from grad `[N, out, H', W']`."""
    _check(grad)
    out, channels, kernel_h, kernel_w = weight.shape
    dx = torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    sizes = _sizes(channels, out // groups, _depth(grad.dtype), grad.dtype != torch.float32)
    size, lists = _kept(
        plans,
        ("triton input", weight.shape, stride, padding, dilation, groups, *sizes),
        lambda: _best(lambda *size: _input_lists(words, weight.shape, stride, padding, dilation, groups, *size), sizes),
    )
    packed = _pack(weight, words, not premasked)
    return _gather(grad, packed, lists, None, dx, groups, kernel_h * kernel_w, stride, True, size)


def backward_weight(grad, x, words, weight_shape, stride, padding, dilation, groups, *, plans=None):
    """dW∘M, contiguous, of `weight_shape` from grad `[N, out, H', W']` and x `[N, C, H, W]`."""
    _check(x)
    out, channels, kernel_h, kernel_w = weight_shape = tuple(weight_shape)
    BM, sizes = _depth(x.dtype), _sizes(out // groups, channels, 64, False)
    (BN, BK, UNIT), (tiles,) = _kept(
        plans,
        ("triton weight", weight_shape, groups, *sizes),
        lambda: _best(lambda *size: _weight_tiles(words, weight_shape, groups, *size), sizes),
    )
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    if not tiles.shape[0] or not pixels:
        return torch.zeros(weight_shape, dtype=x.dtype, device=x.device)
    # Few live tiles: several programs share one, each with its own range of pixels, and their sums are added in order.
    splits = max(1, min(_PROGRAMS_WANTED // tiles.shape[0], triton.cdiv(pixels, 8 * BM), 64))
    splits = max(splits, triton.cdiv(pixels, _MOST_PIXELS))
    steps = triton.cdiv(triton.cdiv(pixels, splits), BM)
    splits = triton.cdiv(pixels, steps * BM)
    dtype = x.dtype if splits == 1 else torch.float32
    dweight = torch.zeros(splits, *weight_shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        weight_product[(tiles.shape[0], splits)](
            grad, x, words.contiguous(), tiles, dweight, grad.shape[0], *grad.shape[2:], *x.shape[2:], channels, out // groups,
            kernel_h * kernel_w, kernel_w, words.shape[1], steps, *grad.stride(), *x.stride(), *dweight.stride(),
            *stride, *padding, *dilation, PRECISION=_precision(x.dtype), UPCAST=_upcast(x), BM=BM, BN=BN, BK=BK, UNIT=UNIT,
            **_WEIGHT,
        )  # fmt: skip
    return dweight[0] if splits == 1 else dweight.sum(0).to(x.dtype)


# ---- what `python -m sparselottery.kernels.aot` compiles ----


def _cases():
    gather = """N ROWS COLUMNS K M TAPS SOURCE_H SOURCE_W source_n source_h source_w source_step_h source_step_w
        TARGET_H TARGET_W target_n target_h target_w target_step_h target_step_w"""
    weight = """N OH OW H W C O TAPS KW CW STEPS grad_n grad_h grad_w x_n x_h x_w dw_split dw_o dw_c dw_h
        stride_h stride_w padding_h padding_w dilation_h dilation_w"""
    names = {"source", "packed", "bias", "target", "grad", "x", "weight"}
    indices = {"words": "*i32", "first": "*i32", "tiles": "*i32"}
    for dtype, precision in (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "tf32x3")):
        pointers = dict.fromkeys(names, f"*{dtype}") | indices
        label = f"{dtype} {precision}" if dtype == "fp32" else dtype
        common = {"PRECISION": precision, "UPCAST": False}
        depth = 32 if dtype == "fp32" else 64
        sizes = _sizes(512, 512, depth, dtype != "fp32")
        for BN, BK, unit in sizes if dtype != "fp16" else sizes[:1]:  # fp16 compiles like bf16: one size stands for all
            for gradient in (False, True):
                yield AotCase(
                    name=f"{'dX' if gradient else 'forward'} {label} 128x{BN}x{BK} units of {unit}",
                    fn=gather_product,
                    signature=pointers | dict.fromkeys(gather.split(), "i32"),
                    constexprs=common
                    | {"INPUT_GRADIENT": gradient, "BIAS": not gradient, "BM": 128, "BN": BN, "BK": BK, "UNIT": unit}
                    | {"source_c": 1, "target_c": 1},
                    divisible_by_16=(
                        *("source", "packed", "bias", "target", "tiles", "K", "M"),
                        *("source_n", "source_h", "source_w", "target_n", "target_h", "target_w"),
                    ),
                    expect=("HGMMA",),
                    **_GATHER,
                )
        sizes = _sizes(512, 512, 64, False)
        for BN, BK, unit in sizes if dtype != "fp16" else sizes[:1]:
            yield AotCase(
                name=f"dW {label} {BN}x{BK}x{depth} units of {unit}",
                fn=weight_product,
                signature=pointers | {"dweight": "*fp32"} | dict.fromkeys(weight.split(), "i32"),
                constexprs=common
                | {"BM": depth, "BN": BN, "BK": BK, "UNIT": unit}
                | {"grad_c": 1, "x_c": 1, "dw_w": 1},
                divisible_by_16=(
                    *("grad", "x", "dweight", "tiles", "C", "O"),
                    *("grad_n", "grad_h", "grad_w", "x_n", "x_h", "x_w"),
                ),
                expect=("HGMMA",),
                **_WEIGHT,
            )
        if precision == "tf32":
            yield AotCase(
                name=f"mask weight {dtype}",
                fn=mask_weight,
                signature=pointers | dict.fromkeys(("ROWS", "C", "TAPS", "KW", "CW", "so", "sc", "sh"), "i32"),
                constexprs={"MASK": True, "BLOCK": 1024, "sw": 1},
                divisible_by_16=("weight", "words", "packed", "C", "so"),
            )


AOT_CASES = list(_cases())
