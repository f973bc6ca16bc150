"""What is done with the weights once the mask is known: the mask-1 and mask-0 actions of Zhou et al. 2019, Deconstructing
Lottery Tickets (arXiv 1905.01067, sections 3 and 4).

Kept weights (`kept_weights`): their initial values, or the layer's values drawn or shuffled anew, or one constant, each with
the signs that they had at first or without. Pruned weights are 0 in every masked layer, and that is what makes them fast; to
leave them at their initial values instead, `freeze_pruned` makes a network of plain layers that trains the others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..nn.convert import densify
from .controls import derived_seed
from .ticket import Ticket

ACTIONS = ("rewind", "reinit", "reshuffle", "constant")
SIGNS = ("initial", "random")


def kept_weights(ticket: Ticket, action: str, *, signs: str = "initial", seed: int = 0) -> Ticket:
    """The ticket's masks with other values for the weights that it keeps.

    Args:
        ticket: with the initial values of all weights, also of those that it prunes.
        action: "rewind": the ticket's own values. "reinit": values drawn from the layer's initial distribution: all its initial
            weights shuffled. "reshuffle": the kept weights' initial values shuffled among themselves. "constant": the standard
            deviation of the layer's initial weights.
        signs: "initial": every weight has the sign that it had; "random": the sign comes with the value, or for "constant" from
            another of the layer's initial weights at random.
        seed: of what is random.

    Returns:
        A new ticket. Values of pruned weights, biases and all else are those of `ticket`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(ticket, Ticket):
        raise TypeError(f"ticket: expected a sl.Ticket, got {type(ticket).__name__}")
    if action not in ACTIONS:
        raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    if signs not in SIGNS:
        raise ValueError(f"signs: expected one of {', '.join(SIGNS)}, got {signs!r}")
    values = dict(ticket.initial)
    for name, mask in ticket.masks.items() if action != "rewind" else ():
        key = f"{name}.weight" if name else "weight"
        generator = torch.Generator().manual_seed(derived_seed(action, seed, name))
        weight, kept = values[key].clone(), mask.to_dense().cpu()
        own = weight[kept]
        if action == "reshuffle":
            new = own[torch.randperm(own.numel(), generator=generator)]
        elif action == "reinit" or signs == "random":
            new = weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)[kept]
        else:
            new = own
        if action == "constant":
            new = weight.std(correction=0) * new.sign()
        weight[kept] = new.abs() * own.sign() if signs == "initial" else new
        values[key] = weight
    return Ticket(dict(ticket.masks), values)


class Frozen(nn.Module):
    """A parametrization: the weight where `kept` is True, `values` elsewhere."""

    def __init__(self, kept: Tensor, values: Tensor):
        super().__init__()
        self.register_buffer("kept", kept)
        self.register_buffer("values", values)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept, weight, self.values)


def freeze_pruned(model: nn.Module, ticket: Ticket, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Give a model the values of a ticket, of which only those that the ticket keeps are trained: the others stay where they
    are, whatever the optimizer does (weight decay and momentum too), in place of being 0.

    A masked layer's weight is 0 off its mask, so the layers become plain ones whose weight is a parametrization
    (`torch.nn.utils.parametrize`): a network to compare with, not a fast one. `parametrize.remove_parametrizations` makes
    plain weights of them again.

    Args:
        model: plain or masked layers; changed in place.
        values: at which the pruned weights stay; None is `ticket.initial`. See `frozen_if_growing`.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: an argument is not as described, or the ticket does not fit the model.
    """
    if not isinstance(ticket, Ticket):
        raise TypeError(f"ticket: expected a sl.Ticket, got {type(ticket).__name__}")
    values = ticket.initial if values is None else values
    for name, mask in ticket.masks.items():
        key = f"{name}.weight" if name else "weight"
        if not isinstance(values.get(key), Tensor) or values[key].shape != mask.shape:
            raise ValueError(f"values: expected a tensor {list(mask.shape)} for {key}")
    densify(ticket.apply(model))
    model.load_state_dict(ticket.initial)
    for name, mask in ticket.masks.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        stay = values[f"{name}.weight" if name else "weight"].to(weight)
        parametrize.register_parametrization(layer, "weight", Frozen(mask.to(weight.device).to_dense(), stay.clone()))
    return model


def frozen_if_growing(initial: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for `freeze_pruned`: 0 for weights that training moved towards zero, the initial value for the others (the paper's
    variant 1).

    Args:
        initial, final: state_dicts of before and after the training of the dense network.

    Raises:
        ValueError: they do not have the same keys and shapes.
    """
    for key, value in initial.items():
        if key not in final or final[key].shape != value.shape:
            raise ValueError(f"final: expected {key} with shape {list(value.shape)} as in initial")
    return {key: torch.where(final[key].abs() < v.abs(), torch.zeros_like(v), v) for key, v in initial.items()}
