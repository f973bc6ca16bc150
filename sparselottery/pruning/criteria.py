"""Which weights matter: a criterion gives every weight a score, and the highest scores survive.

Of weights, from their initial values w_i and their final ones w_f (Zhou et al. 2019, arXiv 1905.01067, figure 3):

    large-final, magnitude     |w_f|
    small-final                -|w_f|
    large-init                 |w_i|
    small-init                 -|w_i|
    large-init-large-final     min(a |w_f|, |w_i|)
    small-init-small-final     -max(a |w_f|, |w_i|)
    magnitude-increase         |w_f| - |w_i|
    movement                   |w_f - w_i|
    random                     the same for all, ties broken at random

`a` aligns the percentiles of a layer's w_f and w_i, as the paper has it: a |w_f| stands for the |w_j| that has the same rank
among the |w_i| of the layer's survivors as |w_f| has among their |w_f|.

NAME-same-sign ranks the weights whose sign training has changed (or that are zero before or after) below all others, and
NAME-diff-sign those whose sign is the same; among themselves they keep their order. The paper, which has both for
large-final and magnitude-increase, gives them a score of 0 (section 5: max(0, w_i w_f / |w_i|)); so does this for
large-final, except that where more survivors are asked for than there are, the largest of the others follow, not any.

"snip", "grasp" and "synflow" ask gradients: see sensitivity.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..masks import Mask
from . import sensitivity

_FORMULAS = {  # of the magnitudes |w_f|, |w_i| and |w_f - w_i|, float64 [survivors]
    "large-final": lambda final, initial, moved: final,
    "small-final": lambda final, initial, moved: -final,
    "large-init": lambda final, initial, moved: initial,
    "small-init": lambda final, initial, moved: -initial,
    "large-init-large-final": lambda final, initial, moved: torch.minimum(_aligned(final, initial), initial),
    "small-init-small-final": lambda final, initial, moved: -torch.maximum(_aligned(final, initial), initial),
    "magnitude-increase": lambda final, initial, moved: final - initial,
    "movement": lambda final, initial, moved: moved,
}
_FREE = ("magnitude", "random", "large-final", "small-final")  # of the initial values
SIGNED = ("-same-sign", "-diff-sign")
BASES = tuple(_FORMULAS)
NAMES = ("magnitude", "random", *BASES, *(base + sign for base in BASES for sign in SIGNED), *sensitivity.NAMES)
EXPECTED = (
    f"'magnitude', 'random', {', '.join(map(repr, BASES))} (each also with -same-sign or -diff-sign), "
    f"{', '.join(map(repr, sensitivity.NAMES))}, a callable (name, layer) -> scores or a mapping of scores"
)
Criterion = str | Callable[[str, nn.Module], Tensor] | Mapping[str, Tensor]
Scorer = Callable[[dict[str, Mask]], tuple[list[Tensor], str]]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may ask for besides the weights; `prune` describes the fields."""

    initial: nn.Module | Mapping[str, Tensor] | None = None
    batch: tuple[Tensor, Tensor] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    generator: torch.Generator | None = None


def check(criterion: Criterion) -> None:
    """See whether it is a criterion at all.

    Raises:
        TypeError, ValueError: it is not; the message lists the names.
    """
    if isinstance(criterion, str):
        if criterion not in NAMES:
            raise ValueError(f"criterion: expected {EXPECTED}, got {criterion!r}")
    elif not isinstance(criterion, Mapping) and not callable(criterion):
        raise TypeError(f"criterion: expected {EXPECTED}, got {type(criterion).__name__}")


def needs_initial(criterion: Criterion) -> bool:
    """Whether it compares the weights with their initial values."""
    return isinstance(criterion, str) and criterion not in (*_FREE, *sensitivity.NAMES)


def needs_batch(criterion: Criterion) -> bool:
    """Whether it puts data through the network."""
    return criterion in sensitivity.NAMES


