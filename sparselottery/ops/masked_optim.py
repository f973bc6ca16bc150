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
    check(params, {"grads": grads} | ({"momentum_buffers": momentum_buffers} if momentum else {}), words)
    count = len(params)
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
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    state |= {"max_exp_avg_sqs": max_exp_avg_sqs} if max_exp_avg_sqs else {}
    check(params, {"grads": grads} | state, words)
    count = len(params)
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
    """Raise TypeError or ValueError unless each list of tensors of `like_params` {name: list} fits `params`."""
    for name, tensors in (("params", params), *like_params.items(), ("words", words)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or not p.is_floating_point() or p.layout != torch.strided:
            got = f"{p.dtype} ({p.layout})" if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"params[{i}]: expected a dense floating-point tensor, got {got}")
    for name, tensors in like_params.items():
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


def tables(params, grads, states, words, clean, fresh, copies=None, steps=None) -> list:
    """[(positions, table)]: what steps the tensors of one backend, device and dtype in one call, unchecked.

    A table has `sgd` and `adam`, which take the numbers of `masked_sgd_` and `masked_adam_`, and `serves(grads)`: whether it can
    go on with other gradients of the same tensors. It keeps addresses: a caller that keeps a table keeps the tensors alive, and
    their memory where it is.

    Args:
        params, grads, words, clean, fresh: lists, as in `masked_sgd_` (`fresh`: its `first`).
        states: three lists of tensors (SGD: momentum buffers first; Adam: both moments, AMSGrad's), empty where there are none.
        copies: for each parameter None, or a tensor of its gradient's dtype that follows it, rounded; the parameter is then its
            float32 master.
        steps: tensors that count Adam's steps, where `adam` will be called with them instead of numbers.
    """
    groups = {}
    for i, p in enumerate(params):
        copy = copies[i] if copies else None
        groups.setdefault((backend_of(p), p.device, p.dtype, None if copy is None else copy.dtype), []).append(i)
    made = []
    for (backend, _, _, copied), group in groups.items():
        lists = [_take(x, group) for x in (params, grads)]
        lists.append([_take(s, group) if s else [] for s in states])
        lists += [_take(x, group) for x in (words, clean, fresh)]
        lists += [_take(copies, group) if copied else None, _take(steps, group) if steps else None]
        made.append((group, _table_class(backend)(*lists)))
    return made


def _table_class(backend):
    if backend == "triton":
        from ..kernels import masked_optim

        return masked_optim.Table
    return CpuTable if backend == "cpu" else ReferenceTable


def _sgd(
    params, grads, momentum_buffers, words, lr, momentum, dampening, weight_decay, nesterov, maximize, first, clean
):
    scalars = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    scalars |= {"nesterov": nesterov, "maximize": maximize}
    for _, table in tables(params, grads, (momentum_buffers, [], []), words, clean, first):
        table.sgd(**scalars)
    increment_version([*params, *momentum_buffers])


def _adam(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, words, step, lr, beta1, beta2, eps, weight_decay, decoupled,
    maximize, clean,
):  # fmt: skip
    scalars = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    scalars |= {"decoupled": decoupled, "maximize": maximize}
    states, fresh = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), [False] * len(params)
    for group, table in tables(params, grads, states, words, clean, fresh):
        table.adam(step=_take(step, group), **scalars)
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs])


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
_ONE = torch.tensor(1.0)


