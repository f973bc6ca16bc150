"""SGD, Adam and AdamW that update the survivors only: torch.optim's arguments, arithmetic and checkpoints.

A parameter that a masked layer owns is updated where its mask is 1; elsewhere weight and state are exactly 0 after
every step, also right after pruning in mid-training. All other parameters are updated as torch.optim does. One call
into C++ (CUDA: one kernel launch) updates all parameters of a group.

`master_weights=True` keeps, for parameters of float16 and bfloat16, float32 weights and state (`state["master_param"]`); the
parameter is then the master, rounded, after every step. A parameter that somebody else writes to takes its master along.

CUDA graphs: Adam and AdamW with `capturable=True`, and SGD, can be captured together with the forward and backward pass,
after at least one step outside of the graph. A learning rate that is a tensor on the device is read at each replay; a number
is fixed by the capture. Between replays `prune` and `set_mask` may prune more: masks are read at each replay; the state of what
they prune is zeroed by the next step outside of a graph. Weights that come back need a new capture, for a sparse layer's
kernel may go by what survived when it was captured.
"""

import itertools

import torch
from torch import Tensor

from . import masks
from .ops import masked_optim

__all__ = ["SGD", "Adam", "AdamW"]

_ONE = torch.tensor(1.0)
_HALVES = (torch.float16, torch.bfloat16)


def _check_number(name, value):
    try:
        fits = float(value) >= 0
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number of at least 0, got {value!r}") from None
    if not fits:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")


def _is_captured(params):
    """Whether a CUDA graph is being captured. Does not start CUDA."""
    return params[0].is_cuda and torch.cuda.is_current_stream_capturing()


class _Plan:
    """The lists of one step of one param group, and what must not have changed for them to serve the next one.

    `targets` are the tensors that are stepped: the masters where there are such, else the parameters.
    """

    def __init__(self, params, masters, words, slots, lists, fresh, steps):
        self.params, self.masters, self.words, self.slots, self.lists = params, masters, words, slots, lists
        self.fresh, self.steps = fresh, steps
        self.targets = [p if m is None else m for p, m in zip(params, masters, strict=True)]
        self.copies = [None if m is None else p for p, m in zip(params, masters, strict=True)]
        self.pointers = [p.data_ptr() for p in params]
        self.others = [t for tensors in [*lists, masters, words] for t in tensors if t is not None]
        self.other_pointers = [t.data_ptr() for t in self.others]
        self.sizes = [p.numel() for p in params]
        self.dtypes = [p.dtype for p in params]
        # Ids of what this plan keeps alive.
        self.ids, self.word_ids = [*map(id, params)], [*map(id, words)]
        slotted = [*zip(slots, lists, strict=True), ("step", steps), ("master_param", masters)]
        self.slotted = [(slot, [*map(id, tensors)]) for slot, tensors in slotted]
        self.clean = [False] * len(params)
        self.versions = self._tables = None

    def current_versions(self):
        return [(p._version, None if w is None else w._version) for p, w in zip(self.params, self.words, strict=True)]

    def done(self):
        """To be called after a step: dead weights and their state are 0 now, until somebody writes to them."""
        if not all(self.clean) or any(self.fresh):
            self.clean, self.fresh = [True] * len(self.params), [False] * len(self.params)
            self._tables = None
        self.versions = self.current_versions()

    def tables(self, grads, counted):
        """[(positions, table)] as `masked_optim.tables` makes them, kept from step to step; `counted`: on the device."""
        if self._tables is not None and all(t.serves([grads[i] for i in group]) for group, t in self._tables):
            return self._tables
        states = [*self.lists, *[[]] * (3 - len(self.lists))]
        steps = self.steps if counted else None
        lists = (self.targets, grads, states, self.words, self.clean, self.fresh, self.copies, steps)
        self._tables = masked_optim.tables(*lists)
        return self._tables

    def serves(self, params, grads, words, state, slots) -> bool:
        if slots != self.slots or [*map(id, params)] != self.ids or [*map(id, words)] != self.word_ids:
            return False
        if [p.data_ptr() for p in params] != self.pointers or [g.numel() for g in grads] != self.sizes:
            return False
        if [g.dtype for g in grads] != self.dtypes:
            return False
        owns = [state[p] for p in params]
        for slot, tensors in self.slotted:
            if [id(own.get(slot)) for own in owns] != tensors:
                return False
        # The same tensors in other memory: `state.data = ...`, share_memory_(). The tables keep addresses.
        if [t.data_ptr() for t in self.others] != self.other_pointers:
            return False
        return self.versions == self.current_versions()


