"""Linear layers of unstructured tickets at small batches, from a weight packed for inference.

At batch 1 to 128 a layer takes as long as reading its weight takes, so what is stored is what counts. Three formats
(csrc/decode_linear.h has them bit by bit), all with the survivors' 16-bit values and sums in float32:

- gap4: 4 bits a survivor say how far it lies from the one before; 2.5 bytes a survivor, best for densities .1 to .5.
- gap8: 8 bits; 3 bytes, but hardly ever a filler: best below .1.
- tiles: position in a 16 x 16 tile, 3 bytes, multiplied on the tensor cores: batches that the others read twice for.

The kernels are CUDA C++ for compute capability 8.0 and later. Elsewhere, and for larger batches, the op unpacks the
weight and is a dense layer; `why_dense` says why. A CPU has formats of its own, decode_cpu.py, for which this is the
entrance too.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _ext
from .._ext import DTYPE_CODES, extension
from . import bitmask, decode_cpu
from .library import LIBRARY, transformed

FORMATS = {"gap4": 4, "gap8": 8, "tiles": 16}  # sl::DecodeFormat in csrc/decode_linear.h
MAX_BATCH = 128  # beyond, the time is no longer that of reading the weight
CODES = FORMATS | decode_cpu.FORMATS  # of every format
DTYPES = (torch.float16, torch.bfloat16)
_GROUP, _UNIT, _SIDE, _STEP = 8, 4, 16, 64
_CODE_BYTES = {"gap4": 4, "gap8": 8, "tiles": 4}  # of a group or unit

LIBRARY.define(
    "decode_linear(Tensor x, Tensor starts, Tensor codes, Tensor values, Tensor? bias, int format, int rows, int columns)"
    " -> Tensor"
)


@dataclasses.dataclass(frozen=True)
class DecodeWeight:
    """A weight `[rows, columns]` in one of the formats of CODES.

    Attributes:
        starts: int32 `[rows + 1]`, or `[steps, 2]` for tiles; a CPU's: csrc/decode_cpu.h.
        codes: uint8, where the values belong.
        values: the survivors and what pads them, in one of `dtypes(format)`.
    """

    format: str
    rows: int
    columns: int
    starts: Tensor
    codes: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """What a product reads of the weight."""
        return sum(t.numel() * t.element_size() for t in (self.starts, self.codes, self.values))


def dtypes(format: str) -> tuple[torch.dtype, ...]:
    """The dtypes that values of a format may have."""
    return decode_cpu.DTYPES if format in decode_cpu.FORMATS else DTYPES


def pack(weight: Tensor, words: Tensor, format: str) -> DecodeWeight:
    """Pack the survivors of a weight; done on the CPU, the result lies where the weight does.

    Args:
        weight: `[rows, columns]`, in one of `dtypes(format)`. What lies off the mask is ignored.
        words: its mask, int32 `[rows, ceil(columns / 32)]`.
        format: a key of CODES.

    Raises:
        TypeError, ValueError: not a dense tensor; another dtype, shape or format; bits of `words` beyond the columns; more
            entries than an int32 counts.
    """
    if not isinstance(format, str) or format not in CODES:
        raise ValueError(f"format: expected one of {', '.join(CODES)}, got {format!r}")
    for name, t in (("weight", weight), ("words", words)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided or t.is_meta:
            raise ValueError(f"{name}: expected a dense tensor, got {'a meta tensor' if t.is_meta else t.layout}")
    if weight.dtype not in dtypes(format):
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes(format))
        raise TypeError(f"weight: expected {expected}, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [rows, columns], got {list(weight.shape)}")
    if words.dtype != torch.int32 or tuple(words.shape) != bitmask.words_shape(weight.shape):
        expected = list(bitmask.words_shape(weight.shape))
        raise ValueError(f"words: expected int32 {expected}, got {words.dtype} {list(words.shape)}")
    rows, columns = weight.shape
    dense, mask = weight.detach().cpu().contiguous(), words.cpu().contiguous()
    if (
        columns % 32 and mask.numel() and (mask[:, -1] & -(1 << columns % 32)).any()
    ):  # the kernels would read beyond a row
        raise ValueError(f"words: expected 0 in the bits beyond column {columns}")
    if format in decode_cpu.FORMATS:
        tensors = decode_cpu.pack(dense, mask, format)
        return DecodeWeight(format, rows, columns, *(t.to(weight.device) for t in tensors))
    steps = -(-rows // _SIDE) * -(-columns // _STEP)
    empty = functools.partial(torch.empty, device="cpu")  # whatever torch.set_default_device says
    starts = empty((steps, 2) if format == "tiles" else (rows + 1,), dtype=torch.int32)
    library, code = extension(), FORMATS[format]
    units = library.cpu_decode_linear_layout(code, mask.data_ptr(), rows, columns, starts.data_ptr())
    codes = empty(units, _CODE_BYTES[format], dtype=torch.uint8)
    values = empty(units, _UNIT if format == "tiles" else _GROUP, dtype=weight.dtype)
    library.cpu_decode_linear_pack(
        code,
        dense.data_ptr(),
        mask.data_ptr(),
        rows,
        columns,
        starts.data_ptr(),
        codes.data_ptr(),
        values.data_ptr(),
    )
    return DecodeWeight(format, rows, columns, *(t.to(weight.device) for t in (starts, codes, values)))


def unpack(packed: DecodeWeight) -> Tensor:
    """The dense weight `[rows, columns]`, bit for bit, +0 off the mask. Plain torch, on the device of the packed one."""
    return _unpack(packed.starts, packed.codes, packed.values, CODES[packed.format], packed.rows, packed.columns)


def predicted_bytes(format: str, rows: int, columns: int, density: float) -> float:
    """Bytes of a packed weight whose survivors lie anywhere with equal chance.

    A survivor follows the one before at a geometric distance; each full reach of the code is a filler. A row is padded
    by half a group, a tile by 1.5 entries.
    """
    survivors = rows * columns * density
    if format == "tiles":
        tiles, steps = rows * columns / _SIDE**2, rows * columns / (_SIDE * _STEP)
        filled = 1 - (1 - density) ** (_SIDE**2)
        return 3 * (survivors + 1.5 * filled * tiles) + 8 * steps
    over = (1 - density) ** (2 ** FORMATS[format])
    entries = survivors / (1 - over) if over < 1 else 0.0
    filled = 1 - (1 - density) ** columns
    return (2 + _CODE_BYTES[format] / _GROUP) * (entries + (_GROUP - 1) / 2 * filled * rows) + 4 * rows


def candidates(rows: int, columns: int, density: float, batch: int, device: str = "cuda") -> list[str]:
    """The formats worth measuring on a type of device; on a GPU fewest predicted bytes first, those that beat dense on bytes.

    There a gap kernel takes 8 rows of x at a time, so beyond a few times that the tensor cores' format is alone; below 8 rows
    these would multiply mostly zeros. The bounds are predictions: nothing here has been measured on a GPU yet.
    """
    if device == "cpu":
        return decode_cpu.candidates(rows, columns, density, batch)
    if not 1 <= batch <= MAX_BATCH:
        return []
    possible = [name for name in FORMATS if (batch >= 8 if name == "tiles" else batch <= 32)]
    size = {name: predicted_bytes(name, rows, columns, density) for name in possible}
    return sorted((name for name in possible if size[name] < 2 * rows * columns), key=size.get)


def decode_linear(x: Tensor, packed: DecodeWeight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias for inference; the gradient of x alone is known, through a dense weight.

    A dead weight may count as 0 · x, as in a dense layer: an x that is not finite may make outputs NaN that do not
    depend on it.

    Args:
        x: `[*, columns]` of the dtype of the values.
        packed: from `pack`.
        bias: `[rows]` of that dtype, or None.

    Returns:
        `[*, rows]`.

    Raises:
        TypeError, ValueError: `packed` is not from `pack`; another dtype, shape or device.
    """
    if not isinstance(packed, DecodeWeight):
        raise TypeError(f"packed: expected what pack returns, got {type(packed).__name__}")
    values = packed.values
    for name, t, shape in (("x", x, [packed.columns]), ("bias", bias, [packed.rows])):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got layout {t.layout}")
        if t.dtype != values.dtype:
            raise TypeError(f"{name}: expected {values.dtype} like the weight, got {t.dtype}")
        if t.device != values.device:
            raise ValueError(f"{name}: expected device {values.device} like the weight, got {t.device}")
        if list(t.shape[-1:]) != shape or (name == "bias" and t.dim() != 1):
            expected = f"[*, {shape[0]}]" if name == "x" else shape
            raise ValueError(
                f"{name}: expected {expected} for weight {[packed.rows, packed.columns]}, got {list(t.shape)}"
            )
    wants_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    if transformed() or (torch.is_grad_enabled() and wants_gradient):
        return F.linear(x, unpack(packed), bias)
    return torch.ops.sparselottery.decode_linear(
        x, packed.starts, packed.codes, values, bias, CODES[packed.format], packed.rows, packed.columns
    )


