"""SGD, Adam and AdamW that update the survivors only: torch.optim's arguments, arithmetic and checkpoints.

A parameter that a masked layer owns is updated where its mask is 1; elsewhere weight and state are exactly 0 after
every step, also right after pruning in mid-training. All other parameters are updated as torch.optim does. One call
into C++ (CUDA: one kernel launch) updates all parameters of a group.
"""

import torch
from torch import Tensor

from . import masks
from .ops import masked_optim

__all__ = ["SGD", "Adam", "AdamW"]


_ONE = torch.tensor(1.0)


def _check_number(name, value):
    try:
        fits = float(value) >= 0
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number of at least 0, got {value!r}") from None
    if not fits:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")


class _Plan:
    """The lists of one step of one param group, and what must not have changed for them to serve the next one."""

    def __init__(self, params, words, slots, lists, fresh, steps):
        self.params, self.words, self.slots, self.lists = params, words, slots, lists
        self.fresh, self.steps = fresh, steps
        kinds = {(masked_optim.backend_of(p), p.dtype) for p in params}
        self.fast = len(kinds) == 1 and next(iter(kinds))[0] == "cpu"
        self.pointers = [p.data_ptr() for p in params]
        self.others = [t for tensors in [*lists, words] for t in tensors if t is not None]
        self.other_pointers = [t.data_ptr() for t in self.others]
        self.sizes = [p.numel() for p in params]
        self.clean = [False] * len(params)
        self.versions = self._table = None

    def is_fast(self):
        """Whether the extension may be called without the checks and the registered op around it."""
        return self.fast and not torch.compiler.is_compiling()

    def current_versions(self):
        return [(p._version, None if w is None else w._version) for p, w in zip(self.params, self.words, strict=True)]

    def done(self):
        """To be called after a step: dead weights and their state are 0 now, until somebody writes to them."""
        if not all(self.clean) or any(self.fresh):
            self.clean, self.fresh = [True] * len(self.params), [False] * len(self.params)
            self._table = None
        self.versions = self.current_versions()

    def table(self, grads):
        """What the extension needs to know, kept from step to step."""
        if self._table is None or not self._table.serves(grads):
            states = [*self.lists, *[None] * (3 - len(self.lists))]
            self._table = masked_optim.CpuTable(self.params, grads, states, self.words, self.clean, self.fresh)
        return self._table

    def serves(self, params, grads, words, state, slots) -> bool:
        if slots != self.slots or len(params) != len(self.params):
            return False
        for i, p in enumerate(params):
            if p is not self.params[i] or words[i] is not self.words[i] or p.data_ptr() != self.pointers[i]:
                return False
            if grads[i].numel() != self.sizes[i] or grads[i].dtype is not p.dtype:
                return False
            own = state[p]
            for slot, tensors in zip(slots, self.lists, strict=True):
                if own.get(slot) is not tensors[i]:
                    return False
            if own.get("step") is not self.steps[i]:
                return False
        # The same tensors in other memory: `state.data = ...`, share_memory_(). The extension keeps addresses.
        if [t.data_ptr() for t in self.others] != self.other_pointers:
            return False
        return self.versions == self.current_versions()


class _MaskedOptimizer(torch.optim.Optimizer):
    """What the three have in common: reading masks, keeping plans, refusing what cannot be had."""

    masks_weights = True  # tells masked layers that they need not zero anything after a step

    def __init__(self, params, defaults):
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr: expected a number or a tensor of one element, got {list(lr.shape)}")
        for name in ("lr", "weight_decay"):
            _check_number(name, defaults[name])
        for name in ("capturable", "differentiable"):
            if defaults.get(name):
                raise ValueError(
                    f"{name}: not supported by {type(self).__name__}; use torch.optim.{type(self).__name__}"
                )
        self._plans = {}
        super().__init__(params, defaults)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            # A checkpoint of torch.optim may ask for these; they change how a step runs, not what it computes.
            for name in ("capturable", "differentiable"):
                if name in group:
                    group[name] = False

    def step(self, closure=None):
        """Update the survivors of all parameters that have a gradient.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for position, group in enumerate(self.param_groups):
                self._step_group(position, group)
        return loss

    def _step_group(self, position, group):
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        words = [masks.words_of(p) for p in params]
        plan = self._plans.get(position)
        if plan is None or not plan.serves(params, grads, words, self.state, self._slots(group)):
            plan = self._plans[position] = self._make_plan(group, params, grads, words)
        # Dropped while the step runs: should it fail half way, the next one starts from nothing.
        del self._plans[position]
        self._advance(group, plan, grads)
        if plan.is_fast():
            masked_optim.increment_version(params)
        plan.done()
        self._plans[position] = plan

    def _make_plan(self, group, params, grads, words):
        for p, g in zip(params, grads, strict=True):
            if g.layout != torch.strided:
                raise ValueError(f"{type(self).__name__}: expected dense gradients, got {g.layout}")
            if p.is_complex():
                raise ValueError(f"{type(self).__name__}: expected real parameters, got {p.dtype}")
        slots = self._slots(group)
        lists, fresh = [[] for _ in slots], []
        for p in params:
            state = self.state[p]
            self._start(state)
            fresh.append(any(state.get(slot) is None for slot in slots))  # torch.optim.SGD may store None
            for tensors, slot in zip(lists, slots, strict=True):
                if state.get(slot) is None:
                    state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
                tensors.append(state[slot])
        # A state_dict may have brought tensors of any shape; nothing unchecked goes where only addresses count.
        masked_optim.check(params, {"grads": grads} | dict(zip(slots, lists, strict=True)), words)
        return _Plan(params, words, slots, lists, fresh, [self.state[p].get("step") for p in params])

    def _start(self, state):
        """Put into a parameter's state what is not a tensor of its shape."""


