"""Iterative magnitude pruning with rewinding (Frankle & Carbin, arXiv 1803.03635)."""

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..nn.convert import as_tuple
from ..pruning import round_densities
from . import controls as control_kinds
from . import driver, masking
from .result import Result


def imp(
    make_model: Callable[..., nn.Module],
    fit: Callable,
    *,
    rounds: int | None = None,
    rate: float | None = None,
    density: float | None = None,
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
    """Find lottery tickets: train, prune the weights of smallest magnitude, rewind the others, again.

    Level 0 is the dense network, level i what is left after i rounds, trained from the values it was rewound to.

    Args:
        make_model: a new model: called with `seed` if it takes one, else with torch's generator seeded. Plain layers are
            masked in place (see `sl.sparsify`).
        fit: `fit(model, *, seed, budget) -> History` trains a model in place: a `sl.Trainer`, or any training loop that
            returns a History or a mapping with "test_accuracy" (and, for the early stop, see `History.of`). To rewind to a
            step it also takes `snapshot_at` (return the state_dict at that step as the history's `snapshot`) and `start_at`.
            If it has a method `check(model, *, budget, snapshot_at)`, that is asked before anything is made.
        rounds: how many rounds of pruning.
        rate: the fraction of the remaining weights pruned in a round; None is 0.2.
        density: in place of `rounds`, until this fraction of the weights or less is left. With `rounds`, in place of `rate`:
            every round keeps density^(1 / rounds) of what is left, and the last ends at exactly this density.
        criterion: which of the trained weights survive: a name of `sl.pruning.CRITERIA` or a callable (see `sl.prune`).
            Initial values are those that the ticket is rewound to.
        batch: (x, y) for "snip", "grasp" and "synflow"; None is 10 training examples of each class if `fit` is a sl.Trainer.
        rewind: "init" (to the initial values), or a step of the dense training: "500it", "2ep". Training then starts at it.
            "lr" leaves the weights as they are and rewinds the learning rate alone: every round trains on from the survivors'
            trained values with the whole schedule (Renda et al. 2020, arXiv 2003.02389). Then level 0's ticket holds the
            trained weights, which the controls random-mask and shuffle take too.
        controls: "reinit", "random-mask", "shuffle", "constant", "frozen" (see tickets/controls.py), each trained at every
            level, or at `control_levels` only, `repeats` times each. The last two not with rewind="lr".
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
    masking.check(fit, criterion, batch, rewind)
    exclude = as_tuple(exclude)
    if rates is None:
        rates = {"output": 0.5} if scope == "layer" else {}
    shared = {"scope": scope, "rates": driver.as_rates(rates), "exclude": exclude}
    if criterion != "magnitude":
        shared["criterion"] = criterion
    steps = _steps(driver.probe(make_model, chosen[0], exclude, controls), shared, rounds, rate, density)
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
        batch=batch,
    )
    return driver.run(plan, out, workers, progress, config)


def _steps(model: nn.Module, shared: Mapping, rounds, rate, density) -> tuple[dict, ...]:
    """The arguments of `prune` in each round, tried out on `model`, since what a round leaves does not depend on the weights."""
    if rounds is None and density is None:
        raise ValueError("rounds: expected rounds, density or both, got neither")
    if rounds is not None and density is not None:
        if rate is not None:
            raise ValueError(f"rate: expected None with both rounds and density, which make it, got {rate!r}")
        steps = tuple({"density": d, **shared} for d in round_densities(density, rounds))
        for step in steps:
            masking.try_out(model, step)
        return steps
    rate = 0.2 if rate is None else rate
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ValueError(f"rate: expected a fraction between 0 and 1, got {rate!r}")
    step = {"rate": rate, **shared}
    if rounds is not None:
        if isinstance(rounds, bool) or not isinstance(rounds, int):
            raise TypeError(f"rounds: expected an int, got {type(rounds).__name__}")
        if rounds < 0:
            raise ValueError(f"rounds: expected at least 0, got {rounds}")
        masking.try_out(model, step)  # complains about scope, rates and the like before anything is trained
        return (step,) * rounds
    if not isinstance(density, int | float) or not 0 < density < 1:
        raise ValueError(f"density: expected a fraction between 0 and 1, got {density!r}")
    count, left = 0, 1.0
    while left > density:
        after = masking.try_out(model, step).density
        if after == left:
            raise ValueError(f"density: {density} cannot be reached at rate {rate}: rounds end at {left:.3g}")
        count, left = count + 1, after
    return (step,) * count
