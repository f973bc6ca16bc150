"""One-shot pruning: train once, prune at once, rewind, train again (Frankle & Carbin, arXiv 1803.03635, section 2)."""

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..nn.convert import as_tuple
from ..pruning import criteria
from . import controls as control_kinds
from . import driver, masking
from .result import Result


def one_shot(
    make_model: Callable[..., nn.Module],
    fit: Callable,
    *,
    density: float | Sequence[float],
    schedule: str = "once",
    criterion: str | Callable = "magnitude",
    batch: tuple[Tensor, Tensor] | None = None,
    rewind: str | int = "init",
    controls: Sequence[str] = control_kinds.CONTROLS,
    control_levels: Sequence[int] | None = None,
    repeats: int = 1,
    seeds: int | Sequence[int] = 5,
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    budget: int | str | None = None,
    exclude: Sequence = (),
    out: str | os.PathLike | None = None,
    workers: int = 1,
    threads: int | None = None,
    replicas: int | None = None,
    progress: Callable[[dict], None] | None = None,
    config: Mapping | None = None,
) -> Result:
    """Find lottery tickets in one step each: level 0 is the dense network, level i the ticket of the i-th density.

    Args:
        density: the fraction of the weights to keep, exactly; or several, falling, all pruned from the same dense network.
            With factors in `rates` the layers share them as after many small rounds (see `sl.prune`).
        schedule: "once" prunes the trained dense network. "gradual" trains another one for each density, from the same values
            and on the same minibatches, that is pruned on the way as a `sl.Gradual` of this density does, and takes its mask;
            `fit` then takes `schedule=` (a `sl.Trainer` does).
        criterion, batch: as for `sl.imp`, but "snip", "grasp" and "synflow" are asked before training, of the values that the
            ticket starts from, as their papers have it.

    The other arguments, the result and the errors are those of `sl.imp`.
    """
    chosen = driver.check(make_model, fit, seeds, rewind, controls, repeats, workers, threads)
    masking.check(fit, criterion, batch, rewind, at_start=True, schedule=schedule)
    if schedule == "gradual" and not driver.accepts(fit, "schedule"):
        raise TypeError(
            f"schedule: 'gradual' needs a fit that takes schedule= (sl.Trainer does), {driver.name_of(fit)} does not"
        )
    densities = list(density) if isinstance(density, Sequence) and not isinstance(density, str) else [density]
    numbers = all(isinstance(d, int | float) and 0 < d < 1 for d in densities)
    if not densities or not numbers or sorted(set(densities), reverse=True) != densities:
        raise ValueError(f"density: expected fractions between 0 and 1, falling, got {density!r}")
    if rates is None:
        rates = {"output": 0.5} if scope == "layer" else None
    exclude = as_tuple(exclude)
    shared = {"scope": scope, "rates": None if rates is None else driver.as_rates(rates), "exclude": exclude}
    if criterion != "magnitude":
        shared["criterion"] = criterion
    steps = tuple({"density": d, **shared} for d in densities)
    model = driver.probe(make_model, chosen[0], exclude, controls)
    for step in steps:
        masking.try_out(model, step)  # complains about scope, rates and the like before anything is trained
    plan = driver.Plan(
        title="one-shot",
        make_model=make_model,
        fit=fit,
        seeds=chosen,
        steps=steps,
        parents=(0,) * len(steps),
        rewind=rewind,
        controls=tuple(controls),
        control_levels=driver.check_control_levels(control_levels, len(steps)),
        repeats=repeats,
        budget=budget,
        exclude=exclude,
        threads=threads,
        replicas=replicas,
        batch=batch,
        schedule=schedule,
        at_start=criteria.needs_batch(criterion),
    )
    return driver.run(plan, out, workers, progress, config)
