"""Figures of the other ways to find a ticket; see `figures`."""

from __future__ import annotations

from dataclasses import replace

from .claims import Claim, Found, points_between
from .figures import FINAL, Figure
from .hparams import EarlyBird, MutualInformation, Supermask

# ---- neurons by mutual information: proposed, no paper's; what it must show to be of use ----


def accuracy_of(method: str, figure="test_accuracy"):
    return lambda found: 100 * found["mutual-information"]["methods"][method][figure]["mean"]


def _iterations_over(method: str, other: str):
    """Iterations of search and retraining, over those of another method."""

    def measure(found):
        costs = (found["mutual-information"]["methods"][name]["cost"]["relative"]["mean"] for name in (method, other))
        return next(costs) / next(costs)

    return measure


def _mutual_information_claims(gain, behind) -> tuple[Claim, ...]:
    """The arguments are tolerances."""
    mine = "mutual-information"
    return (
        Claim("tickets by mutual information are more accurate than random ones of as many neurons, in points",
              points_between(accuracy_of(mine), accuracy_of("random")), 0.5, gain, "least"),
        Claim("they are not less accurate than those of IMP by neuron, in points over them",
              points_between(accuracy_of(mine), accuracy_of("imp")), 0.0, behind, "least"),
        Claim("they cost less than IMP: iterations of search and retraining over those of IMP",
              _iterations_over(mine, "imp"), 0.25, 0.25, "most"),
    )  # fmt: skip


def method_panels(found: Found) -> list[dict]:
    """Accuracy of each method at its density, and of the dense network."""
    result = found["mutual-information"]
    dense = result["dense"]["test_accuracy"]
    series = [{"name": "dense", "points": [[1.0, 100 * dense["mean"], 100 * (dense["ci95"] or 0)]]}]
    for method, figures in result["methods"].items():
        accuracy = figures["test_accuracy"]
        point = [figures["weight_density"]["mean"], 100 * accuracy["mean"], 100 * (accuracy["ci95"] or 0)]
        series.append({"name": method, "points": [point]})
    return [{"label": "test accuracy at early stop, %", "series": series}]


_MUTUAL = MutualInformation(
    data="mnist", budget="20000it", validation=5000, evaluate_every=100, evaluate_test="improved"
)
MUTUAL_INFORMATION = Figure(
    "Neurons by mutual information, LeNet-300-100 on MNIST",
    runs={
        "paper": {"mutual-information": _MUTUAL},
        "short": {"mutual-information": replace(_MUTUAL, budget="6000it", validation=3000, seeds=3)},
        "smoke": {
            "mutual-information": replace(
                _MUTUAL, budget="300it", validation=1000, evaluate_every=50, seeds=2, fraction=0.2, rate=0.5,
                methods=("mutual-information", "imp", "random"),
            )
        },
    },
    claims={
        "paper": _mutual_information_claims(gain=0.5, behind=0.5),
        "short": _mutual_information_claims(gain=0.5, behind=1.0),
        # Which neurons are best does not show in so few minibatches.
        "smoke": (
            Claim("after 300it tickets by mutual information are above chance in test accuracy, in points over 10",
                  lambda found: accuracy_of("mutual-information")(found) - 10, 70.0, 15.0, "least"),
            _mutual_information_claims(gain=0, behind=0)[2],
        ),
    },
    panels=method_panels,
)  # fmt: skip

# ---- Early-Bird: You et al., arXiv 1909.11957, figures 3 and 4, table 2 ----


def _early_bird_claims(run, percent, accuracy, saving) -> tuple[Claim, ...]:
    """`accuracy`, `saving`: tolerances."""

    def over_dense(found):
        levels = found[run]["levels"]
        return 100 * (levels[1]["ticket"][FINAL]["mean"] - levels[0]["ticket"][FINAL]["mean"])

    return (
        Claim(f"with {percent} % of the channels the ticket is drawn early: its epoch over all epochs",
              lambda found: found[run]["drawn_epochs"]["mean"] / found[run]["epochs"], 0.15, 0.1, "most"),
        Claim(f"with {percent} % of the channels the retrained ticket is at the dense network's test accuracy, in points over it",
              over_dense, 0.0, accuracy, "least"),
        Claim(f"with {percent} % of the channels search and retraining take less time than iterative pruning, so many times",
              lambda found: found[run]["cost"]["ratio"]["imp / early-bird"]["seconds"], 5.8, saving, "least"),
    )  # fmt: skip