def why_dense(device: torch.device, format: str, columns: int) -> str | None:
    """Why a layer on `device` is computed from an unpacked weight; None: its kernel runs there."""
    if format in decode_cpu.FORMATS:
        return decode_cpu.why_dense(device, format)
    if device.type != "cuda":
        return f"the decode kernels need a CUDA device, the weight is on {device.type}"
    reason = _why_not(device)
    if reason is None and format != "tiles":
        most = _max_columns(device)
        if columns > most:
            return f"a row of x, {columns} columns, is larger than shared memory ({most})"
    return reason


@functools.cache
def _why_not(device):
    reason = _ext.why_no_cuda(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the decode kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


@functools.cache
def _max_columns(device):
    with torch.cuda.device(device):
        return extension().cuda_decode_linear_max_columns()


# ---- the op ----


def _decode(x, starts, codes, values, bias, format, rows, columns):
    name = next(n for n, code in CODES.items() if code == format)
    batch = x.numel() // max(columns, 1)
    on_cpu = name in decode_cpu.FORMATS
    if columns == 0 or (batch > MAX_BATCH and not on_cpu) or why_dense(x.device, name, columns) is not None:
        return F.linear(x, _unpack(starts, codes, values, format, rows, columns), bias)
    if on_cpu:
        return decode_cpu.run(x, starts, codes, values, bias, format, rows, columns)
    return _cuda(x, starts, codes, values, bias, format, rows, columns)


def _cuda(x, starts, codes, values, bias, format, rows, columns):
    """One or two launches; nothing waits for the device."""
    y = x.new_empty((*x.shape[:-1], rows))
    batch = x.numel() // columns
    held = [_aligned(t) for t in (starts, codes, values)]
    inputs = x.contiguous()
    add = None if bias is None else bias.contiguous()
    weight = (format, rows, columns, held[2].shape[0], *(t.data_ptr() for t in held))
    with torch.cuda.device_of(x):
        library = extension()
        scratch = x.new_empty(library.cuda_decode_linear_scratch(weight, batch), dtype=torch.uint8)
        library.cuda_decode_linear(
            weight,
            DTYPE_CODES[x.dtype],
            inputs.data_ptr(),
            0 if add is None else add.data_ptr(),
            y.data_ptr(),
            batch,
            scratch.data_ptr(),
            bitmask.stream_of(x),
        )
    return y


def _aligned(t):
    """Contiguous at an address for 16-byte loads, as `pack` makes it; a view of a larger buffer may be neither."""
    whole = t.is_contiguous() and t.data_ptr() % 16 == 0
    return t if whole else t.clone(memory_format=torch.contiguous_format)


LIBRARY.impl("decode_linear", _decode, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::decode_linear")
def _(x, starts, codes, values, bias, format, rows, columns):
    return x.new_empty((*x.shape[:-1], rows))


# ---- unpacking ----


def _unpack(starts, codes, values, format, rows, columns):
    for name, code in decode_cpu.FORMATS.items():
        if code == format:
            return decode_cpu.unpack(starts, codes, values, name, rows, columns)
    locate = _tile_places if format == FORMATS["tiles"] else _gap_places
    row, column = locate(starts, codes, format, rows, columns)
    # Fillers and padding are zeros in places where there is no survivor, or outside.
    inside = (row < rows) & (column < columns)
    dense = values.new_zeros(rows, columns)
    dense[row[inside], column[inside]] = values.flatten()[inside]
    return dense


def _gap_places(starts, codes, format, rows, columns):
    """Row and column of every entry."""
    if format == FORMATS["gap4"]:
        codes = torch.stack([codes & 15, codes >> 4], -1)
    advance = codes.flatten().long() + 1
    reached = advance.cumsum(0)
    first = starts.long() * _GROUP
    counts = first.diff()
    row = torch.repeat_interleave(torch.arange(rows, device=starts.device), counts)
    before = torch.cat([reached.new_zeros(1), reached])[first[:-1]]
    return row, reached - before[row] - 1


def _tile_places(starts, codes, format, rows, columns):
    """Row and column of every entry."""
    steps = -(-columns // _STEP)
    shifts = torch.arange(0, 32, 8, device=starts.device)
    units = (starts[:, 1:].long() >> shifts & 255).flatten()  # of each tile
    tile = torch.repeat_interleave(torch.arange(units.numel(), device=starts.device), units * _UNIT)
    step, position = tile // 4, codes.flatten().long()
    matrix, within = position // 64, position % 64
    row = step // max(steps, 1) * _SIDE + matrix % 2 * 8 + within // 8
    return row, step % max(steps, 1) * _STEP + tile % 4 * _SIDE + matrix // 2 * 8 + within % 8
