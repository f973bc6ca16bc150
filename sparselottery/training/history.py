"""What a training run leaves behind: a record per evaluation, and the early stop read from them."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from torch import Tensor

_STEP = re.compile(r"(?:([0-9]+)ep)?(?:([0-9]+)it)?|([0-9]+)")


@dataclass(frozen=True)
class Record:
    """One evaluation. Losses are means per example, accuracies fractions (0..1); what was not measured is None.

    `iteration` is None where a user's `fit` did not say it, and then there is no early-stop iteration.
    `train_loss` is the mean over the minibatches since the previous evaluation.
    """

    iteration: int | None
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None


@dataclass
class History:
    """The evaluations of one training run, in order of iteration.

    `snapshot` holds the model's state_dict at the step the caller asked for (`snapshot_at`), None if none was asked for;
    it is not part of the JSON.
    """

    records: list[Record] = field(default_factory=list)
    snapshot: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def early_stop(self) -> Record | None:
        """The record of minimum validation loss (the first of equals); None if validation was never measured."""
        measured = [r for r in self.records if r.validation_loss is not None and not math.isnan(r.validation_loss)]
        return min(measured, key=lambda r: r.validation_loss, default=None)

    @property
    def early_stop_iteration(self) -> int | None:
        best = self.early_stop
        return None if best is None else best.iteration

    @property
    def validation_loss(self) -> float | None:
        """The minimum validation loss."""
        best = self.early_stop
        return None if best is None else best.validation_loss

    @property
    def validation_accuracy(self) -> float | None:
        """Validation accuracy at the early stop."""
        best = self.early_stop
        return None if best is None else best.validation_accuracy

    @property
    def test_accuracy_at_early_stop(self) -> float | None:
        best = self.early_stop
        return None if best is None else best.test_accuracy

    @property
    def final_test_accuracy(self) -> float | None:
        """Test accuracy at the last evaluation."""
        return self.records[-1].test_accuracy if self.records else None

    @property
    def test_accuracy(self) -> float | None:
        """Test accuracy at the early stop; the final one where nothing was validated."""
        return self.final_test_accuracy if self.early_stop is None else self.test_accuracy_at_early_stop

    def at(self, iteration: int) -> Record:
        """The last record not later than `iteration`.

        Raises:
            ValueError: nothing was recorded by then.
        """
        until = [r for r in self.records if r.iteration is not None and r.iteration <= iteration]
        if not until:
            raise ValueError(f"iteration: expected one at or after the first evaluation, got {iteration}")
        return until[-1]

    def to_json(self) -> dict:
        """{"records": [{"iteration": .., "train_loss": .., ...}, ...]}; JSON knows no NaN or infinity: they become null."""
        finite = [
            {k: None if v is None or not math.isfinite(v) else v for k, v in asdict(r).items()} for r in self.records
        ]
        return {"records": finite}

    @classmethod
    def from_json(cls, value: Mapping) -> "History":
        """The inverse of `to_json`.

        Raises:
            ValueError: not such an object.
        """
        try:
            return cls([_record(r) for r in value["records"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"value: expected {{'records': [...]}} as History.to_json writes it ({error})") from None

    @classmethod
    def of(cls, value, fit="fit") -> "History":
        """What a user's `fit` returned, as a History: itself, `{"records": [...]}`, or the record of one single evaluation.

        The single evaluation is a mapping with at least "test_accuracy"; "iteration" (also "early_stop_iteration"),
        "train_loss", "validation_loss", "validation_accuracy" and "snapshot" are understood as well. Without an iteration
        there is no early-stop iteration; everything else goes as usual.

        Raises:
            TypeError: anything else; the message names `fit`.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            snapshot = value.get("snapshot")
            try:
                if "records" in value:
                    return cls([_record(r) for r in value["records"]], snapshot)
                if "test_accuracy" in value:
                    known = {"iteration": value.get("early_stop_iteration"), **value}
                    names = {f.name for f in fields(Record)}
                    return cls([_record({k: v for k, v in known.items() if k in names})], snapshot)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{fit}: returned a mapping that is no history: {error}") from None
        got = f"a mapping with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise TypeError(f'{fit}: expected it to return a sl.History or a mapping with "test_accuracy", got {got}')


def _record(value: Mapping) -> Record:
    """A Record of plain numbers (0-d tensors and numpy scalars too)."""
    unknown = set(value) - {f.name for f in fields(Record)}
    if unknown or "iteration" not in value:
        raise TypeError(f"a record has iteration, losses and accuracies, got {sorted(value)}")
    numbers = {k: None if v is None else float(v) for k, v in value.items()}
    numbers["iteration"] = None if value["iteration"] is None else int(value["iteration"])
    return Record(**numbers)


def check_seed(seed: int, name: str = "seed") -> int:
    """A seed that torch's generators take.

    Raises:
        TypeError: not an int. ValueError: out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name}: expected a seed from 0 to 2**64 - 1, got {seed}")
    return seed


def parse_step(step: int | str, steps_per_epoch: int | None = None, name: str = "step") -> int:
    """A step as a number of iterations: 500, "500", "500it", "2ep" or "2ep50it".

    Raises:
        ValueError: it is none of these or negative, or counts epochs where `steps_per_epoch` is unknown.
        TypeError: neither int nor str.
    """
    if isinstance(step, bool) or not isinstance(step, int | str):
        raise TypeError(f'{name}: expected iterations or a string such as "500it" or "2ep", got {type(step).__name__}')
    if isinstance(step, int):
        if step < 0:
            raise ValueError(f"{name}: expected at least 0 iterations, got {step}")
        return step
    match = _STEP.fullmatch(step)
    if not step or match is None:
        raise ValueError(f'{name}: expected iterations or a string such as "500it" or "2ep", got {step!r}')
    epochs, iterations, bare = (int(group or 0) for group in match.groups())
    if epochs and steps_per_epoch is None:
        raise ValueError(f"{name}: {step!r} counts epochs, but how many iterations an epoch has is unknown here")
    return epochs * (steps_per_epoch or 0) + iterations + bare