class _MaskedOptimizer(torch.optim.Optimizer):
    """What the three have in common: reading masks, keeping plans, refusing what cannot be had."""

    masks_weights = True  # tells masked layers that they need not zero anything after a step

    def __init__(self, params, defaults, master_weights):
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr: expected a number or a tensor of one element, got {list(lr.shape)}")
        for name in ("lr", "weight_decay"):
            _check_number(name, defaults[name])
        if defaults["differentiable"]:
            name = type(self).__name__
            raise ValueError(f"differentiable: not supported by {name}; use torch.optim.{name}")
        if not isinstance(master_weights, bool):
            raise TypeError(f"master_weights: expected True or False, got {master_weights!r}")
        if master_weights:  # not a key of torch.optim's: checkpoints without it are torch.optim's own
            defaults = defaults | {"master_weights": True}
        self._plans = {}
        self._captured = []
        super().__init__(params, defaults)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._plans = {}
        self.__dict__.setdefault("_captured", [])
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            # A checkpoint of torch.optim may ask for it; it changes how a step runs, not what it computes.
            if "differentiable" in group:
                group["differentiable"] = False

    def load_state_dict(self, state_dict):
        """As torch.optim's; float32 state of masters stays float32."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            for slot, value in state_dict["state"].get(key, {}).items():
                # torch has rounded it to the parameter's type.
                if slot != "step" and p.dtype in _HALVES and isinstance(value, Tensor) and value.dtype is torch.float32:
                    self.state[p][slot] = value.detach().to(device=p.device, copy=True)

    def step(self, closure=None):
        """Update the survivors of all parameters that have a gradient.

        Args:
            closure: re-evaluates the model with gradients and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a CUDA graph is being captured, and a replay could not repeat this step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for position, group in enumerate(self.param_groups):
                self._step_group(position, group)
        return loss

    @torch._disable_dynamo  # addresses and plans are nothing to trace; torch.compiler.disable would import the compiler
    def _step_group(self, position, group):
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        words = [masks.words_of(p) for p in params]
        plan = self._plans.get(position)
        if plan is None or not plan.serves(params, grads, words, self.state, self._slots(group)):
            plan = self._plans[position] = self._make_plan(group, params, grads, words)
        captured = _is_captured(params)
        if captured:
            self._check_capture(group, plan)
        # Dropped while the step runs: should it fail half way, the next one starts from nothing.
        del self._plans[position]
        tables = plan.tables(grads, self._counts_on_device(group))
        self._advance(group, plan, tables)
        masked_optim.increment_version(params)
        if captured:
            self._captured.append((plan, tables))  # replays read the tables' memory
        plan.done()
        self._plans[position] = plan

    def _check_capture(self, group, plan):
        if any(plan.fresh):
            raise RuntimeError(
                f"{type(self).__name__}.step: the first step cannot be captured in a CUDA graph, since each replay would "
                "start from fresh state; take one before the capture"
            )

    def _counts_on_device(self, group):
        return False

    def _make_plan(self, group, params, grads, words):
        for p, g in zip(params, grads, strict=True):
            if g.layout != torch.strided:
                raise ValueError(f"{type(self).__name__}: expected dense gradients, got {g.layout}")
            if p.is_complex():
                raise ValueError(f"{type(self).__name__}: expected real parameters, got {p.dtype}")
        slots = self._slots(group)
        lists, fresh, masters = [[] for _ in slots], [], []
        for p in params:
            state = self.state[p]
            self._start(group, state, p)
            masters.append(self._master(group, state, p))
            target = p if masters[-1] is None else masters[-1]
            fresh.append(any(state.get(slot) is None for slot in slots))  # torch.optim.SGD may store None
            for tensors, slot in zip(lists, slots, strict=True):
                if state.get(slot) is None:
                    state[slot] = torch.zeros_like(target, memory_format=torch.preserve_format)
                elif target is not p and state[slot].dtype is p.dtype:  # from a checkpoint without masters
                    state[slot] = state[slot].to(target.dtype)
                tensors.append(state[slot])
        steps = [self.state[p].get("step") for p in params]
        plan = _Plan(params, masters, words, slots, lists, fresh, steps)
        # A state_dict may have brought tensors of any shape; nothing unchecked goes where only addresses count.
        masked_optim.check(params, {"grads": grads}, words)
        masked_optim.check(plan.targets, dict(zip(slots, lists, strict=True)), words)
        return plan

    def _master(self, group, state, p):
        """The float32 weights behind a parameter of lower precision, None where there are none."""
        if not group.get("master_weights") or p.dtype not in _HALVES:
            return state.get("master_param")
        master = state.get("master_param")
        if master is None:
            state["master_param"] = master = p.detach().to(torch.float32)
        else:
            masked_optim.check([master], {}, [None])
            if master.shape != p.shape:
                raise ValueError(f"master_param: expected {list(p.shape)} like its parameter, got {list(master.shape)}")
            # Where the parameter is another one now (loaded, rewound to its initial weights), the master is that.
            master.copy_(torch.where(master.to(p.dtype) == p, master, p))
        return master

    def _start(self, group, state, p):
        """Put into a parameter's state what is not a tensor of its shape."""


