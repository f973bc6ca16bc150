"""Supermasks: masks learned over weights that are never trained.

    bernoulli   every weight is kept with probability sigmoid(s), sampled anew in each forward pass of training; the gradient by
                the sample is taken for that by the probability (Zhou et al. 2019, arXiv 1905.01067, section 5). Afterwards the
                mask keeps what is more likely kept than not.
    edge-popup  the `density` of each layer's weights with the largest |s| are kept; the gradient by the mask is taken for that
                by |s| (Ramanujan et al. 2020, arXiv 1911.13299, section 3)

Only the scores s are trained: weights, biases and norms stay at their initial values (BatchNorm's running statistics follow
the data).
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..masks import Mask
from ..nn.convert import densify, masked_modules
from .actions import kept_weights
from .ticket import Ticket

METHODS = ("bernoulli", "edge-popup")
WEIGHTS = ("constant", "init")


class MaskedByScores(nn.Module):
    """A parametrization of a weight: its values times a mask that is a function of trained scores.

    Attributes:
        scores: Parameter of the weight's shape.
        sample: in evaluation: False keeps the one mask that `mask()` is; True samples, as in training (bernoulli alone).
    """

    def __init__(self, shape, method: str, density: float | None, rescale: bool, device=None):
        super().__init__()
        scores = torch.zeros(shape, device=device)
        if method == "edge-popup":
            nn.init.kaiming_uniform_(scores.view(shape[0], -1), a=math.sqrt(5))
        self.scores = nn.Parameter(scores)
        self.method, self.rescale, self.sample = method, rescale, False
        self.keep = None if density is None else max(1, round(density * scores.numel()))

    def mask(self) -> Tensor:
        """The mask that is learned, bool."""
        if self.method == "bernoulli":
            return self.scores > 0
        kept = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.scores.device)
        kept[self.scores.detach().abs().flatten().topk(self.keep).indices] = True
        return kept.view(self.scores.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if self.method == "edge-popup":
            soft, mask = self.scores.abs(), self.mask().to(weight.dtype)
        else:
            soft = self.scores.sigmoid()
            sampled = self.training or self.sample
            mask = (torch.rand_like(soft) < soft if sampled else self.mask()).to(weight.dtype)
        scale = multiplier(mask) if self.rescale else 1.0
        return weight * ((mask + (soft - soft.detach())) * scale)  # the difference is exactly 0


def multiplier(mask: Tensor) -> Tensor:
    """Dynamic weight rescaling: the number of a layer's weights over the number of those that are kept (Zhou et al., section
    5.2)."""
    return mask.numel() / mask.sum().clamp(min=1)


def learn_masks(
    model: nn.Module,
    *,
    method: str = "bernoulli",
    weights: str = "constant",
    density: float | None = None,
    rescale: bool = False,
) -> nn.Module:
    """Prepare a network for learning its masks, in place: any training loop over `model.parameters()` that require gradients
    then learns them, and `learned_ticket` tells what they are.

    Args:
        model: its masked layers (`sl.sparsify`) become plain ones with a parametrized weight; everything else is frozen.
        method: "bernoulli" or "edge-popup".
        weights: "constant": each layer's weights are their initial sign times the standard deviation of its initial weights;
            "init": the initial weights.
        density: of each layer, for "edge-popup"; None is 0.5. "bernoulli" finds its own.
        rescale: multiply what is kept by the number of weights over the number kept, layer by layer.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: an argument is not as described; there is no masked layer.
    """
    check(method, weights, density)
    names = [name for name, _ in masked_modules(model)]
    if not names:
        raise ValueError("model: expected masked layers whose masks to learn, found none; sl.sparsify makes them")
    start = untrained(model, weights)
    start.apply(model)
    densify(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    share = (0.5 if density is None else density) if method == "edge-popup" else None
    for name in names:
        layer = model.get_submodule(name)
        module = MaskedByScores(layer.weight.shape, method, share, rescale, layer.weight.device)
        parametrize.register_parametrization(layer, "weight", module)
    return model


def learned_ticket(model: nn.Module) -> Ticket:
    """The masks that a network of `learn_masks` has now, with the weights that they are over (rescaled, where they were): a
    ticket of an untrained network.

    Raises:
        ValueError: it is no such network.
    """
    found = {n: m for n, m in model.named_modules() if _scores_of(m) is not None}
    if not found:
        raise ValueError("model: expected a network of learn_masks, found no layer with scores")
    state = dict(model.state_dict())
    masks = {}
    for name, layer in found.items():
        prefix = f"{name}.parametrizations.weight." if name else "parametrizations.weight."
        module = _scores_of(layer)
        weight, mask = state.pop(f"{prefix}original"), module.mask()
        state.pop(f"{prefix}0.scores")
        state[f"{name}.weight" if name else "weight"] = weight * multiplier(mask) if module.rescale else weight
        masks[name] = Mask.from_dense(mask.cpu())
    return Ticket(masks, {key: value.detach().to("cpu", copy=True) for key, value in state.items()})


def sampling(model: nn.Module, on: bool) -> nn.Module:
    """Have a network of `learn_masks` sample its masks in evaluation too, or not."""
    for module in model.modules():
        if isinstance(module, MaskedByScores):
            module.sample = on
    return model


def untrained(model: nn.Module, weights: str) -> Ticket:
    """All weights of a network with masked layers, as they are or as signed constants."""
    whole = copy.deepcopy(model)
    for _, layer in masked_modules(whole):
        layer.set_mask(Mask.ones(layer.weight.shape, layer.weight.device))
    ticket = Ticket.of(whole, whole)
    return kept_weights(ticket, "constant") if weights == "constant" else ticket


def masked_untrained(ticket: Ticket, masks: Mapping[str, Mask], rescale: bool) -> Ticket:
    """Other masks on a ticket's weights; `rescale` multiplies each layer's by its number of weights over the number kept."""
    values = dict(ticket.initial)
    for name, mask in masks.items() if rescale else ():
        key = f"{name}.weight" if name else "weight"
        values[key] = values[key] * (mask.numel / max(1, mask.count))
    return Ticket(dict(masks), values)


def check(method, weights, density) -> None:
    """The arguments of `learn_masks`.

    Raises:
        TypeError, ValueError: one is not as described there.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    if density is None:
        return
    if method != "edge-popup":
        raise ValueError(f"density: expected None with {method}, which finds its own, got {density!r}")
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density: expected a fraction between 0 and 1, got {type(density).__name__}")
    if not 0 < density < 1:
        raise ValueError(f"density: expected a fraction between 0 and 1, got {density}")


def _scores_of(module) -> MaskedByScores | None:
    lists = getattr(module, "parametrizations", None)
    first = lists["weight"][0] if lists is not None and "weight" in lists else None
    return first if isinstance(first, MaskedByScores) else None
