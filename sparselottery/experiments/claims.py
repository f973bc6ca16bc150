"""A paper's statement as an inequality over the results of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Found = dict[str, dict]  # the JSON object of each run of a figure, by the run's label
Measure = Callable[[Found], float]


@dataclass(frozen=True)
class Claim:
    """A statement of a paper as an inequality.

    `measure(found)` gives the number; it holds when it is at least `expected - tolerance` ("least") or at most
    `expected + tolerance` ("most").
    """

    text: str
    measure: Measure
    expected: float
    tolerance: float
    side: str  # "least" or "most"

    def check(self, found: Found) -> dict:
        """The claim as JSON: {"claim", "measured", "expected", "tolerance", "side", "holds"}."""
        measured = self.measure(found)
        least = self.side == "least"
        holds = measured >= self.expected - self.tolerance if least else measured <= self.expected + self.tolerance
        return {
            "claim": self.text,
            "measured": measured,
            "expected": self.expected,
            "tolerance": self.tolerance,
            "side": self.side,
            "holds": bool(holds),
        }


def line(claim: dict) -> str:
    """A checked claim for people."""
    least = claim["side"] == "least"
    bound = claim["expected"] - claim["tolerance"] if least else claim["expected"] + claim["tolerance"]
    sign = ">=" if least else "<="
    verdict = "pass" if claim["holds"] else "FAIL"
    return f"{verdict}  {claim['claim']}: {claim['measured']:.3g} (expected {claim['expected']:.3g}; passes {sign} {bound:.3g})"


# ---- measures of iterative and one-shot runs; `run` is the label, None the figure's first run ----


def levels_of(found: Found, run: str | None) -> list[dict]:
    return found[next(iter(found)) if run is None else run]["levels"]


def nearest(levels: list[dict], density: float) -> dict:
    """The level whose density is nearest to `density` (a fraction), which must be within a tenth of it.

    Raises:
        ValueError: no level is that near.
    """
    best = min(levels, key=lambda v: abs(v["density"] - density))
    if abs(best["density"] - density) > 0.1 * density:
        raise ValueError(f"levels: expected one near density {density:g}, the nearest is {best['density']:.3g}")
    return best


def mean(
    density: float, kind: str = "ticket", figure: str = "test_accuracy", run: str | None = None, scale: float = 1.0
) -> Measure:
    """Mean over seeds of a figure of `kind` at `density`, times `scale`."""
    return lambda found: scale * nearest(levels_of(found, run), density)[kind][figure]["mean"]


def early_stop_ratio(density: float, kind: str = "ticket", run: str | None = None) -> Measure:
    """Early-stop iteration of `kind` at `density` over that of the dense network."""
    here, dense = (mean(d, k, "early_stop_iteration", run) for d, k in ((density, kind), (1.0, "ticket")))
    return lambda found: here(found) / dense(found)


def points_over(
    density: float, kind: str = "ticket", other: str | None = None, figure="test_accuracy", run: str | None = None
) -> Measure:
    """Accuracy of `kind` at `density`, in percentage points over the dense network (or over `other` at that density)."""
    here = mean(density, kind, figure, run, 100)
    base = mean(1.0, "ticket", figure, run, 100) if other is None else mean(density, other, figure, run, 100)
    return lambda found: here(found) - base(found)


def points_between(one: Measure, other: Measure) -> Measure:
    return lambda found: one(found) - other(found)


def chosen_points_over_dense(figure="test_accuracy", run: str | None = None) -> Measure:
    """Accuracy of the ticket that is best on validation data, in percentage points over the dense network."""

    def measure(found):
        dense, *tickets = levels_of(found, run)
        chosen = max(tickets, key=lambda level: level["ticket"]["validation_accuracy"]["mean"])
        return 100 * (chosen["ticket"][figure]["mean"] - dense["ticket"][figure]["mean"])

    return measure


def best_points_over_dense(figure="test_accuracy", run: str | None = None) -> Measure:
    """The best ticket's accuracy, in percentage points over the dense network."""

    def measure(found):
        accuracies = [100 * level["ticket"][figure]["mean"] for level in levels_of(found, run)]
        return max(accuracies[1:]) - accuracies[0]

    return measure
