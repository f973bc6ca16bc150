"""fp32 matrix products on the tensor cores, at fp32 accuracy: bf16x6, in Triton.

A float32 number is the sum of three bfloat16 numbers (8 bits of the mantissa each; bfloat16 has float32's exponents). Of the
nine products of two such sums the six larger ones are kept, each exact in float32; the other three are below 2^-23 of the
whole. Source: Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
computations". Why not three TF32 products: as many tensor-core cycles, and 22 bits of the mantissa instead of 24.

Tensor cores truncate where they add. So they add up BK products only, the small ones first, and a float32 addition that
rounds to nearest takes it from there. tests/test_fp32_linear.py has the analysis of the error.

The numbers are taken apart once, in a pass of its own (10 bytes a number), so that the product reads bfloat16 tiles which go
straight to the tensor cores. Infinity in a factor gives NaN, since infinity times a part that is 0 joins the sum.

Callers (ops/fp32_linear.py) have checked their arguments.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .aot import AotCase

INTERPRETED = isinstance(tl.cdiv, InterpretedFunction)
LARGEST = tl.constexpr(3.3895313892515355e38)  # of bfloat16; above, float32 would round to infinity
SPLIT = 1024  # numbers a program takes apart
TILES = {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3}


@triton.jit
def split(source, target, ROWS, COLUMNS, WIDTH, source_r, source_c, UPCAST: tl.constexpr, BLOCK: tl.constexpr):
    """target [3, ROWS, WIDTH] contiguous: the parts of source [ROWS, COLUMNS], the largest first, then zeros.

    UPCAST: for the interpreter, whose conversion to bfloat16 truncates; it rounds by hand.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(source + row * source_r + c.to(tl.int64) * source_c, mask=c < COLUMNS, other=0.0)
    plane = ROWS.to(tl.int64) * WIDTH
    place = target + row * WIDTH + c
    for part in tl.static_range(3):
        finite = tl.abs(rest) < float("inf")
        small = tl.minimum(tl.maximum(rest, -LARGEST), LARGEST)
        if UPCAST:
            bits = small.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            rounded = tl.where(tl.abs(rest) < LARGEST, bits.to(tl.float32, bitcast=True), small)
        else:
            rounded = small.to(tl.bfloat16).to(tl.float32)
        value = tl.where(finite, rounded, rest)
        tl.store(place + part * plane, value.to(tl.bfloat16), mask=c < WIDTH)
        rest = tl.where(finite, rest - value, 0.0)


