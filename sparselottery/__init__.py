"""Find lottery tickets and make them fast."""

from . import optim
from .masks import Mask
from .nn import MaskedConv2d, MaskedLinear, densify, from_torch_prune, sparsify
from .ops.global_topk import global_topk
from .pruning import prune
from .tickets.ticket import Ticket, TicketError

__all__ = [
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "Ticket",
    "TicketError",
    "densify",
    "from_torch_prune",
    "global_topk",
    "optim",
    "prune",
    "sparsify",
]
