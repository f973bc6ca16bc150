"""Masked linear layers: nn.Linear's, and the transposed one that transformers calls Conv1D."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..masks import Mask
from ..ops import bitmask, block_linear
from ..ops.library import nothing_watches
from ..ops.masked_linear import masked_linear, runs_dense
from ..ops.masked_linear_layer import DENSE, backends, prepared, takes
from .invariant import MaskedWeight, leaves_gradients_unmasked


class _ByBlocks:
    """Sends a layer whose mask is made of blocks to `block_linear`. Weights and words are given as `[out, in]`."""

    _block: tuple[int, int] | None = None  # of the mask, where the last eager forward found kernels for it

    def _find_block(self, input, words, shape):
        if isinstance(input, Tensor):  # else the op says what is wrong
            block = block_linear.blocks_for(input, words, shape)
            if block != self._block:
                self.__dict__["_block"] = block

    def _decide(self, input, weight, words, wanted):
        """For `_route`: whether the library takes such a call, and the backends that do if it does not."""
        self._find_block(input, words, weight.shape)
        if self._block is not None:
            return block_linear.runs_dense(input, weight, words, self._block, wanted), None
        if takes(input):
            names = backends(input, weight, words, wanted)
            return (None if names is None else False), names
        return runs_dense(input, weight, words, wanted), None

    def _masked(self, input, weight, words, premasked):
        # Compiled code can't ask what blocks the mask has: it goes by what the last eager forward found.
        if self._block is None:
            return masked_linear(input, weight, words, self.bias, premasked=premasked)
        return block_linear.block_linear(input, weight, words, self.bias, block=self._block, premasked=premasked)


class MaskedLinear(_ByBlocks, MaskedWeight, nn.Linear):
    """y = x (W∘M)ᵀ + b: an `nn.Linear` whose weight is masked by bits and is exactly zero wherever the mask is.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        mask: which weights are kept: a `Mask` or a bool tensor `[out_features, in_features]`; None keeps all.

    Shapes: x `[*, in_features]` -> `[*, out_features]`. The gradient of `weight` is zero off the mask.

    Raises:
        TypeError, ValueError: `mask` is something else or has another shape.
    """

    _transient = (*MaskedWeight._transient, "_block")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: Mask | Tensor | None = None,
        device=None,
        dtype=None,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._start(mask)

    def forward(self, input: Tensor) -> Tensor:
        premasked = self._premasked()
        if premasked:
            if self._nothing_pruned():
                return super().forward(input)
            weight, words, bias = self._parameters["weight"], self._buffers["weight_mask"], self._parameters["bias"]
            dense, names = self._route(input, lambda wanted: self._decide(input, weight, words, wanted))
            if names == DENSE and leaves_gradients_unmasked():
                dense = True
            elif names is not None and type(input) is Tensor and nothing_watches():
                return prepared(input, weight, words, bias, names)
            if dense or names == DENSE:
                return F.linear(input, self._weight_for_library(), bias)
        return self._masked(input, self.weight, self.weight_mask, premasked)


class MaskedConv1D(_ByBlocks, MaskedWeight):
    """y = x (W∘M) + b with a weight `[in, out]`: put before transformers' `Conv1D` (GPT-2's projections) by `sparsify`.

    The mask has the layout of the weight. The kernels want rows of outputs, so a transposed copy of the bits is kept
    too.
    """

    _transient = (*MaskedWeight._transient, "_block", "_transposed", "_transposed_of")
    _transposed: Tensor | None = None
    _transposed_of: tuple | None = None

    def forward(self, x: Tensor) -> Tensor:
        premasked = self._premasked()
        if premasked and self._nothing_pruned():
            return super().forward(x)
        words = self._words_by_output(cached=premasked)
        if premasked:
            dense, names = self._route(x, lambda wanted: self._decide(x, self.weight.t(), words, wanted))
            if dense or (names is not None and set(names) <= {"dense", None}):
                return F.linear(x, self._weight_for_library().t(), self.bias)
        return self._masked(x, self.weight.t(), words, premasked)

    def _words_by_output(self, cached: bool) -> Tensor:
        """int32 words of the mask transposed, `[out, ceil(in / 32)]`."""
        words = self.weight_mask
        if not cached:
            return bitmask.pack(bitmask.unpack(words, self.weight.shape).t())
        now = (id(words), words._version)
        if self._transposed_of != now:
            self.__dict__["_transposed"] = bitmask.pack(bitmask.unpack(words, self.weight.shape).t())
            self.__dict__["_transposed_of"] = now
        return self._transposed


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (known by name: transformers need not be there)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__
    ) and isinstance(module._parameters.get("weight"), torch.Tensor)
