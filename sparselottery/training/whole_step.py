"""Training a multilayer perceptron on a CPU without a way back to Python between steps.

A step of a small network costs more in Python and autograd than in arithmetic. `sl.Trainer` therefore hands networks made of
linear layers and ReLU to C++ (csrc/whole_step.h), which runs forward, cross-entropy, backward and optimizer for a stretch of
minibatches at once: layers up to half density as survivors alone, the others as dense matrices. Losses and weights are
those of the module path up to rounding; the same network, data and seed give the same bits on every run and for any number
of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ext, masks
from ..nn.compiled_mlp import has_global_hooks, layers_of, make_network
from ..nn.linear import MaskedLinear
from ..ops import dispatch
from ..ops.masked_optim import increment_version

# Before Python looks for Ctrl-C: steps, and multiply-adds forward by a network without a mask (about a second in all).
LONGEST, WORK = 500, 8 * 10**9
# Where there are no vectors of eight, a library's dense product is far ahead: only what is mostly gone is worth it.
_DENSEST_PORTABLE = 0.2

_OPTIMIZERS = {
    "sgd": {"momentum", "dampening", "weight_decay", "nesterov"},
    "adam": {"betas", "eps", "weight_decay", "decoupled_weight_decay"},
    "adamw": {"betas", "eps", "weight_decay"},
}
_WITHOUT_EFFECT = {"foreach", "fused"}


def why_not(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], optimizer, options: dict, loss) -> str | None:
    """Why this training cannot run in C++, None if it can.

    Args:
        data: name -> (x [N, *], y [N]), on the model's device. optimizer, options, loss: as `sl.Trainer` has them.
    """
    if _ext.WHY_NOT is not None:
        return f"the extension is missing: {_ext.WHY_NOT}"
    if dispatch.forced() not in (None, "cpu"):
        return f"SPARSELOTTERY_BACKEND={dispatch.forced()}"
    if loss is not F.cross_entropy:
        return "the loss is not torch.nn.functional.cross_entropy"
    if not isinstance(optimizer, str):
        return "the optimizer is the caller's own"
    unknown = set(options) - _OPTIMIZERS[optimizer] - _WITHOUT_EFFECT
    if unknown:
        return f"optimizer option {min(unknown)!r}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if has_global_hooks():
        return "a hook on all modules"
    layers = layers_of(model)
    if isinstance(layers, str):
        return layers
    seen = set()
    for linear, _ in layers:
        if not isinstance(linear, MaskedLinear) and masks.words_of(linear.weight) is not None:
            return "a weight that a layer elsewhere masks"
        for p in linear._parameters.values():
            if p is None:
                continue
            if not p.requires_grad:
                return "a parameter that is not trained"
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                return "a hook on a parameter"
            if p.data_ptr() in seen:  # as one object, or two in one memory
                return "layers share a parameter"
            seen.add(p.data_ptr())
    if _ext.extension().cpu_isa() == "portable" and any(
        (linear.density if isinstance(linear, MaskedLinear) else 1.0) > _DENSEST_PORTABLE for linear, _ in layers
    ):
        return "dense layers, and no vector instructions for them"
    features, classes = layers[0][0].in_features, layers[-1][0].out_features
    flattens = any(isinstance(m, nn.Flatten) for m in model.modules())
    for name, (x, y) in data.items():
        if x.dtype is not torch.float32 or x[0].numel() != features or (x.ndim != 2 and not flattens):
            return f"{name} is not made of float32 vectors of {features} features"
        if int(y.min()) < 0 or int(y.max()) >= classes:
            return f"{name} has labels that are no class"
    return None


class WholeStep:
    """One network in C++, from its present weights on; `store` writes them back into the model.

    Made only where `why_not` found nothing. Optimizer state starts at zero, as that of a new optimizer does.

    Args:
        model: an nn.Sequential. optimizer: a new optimizer of `sl.optim` over its parameters, whose options are read.
    """

    longest = 1  # steps in one call of `run`: more once a minibatch was seen
    masks_weights = True

    def __init__(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, data: dict[str, tuple[Tensor, Tensor]]):
        optimizer.zero_grad(set_to_none=True)  # as after a step: gradients from before are gone
        self.layers = layers_of(model)
        self.total = 0.0
        group = optimizer.param_groups[0]
        self.rate = float(group["lr"])
        self.data = {
            name: (x.detach().resolve_neg().flatten(1).contiguous(), y.contiguous()) for name, (x, y) in data.items()
        }
        adam = "betas" in group
        beta1, beta2 = group["betas"] if adam else (0.0, 0.0)
        self.network = make_network(
            self.layers,
            adam=adam,
            momentum=float(group.get("momentum", 0)),
            dampening=float(group.get("dampening", 0)),
            nesterov=bool(group.get("nesterov", False)),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0)),
            decoupled=bool(group.get("decoupled_weight_decay", False)),
            weight_decay=float(group["weight_decay"]),
        )

    def run(self, order: Tensor, factors: Sequence[float]) -> None:
        """Train on one minibatch for each of `factors` on the learning rate.

        Args:
            order: int64 [steps * batch], contiguous: which training examples, minibatch after minibatch.
        """
        x, y = self.data["train"]
        batch = len(order) // len(factors)
        rates = [self.rate * factor for factor in factors]
        self.total += self.network.train(x.data_ptr(), x.stride(0), y.data_ptr(), order.data_ptr(), batch, rates)
        weights = sum(linear.in_features * linear.out_features for linear, _ in self.layers)
        self.longest = max(1, min(LONGEST, WORK // (batch * weights)))

    def take_loss(self) -> float:
        """The sum of the minibatches' mean losses since the last call."""
        total, self.total = self.total, 0.0
        return total

    def evaluate(self, part: str) -> tuple[float, float]:
        """Mean loss and accuracy on a part of the data."""
        x, y = self.data[part]
        loss, right = self.network.evaluate(x.data_ptr(), x.stride(0), y.data_ptr(), len(y))
        return loss / len(y), right / len(y)

    def store(self) -> None:
        """Write the weights and biases into the model."""
        for i, (linear, _) in enumerate(self.layers):
            bias = linear.bias
            self.network.store(i, linear.weight.data_ptr(), 0 if bias is None else bias.data_ptr())
            increment_version([linear.weight] if bias is None else [linear.weight, bias])
