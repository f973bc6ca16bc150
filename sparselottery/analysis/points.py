"""The loss of one network at many points of its parameter space, many of them in one forward pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..nn.convert import densify
from ..nn.packed import PackedWeight

MEMORY = 256 << 20  # bytes that a forward pass of a stack of points may take
MOST_EXAMPLES = 1000  # in a forward pass of one point


class Points:
    """A network of which only the parameters change: `points(states, coordinates)` gives its loss and accuracy at each.

    The network runs as in evaluation; its buffers (running statistics of BatchNorm) stay those of `model`. Points are stacked
    along a batch axis (`torch.func.vmap`) as far as `memory` allows, or taken one by one where that is faster on this machine
    or the network cannot be batched: `cost` measures both on a chunk. The results are the same up to rounding.

    Args:
        model: masked or plain, not packed; it is copied. x [N, *], y int64 [N]: the examples, moved to its device.
        loss: `loss(output, y) -> scalar`, a mean over examples.
        memory: bytes for parameters and activations of the points in a forward pass. One point is always taken.
        at_once: points in a forward pass; None has `cost`, or the first call, choose.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        memory: int = MEMORY,
        at_once: int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(module, PackedWeight) for module in model.modules()):
            raise ValueError("model: is packed; call sl.unpack on it first")
        if len(x) == 0 or y.shape != x.shape[:1]:
            raise ValueError(
                f"x, y: expected [N, *] and [N] with N of at least 1, got {list(x.shape)}, {list(y.shape)}"
            )
        for name, value in (("memory", memory), ("at_once", 1 if at_once is None else at_once)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.skeleton = densify(copy.deepcopy(model)).eval().requires_grad_(False)
        self.fixed = {**dict(self.skeleton.named_parameters()), **dict(self.skeleton.named_buffers())}
        device = next((value.device for value in self.fixed.values()), torch.device("cpu"))
        self.x, self.y, self.loss, self.memory, self.at_once = x.to(device), y.to(device), loss, memory, at_once
        self.examples, self.most = self._fit(memory)

    def _fit(self, memory: int) -> tuple[int, int]:
        """How many examples and points fit in a forward pass."""
        sizes = []
        hooks = [
            module.register_forward_hook(lambda module, given, output: sizes.append(_nbytes(output)))
            for module in self.skeleton.modules()
        ]
        try:
            with torch.no_grad():
                self.skeleton(self.x[:1])
        finally:
            for hook in hooks:
                hook.remove()
        example = max(1, _nbytes(self.x[:1]) + sum(sizes))
        weights = 2 * sum(_nbytes(p) for p in self.skeleton.parameters())  # the points', and what they are made from
        examples = max(1, min(len(self.x), MOST_EXAMPLES, (memory - weights) // example))
        return examples, max(1, memory // (weights + examples * example))

    def cost(self, states: Callable[[Tensor], dict[str, Tensor]], coordinates: Tensor) -> float:
        """Seconds that `self(states, coordinates)` will take, from one chunk measured each way; chooses the faster way."""
        count = len(coordinates)
        ways = {1, min(self.most, count)} if self.at_once is None else {self.at_once}
        found = {}
        for way in sorted(ways, reverse=True):
            chunk = coordinates[:way]
            try:
                self._chunk(states, chunk, self.x[: self.examples], self.y[: self.examples])  # what is slow once only
            except RuntimeError as error:
                if way == 1 or self.at_once is not None or "vmap" not in str(error):
                    raise
                continue  # a forward that branches on its data, say: one by one it goes
            begin = time.perf_counter()
            self._chunk(states, chunk, self.x[: self.examples], self.y[: self.examples])
            self._wait()
            found[way] = (time.perf_counter() - begin) / len(chunk)
        self.at_once = min(found, key=lambda way: found[way])
        return found[self.at_once] * count * math.ceil(len(self.x) / self.examples)

    def __call__(
        self,
        states: Callable[[Tensor], dict[str, Tensor]],
        coordinates: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate every point.

        Args:
            states: coordinates [P, k] -> parameters of P points by name, each [P, ...]; those left out stay the model's.
            coordinates: [count, k].
            progress: called with (points done, count) after every chunk.

        Returns:
            Mean losses and accuracies, float64 [count] on the CPU. A loss may be NaN or infinite where the network is so.
        """
        if self.at_once is None:
            self.cost(states, coordinates)
        losses, accuracies = [], []
        for chunk in coordinates.split(self.at_once):
            loss = right = 0
            for x, y in zip(self.x.split(self.examples), self.y.split(self.examples), strict=True):
                found = self._chunk(states, chunk, x, y)
                loss, right = loss + found[0].double() * len(y), right + found[1].double()
            losses.append(loss.cpu() / len(self.y))
            accuracies.append(right.cpu() / len(self.y))
            if progress is not None:
                progress(sum(map(len, losses)), len(coordinates))
        return torch.cat(losses), torch.cat(accuracies)

    @torch.no_grad()
    def _chunk(self, states, chunk, x, y) -> tuple[Tensor, Tensor]:
        """Mean losses and numbers of right answers of some points on some examples: [P] and [P]."""
        moved = states(chunk)

        def one(parameters):
            output = functional_call(self.skeleton, {**self.fixed, **parameters}, (x,))
            return self.loss(output, y), (output.argmax(-1) == y).sum()

        if len(chunk) > 1:
            return vmap(one)(moved)
        loss, right = one({name: value[0] for name, value in moved.items()})
        return loss[None], right[None]

    def _wait(self):
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)


def _nbytes(value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value)) if isinstance(value, tuple | list) else 0
