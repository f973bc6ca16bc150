"""Packed layers: the survivors' values as one Parameter and the mask's bits; nothing dense outlives a forward or backward.

`convert.pack` and `convert.unpack` turn masked layers into these and back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask
from ..ops import packed
from ..ops.packed_layers import packed_conv2d, packed_linear
from .conv import MaskedConv2d
from .linear import MaskedLinear
from .states import to_packed_state


class PackedWeight:
    """What every packed layer has, to be put before `nn.Module`.

    Attributes:
        values: Parameter `[count]`, the surviving weights in the row-major order of the mask.
        weight_mask: buffer, int32 words of the mask (`masks.Mask`).
        weight_shape: the shape of the weight that they stand for.
        plain_class: the class of the plain layer that it packs.
    """

    values: nn.Parameter
    weight_mask: Tensor
    weight_shape: tuple[int, ...]
    plain_class: type[nn.Module]

    @property
    def mask(self) -> Mask:
        """A copy of the mask as a value, of the shape `weight_shape`."""
        return Mask(self.weight_mask.clone(), self.weight_shape)

    @property
    def density(self) -> float:
        """The fraction of the weights that is kept, 0..1 (1 for an empty weight)."""
        total = torch.Size(self.weight_shape).numel()
        return self.values.numel() / total if total else 1.0

    def dense_weight(self) -> Tensor:
        """The weight as a fresh dense tensor of `weight_shape`, zeros off the mask; its gradient flows to `values`."""
        return packed.expand(self.values, self.weight_mask, self.weight_shape)

    def extra_repr(self) -> str:
        parts = [self.plain_class.extra_repr(self), f"density={self.density:.4g}"]
        return ", ".join(filter(None, parts))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        values_key, mask_key = prefix + "values", prefix + "weight_mask"
        try:
            to_packed_state(state_dict, prefix, self.weight_shape)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
            return
        if values_key in state_dict and mask_key in state_dict:
            count = state_dict[values_key].numel()
            if count != self.values.numel():  # another mask: the same Parameter, with room for its survivors
                replace_data(self.values, self.values.data.new_zeros(count))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class PackedLinear(PackedWeight, nn.Module):
    """y = x (W∘M)ᵀ + b of which only the survivors are stored: a Parameter `values` `[count]` and a bit per weight.

    Gradients, the state of any optimizer of torch's, checkpoints and the traffic of DistributedDataParallel have the shape
    of `values`, so they shrink with the density. The dense weight exists only while a forward or a backward computes. On a
    CPU, float32 layers run sparse instead where that was measured faster; this keeps an index of some 24 bytes a survivor
    (SPARSELOTTERY_BACKEND=dense does without).

    Args:
        in_features, out_features, bias, mask, device, dtype: as for `MaskedLinear`, whose initial values it has.

    Shapes: x `[*, in_features]` -> `[*, out_features]`.

    Raises:
        TypeError, ValueError: `mask` is something else or has another shape.
    """

    plain_class = nn.Linear

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
        take_over(self, MaskedLinear(in_features, out_features, bias, mask=mask, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return packed_linear(input, self.values, self.weight_mask, self.bias, self.weight_shape)


class PackedConv1D(PackedWeight, nn.Module):
    """The packed form of transformers' `Conv1D`: y = x (W∘M) + b with a weight `[in, out]`. Made by `pack`."""

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.values, self.weight_mask, self.bias, self.weight_shape, transposed=True)


class PackedConv2d(PackedWeight, nn.Module):
    """y = conv2d(x, W∘M) + b of which only the survivors are stored; see `PackedLinear`.

    Args: those of `MaskedConv2d`.

    Shapes: x `[N, in_channels, H, W]` or `[in_channels, H, W]`.
    """

    plain_class = nn.Conv2d

    def __init__(self, *args, mask: Mask | Tensor | None = None, **kwargs):
        take_over(self, MaskedConv2d(*args, mask=mask, **kwargs))

    def forward(self, input: Tensor) -> Tensor:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.padding_mode != "zeros" or left != right or top != bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        unbatched = isinstance(input, Tensor) and input.ndim == 3
        y = packed_conv2d(
            input.unsqueeze(0) if unbatched else input,
            self.values,
            self.weight_mask,
            self.bias,
            self.weight_shape,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        return y.squeeze(0) if unbatched else y


def take_over(layer: PackedWeight, masked: nn.Module) -> None:
    """Make `layer`, not yet initialized, the packed form of a masked layer that nobody else has."""
    nn.Module.__init__(layer)
    layer.__dict__.update(masked.__getstate__())
    weight = masked.weight
    shape = tuple(weight.shape)
    replace_data(weight, packed.gather(weight.detach(), masked.weight_mask))
    rename(layer, "weight", "values")
    layer.weight_shape = shape


def rename(layer: nn.Module, old: str, new: str) -> None:
    """Give a layer's Parameter another name, at the same place among the parameters."""
    layer._parameters = {new if name == old else name: value for name, value in layer._parameters.items()}


def replace_data(param: nn.Parameter, data: Tensor, grad: Tensor | None = None) -> None:
    """Give a Parameter data of another shape: it stays the same object for optimizers and tied layers.

    A graph of the past may hold the Parameter's gradient accumulator, which remembers the old shape and would refuse the new
    one's gradients. torch makes a new one when the dtype changes, hence the detour.
    """
    param.grad = None
    param.data = data.new_empty(0, dtype=torch.float32 if data.dtype is torch.float64 else torch.float64)
    param.data = data
    param.grad = grad