@triton.jit
def product(
    a, b, bias, target, M, N, K, a_rows, a_inner, b_rows, b_inner, a_plane, a_m, a_k, b_plane, b_n, b_k, target_m,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """target [M, N] = A [M, K] @ B [N, K]^T + bias, of planes a [3, a_rows, a_inner] and b [3, b_rows, b_inner].

    Planes are at least as large as A and B and end in zeros. The columns of target lie side by side.
    """
    across = tl.cdiv(N, BN)
    rm = (tl.program_id(0) // across).to(tl.int64) * BM + tl.arange(0, BM)
    rn = (tl.program_id(0) % across).to(tl.int64) * BN + tl.arange(0, BN)
    first_a = a + (rm * a_m)[:, None]
    first_b = b + (rn * b_n)[None, :]
    alive_a = (rm < a_rows)[:, None]
    alive_b = (rn < b_rows)[None, :]
    a_plane = a_plane.to(tl.int64)  # twice a plane may be more than 32 bits hold where a plane is not
    b_plane = b_plane.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        rk = (start + tl.arange(0, BK)).to(tl.int64)
        pa = first_a + (rk * a_k)[None, :]
        pb = first_b + (rk * b_k)[:, None]
        keep_a = (rk < a_inner)[None, :] & alive_a
        keep_b = (rk < b_inner)[:, None] & alive_b
        a0 = tl.load(pa, mask=keep_a, other=0.0)
        a1 = tl.load(pa + a_plane, mask=keep_a, other=0.0)
        a2 = tl.load(pa + 2 * a_plane, mask=keep_a, other=0.0)
        b0 = tl.load(pb, mask=keep_b, other=0.0)
        b1 = tl.load(pb + b_plane, mask=keep_b, other=0.0)
        b2 = tl.load(pb + 2 * b_plane, mask=keep_b, other=0.0)
        if UPCAST:
            a0, a1, a2 = a0.to(tl.float32), a1.to(tl.float32), a2.to(tl.float32)
            b0, b1, b2 = b0.to(tl.float32), b1.to(tl.float32), b2.to(tl.float32)
        part = tl.dot(a1, b1)
        part = tl.dot(a0, b2, part)
        part = tl.dot(a2, b0, part)
        part = tl.dot(a0, b1, part)
        part = tl.dot(a1, b0, part)
        acc += tl.dot(a0, b0, part)
    if BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0)[None, :]
    tl.store(target + (rm * target_m)[:, None] + rn[None, :], acc, mask=(rm < M)[:, None] & (rn < N)[None, :])


# ---- launches ----


def parts(matrix):
    """bfloat16 `[3, rows, width]` whose sum over the first dimension is the float32 `matrix` `[rows, columns]`, then zeros.

    `width` is a multiple of 16, so that every row is aligned and no 16-byte load is cut by a mask.
    """
    rows, columns = matrix.shape
    width = -(-columns // 16) * 16
    target = torch.empty(3, rows, width, dtype=torch.bfloat16, device=matrix.device)
    if target.numel():
        with torch.cuda.device_of(matrix):
            split[(rows, triton.cdiv(width, SPLIT))](
                matrix, target, rows, columns, width, *matrix.stride(), UPCAST=INTERPRETED, BLOCK=SPLIT
            )
    return target


def matmul(a, b, shape, inner, bias=None):
    """float32 `[M, N]` (`shape`): A Bᵀ + bias over `inner` products, from the parts of A `[M, inner]` and of B `[N, inner]`.

    Parts of a transpose are transposed parts: `parts(matrix).mT`.
    """
    target = torch.empty(shape, dtype=torch.float32, device=a.device)
    if target.numel() == 0:
        return target
    programs = triton.cdiv(shape[0], TILES["BM"]) * triton.cdiv(shape[1], TILES["BN"])
    with torch.cuda.device_of(a):
        product[(programs,)](
            a, b, bias, target, *shape, inner, *a.shape[1:], *b.shape[1:], *a.stride(), *b.stride(), shape[1],
            BIAS=bias is not None, UPCAST=INTERPRETED, **TILES,
        )  # fmt: skip
    return target


def forward(x, weight, bias=None):
    """y `[rows, out]` = x `[rows, in]` weightᵀ + bias, weight `[out, in]`."""
    bias = None if bias is None else bias.contiguous()  # the kernel knows no stride of it
    return matmul(parts(x), parts(weight), (x.shape[0], weight.shape[0]), x.shape[1], bias)


def backward(grad, x, weight):
    """(dX, dW) of `forward`; None for an x or a weight that is None: dX needs weight, dW needs x."""
    split_grad = parts(grad)
    dx = dw = None
    if weight is not None:
        dx = matmul(split_grad, parts(weight).mT, (grad.shape[0], weight.shape[1]), grad.shape[1])
    if x is not None:
        dw = matmul(split_grad.mT, parts(x).mT, (grad.shape[1], x.shape[1]), grad.shape[0])
    return dx, dw


# ---- ahead-of-time cases: what the launches above use, with contiguous tensors ----


def _cases():
    signature = dict.fromkeys(("a", "b"), "*bf16") | dict.fromkeys(("bias", "target"), "*fp32")
    names = (
        "M",
        "N",
        "K",
        "a_rows",
        "a_inner",
        "b_rows",
        "b_inner",
        "a_plane",
        "a_m",
        "a_k",
        "b_plane",
        "b_n",
        "b_k",
        "target_m",
    )
    signature |= dict.fromkeys(names, "i32")
    tiles = dict(TILES)
    warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    cases = []
    for name, ones in {"y": ("a_k", "b_k"), "dX": ("a_k", "b_n"), "dW": ("a_m", "b_n")}.items():
        constexprs = {**tiles, **dict.fromkeys(ones, 1), "BIAS": name == "y", "UPCAST": False}
        ragged = {"y": ("a_rows", "b_rows"), "dX": ("a_rows", "b_inner"), "dW": ("a_inner", "b_inner")}[name]
        aligned = tuple(n for n in signature if n not in (*ones, *ragged, "M", "N", "K", "target_m"))
        cases.append(AotCase(f"{name} bf16x6", product, signature, constexprs, warps, stages, aligned, ("HGMMA",)))
    signature = {"source": "*fp32", "target": "*bf16"} | dict.fromkeys(("ROWS", "COLUMNS", "WIDTH", "source_r"), "i32")
    constexprs = {"source_c": 1, "UPCAST": False, "BLOCK": SPLIT}
    cases.append(
        AotCase("split", split, signature, constexprs, divisible_by_16=("source", "target", "WIDTH", "source_r"))
    )
    return cases


AOT_CASES = _cases()
