"""SGD, Adam and AdamW in Triton: one launch steps the survivors of any number of tensors.

A table of addresses says where each tensor lies. A program takes WORDS words of one mask and steps the weights they keep;
loads and stores are predicated by the bits, so memory without survivors costs nothing. Arithmetic is fp32 whatever the
tensors are.

Callers (ops/masked_optim.py) have checked their arguments.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .aot import AotCase

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WORDS = 32  # words of the mask a program takes
FIELDS = 9  # of the table, one row a tensor; see _Table


@triton.jit
def _pointer(table, tensor, FIELD: tl.constexpr, ELEMENT: tl.constexpr, FIELDS: tl.constexpr):
    return tl.load(table + tensor * FIELDS + FIELD).to(tl.pointer_type(ELEMENT))


@triton.jit
def _survivors(table, tensor, row, column, FIELDS: tl.constexpr, WORDS: tl.constexpr):
    """(offsets, survivors, dead weights to be zeroed), each [WORDS, 32], of the words from (row, column) on."""
    rows = tl.load(table + tensor * FIELDS + 6)
    columns = tl.load(table + tensor * FIELDS + 7)
    flags = tl.load(table + tensor * FIELDS + 8)
    address = tl.load(table + tensor * FIELDS + 5)
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
    return r[:, None] * columns + within, inside & (bit != 0), inside & (bit == 0) & zeroed[:, None]


@triton.jit
def sgd(
    table, numbers, blocks, momentum, blend, decay, ELEMENT: tl.constexpr, MOMENTUM: tl.constexpr, DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(block)
    offsets, survivors, dead = _survivors(table, tensor, tl.load(block + 1), tl.load(block + 2), FIELDS, WORDS)
    nothing = tl.zeros((WORDS, 32), ELEMENT)
    param = _pointer(table, tensor, 0, ELEMENT, FIELDS) + offsets
    w = tl.load(param, mask=survivors, other=0.0).to(tl.float32)
    g = tl.load(_pointer(table, tensor, 1, ELEMENT, FIELDS) + offsets, mask=survivors, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if DECAYS:
        g += decay * w
    if MOMENTUM:
        buffer = _pointer(table, tensor, 2, ELEMENT, FIELDS) + offsets
        fresh = (tl.load(table + tensor * FIELDS + 8) & 2) != 0
        b = tl.load(buffer, mask=survivors, other=0.0).to(tl.float32)
        b = tl.where(fresh, g, momentum * b + blend * g)
        tl.store(buffer, b.to(ELEMENT), mask=survivors)
        tl.store(buffer, nothing, mask=dead)
        if NESTEROV:
            g += momentum * b
        else:
            g = b
    tl.store(param, (w - tl.load(numbers + tensor * 2) * g).to(ELEMENT), mask=survivors)
    tl.store(param, nothing, mask=dead)


@triton.jit
def adam(
    table, numbers, blocks, one_minus_beta1, beta2, one_minus_beta2, eps, decay, shrink, ELEMENT: tl.constexpr,
    DECAYS: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(block)
    offsets, survivors, dead = _survivors(table, tensor, tl.load(block + 1), tl.load(block + 2), FIELDS, WORDS)
    nothing = tl.zeros((WORDS, 32), ELEMENT)
    param = _pointer(table, tensor, 0, ELEMENT, FIELDS) + offsets
    first = _pointer(table, tensor, 2, ELEMENT, FIELDS) + offsets
    second = _pointer(table, tensor, 3, ELEMENT, FIELDS) + offsets
    w = tl.load(param, mask=survivors, other=0.0).to(tl.float32) * shrink
    g = tl.load(_pointer(table, tensor, 1, ELEMENT, FIELDS) + offsets, mask=survivors, other=0.0).to(tl.float32)
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
        largest = _pointer(table, tensor, 4, ELEMENT, FIELDS) + offsets
        before = tl.load(largest, mask=survivors, other=0.0).to(tl.float32)
        v = tl.where(before > v, before, v)  # v where it is NaN
        tl.store(largest, v.to(ELEMENT), mask=survivors)
        tl.store(largest, nothing, mask=dead)
    rate = tl.load(numbers + tensor * 2)
    correction = tl.load(numbers + tensor * 2 + 1)
    # A lane that is not stored may divide by zero here.
    w -= rate * (m / (tl.sqrt(v) * correction + eps))
    tl.store(param, w.to(ELEMENT), mask=survivors)
    tl.store(param, nothing, mask=dead)


# ---- launches ----


class _Table:
    """Where the tensors lie, on their device; contiguous copies stand in for tensors that are not contiguous."""

    def __init__(self, params, grads, states, words, clean, fresh, numbers):
        self.copies = []
        rows, sizes = [], []
        for i, p in enumerate(params):
            w = words[i]
            size = (1, p.numel()) if w is None or p.numel() == 0 else (w.shape[0], p.numel() // w.shape[0])
            state = [self._address(s[i], True) if s else 0 for s in states]
            flags = int(clean[i]) | int(fresh[i]) << 1
            own = [self._address(p, True), self._address(grads[i], False)]
            rows.append([*own, *state, self._address(w, False), *size, flags])
            sizes.append(size)
        device = params[0].device
        self.table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        self.numbers = torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
        self.blocks = _blocks(tuple(sizes), device)

    def _address(self, tensor, written):
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            copy = tensor.contiguous()
            self.copies.append((tensor if written else None, copy))
            tensor = copy
        return tensor.data_ptr()

    def write_back(self):
        for original, copy in self.copies:
            if original is not None:
                original.copy_(copy)


@functools.lru_cache(maxsize=64)
def _blocks(sizes, device):
    """int64 [programs, 3] of (tensor, row, word within the row): where each program starts."""
    parts = []
    for i, (rows, columns) in enumerate(sizes):
        per_row = -(-columns // 32)
        start = torch.arange(0, rows * per_row, WORDS)
        parts.append(torch.stack([torch.full_like(start, i), start // max(per_row, 1), start % max(per_row, 1)], 1))
    return torch.cat(parts).to(device)


def sgd_(
    params, grads, momentum_buffers, words, *,
    lr, momentum, dampening, weight_decay, nesterov, maximize, first, clean,
):  # fmt: skip
    """ops.masked_optim.masked_sgd_ for tensors of one dtype on one device; `first` and `clean` are lists."""
    numbers = [(lr, 0.0)] * len(params)
    table = _Table(params, grads, (momentum_buffers, (), ()), words, clean, first, numbers)
    if len(table.blocks):
        with torch.cuda.device_of(params[0]):
            sgd[(len(table.blocks),)](
                table.table, table.numbers, table.blocks, float(momentum), float(1 - dampening), float(weight_decay),
                ELEMENT=DTYPES[params[0].dtype], MOMENTUM=bool(momentum), DECAYS=bool(weight_decay), NESTEROV=nesterov,
                MAXIMIZE=maximize, FIELDS=FIELDS, WORDS=WORDS,
            )  # fmt: skip
    table.write_back()


def adam_(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, words, *,
    step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, clean,
):  # fmt: skip
    """ops.masked_optim.masked_adam_ for tensors of one dtype on one device; `step` and `clean` are lists."""
    numbers = [(lr / (1 - beta1**n), 1 / math.sqrt(1 - beta2**n)) for n in step]
    fresh = [False] * len(params)
    table = _Table(params, grads, (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), words, clean, fresh, numbers)
    decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    if len(table.blocks):
        with torch.cuda.device_of(params[0]):
            adam[(len(table.blocks),)](
                table.table, table.numbers, table.blocks, float(1 - beta1), float(beta2), float(1 - beta2), float(eps),
                float(decay), float(shrink), ELEMENT=DTYPES[params[0].dtype], DECAYS=bool(decay),
                AMSGRAD=bool(max_exp_avg_sqs), MAXIMIZE=maximize, FIELDS=FIELDS, WORDS=WORDS,
            )  # fmt: skip
    table.write_back()


# ---- ahead-of-time cases ----


def _cases():
    pointers = {"table": "*i64", "numbers": "*fp32", "blocks": "*i64"}
    sizes = {"FIELDS": FIELDS, "WORDS": WORDS, "MAXIMIZE": False, "DECAYS": True}
    scalars = dict.fromkeys(("momentum", "blend", "decay"), "fp32")
    moments = dict.fromkeys(("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "shrink"), "fp32")
    cases = []
    for dtype, element in DTYPES.items():
        short = str(dtype).removeprefix("torch.")
        flags = {"ELEMENT": element, **sizes}
        chosen = {**flags, "MOMENTUM": True, "NESTEROV": True}
        cases.append(AotCase(f"sgd {short}", sgd, {**pointers, **scalars}, chosen, divisible_by_16=tuple(pointers)))
        for amsgrad in (False, True) if dtype == torch.float32 else (False,):
            chosen = {**flags, "AMSGRAD": amsgrad}
            name = f"adam {short}{' amsgrad' if amsgrad else ''}"
            cases.append(AotCase(name, adam, {**pointers, **moments}, chosen, divisible_by_16=tuple(pointers)))
    return cases


AOT_CASES = _cases()
