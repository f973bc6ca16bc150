"""How a driver finds the mask of a level: by which criterion, with what it needs, at once or while a network trains."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dispatch
from ..pruning import Gradual, PruneReport, criteria, prune
from ..training.trainer import Trainer
from . import controls
from .seeding import seeded
from .ticket import Ticket

SCHEDULES = ("once", "gradual")
PER_CLASS = 10  # training examples that snip and grasp see of each class, as GraSP's authors have it


def check(fit: Callable, criterion, batch, rewind, at_start: bool = False, schedule: str = "once") -> None:
    """The arguments of drivers that decide how masks are found.

    Args:
        at_start: whether such a criterion is asked before training.

    Raises:
        TypeError, ValueError: one is not as described there, or they do not go together.
    """
    if isinstance(criterion, Mapping):
        raise TypeError(
            "criterion: expected a name or a callable (name, layer) -> scores, got scores, which are one model's"
        )
    criteria.check(criterion)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if batch is not None and not criteria.needs_batch(criterion):
        raise ValueError("batch: expected None for a criterion that puts no data through the network")
    if criteria.needs_batch(criterion):
        if batch is None and trainer_of(fit) is None:
            raise ValueError(
                f"batch: expected (x, y) for criterion {criterion!r}; only of a sl.Trainer are training examples known"
            )
        if schedule == "gradual":
            raise ValueError(
                f"criterion: expected one that looks at weights with schedule 'gradual', got {criterion!r}"
            )
        if at_start and rewind == "lr":
            raise ValueError(
                f"rewind: expected 'init' or a step with {criterion!r}, whose masks are found there, got 'lr'"
            )


def trainer_of(fit: Callable) -> Trainer | None:
    """The `sl.Trainer` behind a `fit`: itself, the object whose method it is, or the attribute `trainer` of that."""
    owner = getattr(fit, "__self__", fit)
    return owner if isinstance(owner, Trainer) else getattr(owner, "trainer", None)


def examples(trainer: Trainer, seed: int, per_class: int = PER_CLASS) -> tuple[Tensor, Tensor]:
    """Training examples (x, y) drawn from `seed`, `per_class` of each class or all that it has."""
    x, y = trainer.data["train"]
    generator = torch.Generator().manual_seed(controls.derived_seed("examples", seed))
    order = torch.randperm(len(y), generator=generator).to(y.device)
    of_class = [order[y[order] == label][:per_class] for label in y.unique()]
    chosen = torch.cat(of_class)
    return x[chosen], y[chosen]


def try_out(model: nn.Module, step: Mapping) -> PruneReport:
    """Prune `model` to see whether that works and what is left, which depends on no weight."""
    with warnings.catch_warnings():  # of a layer that these weights would empty
        warnings.simplefilter("ignore")
        return prune(model, **{name: value for name, value in step.items() if name != "criterion"})


def masked_models(
    plan, seed: int, levels: Sequence[int], model: nn.Module, start: Ticket, rewound: Ticket
) -> Iterator[tuple[int, nn.Module]]:
    """(level, a network with its mask) for each of the levels that come of one training.

    Args:
        plan: the driver's. model: as it was trained; changed. start: what it was trained from. rewound: what the dense
            network is rewound to.
    """
    # A learning rate rewound leaves the weights where they were: those move from where this training began.
    initial = start.initial if plan.rewind == "lr" else rewound.initial
    for level in levels:
        step = plan.steps[level - 1]
        if plan.schedule == "gradual":
            found = _trained_sparse(plan, seed, level, start, initial)
        elif plan.at_start:
            found = rewound.apply(plan.build(seed))
            prune(found, **step, **_evidence(plan, seed, level, initial))
        else:
            found = model if level == levels[-1] else copy.deepcopy(model)
            prune(found, **step, **_evidence(plan, seed, level, initial))
        yield level, found


def _trained_sparse(plan, seed, level, start, initial) -> nn.Module:
    """A network trained like the dense one, but pruned on the way."""
    options = {**plan.steps[level - 1], **_evidence(plan, seed, level, initial)}
    schedule = Gradual(options.pop("density"), options=options)
    model = start.apply(plan.build(seed))
    with seeded(seed), dispatch.reproducible():
        plan.fit(model, seed=seed, budget=plan.budget, schedule=schedule)
    return model


def _evidence(plan, seed, level, initial) -> dict:
    """What the criterion of a level asks for, as arguments of `prune`."""
    criterion = plan.steps[level - 1].get("criterion", "magnitude")
    if criteria.needs_initial(criterion):
        return {"initial": initial}
    if criterion == "random":
        return {"generator": torch.Generator().manual_seed(controls.derived_seed("criterion", seed, level))}
    if not criteria.needs_batch(criterion):
        return {}
    return {"batch": examples(trainer_of(plan.fit), seed) if plan.batch is None else plan.batch, **loss_of(plan.fit)}


def loss_of(fit: Callable) -> dict:
    """The `loss` that snip and grasp are to ask, as an argument of `prune`; none where theirs is that of the training."""
    trainer = trainer_of(fit)
    return {} if trainer is None or trainer.loss is F.cross_entropy else {"loss": trainer.loss}


def digest_of(batch: Sequence[Tensor]) -> str:
    """The first digits of the SHA-256 of some tensors."""
    found = hashlib.sha256()
    for tensor in batch:
        if tensor is not None:
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
