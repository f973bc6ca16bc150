"""Training on a CPU without a way back to Python between steps.

A step of a small network costs more in Python and autograd than in arithmetic, and a sparse layer is fastest in a layout of its
own. `sl.Trainer` therefore hands Sequentials of linear layers, convolutions, pooling, BatchNorm and ReLU to C++
(csrc/network.h), which runs forward, cross-entropy, backward and optimizer for a stretch of minibatches at once. Losses and
weights are those of the module path up to rounding; the same network, data and seed give the same bits on every run and for
any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ext, masks
from ..nn import network
from ..nn.compiled_mlp import DENSEST, has_global_hooks
from ..nn.dead_units import DROPOUTS
from ..nn.invariant import MaskedWeight
from ..ops import dispatch
from ..ops.masked_optim import increment_version

# Before Python looks for Ctrl-C: steps, and multiply-adds forward by a network without a mask (about a second in all).
LONGEST, WORK = 500, 8 * 10**9
# Where there are no vectors of eight, a library's dense product is far ahead: only what is mostly gone is worth it.
_DENSEST_PORTABLE = 0.2

# A library's dense product is ahead where a convolution has so many channels on both sides (conv-6, batch 60: 0.95 of the module
# path's speed, conv-4 1.18), and where a linear layer of so many weights is read once for each 64 of a batch larger than this:
# (weights, batch). 784-1024-1024-10: 1.16 of the module path's speed at batch 128, 0.93 at 512; 784-512-512-10: 1.09 at 512.
_WIDE, _LARGE = 128, ((1 << 19, 128), (1 << 20, 64))

_OPTIMIZERS = {
    "sgd": {"momentum", "dampening", "weight_decay", "nesterov"},
    "adam": {"betas", "eps", "weight_decay", "decoupled_weight_decay"},
    "adamw": {"betas", "eps", "weight_decay"},
}
_WITHOUT_EFFECT = {"foreach", "fused"}


def why_not(
    model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], optimizer, options: dict, loss, batch: int
) -> str | None:
    """Why this training cannot run in C++, None if it can.

    Args:
        data: name -> (x [N, *], y [N]), on the model's device. optimizer, options, loss, batch: as `sl.Trainer` has them.
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
    for module in model.modules():
        if isinstance(module, DROPOUTS) and module.p > 0:
            return f"a {type(module).__name__}: it drops while training"
    run = network.whole(model)
    if isinstance(run, str):
        return run
    if run.gives != "features":
        return "its outputs are images"
    layers = [module for module, _ in run.layers if next(module.parameters(), None) is not None]
    seen = set()
    for layer in layers:
        if not isinstance(layer, MaskedWeight) and masks.words_of(layer.weight) is not None:
            return "a weight that a layer elsewhere masks"
        for p in layer._parameters.values():
            if p is None:
                continue
            if not p.requires_grad:
                return "a parameter that is not trained"
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                return "a hook on a parameter"
            if p.data_ptr() in seen:  # as one object, or two in one memory
                return "layers share a parameter"
            seen.add(p.data_ptr())
    shapes = []
    for name, (x, y) in data.items():
        if x.dtype is not torch.float32:
            return f"{name} is not float32"
        try:
            shapes = network.check_shapes(run, _input_shape(run, x))
        except ValueError as error:
            return f"{name} does not fit the model: {error}"
        if int(y.min()) < 0 or int(y.max()) >= shapes[-1][0]:
            return f"{name} has labels that are no class"
    for (_, fields), (_, height, width) in zip(run.layers, shapes, strict=True):
        if fields["kind"] == "batch_norm" and batch * height * width == 1:
            return "BatchNorm with one value a channel"  # an error, which the module has words for
    return _why_slower(run, shapes, batch)


def _input_shape(run, x) -> tuple[int, int, int]:
    if run.takes == "image" and x.ndim == 4:
        return tuple(x.shape[1:])
    if run.takes == "any" or (run.takes == "features" and x.ndim == 2):
        return (x[0].numel(), 1, 1)
    raise ValueError(f"expected {'images' if run.takes == 'image' else 'vectors'}, got {list(x.shape)}")


