"""Which trainings of a run go together as the batch axis of `Trainer.fit_many`."""

from collections.abc import Callable, Sequence

from torch import nn

from .store import Job

MOST = 32  # replicas where nobody says how many: activations and gradients of all lie in memory at once


def fit_many_of(fit: Callable) -> Callable | None:
    """The `fit_many` that belongs to a `fit`: its own, or that of the object whose method it is."""
    return getattr(fit, "fit_many", None) or getattr(getattr(fit, "__self__", None), "fit_many", None)


def how_many(asked: int | None, fit: Callable, build: Callable[[], nn.Module], workers: int) -> int:
    """How many trainings go together: `asked`, or as many as the device favours.

    On a GPU a small network costs little more many times at once. On a CPU, replicas on one core took 0.7 to 2 times as long
    as the trainings one by one (LeNet-300-100 on 28x28 and 8x8 pixels), and processes use the other cores: there it is 1.

    Raises:
        TypeError, ValueError: `asked` is no count, or models or `fit` do not allow it.
    """
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int)):
        raise TypeError(f"replicas: expected an int, got {type(asked).__name__}")
    if asked is not None and asked < 1:
        raise ValueError(f"replicas: expected at least 1, got {asked}")
    if asked == 1 or (asked is None and (workers > 1 or fit_many_of(fit) is None)):
        return 1
    if workers > 1:
        raise ValueError(f"replicas: expected 1 with {workers} workers, got {asked}")
    if fit_many_of(fit) is None:
        raise TypeError("replicas: more than 1 needs a fit that has fit_many (sl.Trainer does)")
    model = build()
    parameter = next(model.parameters(), None)
    if asked is None and (parameter is None or parameter.device.type != "cuda"):
        return 1
    why_not = getattr(getattr(fit_many_of(fit), "__self__", None), "why_not_many", None)
    reason = why_not(model) if why_not is not None else None
    if reason is None:
        return MOST if asked is None else asked
    if asked is None:
        return 1
    raise ValueError(f"replicas: {reason}")


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """The jobs of each level in batches of `size` at most, levels ascending.

    They do not depend on what is done already: sums over other batches may differ in the last bit, and a run that goes on
    must leave the bits that an uninterrupted one leaves.
    """
    found = []
    for level in sorted({job.level for job in jobs}):
        here = [job for job in jobs if job.level == level and job.kind != "frozen"]
        found += [here[i : i + size] for i in range(0, len(here), size)]
        found += [[job] for job in jobs if job.level == level and job.kind == "frozen"]  # of parametrized layers
    return found
