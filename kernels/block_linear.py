"""Block-sparse linear layer in Triton: y = x Wᵀ + b, dX = dY W, dW∘M, for a weight that is 0 off a mask of blocks.

The weight lies dense in memory. A product takes strips of its rows, 64 or 128 at a time, and in each strip only the units
of 16, 32 or 64 columns that hold a survivor, so many of them to a step that a step is 64 columns deep: blocks of 16 and 32
are multiplied several at once. Two blocks beside each other along the strip share what is loaded of x, which is why strips
are 64 rows high even where blocks are 16: loads, not products, bound such small blocks. dX takes strips of columns and
units of rows; dW the strips and units of the forward pass, and masks what it stores where units hold dead weights too.

The index of a mask is made once (`strips`, `chunks`). No mask is looked at inside a product's loop, and both factors go
from memory to the tensor cores as they are. Nothing is added atomically: results repeat bit for bit.

Callers (ops/block_linear.py) have checked their arguments and keep the indexes.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .aot import AotCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = isinstance(tl.cdiv, InterpretedFunction)


@triton.jit
def _columns(units, t, UNIT: tl.constexpr, DEPTH: tl.constexpr):
    """The DEPTH column numbers of step t: those of DEPTH / UNIT units one after the other."""
    within = tl.arange(0, DEPTH)
    if UNIT == DEPTH:
        return tl.load(units + t) * UNIT + within
    unit = tl.load(units + t * (DEPTH // UNIT) + within // UNIT)
    # Each unit starts at a multiple of its length: the compiler may load it in pieces of 16 bytes.
    return tl.max_contiguous(tl.multiple_of(unit * UNIT + within % UNIT, UNIT), UNIT)


@triton.jit
def product(
    source, weight, first, units, bias, target, M, OUT, IN,
    source_m, source_i, weight_o, weight_i, target_m, target_o,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """target [M, OUT] = source [M, IN] @ weightᵀ + bias; for dX the strides are those of the transposed weight.

    `first` [strips + 1] says where a strip's steps start; `units` [steps, BI / UNIT] which units of columns a step takes.
    A unit past the last column is there to fill a step, and reads zeros.
    """
    strip = tl.program_id(1)
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ro = strip * BO + tl.arange(0, BO)
    alive_m = rm < M
    alive_o = ro < OUT
    source_rows = source + rm * source_m
    weight_rows = weight + ro.to(tl.int64) * weight_o
    if BM < 64:  # few rows: the weight's strip is the side of the product that has to be 64 high
        acc = tl.zeros((BO, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BO), tl.float32)
    for t in range(tl.load(first + strip), tl.load(first + strip + 1)):
        ri = _columns(units, t, UNIT, BI)
        alive_i = ri < IN
        a = tl.load(
            source_rows[:, None] + (ri.to(tl.int64) * source_i)[None, :],
            mask=alive_m[:, None] & alive_i[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_rows[:, None] + (ri.to(tl.int64) * weight_i)[None, :],
            mask=alive_o[:, None] & alive_i[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if BM < 64:
            acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if BM < 64:
        acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + ro, mask=alive_o, other=0.0).to(tl.float32)[None, :]
    tl.store(
        target + (rm * target_m)[:, None] + (ro.to(tl.int64) * target_o)[None, :],
        acc.to(target.dtype.element_ty),
        mask=alive_m[:, None] & alive_o[None, :],
    )


@triton.jit
def weight_product(
    grad, x, words, strips, units, dweight, M, OUT, IN, grad_m, grad_o, x_m, x_i, words_o, dweight_o, dweight_i,
    MASK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dweight = (gradᵀ x)∘M for one chunk: a strip of rows by BI / UNIT of its live units of columns.

    `strips` [chunks], `units` [chunks, BI / UNIT]. What no chunk covers is not written: `dweight` starts as zeros.
    MASK: whether live units hold dead weights.
    """
    chunk = tl.program_id(0)
    ro = (tl.load(strips + chunk) * BO + tl.arange(0, BO)).to(tl.int64)
    ri = _columns(units, chunk, UNIT, BI)
    alive_o = ro < OUT
    alive_i = ri < IN
    columns = ri.to(tl.int64)
    acc = tl.zeros((BO, BI), tl.float32)
    for start in range(0, M, BM):
        rm = start + tl.arange(0, BM).to(tl.int64)
        alive_m = rm < M
        a = tl.load(
            grad + (rm * grad_m)[:, None] + (ro * grad_o)[None, :], mask=alive_m[:, None] & alive_o[None, :], other=0.0
        )
        b = tl.load(
            x + (rm * x_m)[:, None] + (columns * x_i)[None, :], mask=alive_m[:, None] & alive_i[None, :], other=0.0
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    stored = alive_o[:, None] & alive_i[None, :]
    if MASK:
        word = tl.load(words + (ro * words_o)[:, None] + (ri // 32)[None, :], mask=stored, other=0)
        acc = tl.where(((word >> (ri % 32)[None, :]) & 1) != 0, acc, 0.0)
    tl.store(
        dweight + (ro * dweight_o)[:, None] + (columns * dweight_i)[None, :],
        acc.to(dweight.dtype.element_ty),
        mask=stored,
    )


# ---- tiles ----


def tiling(block, dtype):
    """(rows of a strip, columns of a unit) for blocks of `block` rows and columns."""
    high, wide = block
    unit = next((u for u in (64, 32, 16) if wide % u == 0), 16)
    if dtype == torch.float32:  # three TF32 products a step: larger tiles spill registers
        return 64, min(unit, 32)
    return 128 if high % 128 == 0 else 64, unit


def _config(dtype, rows, strip):
    """Tile sizes (rows of the batch, outputs, inputs) by hand; no search at run time.

    A loop that loads where to load from has two buffers fewer than num_stages.
    """
    if dtype == torch.float32:
        return {"BM": 64 if rows > 32 else 16, "BO": strip, "BI": 32, "num_warps": 4, "num_stages": 5}
    if rows <= 64:
        BM = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return {"BM": BM, "BO": strip, "BI": 64, "num_warps": 4, "num_stages": 6}
    if strip == 128:
        return {"BM": 128, "BO": strip, "BI": 64, "num_warps": 8, "num_stages": 6}
    if rows <= 128:
        return {"BM": 128, "BO": strip, "BI": 64, "num_warps": 4, "num_stages": 6}
    return {"BM": 256, "BO": strip, "BI": 64, "num_warps": 8, "num_stages": 5}


def _weight_config(dtype, strip):
    if dtype == torch.float32:
        return {"BM": 32, "BO": strip, "BI": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BO": strip, "BI": 128, "num_warps": 8 if strip == 128 else 4, "num_stages": 4}


# ---- the index of a mask, from bool [strips, units] of where survivors are: ops/block_linear.py keeps what these return ----


def _packed(live, depth):
    """(first [strips + 1], units [steps, depth]) int32: each strip's live units in order, `depth` to a step."""
    row, unit = live.nonzero(as_tuple=True)
    counts = live.sum(1)
    steps = (counts + depth - 1) // depth
    first = torch.zeros(live.shape[0] + 1, dtype=torch.int64, device=live.device)
    first[1:] = steps.cumsum(0)
    place = torch.arange(len(row), device=live.device) - (counts.cumsum(0) - counts)[row]
    units = torch.full((int(first[-1]) * depth,), live.shape[1], dtype=torch.int32, device=live.device)
    units[first[row] * depth + place] = unit.to(torch.int32)
    return first.to(torch.int32), units.view(-1, depth)


def strips(live, tiles, dtype):
    """The index that `forward` takes; that of `backward_input` is made from strips of columns and units of rows."""
    return *tiles, *_packed(live, (32 if dtype == torch.float32 else 64) // tiles[1])


def chunks(live, tiles, dtype, partial):
    """The index that `backward_weight` takes; `partial`: whether live units hold dead weights."""
    first, units = _packed(live, _weight_config(dtype, tiles[0])["BI"] // tiles[1])
    owners = torch.arange(len(live), dtype=torch.int32, device=live.device)
    return *tiles, torch.repeat_interleave(owners, first[1:] - first[:-1]), units, partial


# ---- launches ----


def _precision(dtype):
    """fp32 as torch.matmul does it: TF32 where allowed, else three TF32 products (fp32 accuracy)."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _options(tensor):
    if tensor.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16 for Triton, got {tensor.dtype}")
    # The interpreter's bf16 products are wrong (triton-lang/triton#11584).
    return {"PRECISION": _precision(tensor.dtype), "UPCAST": INTERPRETED and tensor.dtype == torch.bfloat16}


@functools.cache
def _shared_memory(device):
    """Bytes of shared memory that a block of threads may ask for on a device."""
    properties = torch.cuda.get_device_properties(device)
    small = (properties.major, properties.minor) in ((8, 6), (8, 9), (12, 0), (12, 1))
    return getattr(properties, "shared_memory_per_block_optin", (99 if small else 163) << 10)


def _fitting(config, tensor, factors, unfilled):
    """`config` with as many stages as its buffers fit into shared memory: `factors` elements each, `unfilled` stages without."""
    if not tensor.is_cuda:
        return config
    most = (_shared_memory(tensor.device) - 2048) // (factors * tensor.element_size()) + unfilled  # 2 KB for indexes
    return config | {"num_stages": max(1, min(config["num_stages"], most))}


def _product(source, weight, index, bias):
    """source [M, in] and weight [out, in], any strides -> [M, out]."""
    strip, unit, first, units = index
    (rows, inputs), outputs = source.shape, weight.shape[0]
    target = torch.empty(rows, outputs, dtype=source.dtype, device=source.device)
    if target.numel() == 0:
        return target
    bias = None if bias is None else bias.contiguous()  # its kernel knows no stride
    options, config = _options(source), _config(source.dtype, rows, strip)
    config = _fitting(config, source, (config["BM"] + config["BO"]) * config["BI"], 2)
    with torch.cuda.device_of(source):
        product[(triton.cdiv(rows, config["BM"]), triton.cdiv(outputs, strip))](
            source, weight, first, units, bias, target, rows, outputs, inputs, *source.stride(), *weight.stride(),
            *target.stride(), BIAS=bias is not None, UNIT=unit, **options, **config,
        )  # fmt: skip
    return target


def forward(x, weight, index, bias=None):
    """y `[rows, out]` from x `[rows, in]` and weight `[out, in]` that is 0 off the mask; `index`: from `strips`."""
    return _product(x, weight, index, bias)


def backward_input(grad, weight, index):
    """dX `[rows, in]` from grad `[rows, out]`; `index`: from `strips`, of the mask transposed."""
    return _product(grad, weight.t(), index, None)


def backward_weight(grad, x, words, index):
    """dW∘M `[out, in]` from grad `[rows, out]` and x `[rows, in]`; `index`: from `chunks`."""
    strip, unit, owners, units, partial = index
    dweight = torch.zeros(grad.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    if len(owners) == 0 or grad.shape[0] == 0:
        return dweight
    options, config, words = _options(x), _weight_config(x.dtype, strip), words.contiguous()
    config = _fitting(config, x, (config["BO"] + config["BI"]) * config["BM"], 0)
    with torch.cuda.device_of(x):
        weight_product[(len(owners),)](
            grad, x, words, owners, units, dweight, grad.shape[0], *dweight.shape, *grad.stride(), *x.stride(),
            words.stride(0), *dweight.stride(), MASK=partial, UNIT=unit, **options, **config,
        )  # fmt: skip
    return dweight


# ---- ahead-of-time cases: what the launches above use, with contiguous tensors ----


def _cases():
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for dtype, short in names.items():
        precisions = ("tf32", "tf32x3") if dtype == torch.float32 else ("tf32",)
        # Blocks, and the batches that pick each tile; fp16 compiles like bf16: its largest tiles stand for all.
        sizes = {
            torch.float32: [(16, (64,)), (32, (16, 64))],
            torch.float16: [(128, (256,)), (64, (256,)), (16, (256,))],
            torch.bfloat16: [(128, (16, 32, 64, 256)), (64, (16, 32, 64, 128, 256)), (32, (16, 256)), (16, (16, 256))],
        }[dtype]
        for precision in precisions:
            label = f"{short} {precision}" if dtype == torch.float32 else short
            flags = {"PRECISION": precision, "UPCAST": False}
            for block, batches in sizes:
                strip, unit = tiling((block, block), dtype)
                for rows in batches:
                    for transposed in (False, True):
                        yield _product_case(label, short, flags, _config(dtype, rows, strip), unit, transposed)
                yield _weight_case(label, short, flags, _weight_config(dtype, strip), unit, block < 64)


def _product_case(label, short, flags, config, unit, transposed):
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    data = dict.fromkeys(("source", "weight", "bias", "target"), f"*{short}")
    lists = dict.fromkeys(("first", "units"), "*i32")
    row = "weight_i" if transposed else "weight_o"
    ints = dict.fromkeys(("M", "OUT", "IN", "source_m", row, "target_m"), "i32")
    ones = {"source_i": 1, "weight_o" if transposed else "weight_i": 1, "target_o": 1}
    return AotCase(
        name=f"{'dX' if transposed else 'y'} {label} {config['BM']}x{config['BO']}x{config['BI']} units of {unit}",
        fn=product,
        signature={**data, **lists, **ints},
        constexprs={**ones, **flags, **config, "UNIT": unit, "BIAS": not transposed},
        num_warps=warps,
        num_stages=stages,
        divisible_by_16=(*data, *lists, *ints),
        expect=("HGMMA",),
    )


def _weight_case(label, short, flags, config, unit, mask):
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    data = dict.fromkeys(("grad", "x", "dweight"), f"*{short}")
    lists = dict.fromkeys(("words", "strips", "units"), "*i32")
    ints = dict.fromkeys(("M", "OUT", "IN", "grad_m", "x_m", "words_o", "dweight_o"), "i32")
    return AotCase(
        name=f"dW {label} {config['BO']}x{config['BI']}x{config['BM']} units of {unit}{' masked' if mask else ''}",
        fn=weight_product,
        signature={**data, **lists, **ints},
        constexprs={"grad_o": 1, "x_i": 1, "dweight_i": 1, **flags, **config, "UNIT": unit, "MASK": mask},
        num_warps=warps,
        num_stages=stages,
        divisible_by_16=(*data, *lists, "M", "OUT", "IN", "grad_m", "x_m", "dweight_o"),
        expect=("HGMMA",),
    )


AOT_CASES = list(_cases())