def _why_slower(run, shapes, batch) -> str | None:
    """Why the modules would be faster. A rule and no stopwatch: a training takes the same way whenever it is run."""
    layers = [
        (module, fields["kind"], module.density if isinstance(module, MaskedWeight) else 1.0, height * width)
        for (module, fields), (_, height, width) in zip(run.layers, shapes, strict=True)
        if "outputs" in fields
    ]
    if _ext.extension().cpu_isa() == "portable" and max(d for _, _, d, _ in layers) > _DENSEST_PORTABLE:
        return "dense layers, and no vector instructions for them"
    kept = library = 0.0
    for module, kind, density, pixels in layers:
        shape = module.weight.shape
        sparse = density <= (network.CONV_DENSEST if kind == "conv2d" else DENSEST)
        work = module.weight.numel() * pixels * (density if sparse else 1.0)
        kept += work
        if kind == "conv2d":
            library += work * (not sparse and min(shape[:2]) >= _WIDE)
        else:
            library += work * (not sparse and any(module.weight.numel() > n and batch > b for n, b in _LARGE))
    if library > kept / 2:
        return "mostly large dense layers, which a library runs faster"
    return None


def _work(run, shapes) -> int:
    """Multiply-adds of one example's way forward through the layers without their masks."""
    return max(
        1, sum(m.weight.numel() * s[1] * s[2] for (m, f), s in zip(run.layers, shapes, strict=True) if "outputs" in f)
    )


class WholeStep:
    """One network in C++, from its present weights on; `store` writes them back into the model.

    Made only where `why_not` found nothing. Optimizer state starts at zero, as that of a new optimizer does.

    Args:
        model: an nn.Sequential. optimizer: a new optimizer of `sl.optim` over its parameters, whose options are read.
    """

    longest = 1  # steps in one call of `run`: more once a minibatch was seen
    steps = stored = 0  # taken, and written to the model
    masks_weights = True

    def __init__(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, data: dict[str, tuple[Tensor, Tensor]]):
        optimizer.zero_grad(set_to_none=True)  # as after a step: gradients from before are gone
        self.compiled = network.whole(model)
        self.total = 0.0
        group = optimizer.param_groups[0]
        self.rate = float(group["lr"])
        self.data = {
            name: (x.detach().resolve_neg().flatten(1).contiguous(), y.contiguous()) for name, (x, y) in data.items()
        }
        adam = "betas" in group
        beta1, beta2 = group["betas"] if adam else (0.0, 0.0)
        options = {
            "adam": adam,
            "momentum": group.get("momentum", 0),
            "dampening": group.get("dampening", 0),
            "nesterov": group.get("nesterov", False),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group.get("eps", 0),
            "decoupled": group.get("decoupled_weight_decay", False),
            "weight_decay": group["weight_decay"],
        }
        shape = _input_shape(self.compiled, next(iter(data.values()))[0])
        numbers = {name: float(value) for name, value in options.items()}
        self.network = network.make(self.compiled, shape, numbers, linear_densest=DENSEST)
        self.work = _work(self.compiled, network.check_shapes(self.compiled, shape))

    def run(self, order: Tensor, factors: Sequence[float]) -> None:
        """Train on one minibatch for each of `factors` on the learning rate.

        Args:
            order: int64 [steps * batch], contiguous: which training examples, minibatch after minibatch.
        """
        x, y = self.data["train"]
        batch = len(order) // len(factors)
        rates = [self.rate * factor for factor in factors]
        self.total += self.network.train(x.data_ptr(), x.stride(0), y.data_ptr(), order.data_ptr(), batch, rates)
        self.steps += len(factors)
        self.longest = max(1, min(LONGEST, WORK // (batch * self.work)))

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
        """Write parameters and BatchNorm's statistics into the model."""
        for i, (module, fields) in enumerate(self.compiled.layers):
            network.store(self.network, i, module)
            changed = [p for p in module._parameters.values() if p is not None]
            if fields["kind"] == "batch_norm":
                changed += [module.running_mean, module.running_var]
                if module.num_batches_tracked is not None:
                    module.num_batches_tracked.add_(self.steps - self.stored)
            increment_version(changed)
        self.stored = self.steps
