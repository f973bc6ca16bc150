"""Linear layers of unstructured tickets at small batches on a CPU, from a weight packed for inference.

Three formats (csrc/decode_cpu.h has them bit by bit), values in float32 or bfloat16, sums in float32:

- slots: 32 rows side by side, for each survivor its column of a block of 64 in one byte. x of 32 survivors comes out of
  registers by two permutations (AVX-512) instead of 32 loads. 5 bytes a survivor, and a tenth to a half more of padding.
- windows: the same over two blocks at a time, so that rows share slots better: hardly any padding, twice the permutations.
  For weights that the caches do not hold.
- bitmask: a bit a weight, and the survivors' values, which are spread over the columns of their bits: fewest bytes from
  a density of .3 on.

Where these kernels do not run (no extension, another device or dtype) the op is a dense layer.
"""

import functools

import torch
from torch import Tensor

from .. import _ext
from .._ext import DTYPE_CODES, extension
from .huge_pages import settled

FORMATS = {"slots": 32, "windows": 33, "bitmask": 64}  # sl::CpuFormat in csrc/decode_cpu.h
DTYPES = (torch.float32, torch.bfloat16)
MAX_BATCH = 8  # worth measuring: masked_linear uses each survivor of a batch of 16 at once, and is faster
_PLACES, _ROWS = 32, 8  # rows of a slice: of slots, of the bitmask
_BLOCK, _EMPTY = 64, 128
_LANES = [place % 16 // 4 * 8 + place // 16 * 4 + place % 4 for place in range(_PLACES)]


def pack(weight: Tensor, words: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """starts, codes and values of a contiguous weight on the CPU and the words of its mask."""
    (rows, columns), library, code = weight.shape, extension(), FORMATS[format]
    slices = library.cpu_decode_cpu_slices(code, rows, columns)
    empty = functools.partial(torch.empty, device="cpu")  # whatever torch.set_default_device says
    starts = empty((slices + 1, 2 + _PLACES) if format != "bitmask" else (slices + 1,), dtype=torch.int32)
    sizes = library.cpu_decode_cpu_layout(code, words.data_ptr(), rows, columns, starts.data_ptr())
    codes, values = empty(sizes[0], dtype=torch.uint8), empty(sizes[1], dtype=weight.dtype)
    tensors = (weight, words, starts, codes, values)
    dtype = DTYPE_CODES[weight.dtype]
    library.cpu_decode_cpu_pack(code, rows, columns, dtype, *(t.data_ptr() for t in tensors))
    return starts, settled(codes), settled(values)


def unpack(starts: Tensor, codes: Tensor, values: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """The dense weight, bit for bit. Plain torch."""
    if format == "bitmask":
        row, column, live = _mask_places(starts, codes, columns)
    else:
        row, column, live = _slot_places(starts, codes, columns, format == "windows")
    dense = values.new_zeros(rows, columns)
    dense[row[live], column[live]] = values[: live.numel()][live]
    return dense


def candidates(rows: int, columns: int, density: float, batch: int) -> list[str]:
    """The formats worth measuring."""
    return list(FORMATS) if 1 <= batch <= MAX_BATCH and rows * columns > 0 and density < 0.95 else []


def why_dense(device: torch.device, format: str) -> str | None:
    """Why a layer on `device` is computed from an unpacked weight; None: its kernel runs there."""
    if device.type != "cpu":
        return f"the kernels of format {format} run on a CPU, the weight is on {device.type}"
    return None if _ext.WHY_NOT is None else f"the extension is missing: {_ext.WHY_NOT}"


def run(x: Tensor, starts: Tensor, codes: Tensor, values: Tensor, bias: Tensor | None, format: int, rows, columns):
    """y `[*, rows]`. `x` and `bias` have the dtype of `values`; none is empty but bias may be None."""
    held = [t.contiguous() for t in (starts, codes, values)]
    add = None if bias is None else bias.float().contiguous()
    return product(x.float().contiguous(), *held, add, format, rows, columns).to(x.dtype)


def product(x, starts, codes, values, bias, format, rows, columns):
    """The same of contiguous tensors, x and bias in float32, without looking at anything: one call into C++."""
    y = x.new_empty(x.shape[0], rows) if x.ndim == 2 else x.new_empty((*x.shape[:-1], rows))  # a tuple costs 1 us
    extension().cpu_decode_cpu(
        format,
        rows,
        columns,
        DTYPE_CODES[values.dtype],
        starts.data_ptr(),
        codes.data_ptr(),
        values.data_ptr(),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // columns,
    )
    return y


def _slot_places(starts, codes, columns, windows):
    """Row and column of every value, and which values are survivors."""
    blocks, slices = -(-columns // _BLOCK), starts.shape[0] - 1
    steps, overflow = (int(n) for n in starts[-1, :2])
    order = starts[:-1, 2:].long()
    header = -(-slices * blocks // 64) * 64
    counts = codes[: slices * blocks].long()
    block = torch.repeat_interleave(torch.arange(slices * blocks, device=codes.device), counts)  # of each step
    slot = codes[header : header + _PLACES * steps].view(steps, _PLACES)[:, _LANES].long()
    row = order[block // max(blocks, 1)] if steps else order.new_empty(0, _PLACES)
    first = (block % max(blocks, 1))[:, None]
    if windows:  # bit 6 of the code: that of the block's number
        column = (first + ((slot // _BLOCK ^ first) & 1)) * _BLOCK + slot % _BLOCK
    else:
        column = first * _BLOCK + slot
    parts = codes[header + _PLACES * steps :].view(overflow, 4).long()
    code = (parts << torch.arange(0, 32, 8, device=codes.device)).sum(1)
    slice_ = torch.repeat_interleave(torch.arange(slices, device=codes.device), starts[:, 1].long().diff())
    row = torch.cat([row.flatten(), order[slice_, code % _PLACES]])
    column = torch.cat([column.flatten(), code // _PLACES])
    return row, column, torch.cat([(slot < _EMPTY).flatten(), torch.ones_like(code, dtype=torch.bool)])


def _mask_places(starts, codes, columns):
    """Row and column of every survivor."""
    blocks, slices = -(-columns // _BLOCK), starts.shape[0] - 1
    bits = codes[:, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    where = bits.view(slices, blocks, _ROWS, _BLOCK).nonzero()
    row, column = where[:, 0] * _ROWS + where[:, 2], where[:, 1] * _BLOCK + where[:, 3]
    return row, column, torch.ones_like(row, dtype=torch.bool)
