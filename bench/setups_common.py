"""What the cases of every op share: the form of a prepared case, its candidates, its random inputs."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparselottery.bench.timing import backend

TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}


@dataclasses.dataclass
class Candidate:
    """`run(i)` is what is timed, on input set i; `results()` computes the same once, in the form of Work.expected()."""

    run: Callable[[int], object]
    results: Callable[[], list[Tensor]] | None = None
    backend: str | None = None
    ours: bool = False


@dataclasses.dataclass
class Work:
    """A prepared case. `bytes`, `operations`: the least it must move and compute, for the roofline."""

    candidates: dict[str, Candidate]
    expected: Callable[[], list[Tensor]]
    tolerance: float
    bytes: float
    operations: float = 0.0


def our_candidates(case, run, results, backends=()) -> dict[str, Candidate]:
    """ "auto", and each of `backends` that can run this call."""
    found = {"auto": Candidate(run, results, None, True)}
    for name in backends:
        try:
            with backend(name):
                run(0)
        except ValueError as error:
            if "SPARSELOTTERY_BACKEND" not in str(error):
                raise
        else:
            found[name] = Candidate(run, results, name, True)
    return found


def kernel_backends(case):
    return ("cpu",) if case.device == "cpu" else ("triton", "cuda")


def make_generator(case, seed):
    return torch.Generator(case.device).manual_seed(seed)


def random_mask(shape, density, generator) -> Tensor:
    """bool of `shape` with exactly round(density * count) survivors at random places."""
    count = math.prod(shape)
    order = torch.rand(count, generator=generator, device=generator.device).argsort()
    mask = torch.zeros(count, dtype=torch.bool, device=generator.device)
    mask[order[: round(density * count)]] = True
    return mask.view(shape)
