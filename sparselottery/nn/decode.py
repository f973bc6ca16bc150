"""DecodeLinear: a linear layer for inference at small batches, its weight packed for reading (ops/decode_linear.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import decode_linear as op
from ..ops.library import autocasts

PARTS = ("starts", "codes", "values")


class DecodeLinear(nn.Module):
    """y = x (W∘M)ᵀ + b for inference, of which only the survivors are stored, in the form that the GPU reads fastest.

    Made by `sl.compress` on a GPU where it is faster than the dense layer. Elsewhere (another device or dtype, batches of
    more than 128) it computes the same from a transient dense weight; `sl.explain` says so and why.

    Attributes:
        format: "gap4", "gap8" or "tiles" (ops/decode_linear.py).
        in_features, out_features: as in `nn.Linear`.
        density: the fraction of the weights that is kept.
        starts, codes, values: buffers, the packed weight; their sizes depend on the mask.
        bias: Parameter `[out_features]` or None.

    Shapes: x `[*, in_features]` -> `[*, out_features]`.

    Args:
        packed: from `ops.decode_linear.pack`.
        bias: `[out_features]` or None.
        density: how much of the weight is kept.
    """

    _why_this_form: str | None = None  # what `compress` measured, for `explain`

    def __init__(self, packed: op.DecodeWeight, bias: Tensor | None = None, *, density: float):
        super().__init__()
        self._take(packed, density)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _take(self, packed, density):
        self.format, self.density = packed.format, density
        self.in_features, self.out_features = packed.columns, packed.rows
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name))

    @property
    def packed(self) -> op.DecodeWeight:
        """The weight as the op takes it."""
        return op.DecodeWeight(
            self.format, self.out_features, self.in_features, *(self._buffers[name] for name in PARTS)
        )

    @property
    def weight(self) -> Tensor:
        """A dense copy `[out_features, in_features]`, made anew each time."""
        return op.unpack(self.packed)

    def why_dense(self) -> str | None:
        """Why this layer is computed from a dense weight; None: its kernel runs (for batches that it is made for)."""
        if self.values.dtype not in op.DTYPES:
            return f"the decode kernels take float16 and bfloat16, the values are {self.values.dtype}"
        return op.why_dense(self.values.device, self.format, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.values.dtype
        if autocasts(input.device):
            wanted = torch.get_autocast_dtype(input.device.type)
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(input.device.type, enabled=False):
                return self._product(input.to(dtype), bias).to(wanted)
        return self._product(input, self.bias)

    def _product(self, x, bias):
        if self.values.dtype not in op.DTYPES:
            return F.linear(x, self.weight, bias)
        return op.decode_linear(x, self.packed, bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, format={self.format}, density={self.density:.4g}"

    # ---- saving and loading ----

    def get_extra_state(self) -> dict:
        fields = ("format", "density", "in_features", "out_features")
        return {name: getattr(self, name) for name in fields} | {"why": self._why_this_form}

    def set_extra_state(self, state: dict) -> None:
        self.format, self.density, self._why_this_form = state["format"], state["density"], state["why"]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        extra = state_dict.get(prefix + "_extra_state")
        tensors = [state_dict.get(prefix + name) for name in PARTS]
        if extra is not None and all(isinstance(t, Tensor) for t in tensors):
            shape, found = (self.out_features, self.in_features), (extra["out_features"], extra["in_features"])
            if found != shape:
                error_msgs.append(f"{prefix}values: expected a weight {list(shape)}, got {list(found)}")
                return
            for name, tensor in zip(PARTS, tensors, strict=True):  # another mask or format: other sizes
                mine = self._buffers[name]
                if mine.shape != tensor.shape:
                    self._buffers[name] = mine.new_empty(tensor.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def to_decode(layer: nn.Module, packed: op.DecodeWeight, density: float) -> None:
    """Turn a plain linear layer (transformers' Conv1D too) into a DecodeLinear in place: hooks and names stay."""
    del layer._parameters["weight"]
    layer.__class__ = DecodeLinear
    layer._take(packed, density)