class SGD(_MaskedOptimizer):
    """torch.optim.SGD for survivors only.

    Args: torch.optim.SGD's. `foreach` and `fused` are accepted and change nothing: there is one implementation, fused
    over all tensors. State and checkpoints are torch.optim.SGD's too.
        master_weights: see the module.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range; `differentiable=True`.
    """

    def __init__(
        self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, *,
        maximize=False, foreach=None, differentiable=False, fused=None, master_weights=False,
    ):  # fmt: skip
        _check_number("momentum", momentum)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov: expected momentum > 0 and dampening 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "maximize": maximize, "foreach": foreach, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, master_weights)

    def _slots(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def _advance(self, group, plan, tables):
        scalars = {
            "momentum": group["momentum"], "dampening": group["dampening"], "weight_decay": float(group["weight_decay"]),
            "nesterov": group["nesterov"], "maximize": group["maximize"],
        }  # fmt: skip
        for positions, table in tables:
            table.sgd(lr=_rate(group["lr"], plan.params[positions[0]]), **scalars)


def _rate(lr, param):
    """The learning rate as a table takes it: a tensor only on the parameters' device, where nobody has to wait for it."""
    return lr if isinstance(lr, Tensor) and lr.device == param.device else float(lr)


class Adam(_MaskedOptimizer):
    """torch.optim.Adam for survivors only.

    Args: torch.optim.Adam's. `foreach` and `fused` are accepted and change nothing: there is one implementation, fused
    over all tensors. State and checkpoints are torch.optim.Adam's too.
        capturable: step numbers live on the parameters' device, and a step waits for nothing there. On any device.
        master_weights: see the module.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range; `differentiable=True`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
        maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
        master_weights=False,
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
        super().__init__(params, defaults, master_weights)

    def _slots(self, group):
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _start(self, group, state, p):
        step = state.get("step", 0.0)
        if group["capturable"]:
            dtype, device = torch.float32, p.device
        else:
            dtype, device = torch.get_default_dtype(), torch.device("cpu")
            dtype = dtype if dtype == torch.float64 else torch.float32
        if not isinstance(step, Tensor):  # a new parameter, or a checkpoint of an old torch that kept a number
            state["step"] = torch.full((), float(step), dtype=dtype, device=device)
        elif step.device != device or (group["capturable"] and step.dtype != dtype):
            state["step"] = step.to(device=device, dtype=dtype)

    def _check_capture(self, group, plan):
        super()._check_capture(group, plan)
        if not group["capturable"]:
            raise RuntimeError(
                f"{type(self).__name__}.step: a CUDA graph is being captured, but a replay would repeat the same step number; "
                f"make the optimizer with capturable=True"
            )

    def _counts_on_device(self, group):
        return group["capturable"]

    def _advance(self, group, plan, tables):
        beta1, beta2 = group["betas"]
        scalars = {
            "beta1": float(beta1), "beta2": float(beta2), "eps": group["eps"], "weight_decay": float(group["weight_decay"]),
            "decoupled": group["decoupled_weight_decay"], "maximize": group["maximize"],
        }  # fmt: skip
        steps, capturable = plan.steps, group["capturable"]
        if not capturable:
            torch._foreach_add_(steps, _ONE, alpha=1.0)  # a tensor: a number would be wrapped anew for each
            steps = [step.item() for step in steps]
        for positions, table in tables:
            lr = _rate(group["lr"], plan.params[positions[0]]) if capturable else float(group["lr"])
            table.adam(step=[steps[i] for i in positions], lr=lr, **scalars)


class AdamW(Adam):
    """torch.optim.AdamW for survivors only: weight decay multiplies the weights instead of joining the gradient.

    Args: torch.optim.AdamW's; otherwise as `Adam`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
        foreach=None, capturable=False, differentiable=False, fused=None, master_weights=False,
    ):  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True, master_weights=master_weights,
        )  # fmt: skip

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # checkpoints of an older torch do not have the key