def scorer(criterion: Criterion, model: nn.Module, layers: dict[str, nn.Module], evidence: Evidence) -> Scorer:
    """A function from the present masks to one score per weight of each layer, in the order of `layers`, and how to rank
    them ("magnitude" or "value", as `global_topk` takes them).

    Args:
        criterion: a name of `NAMES`. A callable `(name, layer) -> scores`, or a mapping name -> scores: real numbers of the
            weight's shape; the largest survive, so smallest-first criteria negate them.
        model, layers: the network and its masked layers by name.

    Raises:
        TypeError, ValueError: an unknown criterion; initial values or a batch missing or of another shape; from the
            function: scores missing, of another shape or not floating point, NaN in a gradient.
    """
    check(criterion)
    if isinstance(criterion, Mapping):
        missing = [name for name in layers if name not in criterion]
        if missing:
            raise ValueError(f"criterion: no scores for {', '.join(missing)}")
        return lambda masks: ([_checked(name, criterion[name], layer) for name, layer in layers.items()], "value")
    if not isinstance(criterion, str):
        return lambda masks: ([_checked(n, criterion(n, layer), layer) for n, layer in layers.items()], "value")
    if criterion in ("magnitude", "large-final"):
        return lambda masks: ([layer.weight.detach() for layer in layers.values()], "magnitude")
    if criterion == "random":
        return lambda masks: ([_random(layer.weight, evidence.generator) for layer in layers.values()], "value")
    if needs_batch(criterion):
        ask = sensitivity.Sensitivity(criterion, model, tuple(layers), evidence.batch, evidence.loss)
        return lambda masks: (list(ask(masks).values()), "value")
    initial = _initial_values(criterion, layers, evidence.initial) if needs_initial(criterion) else None
    return lambda masks: (_of_weights(criterion, layers, initial, masks), "value")


def _of_weights(criterion, layers, initial, masks) -> list[Tensor]:
    base = next((criterion.removesuffix(sign) for sign in SIGNED if criterion.endswith(sign)), criterion)
    formula = _FORMULAS[base]
    values, lower = [], []
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        start = weight if initial is None else initial[name]
        alive = masks[name].to_dense()
        score = torch.zeros_like(weight)
        score[alive] = formula(weight[alive].abs(), start[alive].abs(), (weight - start)[alive].abs())
        if bool(score.isnan().any()):
            raise ValueError(f"{name}.weight: holds NaN, which has no rank")
        values.append(score)
        if base != criterion:
            same = weight.sign() * start.sign() > 0
            lower.append(~same if criterion.endswith(SIGNED[0]) else same)
    if lower:  # pushed below everything else, by as much as the scores span
        ends = [v.aminmax() for v in values if v.numel()]
        span = max((e.max for e in ends), default=0) - min((e.min for e in ends), default=0) + 1
        values = [torch.where(low, v - span, v) for v, low in zip(values, lower, strict=True)]
    return values


def _aligned(final: Tensor, initial: Tensor) -> Tensor:
    """For each of the final magnitudes `[n]` the initial magnitude of the same rank."""
    rank = torch.searchsorted(final.sort().values, final, right=True) - 1  # equal ones: the highest of their ranks
    return initial.sort().values[rank]


def _initial_values(criterion, layers, initial) -> dict[str, Tensor]:
    """{layer name: float64 values} of a state_dict or model, checked."""
    if initial is None:
        raise ValueError(
            f"initial: expected the state_dict of before training, which criterion {criterion!r} compares with, got None"
        )
    if isinstance(initial, nn.Module):
        initial = initial.state_dict()
    elif not isinstance(initial, Mapping):
        raise TypeError(f"initial: expected a state_dict or an nn.Module, got {type(initial).__name__}")
    found = {}
    for name, layer in layers.items():
        key = f"{name}.weight" if name else "weight"
        value = initial.get(key)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"initial: expected a tensor {key!r}, got {'none' if value is None else type(value).__name__}"
            )
        if value.shape != layer.weight.shape:
            raise ValueError(f"initial: expected {list(layer.weight.shape)} for {key!r}, got {list(value.shape)}")
        found[name] = value.detach().to(layer.weight.device, torch.float64)
    return found


def _random(weight, generator):
    device = weight.device if generator is None else generator.device
    return torch.rand(weight.shape, generator=generator, device=device, dtype=torch.float64).to(weight.device)


def _checked(name, values, layer):
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"criterion: expected floating-point scores for {name}, got {got}")
    if values.shape != layer.weight.shape:
        expected = list(layer.weight.shape)
        raise ValueError(f"criterion: expected scores {expected} for {name}, got {list(values.shape)}")
    return values.detach().to(layer.weight.device)
