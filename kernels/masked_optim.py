"""SGD, Adam and AdamW in Triton: one launch steps the survivors of any number of tensors.

A table of addresses says where each tensor lies. A program takes WORDS words of one mask and steps the weights they keep;
loads and stores are predicated by the bits, so memory without survivors costs nothing. Arithmetic is fp32 whatever the
tensors are. With master weights the tensors that are stepped are fp32 and their low-precision copies are written beside.

Why Triton and no CUDA C++: torch's CUDA wheels bring Triton along, the kernel is bound by memory and needs neither shared
memory nor shuffles, and ptxas makes the same predicated loads of it (see AOT_CASES); a second version would add nothing.

A step reads nothing back from the device and copies nothing to it as long as gradients keep their addresses. While a CUDA
graph is captured, what must be known on the device travels in kernel arguments, so that a replay finds it again.

Callers (ops/masked_optim.py) have checked their arguments.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WORDS = 32  # words of the mask a program takes
WARPS = 8  # 4 weights a thread: with 4 warps some need 160 registers, and too few programs fit on a multiprocessor
# The table's columns, one row a tensor: four addresses (0: there is none), the mask, then sizes and the other addresses.
PARAM, FIRST, SECOND, LARGEST, MASK, ROWS, COLUMNS, FLAGS, COPY, STEP, TAPS, FIELDS = (
    tl.constexpr(i) for i in range(12)
)


@triton.jit
def _field(table, tensor, FIELD: tl.constexpr):
    return tl.load(table + tensor * FIELDS + FIELD)


@triton.jit
def _pointer(table, tensor, FIELD: tl.constexpr, ELEMENT: tl.constexpr):
    return _field(table, tensor, FIELD).to(tl.pointer_type(ELEMENT))


@triton.jit
def _survivors(table, tensor, row, column, WORDS: tl.constexpr):
    """(offsets, survivors, dead weights to be zeroed), each [WORDS, 32], of the words from (row, column) on."""
    rows = _field(table, tensor, ROWS)
    columns = _field(table, tensor, COLUMNS)
    flags = _field(table, tensor, FLAGS)
    address = _field(table, tensor, MASK)
    taps = _field(table, tensor, TAPS)
    per_row = (columns + 31) // 32
    local = column.to(tl.int32) + tl.arange(0, WORDS)  # 32 bits: 64-bit division is slow
    r = row + local // per_row.to(tl.int32)
    c = local % per_row.to(tl.int32)
    # Scalars join through tl.where: the interpreter makes integers of (bool vector & bool scalar).
    masked = r < tl.where(address != 0, rows, 0)
    zeroed = r < tl.where((flags & 1) == 0, rows, 0)
    words = tl.load(address.to(tl.pointer_type(tl.int32)) + r * per_row + c, mask=masked, other=-1)
    lane = tl.arange(0, 32)
    within = c.to(tl.int64)[:, None] * 32 + lane[None, :]
    inside = (r < rows)[:, None] & (within < columns)
    bit = (words[:, None] >> lane[None, :]) & 1
    place = within
    if taps > 1:  # channels_last: the mask's columns count (channel, tap), memory (tap, channel)
        taps_32 = taps.to(tl.int32)
        w = within.to(tl.int32)
        place = (w % taps_32).to(tl.int64) * (columns // taps) + w // taps_32
    return r[:, None] * columns + place, inside & (bit != 0), inside & (bit == 0) & zeroed[:, None]


@triton.jit
def _write(table, tensor, offsets, w, survivors, dead, ELEMENT: tl.constexpr, COPIES: tl.constexpr):
    """Store the new weights, and their rounded copies where there are such (COPIES: the copies' type, None: none)."""
    param = _pointer(table, tensor, PARAM, ELEMENT) + offsets
    tl.store(param, w.to(ELEMENT), mask=survivors)
    tl.store(param, tl.zeros(w.shape, ELEMENT), mask=dead)
    if COPIES is not None:
        copy = _pointer(table, tensor, COPY, COPIES) + offsets
        tl.store(copy, w.to(COPIES), mask=survivors)
        tl.store(copy, tl.zeros(w.shape, COPIES), mask=dead)


@triton.jit
def sgd(
    table, grads, numbers, blocks, rate, momentum, blend, decay, ELEMENT: tl.constexpr, GRADIENT: tl.constexpr,
    COPIES: tl.constexpr, SHARED: tl.constexpr, MOMENTUM: tl.constexpr, DECAYS: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """SHARED: the learning rate is `rate`; else it is the number at `numbers`."""
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(block)
    offsets, survivors, dead = _survivors(table, tensor, tl.load(block + 1), tl.load(block + 2), WORDS)
    if not SHARED:
        rate = tl.load(numbers)
    w = tl.load(_pointer(table, tensor, PARAM, ELEMENT) + offsets, mask=survivors, other=0.0).to(tl.float32)
    gradient = tl.load(grads + tensor).to(tl.pointer_type(GRADIENT))
    g = tl.load(gradient + offsets, mask=survivors, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if DECAYS:
        g += decay * w
    if MOMENTUM:
        buffer = _pointer(table, tensor, FIRST, ELEMENT) + offsets
        fresh = (_field(table, tensor, FLAGS) & 2) != 0
        b = tl.load(buffer, mask=survivors, other=0.0).to(tl.float32)
        b = tl.where(fresh, g, momentum * b + blend * g)
        tl.store(buffer, b.to(ELEMENT), mask=survivors)
        tl.store(buffer, tl.zeros((WORDS, 32), ELEMENT), mask=dead)
        if NESTEROV:
            g += momentum * b
        else:
            g = b
    _write(table, tensor, offsets, w - rate * g, survivors, dead, ELEMENT, COPIES)


@triton.jit
def adam(
    table, grads, numbers, blocks, rate, correction, shrink, one_minus_beta1, beta2, one_minus_beta2, eps, decay,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, COPIES: tl.constexpr, SHARED: tl.constexpr, DECAYS: tl.constexpr,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """SHARED: rate, correction and shrink are the same for all tensors; else `numbers` has three for each."""
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(block)
    offsets, survivors, dead = _survivors(table, tensor, tl.load(block + 1), tl.load(block + 2), WORDS)
    if not SHARED:
        rate = tl.load(numbers + tensor * 3)
        correction = tl.load(numbers + tensor * 3 + 1)
        shrink = tl.load(numbers + tensor * 3 + 2)
    nothing = tl.zeros((WORDS, 32), ELEMENT)
    first = _pointer(table, tensor, FIRST, ELEMENT) + offsets
    second = _pointer(table, tensor, SECOND, ELEMENT) + offsets
    w = tl.load(_pointer(table, tensor, PARAM, ELEMENT) + offsets, mask=survivors, other=0.0).to(tl.float32) * shrink
    gradient = tl.load(grads + tensor).to(tl.pointer_type(GRADIENT))
    g = tl.load(gradient + offsets, mask=survivors, other=0.0).to(tl.float32)
    m = tl.load(first, mask=survivors, other=0.0).to(tl.float32)
    v = tl.load(second, mask=survivors, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if DECAYS:
        g += decay * w
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    tl.store(first, m.to(ELEMENT), mask=survivors)
    tl.store(second, v.to(ELEMENT), mask=survivors)
    tl.store(first, nothing, mask=dead)
    tl.store(second, nothing, mask=dead)
    if AMSGRAD:
        largest = _pointer(table, tensor, LARGEST, ELEMENT) + offsets
        before = tl.load(largest, mask=survivors, other=0.0).to(tl.float32)
        v = tl.where(before > v, before, v)  # v where it is NaN
        tl.store(largest, v.to(ELEMENT), mask=survivors)
        tl.store(largest, nothing, mask=dead)
    # A lane that is not stored may divide by zero here.
    w -= rate * (m / (tl.sqrt(v) * correction + eps))
    _write(table, tensor, offsets, w, survivors, dead, ELEMENT, COPIES)


@triton.jit
def _power(base, n):
    """base ** n in float64, n from 0 to 2^24 (what a step of float32 can count to)."""
    result = base * 0 + 1
    for _ in range(25):
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def _sum(high, rest):
    """The float64 number that `_two` took apart."""
    return tl.full((), high, tl.float64) + tl.full((), rest, tl.float64)


@triton.jit
def adam_numbers(
    table, numbers, lr, lr_rest, beta1, beta1_rest, beta2, beta2_rest, decay, decay_rest, LR_TENSOR: tl.constexpr,
):  # fmt: skip
    """Count the step of tensor program_id up, on the device, and write its rate, correction and shrink.

    Float64, for 1 - beta2^step cancels; a float64 argument comes as the sum of two float32 numbers.
    """
    tensor = tl.program_id(0).to(tl.int64)
    counter = _pointer(table, tensor, STEP, tl.float32)
    step = tl.load(counter) + 1
    tl.store(counter, step)
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float64)
    else:
        rate = _sum(lr, lr_rest)
    n = step.to(tl.int32)
    bias1 = 1 - _power(_sum(beta1, beta1_rest), n)
    bias2 = 1 - _power(_sum(beta2, beta2_rest), n)
    tl.store(numbers + tensor * 3, (rate / bias1).to(tl.float32))
    tl.store(numbers + tensor * 3 + 1, (1 / tl.sqrt(bias2)).to(tl.float32))
    tl.store(numbers + tensor * 3 + 2, (1 - rate * _sum(decay, decay_rest)).to(tl.float32))


# ---- launches ----


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values, device):
    """int64 [len(values)] on `device`. In a graph's capture, a copy from the host's memory would not be repeatable."""
    if not _capturing(device):
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    target = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(list(target.unbind()), values)  # the numbers go along as arguments of a kernel
    return target


def _two(value):
    """A number as two of float32 whose sum is nearly exact."""
    high = torch.tensor(value, dtype=torch.float32).tolist()
    return high, value - high


def _format(param):
    """The memory format that all tensors of a parameter must have: its own, where the kernels know it."""
    channels_last = param.ndim == 4 and not param.is_contiguous() and param[:1].numel() < 2**31
    if channels_last and param.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class Table:
    """Where the tensors of one kind lie, on their device, kept from step to step.

    A tensor that is neither contiguous nor channels_last, or laid out differently from its parameter, is stood in for by a
    copy. Holds no reference to the others: the caller keeps them alive.

    Args:
        params, grads, words, clean, fresh: lists, as in ops/masked_optim.py; `params` the fp32 masters where there are any.
        states: three lists (SGD: the momentum buffers first; Adam: both moments and AMSGrad's), empty or None: not there.
        copies: low-precision copies of `params` to be written with them, or None.
        steps: float32 tensors on the device that count Adam's steps, or None.
    """

    def __init__(self, params, grads, states, words, clean, fresh, copies=None, steps=None):
        self.device = params[0].device
        self.types = [DTYPES[params[0].dtype], DTYPES[grads[0].dtype], None if not copies else DTYPES[copies[0].dtype]]
        self.amsgrad = bool(states[2])
        self.stand_ins = []
        self.formats = [_format(p) for p in params]
        fields, sizes = [], []
        for i, p in enumerate(params):
            w = words[i]
            rows, columns = (1, p.numel()) if w is None or p.numel() == 0 else (w.shape[0], p.numel() // w.shape[0])
            # Without a mask the order does not matter.
            taps = 1 if w is None or self.formats[i] is torch.contiguous_format else p.shape[2] * p.shape[3]
            own = [self._address(t, i) for t in (p, *(s[i] if s else None for s in states))]
            own.append(0 if w is None else self._address(w, None))
            copy = self._address(copies[i], i) if copies else 0
            counter = 0 if steps is None else steps[i].data_ptr()
            fields += [*own, rows, columns, int(clean[i]) | int(fresh[i]) << 1, copy, counter, taps]
            sizes.append((rows, columns))
        self.count = len(params)
        self.table = _upload(fields, self.device)
        self.blocks = _blocks(sizes, self.device)
        self.numbers = torch.empty(self.count * 3, dtype=torch.float32, device=self.device)
        self.addresses = None
        self._take(grads)

    def _address(self, tensor, i, written=True):
        """Of a tensor of parameter i; i None: of a mask."""
        if tensor is None:
            return 0
        wanted = torch.contiguous_format if i is None else self.formats[i]
        if not tensor.is_contiguous(memory_format=wanted):
            copy = tensor.contiguous(memory_format=wanted)
            self.stand_ins.append((tensor if written and i is not None else None, copy))
            tensor = copy
        return tensor.data_ptr()

    def _take(self, grads):
        addresses = [self._address(g, i, False) for i, g in enumerate(grads)]
        if addresses != self.addresses or _capturing(self.device):
            self.grads, self.addresses = _upload(addresses, self.device), addresses

    def serves(self, grads) -> bool:
        """Take other gradients of the same parameters. False where they, or anything else, need copies."""
        if self.stand_ins:
            return False
        self._take(grads)
        return not self.stand_ins

    def _launch(self, kernel, *arguments, **flags):
        if len(self.blocks):
            element, gradient, copies = self.types
            kernel[(len(self.blocks),)](
                self.table, self.grads, *arguments, ELEMENT=element, GRADIENT=gradient, COPIES=copies, WORDS=WORDS,
                num_warps=WARPS, **flags,
            )  # fmt: skip
        for original, copy in self.stand_ins:
            if original is not None:
                original.copy_(copy)

    def sgd(self, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
        """One step; `lr` a number or a tensor of one element on the device."""
        with torch.cuda.device_of(self.table):
            shared = not isinstance(lr, Tensor)
            numbers = self.numbers if shared else lr.to(torch.float32)
            self._launch(
                sgd, numbers, self.blocks, float(lr) if shared else 0.0, float(momentum), float(1 - dampening),
                float(weight_decay), SHARED=shared, MOMENTUM=bool(momentum), DECAYS=bool(weight_decay), NESTEROV=nesterov,
                MAXIMIZE=maximize,
            )  # fmt: skip

    def adam(self, *, step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize):
        """One step; `step`: numbers, or the tensors that the table was made with, which are counted up."""
        with torch.cuda.device_of(self.table):
            shrinks = weight_decay if decoupled else 0.0
            if isinstance(step[0], Tensor):
                shared, three = False, (0.0, 0.0, 1.0)
                rate = (lr, 0.0) if isinstance(lr, Tensor) else _two(lr)
                adam_numbers[(self.count,)](
                    self.table, self.numbers, *rate, *_two(beta1), *_two(beta2), *_two(shrinks),
                    LR_TENSOR=isinstance(lr, Tensor), num_warps=1,
                )  # fmt: skip
            else:
                known = {n: (lr / (1 - beta1**n), 1 / math.sqrt(1 - beta2**n), 1 - lr * shrinks) for n in set(step)}
                shared, three = len(known) == 1, known[step[0]]
                if not shared:  # parameters that came late, or had no gradient for a while
                    numbers = torch.tensor([known[n] for n in step], dtype=torch.float32)
                    self.numbers = numbers.to(self.device, non_blocking=True)
            decay = 0.0 if decoupled else weight_decay
            self._launch(
                adam, self.numbers, self.blocks, *three, float(1 - beta1), float(beta2), float(1 - beta2), float(eps),
                float(decay), SHARED=shared, DECAYS=bool(decay), AMSGRAD=self.amsgrad, MAXIMIZE=maximize,
            )  # fmt: skip


def _blocks(sizes, device):
    """int64 [programs, 3] of (tensor, row, word within the row): where each program starts. Nothing waits for the device."""
    words = [rows * -(-columns // 32) for rows, columns in sizes]
    programs = [-(-n // WORDS) for n in words]
    starts = [end - n for end, n in zip(itertools.accumulate(programs), programs, strict=True)]
    about = _upload([*starts, *(max(-(-columns // 32), 1) for _, columns in sizes)], device).view(2, -1)
    program = torch.arange(sum(programs), device=device)
    # Of tensors with the same start all but the last are empty.
    tensor = torch.searchsorted(about[0].contiguous(), program, right=True) - 1
    first = (program - about[0][tensor]) * WORDS
    per_row = about[1][tensor]
    return torch.stack([tensor, first // per_row, first % per_row], 1)


# ---- ahead-of-time cases ----


def _cases():
    pointers = {"table": "*i64", "grads": "*i64", "numbers": "*fp32", "blocks": "*i64"}
    rates = dict.fromkeys(("rate", "momentum", "blend", "decay"), "fp32")
    moments = ("rate", "correction", "shrink", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay")
    moments = dict.fromkeys(moments, "fp32")
    flags = {"WORDS": WORDS, "MAXIMIZE": False, "DECAYS": True}
    # (parameters, gradients, copies); the last two have master weights.
    types = [(t, t, None) for t in DTYPES] + [(torch.float32, t, t) for t in (torch.float16, torch.bfloat16)]
    cases = []
    for kind in types:
        element, gradient, copies = (DTYPES.get(t) for t in kind)
        short = str(kind[0]).removeprefix("torch.") + (f" master of {kind[2]}".replace("torch.", "") if kind[2] else "")
        for shared in (True, False):
            own = {**flags, "ELEMENT": element, "GRADIENT": gradient, "COPIES": copies, "SHARED": shared}
            short = f"{short}{'' if shared else ' capturable'}"
            chosen = {**own, "MOMENTUM": True, "NESTEROV": True}
            cases.append(
                AotCase(f"sgd {short}", sgd, {**pointers, **rates}, chosen, WARPS, divisible_by_16=tuple(pointers))
            )
            for amsgrad in (False, True) if kind[0] == torch.float32 else (False,):
                chosen = {**own, "AMSGRAD": amsgrad}
                name = f"adam {short}{' amsgrad' if amsgrad else ''}"
                cases.append(
                    AotCase(name, adam, {**pointers, **moments}, chosen, WARPS, divisible_by_16=tuple(pointers))
                )
    scalars = ("lr_rest", "beta1", "beta1_rest", "beta2", "beta2_rest", "decay", "decay_rest")
    scalars = dict.fromkeys(scalars, "fp32")
    for tensor in (True, False):
        signature = {"table": "*i64", "numbers": "*fp32", "lr": "*fp32" if tensor else "fp32", **scalars}
        name = f"adam numbers, lr {'tensor' if tensor else 'number'}"
        cases.append(
            AotCase(name, adam_numbers, signature, {"LR_TENSOR": tensor}, 1, divisible_by_16=("table", "numbers"))
        )
    return cases


AOT_CASES = _cases()