class CpuTable:
    """What the extension reads about CPU tensors of one dtype: addresses, sizes, flags. See `tables`.

    Contiguous copies stand in for tensors that are not contiguous or of another dtype than the parameters;
    `_write_back` puts results where they belong.
    """

    def __init__(self, params, grads, states, words, clean, fresh, copies=None, steps=None):
        self.dtype = params[0].dtype
        self.count = len(params)
        self.integers = []
        self.stand_ins = []
        self.followers = list(zip(copies, params, strict=True)) if copies else []
        empty = [None] * len(params)
        states = [s or empty for s in states]
        for p, g, a, b, m, w, c, f in zip(params, grads, *states, words, clean, fresh, strict=True):
            rows, columns = 1, p.numel()
            if w is not None and columns:
                rows = w.size(0)
                columns //= rows
            self.integers += (
                self._address(p, True), self._address(g.to(self.dtype), False, g), self._address(a, True),
                self._address(b, True), self._address(m, True), self._address(w, False), rows, columns, c, f,
            )  # fmt: skip

    def _address(self, tensor, written, stands_for=None):
        if tensor is None:
            return 0
        if not tensor.is_contiguous() or (stands_for is not None and stands_for is not tensor):
            copy = tensor.contiguous()
            self.stand_ins.append((tensor if written else None, copy))
            tensor = copy
        return tensor.data_ptr()

    def serves(self, grads) -> bool:
        """Take other gradients of the same parameters. False where they, or anything else, need copies."""
        if self.stand_ins:
            return False
        for i, g in enumerate(grads):
            if not g.is_contiguous() or g.dtype is not self.dtype:
                return False
            self.integers[_FIELDS * i + 1] = g.data_ptr()
        return True

    def _write_back(self):
        for original, copy in self.stand_ins:
            if original is not None:
                original.copy_(copy)
        for copy, param in self.followers:
            copy.copy_(param)

    def sgd(self, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
        """One step; the arguments of `masked_sgd_`, `lr` also a tensor of one element."""
        numbers = [_number(lr), 0.0] * self.count
        _ext.extension().cpu_masked_optim_sgd(
            self.integers, numbers, _ext.DTYPE_CODES[self.dtype], momentum, dampening, weight_decay, nesterov, maximize
        )
        self._write_back()

    def adam(self, *, step, lr, beta1, beta2, eps, weight_decay, decoupled, maximize):
        """One step; the arguments of `masked_adam_`, `step` a list of numbers, or of tensors, which are counted up."""
        if isinstance(step[0], Tensor):
            torch._foreach_add_(step, _ONE, alpha=1.0)
            step = [_number(n) for n in step]
        lr = _number(lr)
        numbers = []
        for n in step:
            numbers += (lr / (1 - beta1**n), 1 / math.sqrt(1 - beta2**n))
        decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
        _ext.extension().cpu_masked_optim_adam(
            self.integers, numbers, _ext.DTYPE_CODES[self.dtype], beta1, beta2, eps, decay, shrink, maximize
        )
        self._write_back()


def _number(value):
    """A number, or the one in a CPU tensor of one element."""
    return value.detach().reshape(()).tolist() if isinstance(value, Tensor) else value


# ---- reference: tensor by tensor; what is a tensor on a device stays there ----


class ReferenceTable:
    """Plain torch for any device and dtype. See `tables`."""

    def __init__(self, params, grads, states, words, clean, fresh, copies=None, steps=None):
        self.states = [s or [None] * len(params) for s in states]
        self.params, self.grads, self.words, self.fresh = params, grads, words, fresh
        self.copies = copies or [None] * len(params)

    def serves(self, grads) -> bool:
        self.grads = grads
        return True

    def _each(self):
        # What stands behind the yield runs after the step of that parameter.
        for i, (p, g, w, copy) in enumerate(zip(self.params, self.grads, self.words, self.copies, strict=True)):
            yield i, p, g.to(p.dtype), w
            if copy is not None:
                copy.copy_(p)

    def sgd(self, *, lr, **scalars):
        """One step; the arguments of `masked_sgd_`, `lr` also a tensor of one element."""
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        for i, p, g, w in self._each():
            reference.masked_sgd_(p, g, self.states[0][i], w, first=self.fresh[i], lr=lr, **scalars)

    def adam(self, *, step, lr, **scalars):
        """One step; the arguments of `masked_adam_`, `step` a list of numbers, or of tensors, which are counted up."""
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        if isinstance(step[0], Tensor):
            torch._foreach_add_(step, 1.0)
            step = [n.reshape(()).double() for n in step]
        for i, p, g, w in self._each():
            reference.masked_adam_(p, g, *(s[i] for s in self.states), w, step=step[i], lr=lr, **scalars)
