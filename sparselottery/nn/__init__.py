"""Masked layers: drop-in versions of torch's, and the ways there and back."""

from .conv import MaskedConv2d
from .convert import densify, from_torch_prune, left_dense, masked_modules, sparsify
from .linear import MaskedConv1D, MaskedLinear

__all__ = [
    "MaskedConv1D",
    "MaskedConv2d",
    "MaskedLinear",
    "densify",
    "from_torch_prune",
    "left_dense",
    "masked_modules",
    "sparsify",
]
