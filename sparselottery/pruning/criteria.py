"""Which weights matter: a criterion gives every weight a score, and the highest scores survive."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

NAMES = ("magnitude", "random")
Criterion = str | Callable[[str, nn.Module], Tensor] | Mapping[str, Tensor]


def scores(
    criterion: Criterion, layers: dict[str, nn.Module], generator: torch.Generator | None
) -> tuple[list[Tensor], str]:
    """One score per weight of each layer, in the order of `layers`, and how to rank them.

    Args:
        criterion: "magnitude": the weights themselves, by absolute value (Frankle & Carbin 2019, section 2).
            "random": every weight is as likely to survive as any other; numbers from `generator`, layer by layer.
            A callable `(name, layer) -> scores`, or a mapping name -> scores: real numbers of the weight's shape; the
            largest survive, so smallest-first criteria negate them.

    Returns:
        The tensors and "magnitude" or "value", as `global_topk` takes them.

    Raises:
        TypeError, ValueError: an unknown criterion, scores missing, of another shape or not floating point.
    """
    if criterion == "magnitude":
        return [layer.weight.detach() for layer in layers.values()], "magnitude"
    if criterion == "random":
        return [_random(layer.weight, generator) for layer in layers.values()], "value"
    if isinstance(criterion, Mapping):
        missing = [name for name in layers if name not in criterion]
        if missing:
            raise ValueError(f"criterion: no scores for {', '.join(missing)}")
        return [_checked(name, criterion[name], layer) for name, layer in layers.items()], "value"
    if callable(criterion):
        return [_checked(name, criterion(name, layer), layer) for name, layer in layers.items()], "value"
    expected = "'magnitude', 'random', a callable (name, layer) -> scores or a mapping of scores"
    if isinstance(criterion, str):
        raise ValueError(f"criterion: expected {expected}, got {criterion!r}")
    raise TypeError(f"criterion: expected {expected}, got {type(criterion).__name__}")


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
