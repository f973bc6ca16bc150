"""Masked linear layer in Triton: y = x (W∘M)ᵀ + b, dX = dY (W∘M), dW∘M.

The mask is applied to each tile of the weight on its way into the product, which visits only tiles with survivors: the
list of live tiles is derived from the mask once. dW is masked where it is stored, and a tile without survivors is not
computed. W∘M is the left factor of a transposed product, since the tensor cores of sm_90 take that one from registers,
where the mask has to be applied. Nothing is added atomically: results repeat bit for bit.

Callers (ops/masked_linear.py) have checked their arguments.
"""

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.interpreter import InterpretedFunction

from .aot import AotCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = isinstance(tl.cdiv, InterpretedFunction)


@triton.jit
def _bits(words, COLUMNS: tl.constexpr):
    """int32 words [rows, COLUMNS / 32] -> bool [rows, COLUMNS]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (words.shape[0], COLUMNS)) != 0


@triton.jit
def product(
    source, weight, words, counts, lists, bias, target, M, OUT, IN, BLOCKS,
    source_m, source_i, weight_o, weight_i, words_o, target_m, target_o,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """target [M, OUT] = source [M, IN] @ A' + bias, where A [OUT, IN] is W∘M (TRANSPOSED: its transpose, for dX).

    `lists` [OUT / BO, BLOCKS]: the live blocks of IN of each block of OUT, `counts` how many there are.
    """
    block = tl.program_id(1)
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ro = block * BO + tl.arange(0, BO)
    alive_m = rm < M
    alive_o = ro < OUT
    source_rows = source + rm * source_m
    acc = tl.zeros((BO, BM), tl.float32)
    for t in range(tl.load(counts + block)):
        first = tl.load(lists + block.to(tl.int64) * BLOCKS + t) * BI
        ri = first + tl.arange(0, BI)
        alive_i = ri < IN
        if TRANSPOSED:
            rw = block * (BO // 32) + tl.arange(0, BO // 32)
            keep = tl.load(
                words + ri.to(tl.int64)[:, None] * words_o + rw[None, :],
                mask=alive_i[:, None] & (rw * 32 < OUT)[None, :],
                other=0,
            )
            a = tl.load(
                weight + ri.to(tl.int64)[:, None] * weight_o + ro.to(tl.int64)[None, :] * weight_i,
                mask=alive_i[:, None] & alive_o[None, :],
                other=0.0,
            )
            a = tl.trans(tl.where(_bits(keep, BO), a, 0.0).to(a.dtype))
        else:
            rw = first // 32 + tl.arange(0, BI // 32)
            keep = tl.load(
                words + ro.to(tl.int64)[:, None] * words_o + rw[None, :],
                mask=alive_o[:, None] & (rw * 32 < IN)[None, :],
                other=0,
            )
            a = tl.load(
                weight + ro.to(tl.int64)[:, None] * weight_o + ri.to(tl.int64)[None, :] * weight_i,
                mask=alive_o[:, None] & alive_i[None, :],
                other=0.0,
            )
            a = tl.where(_bits(keep, BI), a, 0.0).to(a.dtype)
        b = tl.load(
            source_rows[:, None] + (ri.to(tl.int64) * source_i)[None, :],
            mask=alive_m[:, None] & alive_i[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + ro, mask=alive_o, other=0.0).to(tl.float32)[:, None]
    tl.store(
        target + (rm * target_m)[None, :] + (ro.to(tl.int64) * target_o)[:, None],
        acc.to(target.dtype.element_ty),
        mask=alive_o[:, None] & alive_m[None, :],
    )


@triton.jit
def weight_product(
    grad, x, words, dweight, M, OUT, IN, grad_m, grad_o, x_m, x_i, words_o, dweight_o, dweight_i,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dweight [OUT, IN] = (gradᵀ x)∘M, one tile; a tile without survivors is written as zeros."""
    ro = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    ri = tl.program_id(1) * BI + tl.arange(0, BI)
    rw = tl.program_id(1) * (BI // 32) + tl.arange(0, BI // 32)
    alive_o = ro < OUT
    alive_i = ri < IN
    keep = tl.load(
        words + ro[:, None] * words_o + rw[None, :], mask=alive_o[:, None] & (rw * 32 < IN)[None, :], other=0
    )
    live = tl.max(tl.max((keep != 0).to(tl.int32), axis=1), axis=0)
    acc = tl.zeros((BO, BI), tl.float32)
    if live != 0:
        for start in range(0, M, BM):
            rm = start + tl.arange(0, BM).to(tl.int64)
            alive_m = rm < M
            a = tl.load(
                grad + (rm * grad_m)[:, None] + (ro * grad_o)[None, :],
                mask=alive_m[:, None] & alive_o[None, :],
                other=0.0,
            )
            b = tl.load(
                x + (rm * x_m)[:, None] + (ri.to(tl.int64) * x_i)[None, :],
                mask=alive_m[:, None] & alive_i[None, :],
                other=0.0,
            )
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    tl.store(
        dweight + ro[:, None] * dweight_o + (ri.to(tl.int64) * dweight_i)[None, :],
        tl.where(_bits(keep, BI), acc, 0.0).to(dweight.dtype.element_ty),
        mask=alive_o[:, None] & alive_i[None, :],
    )


# ---- live tiles, kept for as long as their mask lives and does not change ----

_PLANS = WeakTensorKeyDictionary()


def _live_blocks(words, rows, columns, transposed):
    """(counts, lists): for each block of `rows` rows of the mask the blocks of `columns` columns with survivors.

    Transposed: for each block of columns the blocks of rows. Lists have room for all blocks, the live ones come first; so
    nothing waits for the device.
    """
    if words.is_inference():  # such tensors do not count their changes
        return _find_live_blocks(words, rows, columns, transposed)
    version, plans = _PLANS.get(words, (None, None))
    if version != words._version:
        plans = {}
        _PLANS[words] = (words._version, plans)
    key = (rows, columns, transposed)
    if key not in plans:
        plans[key] = _find_live_blocks(words, *key)
    return plans[key]


def _find_live_blocks(words, rows, columns, transposed):
    live = torch.nn.functional.pad(words != 0, (0, -words.shape[1] % (columns // 32), 0, -words.shape[0] % rows))
    live = live.view(live.shape[0] // rows, rows, live.shape[1] // (columns // 32), columns // 32).any(3).any(1)
    live = (live.t() if transposed else live).to(torch.int8)
    lists = live.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return live.sum(1, dtype=torch.int32), lists.contiguous()  # a sorted transpose may be a transpose


# ---- launches ----


def _config(dtype, rows):
    """Tile sizes (rows of the batch, outputs, inputs), chosen by hand for few rows and for many; no search at run time."""
    if dtype == torch.float32:  # three TF32 products a step: larger tiles spill registers
        return {"BM": 64 if rows > 32 else 16, "BO": 64, "BI": 32, "num_warps": 4, "num_stages": 3}
    if rows <= 32:
        return {"BM": 16 if rows <= 16 else 32, "BO": 64, "BI": 128, "num_warps": 4, "num_stages": 4}
    return {"BM": 128 if rows > 64 else 64, "BO": 128, "BI": 64, "num_warps": 8, "num_stages": 3}


def _weight_config(dtype):
    if dtype == torch.float32:
        return {"BM": 32, "BO": 64, "BI": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BO": 128, "BI": 128, "num_warps": 8, "num_stages": 3}


def _precision(dtype):
    """fp32 as torch.matmul does it: TF32 where allowed, else three TF32 products (fp32 accuracy)."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _options(tensor):
    if tensor.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16 for Triton, got {tensor.dtype}")
    # The interpreter's bf16 products are wrong (triton-lang/triton#11584).
    return {"PRECISION": _precision(tensor.dtype), "UPCAST": INTERPRETED and tensor.dtype == torch.bfloat16}


def _rows(t):
    """`[*, features]` -> `[rows, features]`; also where nothing is left to tell the number of rows from."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _product(source, weight, words, bias, features, transposed):
    rows = _rows(source)
    target = torch.empty(*source.shape[:-1], features, dtype=source.dtype, device=source.device)
    if target.numel() == 0:
        return target
    options, config = _options(source), _config(source.dtype, rows.shape[0])
    inputs = rows.shape[1]
    if inputs == 0:
        return target.zero_() if bias is None else target.copy_(bias.expand_as(target))
    flat = _rows(target)
    across = (config["BI"], config["BO"]) if transposed else (config["BO"], config["BI"])
    counts, lists = _live_blocks(words, *across, transposed)
    words, bias = (
        words.contiguous(),
        None if bias is None else bias.contiguous(),
    )  # the kernel knows no strides of theirs
    with torch.cuda.device_of(source):
        product[(triton.cdiv(rows.shape[0], config["BM"]), triton.cdiv(features, config["BO"]))](
            rows, weight, words, counts, lists, bias, flat, rows.shape[0], features, inputs, lists.shape[1],
            *rows.stride(), *weight.stride(), words.stride(0), *flat.stride(),
            TRANSPOSED=transposed, BIAS=bias is not None, **options, **config,
        )  # fmt: skip
    return target


def forward(x, weight, words, bias=None):
    """y `[*, out]` from x `[*, in]` and weight `[out, in]`, any strides (x is copied where `*` is more than one stride)."""
    return _product(x, weight, words, bias, weight.shape[0], False)


def backward_input(grad, weight, words):
    """dX `[*, in]` from grad `[*, out]`."""
    return _product(grad, weight, words, None, weight.shape[1], True)


def backward_weight(grad, x, words):
    """dW∘M `[out, in]` from grad `[*, out]` and x `[*, in]`."""
    grad, x = _rows(grad), _rows(x)
    dweight = torch.empty(grad.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    if dweight.numel() == 0:
        return dweight
    options, config, words = _options(x), _weight_config(x.dtype), words.contiguous()
    with torch.cuda.device_of(x):
        weight_product[(triton.cdiv(grad.shape[1], config["BO"]), triton.cdiv(x.shape[1], config["BI"]))](
            grad, x, words, dweight, grad.shape[0], *dweight.shape, *grad.stride(), *x.stride(), words.stride(0),
            *dweight.stride(), **options, **config,
        )  # fmt: skip
    return dweight


# ---- ahead-of-time cases: what the launches above use, with contiguous tensors ----


def _cases():
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    cases = []
    for dtype, short in names.items():
        precision = "tf32x3" if dtype == torch.float32 else "tf32"
        flags = {"PRECISION": precision, "UPCAST": False}
        ints = dict.fromkeys(("M", "OUT", "IN", "BLOCKS", "source_m", "weight_o", "words_o", "target_m"), "i32")
        data = dict.fromkeys(("source", "weight", "bias", "target"), f"*{short}")
        signature = {**data, "words": "*i32", "counts": "*i32", "lists": "*i32", **ints}
        ones = {"source_i": 1, "weight_i": 1, "target_o": 1}
        aligned = (*data, "words", "counts", "lists", "M", "OUT", "IN", "source_m", "weight_o", "target_m")
        # fp16 compiles like bf16: its largest tiles stand for all.
        for rows in {torch.float32: (16, 64), torch.float16: (128,), torch.bfloat16: (16, 32, 64, 128)}[dtype]:
            config = _config(dtype, rows)
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            for transposed in (False, True):
                name = f"{'dX' if transposed else 'y'} {short} {config['BM']}x{config['BO']}x{config['BI']}"
                constexprs = {**ones, **flags, **config, "TRANSPOSED": transposed, "BIAS": not transposed}
                cases.append(AotCase(name, product, signature, constexprs, warps, stages, aligned, ("HGMMA",)))
        config = _weight_config(dtype)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        data = dict.fromkeys(("grad", "x", "dweight"), f"*{short}")
        ints = dict.fromkeys(("M", "OUT", "IN", "grad_m", "x_m", "words_o", "dweight_o"), "i32")
        constexprs = {"grad_o": 1, "x_i": 1, "dweight_i": 1, **flags, **config}
        aligned = (*data, "words", "M", "OUT", "IN", "grad_m", "x_m", "dweight_o")
        signature = {**data, "words": "*i32", **ints}
        name = f"dW {short} {config['BM']}x{config['BO']}x{config['BI']}"
        cases.append(AotCase(name, weight_product, signature, constexprs, warps, stages, aligned, ("HGMMA",)))
    return cases


AOT_CASES = _cases()
