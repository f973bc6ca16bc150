"""Memory for gradients that goes back and forth between a network in C++ and autograd."""

from __future__ import annotations

from torch import Tensor

from ..ops import bitmask
from ..ops.masked_linear_index import Memory
from .invariant import MaskedWeight


class GradientMemory:
    """Memory for the gradient of a parameter, lent out again (`ops.masked_linear_index.Memory`).

    Fresh pages, and the zeros off the mask of a large weight, cost as much as a sparse backward pass. That the zeros are still
    there is told by the gradient's version, and by 64 of them: a write through `.data` moves no version.
    """

    def __init__(self, module, weight):
        self.memory, self.zeros = Memory(), None
        if weight and isinstance(module, MaskedWeight) and module.weight.numel() >= Memory.SMALLEST:
            dead = (~bitmask.unpack(module.weight_mask, module.weight.shape)).view(-1).nonzero()[:, 0]
            self.zeros = dead[:: max(1, len(dead) // 64)] if len(dead) else None

    def lend(self, shape) -> tuple[Tensor, bool]:
        """A tensor to be written, and whether it is 0 off the mask."""
        gradient, same = self.memory.lend(shape, self)
        return gradient, same and self.zeros is not None and not gradient.view(-1)[self.zeros].any()

    def written(self, gradient: Tensor) -> None:
        if self.zeros is not None:
            self.memory.written(gradient, self)
