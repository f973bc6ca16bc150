"""Masked layers: drop-in versions of torch's, and the ways there and back."""

from .compress import compress
from .conv import MaskedConv2d
from .convert import densify, from_torch_prune, left_dense, masked_modules, sparsify
from .explain import Explanation, explain
from .linear import MaskedConv1D, MaskedLinear

__all__ = [
    "Explanation",
    "MaskedConv1D",
    "MaskedConv2d",
    "MaskedLinear",
    "compress",
    "densify",
    "explain",
    "from_torch_prune",
    "left_dense",
    "masked_modules",
    "sparsify",
]
