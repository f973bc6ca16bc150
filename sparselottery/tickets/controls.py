"""What a ticket is measured against: the same number of weights per layer, one thing about them changed.

reinit       the ticket's mask, all weights drawn anew: is it the initial values, or the structure alone?
random-mask  the initial values, a random mask of the same density in each layer: is it which weights are kept?
shuffle      the ticket's mask, its own initial values shuffled within each layer: is it more than their scale?
constant     the ticket's mask, its initial signs, one magnitude in each layer: are signs all you need?
frozen       the ticket as it is, but pruned weights frozen at their initial values: is it that they are zero?

The last two are of Zhou et al. (arXiv 1905.01067, sections 3 and 4), see actions.py.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..masks import Mask
from .ticket import Ticket

CONTROLS = ("reinit", "random-mask", "shuffle")
ALL = (*CONTROLS, "constant", "frozen")


def derived_seed(*parts) -> int:
    """A seed that depends on all `parts` and on nothing else: 0 to 2^31 - 1."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def reinit(ticket: Ticket, fresh: Mapping[str, Tensor]) -> Ticket:
    """The ticket's masks on other weights. `fresh`: the state_dict of a newly initialized model."""
    return Ticket(dict(ticket.masks), dict(fresh))


def random_mask(ticket: Ticket, initial: Mapping[str, Tensor], seed: int) -> Ticket:
    """Random masks that keep as many weights in each layer as the ticket does. `initial`: the values of all weights."""
    masks = {}
    for name, mask in ticket.masks.items():
        generator = torch.Generator().manual_seed(derived_seed("random-mask", seed, name))
        dense = torch.zeros(mask.shape, dtype=torch.bool)
        dense.view(-1)[torch.randperm(dense.numel(), generator=generator)[: mask.count]] = True
        masks[name] = Mask.from_dense(dense)
    return Ticket(masks, dict(initial))


def shuffle(ticket: Ticket, initial: Mapping[str, Tensor], seed: int) -> Ticket:
    """The ticket with the initial values of the weights it keeps permuted within each layer."""
    values = dict(initial)
    for name, mask in ticket.masks.items():
        generator = torch.Generator().manual_seed(derived_seed("shuffle", seed, name))
        kept = mask.to_dense().cpu()
        key = f"{name}.weight" if name else "weight"
        weight = values[key].clone()
        own = weight[kept]
        weight[kept] = own[torch.randperm(len(own), generator=generator)]
        values[key] = weight
    return Ticket(dict(ticket.masks), values)
