"""Masked and packed layers: drop-in versions of torch's, and the ways there and back."""

from .compress import compress
from .conv import MaskedConv2d
from .convert import densify, from_torch_prune, left_dense, masked_modules, pack, sparsify, unpack
from .decode import DecodeLinear
from .explain import Explanation, explain
from .linear import MaskedConv1D, MaskedLinear
from .packed import PackedConv1D, PackedConv2d, PackedLinear
from .resident import Resident, resident

__all__ = [
    "DecodeLinear",
    "Explanation",
    "MaskedConv1D",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedConv1D",
    "PackedConv2d",
    "PackedLinear",
    "Resident",
    "compress",
    "densify",
    "explain",
    "from_torch_prune",
    "left_dense",
    "masked_modules",
    "pack",
    "resident",
    "sparsify",
    "unpack",
]
