"""Find lottery tickets and make them fast."""

from .masks import Mask
from .ops.global_topk import global_topk

__all__ = ["Mask", "global_topk"]