class SGD(_MaskedOptimizer):
    """torch.optim.SGD for survivors only.

    Args: torch.optim.SGD's. `foreach` and `fused` are accepted and change nothing: there is one implementation, fused
    over all tensors. State and checkpoints are torch.optim.SGD's too.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range; `differentiable=True`.
    """

    def __init__(
        self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, *,
        maximize=False, foreach=None, differentiable=False, fused=None,
    ):  # fmt: skip
        _check_number("momentum", momentum)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov: expected momentum > 0 and dampening 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _slots(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def _advance(self, group, plan, grads):
        scalars = {
            "lr": float(group["lr"]), "momentum": group["momentum"], "dampening": group["dampening"],
            "weight_decay": float(group["weight_decay"]), "nesterov": group["nesterov"], "maximize": group["maximize"],
        }  # fmt: skip
        if plan.is_fast():
            plan.table(grads).sgd(**scalars)
        else:
            buffers = plan.lists[0] if plan.lists else []
            flags = {"first": plan.fresh, "clean": plan.clean}
            masked_optim.masked_sgd_(plan.params, grads, buffers, plan.words, **flags, **scalars)


class Adam(_MaskedOptimizer):
    """torch.optim.Adam for survivors only.

    Args: torch.optim.Adam's. `foreach` and `fused` are accepted and change nothing: there is one implementation, fused
    over all tensors. State and checkpoints are torch.optim.Adam's too.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range; `capturable=True` or `differentiable=True`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
        maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
    ):  # fmt: skip
        try:
            betas = tuple(float(b) for b in betas)
        except (TypeError, ValueError):
            raise TypeError(f"betas: expected two numbers from 0 to below 1, got {betas!r}") from None
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")
        _check_number("eps", eps)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _slots(self, group):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _start(self, state):
        step = state.get("step", 0.0)
        if not isinstance(step, Tensor):  # a new parameter, or a checkpoint of an old torch that kept a number
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            state["step"] = torch.tensor(float(step), dtype=dtype)

    def _advance(self, group, plan, grads):
        torch._foreach_add_(plan.steps, _ONE, alpha=1.0)  # a tensor: a number would be wrapped anew for each
        beta1, beta2 = group["betas"]
        scalars = {
            "step": [step.item() for step in plan.steps], "lr": float(group["lr"]), "beta1": float(beta1),
            "beta2": float(beta2), "eps": group["eps"], "weight_decay": float(group["weight_decay"]),
            "decoupled": group["decoupled_weight_decay"], "maximize": group["maximize"],
        }  # fmt: skip
        if plan.is_fast():
            plan.table(grads).adam(**scalars)
        else:
            lists = [*plan.lists, []][:3]
            masked_optim.masked_adam_(plan.params, grads, *lists, plan.words, clean=plan.clean, **scalars)


class AdamW(Adam):
    """torch.optim.AdamW for survivors only: weight decay multiplies the weights instead of joining the gradient.

    Args: torch.optim.AdamW's; otherwise as `Adam`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
        foreach=None, capturable=False, differentiable=False, fused=None,
    ):  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
        )  # fmt: skip

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # checkpoints of an older torch do not have the key