def early_bird_panels(found: Found) -> list[dict]:
    """Accuracy of the dense networks and of the tickets."""
    series = []
    for run, result in found.items():
        points = [
            [level["density"], 100 * level["ticket"][FINAL]["mean"], 100 * (level["ticket"][FINAL].get("ci95") or 0)]
            for level in result["levels"]
        ]
        series.append({"name": run, "points": points})
    return [{"label": "test accuracy at the end, %", "series": series}]


_EARLY_BIRD = EarlyBird(
    data="cifar-10", model="vgg-19", batch_size=64, budget="160ep", milestones=("80ep", "120ep"), weight_decay=1e-4,
    validation=5000, evaluate_every=500, evaluate_test="improved", augment="flip-crop", seeds=3,
)  # fmt: skip
EARLY_BIRD = Figure(
    "Early-Bird tickets",
    runs={
        "paper": {f"{100 * d:.0f} %": replace(_EARLY_BIRD, density=d) for d in (0.7, 0.5, 0.3)},
        # On digits: a search on CIFAR-10 that gets anywhere takes hours on a CPU.
        "short": {"50 %": EarlyBird(seeds=3, heatmap=False)},
        "smoke": {"50 %": EarlyBird(seeds=1, heatmap=False, controls=())},
    },
    claims={
        # 5.8 is the least of the paper's savings, in energy on a GPU; a CPU spends much of its time beside the arithmetic.
        "paper": tuple(c for d in (70, 50, 30) for c in _early_bird_claims(f"{d} %", d, accuracy=1.0, saving=1.0)),
        "short": _early_bird_claims("50 %", 50, accuracy=1.0, saving=3.8),
        "smoke": _early_bird_claims("50 %", 50, accuracy=2.0, saving=3.8),
    },
    panels=early_bird_panels,
)  # fmt: skip

# ---- supermasks: Zhou et al., arXiv 1905.01067, section 5 and table 1 (MNIST, fully connected) ----


def _accuracy_under(mask: str):
    return lambda found: 100 * found["supermask"]["methods"][mask]["test_accuracy"]["mean"]


def _supermask_claims(learned, criterion, gap) -> tuple[Claim, ...]:
    """The arguments are tolerances."""
    return (
        Claim("untrained weights under a learned mask, test accuracy in percent",
              _accuracy_under("learned"), 95.3, learned, "least"),
        Claim("untrained weights under a mask by large-final-same-sign, test accuracy in percent",
              _accuracy_under("criterion"), 86.0, criterion, "least"),
        Claim("under the mask by criterion they are above a random mask, in points",
              points_between(_accuracy_under("criterion"), _accuracy_under("random-mask")), 76.0, gap, "least"),
    )  # fmt: skip


def mask_panels(found: Found) -> list[dict]:
    """Accuracy under each mask at its density."""
    series = []
    for name, figures in found["supermask"]["methods"].items():
        accuracy = figures["test_accuracy"]
        point = [figures["density"]["mean"], 100 * accuracy["mean"], 100 * (accuracy["ci95"] or 0)]
        series.append({"name": name, "points": [point]})
    return [{"label": "test accuracy, %", "series": series}]


_SUPERMASK = Supermask(
    data="mnist", budget="50000it", mask_budget="50000it", validation=5000, evaluate_every=500, evaluate_test="improved"
)
SUPERMASK = Figure(
    "Supermasks over untrained weights, LeNet-300-100 on MNIST",
    runs={
        "paper": {"supermask": _SUPERMASK},
        "short": {"supermask": replace(_SUPERMASK, budget="5000it", mask_budget="3000it", evaluate_every=250, seeds=3)},
        "smoke": {
            "supermask": replace(
                _SUPERMASK, budget="500it", mask_budget="200it", validation=500, test=2000, evaluate_every=100, seeds=2,
                densities=(0.5, 0.3),
            )
        },
    },
    claims={
        "paper": _supermask_claims(learned=2.0, criterion=5.0, gap=10.0),
        "short": _supermask_claims(learned=6.0, criterion=11.0, gap=16.0),
        "smoke": _supermask_claims(learned=30.0, criterion=36.0, gap=46.0),
    },
    panels=mask_panels,
)  # fmt: skip

FIGURES = {
    "early-bird": EARLY_BIRD,
    "mutual-information": MUTUAL_INFORMATION,
    "supermask": SUPERMASK,
}
