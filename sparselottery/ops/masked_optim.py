"""One optimizer step for many tensors at once: SGD, Adam and AdamW that update the survivors of a mask only.

Sources: torch.optim.SGD (Sutskever's form of momentum), Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW),
Reddi et al. 2018 (AMSGrad). At the survivors the results equal torch.optim's up to rounding. A dead weight and its
state become +0 and stay so, whatever stood there and whatever its gradient is (NaN too).

Backends: cpu (C++; float32 and float64), triton (CUDA tensors but float64), reference (everything else).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext, kernels
from . import dispatch, reference
from .library import LIBRARY

_SGD = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] words, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool[] first, bool[] clean) -> ()"
)
_ADAM = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor?[] words, float[] step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize, bool[] clean) -> ()"
)
LIBRARY.define("masked_sgd_" + _SGD)
LIBRARY.define("masked_adam_" + _ADAM)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    words: Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool | Sequence[bool] = False,
    clean: bool | Sequence[bool] = False,
) -> None:
    """One step of SGD at the survivors, in place.

    Args:
        params: floating-point tensors of any shapes and strides.
        grads: one for each parameter: its shape, dtype and device.
        momentum_buffers: likewise; an empty list when `momentum` is 0.
        words: for each parameter int32 `[rows, ceil(columns / 32)]`, or None: a dense parameter.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        first: this step is the first use of the momentum buffers, whose content is then ignored (for all, or one each).
        clean: the caller's promise that parameter and state are already 0 off the mask (for all, or one each). Memory
            without survivors is then neither read nor written, which is where the speed at high sparsity comes from.
            Without the promise zeros are written there.

    Raises:
        TypeError, ValueError: lists or tensors that do not fit; the message names the argument.
    """
    count = len(params)
    check(params, {"grads": grads, "momentum_buffers": momentum_buffers if momentum else None}, words)
    torch.ops.sparselottery.masked_sgd_(
        params, grads, momentum_buffers if momentum else [], words, lr, momentum, dampening, weight_decay, nesterov,
        maximize, _each("first", first, count), _each("clean", clean, count),
    )  # fmt: skip


def masked_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    words: Sequence[Tensor | None],
    *,
    step: float | Sequence[float],
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clean: bool | Sequence[bool] = False,
) -> None:
    """One step of Adam at the survivors, in place.

    Args:
        params, grads, words, clean: as in `masked_sgd_`.
        exp_avgs, exp_avg_sqs: first and second moments, one for each parameter: its shape, dtype and device.
        max_exp_avg_sqs: likewise for AMSGrad; an empty list without it.
        step: the number of this step, from 1 (for all, or one each).
        lr, beta1, beta2, eps, weight_decay, maximize: as in torch.optim.Adam.
        decoupled: weight decay multiplies the weights (AdamW) instead of joining the gradient.

    Raises:
        TypeError, ValueError: lists or tensors that do not fit; the message names the argument.
    """
    count = len(params)
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs or None}
    check(params, {"grads": grads} | state, words)
    steps = _each("step", step, count)
    if any(s < 1 for s in steps):
        raise ValueError(f"step: expected numbers from 1, got {min(steps)}")
    torch.ops.sparselottery.masked_adam_(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [], words, steps, lr, beta1, beta2, eps, weight_decay,
        decoupled, maximize, _each("clean", clean, count),
    )  # fmt: skip


def _each(name, value, count):
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} entries like params, got {len(value)}")
    return list(value)


def check(params, like_params, words) -> None:
    """Raise TypeError or ValueError unless each list of tensors of `like_params` {name: list or None} fits `params`."""
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or not p.is_floating_point():
            got = p.dtype if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"params[{i}]: expected a floating-point tensor, got {got}")
    for name, tensors in like_params.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors like params, got {len(tensors)}")
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if not isinstance(t, Tensor) or t.dtype != p.dtype or t.layout != torch.strided:
                got = f"{t.dtype} ({t.layout})" if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name}[{i}]: expected a dense {p.dtype} tensor like params[{i}], got {got}")
            if t.shape != p.shape or t.device != p.device:
                wanted, got = (f"{list(x.shape)} on {x.device}" for x in (p, t))
                raise ValueError(f"{name}[{i}]: expected {wanted} like params[{i}], got {got}")
    if len(words) != len(params):
        raise ValueError(f"words: expected {len(params)} entries like params, got {len(words)}")
    for i, (p, w) in enumerate(zip(params, words, strict=True)):
        if w is None:
            continue
        expected = reference.words_shape(p.shape)
        if not isinstance(w, Tensor) or w.dtype != torch.int32 or tuple(w.shape) != expected or w.device != p.device:
            got = f"{w.dtype} {list(w.shape)} on {w.device}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"words[{i}]: expected int32 {list(expected)} on {p.device} for params[{i}], got {got}")


# ---- which backend ----

_CPU_DTYPES = (torch.float32, torch.float64)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def backend_of(param: Tensor) -> str:
    """Which backend steps a parameter: "cpu", "triton" or "reference".

    SPARSELOTTERY_BACKEND=reference forces the last; the other backends' names are ignored here.

    Raises:
        ValueError: SPARSELOTTERY_BACKEND names no backend at all.
    """
    if dispatch.forced() == "reference":
        return "reference"
    if param.device.type == "cpu" and param.dtype in _CPU_DTYPES and _ext._C is not None:
        return "cpu"
    if param.device.type == "cuda" and param.dtype in _TRITON_DTYPES and kernels.AVAILABLE:
        return "triton"
    return "reference"


def _split(params) -> dict:
    """{(backend, device, dtype): positions}: each group is one call."""
    groups = {}
    for i, p in enumerate(params):
        groups.setdefault((backend_of(p), p.device, p.dtype), []).append(i)
    return groups


def _sgd(
    params, grads, momentum_buffers, words, lr, momentum, dampening, weight_decay, nesterov, maximize, first, clean
):
    scalars = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    scalars |= {"nesterov": nesterov, "maximize": maximize}
    for backend, group in _split(params).items():
        p, g, b, w, f, c = (_take(x, group) for x in (params, grads, momentum_buffers, words, first, clean))
        if backend[0] == "reference":
            for i in range(len(p)):
                reference.masked_sgd_(p[i], g[i], b[i] if b else None, w[i], first=f[i], **scalars)
        else:
            _sgd_of(backend[0])(p, g, b, w, first=f, clean=c, **scalars)
    increment_version([*params, *momentum_buffers])


def _adam(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, words, step, lr, beta1, beta2, eps, weight_decay, decoupled,
    maximize, clean,
):  # fmt: skip
    scalars = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    scalars |= {"decoupled": decoupled, "maximize": maximize}
    for backend, group in _split(params).items():
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, words, step, clean)
        p, g, a, b, m, w, n, c = (_take(x, group) for x in lists)
        if backend[0] == "reference":
            for i in range(len(p)):
                reference.masked_adam_(p[i], g[i], a[i], b[i], m[i] if m else None, w[i], step=n[i], **scalars)
        else:
            _adam_of(backend[0])(p, g, a, b, m, w, step=n, clean=c, **scalars)
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs])


def _sgd_of(backend):
    if backend == "cpu":
        return cpu_sgd
    from ..kernels import masked_optim

    return masked_optim.sgd_


def _adam_of(backend):
    if backend == "cpu":
        return cpu_adam
    from ..kernels import masked_optim

    return masked_optim.adam_


LIBRARY.impl("masked_sgd_", _sgd, "CompositeExplicitAutograd")
LIBRARY.impl("masked_adam_", _adam, "CompositeExplicitAutograd")


@torch.library.register_fake("sparselottery::masked_sgd_")
def _(*arguments):
    return None


@torch.library.register_fake("sparselottery::masked_adam_")
def _(*arguments):
    return None


def _take(values, positions):
    return values if len(positions) >= len(values) else [values[i] for i in positions]


try:
    torch.autograd.graph.increment_version([])
    increment_version = torch.autograd.graph.increment_version
except (TypeError, AttributeError, RuntimeError):  # an older torch takes one tensor at a time

    def increment_version(tensors):
        for t in tensors:
            torch.autograd.graph.increment_version(t)


# ---- cpu: one call of the extension for all tensors of one dtype; also the fast path of sparselottery.optim ----


_FIELDS = 10  # of sl::OptimTensor that travel as integers, see optim_tensors in csrc/bindings.cpp


class CpuTable:
    """What the extension reads about CPU tensors of one dtype, unchecked: addresses, sizes, flags.

    Contiguous copies stand in for tensors that are not contiguous; `write_back` puts results where they belong.
    Holds no reference to other tensors: the caller keeps them alive.
    """

    def __init__(self, params, grads, states, words, clean, fresh):
        self.code = _ext.DTYPE_CODES[params[0].dtype]
        self.count = len(params)
        self.integers = []
        self.copies = []
        empty = [None] * len(params)
        states = [s or empty for s in states]
        for p, g, a, b, m, w, c, f in zip(params, grads, *states, words, clean, fresh, strict=True):
            rows, columns = 1, p.numel()
            if w is not None and columns:
                rows = w.size(0)
                columns //= rows
            self.integers += (
                self._address(p, True), self._address(g, False), self._address(a, True), self._address(b, True),
                self._address(m, True), self._address(w, False), rows, columns, c, f,
            )  # fmt: skip

    def _address(self, tensor, written):
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            copy = tensor.contiguous()
            self.copies.append((tensor if written else None, copy))
            tensor = copy
        return tensor.data_ptr()

    def serves(self, grads) -> bool:
        """Take other gradients of the same parameters. False where they, or anything else, need copies."""
        if self.copies:
            return False
        for i, g in enumerate(grads):
            if not g.is_contiguous():
                return False
            self.integers[_FIELDS * i + 1] = g.data_ptr()
        return True

    def write_back(self):
        for original, copy in self.copies:
            if original is not None:
                original.copy_(copy)

    def sgd(self, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
        """One step; the arguments of `masked_sgd_`."""
        numbers = [lr, 0.0] * self.count
        _ext.extension().cpu_masked_optim_sgd(
            self.integers, numbers, self.code, momentum, dampening, weight_decay, nesterov, maximize
        )
        self.write_back()

    def adam(self, *, step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize):
        """One step; the arguments of `masked_adam_`, `step` a list."""
        numbers = []
        for n in step:
            numbers += (lr / (1 - beta1**n), 1 / math.sqrt(1 - beta2**n))
        decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
        _ext.extension().cpu_masked_optim_adam(
            self.integers, numbers, self.code, beta1, beta2, eps, decay, shrink, maximize
        )
        self.write_back()


def cpu_sgd(params, grads, momentum_buffers, words, *, first, clean, **scalars):
    """masked_sgd_ for CPU tensors of one dtype, unchecked; `first` and `clean` are lists."""
    CpuTable(params, grads, (momentum_buffers, None, None), words, clean, first).sgd(**scalars)


def cpu_adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, words, *, clean, **scalars):
    """masked_adam_ for CPU tensors of one dtype, unchecked; `step` and `clean` are lists."""
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    CpuTable(params, grads, states, words, clean, [False] * len(params)).adam(**scalars)
