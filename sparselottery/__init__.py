"""Find lottery tickets and make them fast."""

from .masks import Mask
from .nn import MaskedConv2d, MaskedLinear, densify, from_torch_prune, sparsify
from .ops.global_topk import global_topk

__all__ = [
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "densify",
    "from_torch_prune",
    "global_topk",
    "sparsify",
]
