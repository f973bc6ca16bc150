"""How many weights each layer keeps, or each set of layers that competes for the survivors."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

SCOPES = ("global", "layer")


@dataclass
class Group:
    """Layers whose weights are ranked against each other, and how fast they are pruned."""

    names: list[str]
    factor: float
    total: int  # weights (or blocks of weights)
    count: int  # those that survived so far
    keep: int = 0


def groups(
    layers: dict[str, nn.Module],
    totals: dict[str, int],
    counts: dict[str, int],
    scope: str,
    rates: Mapping[str, float] | None,
) -> list[Group]:
    """One group per layer, or in global scope one per factor.

    Raises:
        TypeError, ValueError: `scope` or `rates` are not as `prune` describes them.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
    factors = _factors(layers, rates)
    found: dict[object, Group] = {}
    for name in layers:
        group = found.setdefault(name if scope == "layer" else factors[name], Group([], factors[name], 0, 0))
        group.names.append(name)
        group.total += totals[name]
        group.count += counts[name]
    return list(found.values())


def _factors(layers, rates):
    factors = dict.fromkeys(layers, 1.0)
    if rates is None:
        return factors
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected a mapping such as {{'output': 0.5}}, got {type(rates).__name__}")
    for key, factor in rates.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"rates[{key!r}]: expected a number, got {type(factor).__name__}")
        if not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(f"rates[{key!r}]: expected a factor of at least 0, got {factor}")
    kinds = {name: "conv" if isinstance(layer, nn.Conv2d) else "linear" for name, layer in layers.items()}
    for key, factor in rates.items():
        if key in ("conv", "linear"):
            factors.update({name: float(factor) for name, kind in kinds.items() if kind == key})
    if "output" in rates and layers:
        factors[next(reversed(layers))] = float(rates["output"])
    for key, factor in rates.items():
        if key in ("conv", "linear", "output"):
            continue
        hits = [name for name in layers if fnmatch.fnmatchcase(name, key)]
        if not hits:
            raise ValueError(f"rates: no prunable layer is called {key!r}")
        factors.update(dict.fromkeys(hits, float(factor)))
    return factors


def share_out(found: list[Group], keep: int, ideal: list[float]) -> None:
    """Round `ideal` so that it sums to `keep`: floors, then one more each for the largest remainders, first come first.

    No group gets more than it has.
    """
    for group, wish in zip(found, ideal, strict=True):
        group.keep = min(group.count, max(0, math.floor(wish + 1e-9)))
    order = sorted(range(len(found)), key=lambda i: found[i].keep - ideal[i])
    left = keep - sum(group.keep for group in found)
    while left > 0:
        for i in order:
            if left > 0 and found[i].keep < found[i].count:
                found[i].keep += 1
                left -= 1


def to_density(found: list[Group], density: float, rated: bool) -> int:
    """Set what each group keeps so that `round(density * total)` weights survive in all; returns that number.

    Groups without factors all end at `density`. With factors each keeps count * s**factor for the one s that fits: as
    if all had been pruned in many small rounds, so no group is emptied before the others.

    Raises:
        ValueError: more than survive now, in all or in a group.
    """
    total, count = sum(g.total for g in found), sum(g.count for g in found)
    keep = round(density * total)
    if keep > count:
        raise ValueError(
            f"density: {density:.6g} asks for {keep} of {total} weights, but {count} are left; prune never regrows"
        )
    if not rated:
        ideal = [density * g.total for g in found]
        for group, wish in zip(found, ideal, strict=True):
            if math.floor(wish) > group.count:
                raise ValueError(
                    f"density: {density:.6g} asks for {round(wish)} of {group.total} weights in"
                    f" {', '.join(group.names)}, but {group.count} are left; prune never regrows"
                )
    else:
        frozen = sum(g.count for g in found if g.factor == 0)
        if keep < frozen:
            raise ValueError(
                f"density: {density:.6g} asks for {keep} weights, but layers with rate 0 alone keep {frozen}"
            )
        ideal = _by_common_survival(found, keep)
    share_out(found, keep, ideal)
    return keep


def _by_common_survival(found, keep):
    """count * s**factor per group, s found by bisection so that they sum to `keep`."""

    def kept(log_s):
        return [g.count * math.exp(log_s * g.factor) if g.factor else float(g.count) for g in found]

    low, high = -1.0, 0.0
    while sum(kept(low)) > keep and low > -1e6:
        low *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(kept(middle)) > keep else (middle, high)
    return kept(low)


def by_rate(found: list[Group], rate: float) -> int:
    """Set what each group keeps when it loses the fraction rate * factor of its survivors; returns the sum, rounded
    once.

    Raises:
        ValueError: rate * factor is above 1.
    """
    for group in found:
        if rate * group.factor > 1:
            raise ValueError(f"rates: {rate} * {group.factor} prunes more than all of {', '.join(group.names)}")
    ideal = [g.count * (1 - rate * g.factor) for g in found]
    keep = round(sum(ideal))
    share_out(found, keep, ideal)
    return keep
