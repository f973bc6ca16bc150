"""Masked 2-D convolution."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask
from ..ops.masked_conv2d import masked_conv2d, runs_dense
from .invariant import MaskedWeight


class MaskedConv2d(MaskedWeight, nn.Conv2d):
    """y = conv2d(x, W∘M) + b: an `nn.Conv2d` whose weight is masked by bits and is exactly zero wherever the mask is.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for `nn.Conv2d`.
        mask: which weights are kept: a `Mask` or a bool tensor of the weight's shape; None keeps all.

    Shapes: x `[N, in_channels, H, W]` or `[in_channels, H, W]`. The gradient of `weight` is zero off the mask.

    Raises:
        TypeError, ValueError: `mask` is something else or has another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        mask: Mask | Tensor | None = None,
    ):
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._start(mask)

    def _decide(self, input, wanted):
        """For `_route`: whether the library takes such a call."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return runs_dense(input, self.weight, self.weight_mask, *geometry, wanted), None

    def _is_dense(self, input):
        layout = input.stride() if isinstance(input, Tensor) else None
        return self._route(input, lambda wanted: self._decide(input, wanted), layout)[0]

    def forward(self, input: Tensor) -> Tensor:
        premasked = self._premasked()
        if premasked:
            if self._nothing_pruned():
                return super().forward(input)
            if self.padding_mode == "zeros" and self._is_dense(input):
                return self._conv_forward(input, self._weight_for_library(), self.bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return masked_conv2d(
            input,
            self.weight,
            self.weight_mask,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            premasked=premasked,
        )
