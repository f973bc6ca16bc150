"""How sparse when: rounds that end at a density, and pruning little by little while a network trains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from torch.optim import Optimizer

from .prune import PruneReport, prune


def round_densities(density: float, rounds: int) -> tuple[float, ...]:
    """The density after each of `rounds` rounds that all prune the same fraction and end at `density`: after round i it is
    density^(i / rounds), so a round keeps density^(1 / rounds).

    Raises:
        TypeError, ValueError: `density` is not between 0 and 1, `rounds` no count of at least 1.
    """
    _between("density", density)
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds: expected an int, got {type(rounds).__name__}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    return (*(density ** (i / rounds) for i in range(1, rounds)), float(density))


def rate_for(density: float, rounds: int) -> float:
    """The fraction of the survivors that goes in each of `rounds` rounds which end at `density`: 1 - density^(1 / rounds).

    Raises: as `round_densities`.
    """
    return 1 - round_densities(density, rounds)[0]


@dataclass(frozen=True)
class Gradual:
    """Pruning during training: from `begin` to `end` the sparsity rises, fast at first and ever slower.

    s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3, pruned to at begin, begin + every, ... and at `end` (Zhu & Gupta
    2017, arXiv 1710.01878, section 3). In a training loop, after each optimizer step:

        schedule = sl.Gradual(density=0.1, begin=100, end=1000, every=50)
        ...
        optimizer.step()
        schedule(model, iteration, optimizer)  # iteration: how many steps have been done

    or `trainer(model, schedule=schedule)`.

    Args:
        density: the fraction of the weights that is left at the end, s_f = 1 - density.
        begin, end, every: iterations, or floats from 0 to 1 as fractions of the training; `over` makes iterations of those.
        initial: the density at the beginning, s_i = 1 - initial.
        power: 3 is the paper's; 1 removes the same number each time.
        options: further arguments of `sl.prune`: scope, rates, criterion, exclude, ...

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    density: float
    begin: int | float = 0.0
    end: int | float = 0.75
    every: int | float = 0.01
    initial: float = 1.0
    power: float = 3.0
    options: Mapping = field(default_factory=dict)

    def __post_init__(self):
        _between("density", self.density)
        if not _is_number(self.initial) or not self.density < self.initial <= 1:
            raise ValueError(f"initial: expected a density above {self.density:g} and up to 1, got {self.initial!r}")
        if not _is_number(self.power) or not 0 < self.power < math.inf:
            raise ValueError(f"power: expected a positive number, got {self.power!r}")
        for name in ("begin", "end", "every"):
            value = getattr(self, name)
            if not _is_number(value):
                raise TypeError(
                    f"{name}: expected iterations or a fraction of the training, got {type(value).__name__}"
                )
            if value < 0 or (isinstance(value, float) and not value <= 1):
                raise ValueError(
                    f"{name}: expected iterations (an int) or a fraction from 0 to 1 (a float), got {value}"
                )
        if type(self.begin) is type(self.end) and self.begin >= self.end:
            raise ValueError(f"end: expected a step after begin ({self.begin}), got {self.end}")
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"every: expected at least 1 iteration, got {self.every}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: expected a mapping of arguments of sl.prune, got {type(self.options).__name__}")
        taken = {"density", "sparsity", "rate", "optimizer"} & set(self.options)
        if taken:
            raise ValueError(f"options: expected other arguments of sl.prune than {', '.join(sorted(taken))}")

    def over(self, iterations: int) -> "Gradual":
        """The same schedule with fractions made iterations of a training of so many.

        Raises:
            ValueError: no time is left between `begin` and `end`.
        """
        steps = {
            name: round(value * iterations) if isinstance(value, float) else value
            for name, value in (("begin", self.begin), ("end", self.end), ("every", self.every))
        }
        return replace(self, **steps | {"every": max(1, steps["every"])})

    def due(self, iteration: int) -> bool:
        """Whether `iteration` is one at which weights go."""
        self._check_resolved()
        on_grid = self.begin <= iteration < self.end and (iteration - self.begin) % self.every == 0
        return on_grid or iteration == self.end

    def density_at(self, iteration: int) -> float:
        """The density that a network has after this iteration, 0..1."""
        self._check_resolved()
        if iteration < self.begin:
            return self.initial
        if iteration >= self.end:
            return self.density
        last = (iteration - self.begin) // self.every * self.every
        left = (1 - last / (self.end - self.begin)) ** self.power
        return self.density + (self.initial - self.density) * left

    def __call__(self, model: nn.Module, iteration: int, optimizer: Optimizer | None = None) -> PruneReport | None:
        """Prune `model` in place if this iteration is one at which to; returns what is left, None if it is not.

        Args:
            iteration: how many steps of the optimizer have been done.
            optimizer: its state is zeroed at pruned weights too.

        Raises:
            TypeError, ValueError: as `sl.prune`; the network is sparser than the schedule already.
        """
        if not self.due(iteration):
            return None
        density = self.density_at(iteration)
        return None if density == 1 else prune(model, density=density, optimizer=optimizer, **self.options)

    def _check_resolved(self):
        for name in ("begin", "end", "every"):
            if isinstance(getattr(self, name), float):
                raise ValueError(
                    f"{name}: expected iterations, got the fraction {getattr(self, name)}; over(n) makes them"
                )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _between(name, value) -> None:
    if not _is_number(value):
        raise TypeError(f"{name}: expected a fraction between 0 and 1, got {type(value).__name__}")
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a fraction between 0 and 1, got {value}")
