"""Iterative magnitude pruning with rewinding (Frankle & Carbin, arXiv 1803.03635)."""

import os
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..nn.convert import as_tuple
from ..pruning import prune
from . import controls as control_kinds
from . import driver
from .result import Result


def imp(
    make_model: Callable[..., nn.Module],
    fit: Callable,
    *,
    rounds: int | None = None,
    rate: float = 0.2,
    density: float | None = None,
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
    """Find lottery tickets: train, prune the weights of smallest magnitude, rewind the others, again.

    Level 0 is the dense network, level i what is left after i rounds, trained from the values it was rewound to.

    Args:
        make_model: a new model: called with `seed` if it takes one, else with torch's generator seeded. Plain layers are
            masked in place (see `sl.sparsify`).
        fit: `fit(model, *, seed, budget) -> History` trains a model in place: a `sl.Trainer`, or any training loop that
            returns a History or a mapping with "test_accuracy" (and, for the early stop, see `History.of`). To rewind to a
            step it also takes `snapshot_at` (return the state_dict at that step as the history's `snapshot`) and `start_at`.
            If it has a method `check(model, *, budget, snapshot_at)`, that is asked before anything is made.
        rounds, density: how many rounds of pruning, or instead until this fraction of the weights or less is left.
        rate: the fraction of the remaining weights pruned in a round.
        rewind: "init" (to the initial values), or a step of the dense training: "500it", "2ep". Training then starts at it.
        controls: "reinit", "random-mask", "shuffle" (see tickets/controls.py), each trained at every level, or at
            `control_levels` only, `repeats` times each.
        seeds: how many trials (0, 1, ...), or their seeds. One decides initial values, batch order and random masks.
        scope: "layer" prunes every layer by the rate, "global" ranks all weights together.
        rates: factors on the rate by layer, {"output": 0.5, "conv": 0.75} (see `sl.prune`; 0 never prunes it). None is
            {"output": 0.5} with scope "layer", as in the paper, and no factors with "global".
        budget: handed to `fit`. exclude: layer names or types that are not pruned.
        out: the run folder. A run that was interrupted goes on where it was; its tickets are those of an uninterrupted one,
            bit for bit, if `fit` is deterministic. A second process on the folder waits for the first.
        workers: processes that train at the same time (make_model and fit must pickle). threads: CPU threads of each training;
            None is 1 with several workers, else torch's. Sums over other thread counts may differ in the last bit.
        replicas: how many trainings of a level go at once as a batch axis in this process (`sl.Trainer.fit_many`), which a GPU
            favours with small networks: None is up to 32 on a GPU, if `fit` and the model allow it and there is one worker,
            and 1 elsewhere. Sums over other batches may differ in the last bit.
        progress: called with a dictionary: {"event": "start" | "job" | "waiting", "done": .., "total": .., ...}.
        config: more to say in config.json, and to compare when a run goes on.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    chosen = driver.check(make_model, fit, seeds, rewind, controls, repeats, workers, threads)
    exclude = as_tuple(exclude)
    if rates is None:
        rates = {"output": 0.5} if scope == "layer" else {}
    step = {"rate": rate, "scope": scope, "rates": driver.as_rates(rates), "exclude": exclude}
    steps = (step,) * _count(driver.probe(make_model, chosen[0], exclude, controls), step, rounds, density)
    plan = driver.Plan(
        title="imp",
        make_model=make_model,
        fit=fit,
        seeds=chosen,
        steps=steps,
        parents=tuple(range(len(steps))),
        rewind=rewind,
        controls=tuple(controls),
        control_levels=driver.check_control_levels(control_levels, len(steps)),
        repeats=repeats,
        budget=budget,
        exclude=exclude,
        threads=threads,
        replicas=replicas,
    )
    return driver.run(plan, out, workers, progress, config)


def _count(model: nn.Module, step: Mapping, rounds: int | None, density: float | None) -> int:
    """How many rounds: tried out on `model`, since what a round leaves does not depend on the weights."""
    if (rounds is None) == (density is None):
        raise ValueError("rounds: expected either rounds or density, got " + ("neither" if rounds is None else "both"))
    if not isinstance(step["rate"], int | float) or not 0 < step["rate"] < 1:
        raise ValueError(f"rate: expected a fraction between 0 and 1, got {step['rate']!r}")
    if rounds is not None:
        if isinstance(rounds, bool) or not isinstance(rounds, int):
            raise TypeError(f"rounds: expected an int, got {type(rounds).__name__}")
        if rounds < 0:
            raise ValueError(f"rounds: expected at least 0, got {rounds}")
        prune(model, **step)  # complains about scope, rates and the like before anything is trained
        return rounds
    if not isinstance(density, int | float) or not 0 < density < 1:
        raise ValueError(f"density: expected a fraction between 0 and 1, got {density!r}")
    count, left = 0, 1.0
    while left > density:
        after = prune(model, **step).density
        if after == left:
            raise ValueError(f"density: {density} cannot be reached at rate {step['rate']}: rounds end at {left:.3g}")
        count, left = count + 1, after
    return count
