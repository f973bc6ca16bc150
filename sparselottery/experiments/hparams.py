"""What an experiment is made of, as dataclasses: the command line, the run folder's name and its config.json come from them.

Each field's metadata says what it means ("help") and, where it is a choice, of what ("choices").
"""

from dataclasses import asdict, dataclass, field, fields, replace

from ..pruning import CRITERIA
from ..tickets.controls import ALL as CONTROLS
from ..tickets.early_bird import STRUCTURES
from ..tickets.early_bird_driver import STARTS
from ..tickets.masking import SCHEDULES
from ..tickets.supermask import METHODS as SUPERMASK_METHODS
from ..tickets.supermask import WEIGHTS
from ..training.augment import AUGMENTATIONS
from .data import DATASETS
from .models import MODELS


def _of(default, help, choices=None):
    return field(default=default, metadata={"help": help, **({"choices": tuple(choices)} if choices else {})})


@dataclass(frozen=True)
class Training:
    """Data, network and optimizer. The defaults are those of the digits demo."""

    data: str = _of("digits", "data set", DATASETS)
    model: str = _of("lenet-300-100", "network", MODELS)
    dropout: float = _of(0.0, "dropout before the fully connected layers of conv-2, conv-4 and conv-6")
    optimizer: str = _of("adam", "optimizer", ("adam", "adamw", "sgd"))
    lr: float = _of(1.2e-3, "learning rate")
    momentum: float = _of(0.0, "momentum, for sgd")
    weight_decay: float = _of(0.0, "weight decay")
    batch_size: int = _of(60, "examples in a minibatch")
    budget: str = _of("1200it", "how long each network is trained, in iterations (600 or 600it) or epochs (20ep)")
    warmup: str = _of("0it", "linear warm-up of the learning rate, as long as this")
    milestones: tuple[str, ...] = _of((), "steps such as 500it or 20ep from which the learning rate is divided by ten")
    validation: int = _of(200, "training examples held out for validation")
    split_seed: int = _of(0, "which examples are held out")
    test: int = _of(0, "how many test examples to use, the first ones (0: all)")
    augment: str = _of("none", "change training images at random: mirror, and crop after padding", AUGMENTATIONS)
    evaluate_every: int = _of(20, "iterations between evaluations")
    evaluate_test: str = _of(
        "always", "test at every evaluation, or only where validation improved", ("always", "improved")
    )

    def __post_init__(self):
        for name in {"budget", "warmup", "milestones", "rewind", "mask_budget"} & {f.name for f in fields(self)}:
            object.__setattr__(self, name, _with_unit(getattr(self, name)))


@dataclass(frozen=True)
class _Search(Training):
    """What both drivers share."""

    scope: str = _of("layer", "prune every layer by the rate, or rank all weights together", ("layer", "global"))
    output_factor: float = _of(0.5, "factor on the rate in the output layer (0 with global scope: it is not pruned)")
    conv_factor: float = _of(1.0, "factor on the rate in convolutions")
    criterion: str = _of("magnitude", "which weights survive", CRITERIA)
    rewind: str = _of(
        "init", "rewind to the initial values, to a step such as 500it or 2ep, or lr: the learning rate alone"
    )
    controls: tuple[str, ...] = _of(("reinit", "random-mask"), "controls trained at every level", CONTROLS)
    control_levels: tuple[int, ...] | None = _of(None, "levels at which controls are trained (all)")
    repeats: int = _of(1, "how often each control is trained per seed")
    seeds: int = _of(5, "trials")

    def rates(self) -> dict[str, float]:
        """As `sl.imp` takes them.

        Raises:
            ValueError: a factor that global scope has no use for.
        """
        if self.scope == "global":
            if (
                self.output_factor not in (0.0, 0.5) or self.conv_factor != 1.0
            ):  # 0.5, the default, is that of the other scope
                raise ValueError(
                    "output_factor, conv_factor: expected none but --output-factor 0 with global scope, which ranks all "
                    f"weights together, got {self.output_factor:g} and {self.conv_factor:g}"
                )
            return {} if self.output_factor else {"output": 0.0}
        named = {"output": self.output_factor, "conv": self.conv_factor}
        return {name: factor for name, factor in named.items() if name == "output" or self.model != "lenet-300-100"}


@dataclass(frozen=True)
class Imp(_Search):
    """Iterative magnitude pruning."""

    rounds: int = _of(15, "rounds of pruning; level 0 is the dense network")
    rate: float = _of(0.2, "fraction of the remaining weights pruned in a round")
    density: float | None = _of(
        None, "end at this density: every round keeps density^(1 / rounds) (in place of --rate)"
    )

    def pace(self) -> dict:
        """How fast, as `sl.imp` takes it.

        Raises:
            ValueError: both a rate and a density.
        """
        if self.density is None:
            return {"rounds": self.rounds, "rate": self.rate}
        if self.rate != 0.2:
            raise ValueError(f"rate: expected none with --density, which makes it, got {self.rate:g}")
        return {"rounds": self.rounds, "density": self.density}


@dataclass(frozen=True)
class OneShot(_Search):
    """One-shot pruning."""

    densities: tuple[float, ...] = _of((0.5, 0.2, 0.1, 0.05), "fractions of the weights to keep")
    schedule: str = _of(
        "once", "prune the trained network at once, or another one gradually while it trains, for the mask", SCHEDULES
    )


@dataclass(frozen=True)
class EarlyBird(Training):
    """Early-Bird tickets. The defaults are those of the digits demo; networks with BatchNorm only have channels to rank."""

    model: str = _of("conv-bn-4", "network", MODELS)
    optimizer: str = _of("sgd", "optimizer", ("adam", "adamw", "sgd"))
    lr: float = _of(0.1, "learning rate")
    momentum: float = _of(0.9, "momentum, for sgd")
    budget: str = _of("50ep", "how long each network is trained, in epochs (20ep) or iterations (600 or 600it)")
    milestones: tuple[str, ...] = _of(
        ("25ep", "38ep"), "steps such as 500it or 20ep from which the learning rate is divided by ten"
    )
    density: float = _of(0.5, "fraction of the channels (weights) to keep")
    structure: str = _of("channel", "channels by BatchNorm scale, or single weights by magnitude", STRUCTURES)
    window: int = _of(5, "epochs whose masks are compared")
    threshold: float = _of(0.1, "the ticket is drawn when their distances are below this")
    l1: float = _of(1e-4, "factor of the L1 penalty on BatchNorm scales in the search")
    start: str = _of("init", "train the ticket from its initial values, or from those at which it was drawn", STARTS)
    round_to: int | None = _of(None, "round the widths of the layers up to multiples of this (8 suits GPUs)")
    controls: tuple[str, ...] = _of(("random-mask",), "controls trained beside the ticket", ("random-mask",))
    heatmap: bool = _of(True, "go on with the first search to the end, for the distances over all epochs")
    seeds: int = _of(5, "trials")


METHODS = ("mutual-information", "early-bird", "imp", "magnitude", "random")


@dataclass(frozen=True)
class MutualInformation(Training):
    """Neurons chosen by mutual information, beside other ways to choose as many."""

    density: float = _of(0.1, "fraction of the neurons and channels to keep")
    scope: str = _of("layer", "keep this fraction of every layer, or rank all together", ("layer", "global"))
    methods: tuple[str, ...] = _of(METHODS, "ways to choose them", METHODS)
    fraction: float = _of(0.1, "how much of the budget is trained before mutual information is measured")
    bins: int = _of(0, "bins of the estimator (0: as many as the probe set, the validation examples, allows)")
    rate: float = _of(0.2, "imp: fraction of the remaining neurons pruned in a round")
    window: int = _of(5, "early-bird: epochs whose masks are compared")
    threshold: float = _of(0.1, "early-bird: the distance below which masks have settled")
    l1: float = _of(1e-4, "early-bird: factor of the L1 penalty on BatchNorm scales")
    seeds: int = _of(5, "trials")


@dataclass(frozen=True)
class Supermask(Training):
    """Masks learned over untrained weights, beside masks from a trained network."""

    method: str = _of("bernoulli", "how masks are learned", SUPERMASK_METHODS)
    weights: str = _of("constant", "untrained weights: signed constants of each layer, or the initial values", WEIGHTS)
    rescale: bool = _of(False, "multiply what is kept by the number of weights over the number kept, layer by layer")
    density: float | None = _of(None, "density of every layer, for edge-popup (default 0.5)")
    mask_lr: float = _of(0.1, "learning rate of the masks' scores (Adam)")
    mask_budget: str = _of("1200it", "how long masks are learned")
    criterion: str = _of("large-final-same-sign", "which masks from the trained network to compare with", CRITERIA)
    densities: tuple[float, ...] = _of(
        (0.8, 0.5, 0.3, 0.2, 0.1), "densities tried for the masks from the trained network"
    )
    seeds: int = _of(5, "trials")


def _with_unit(step):
    """A number of iterations as "600it": one run has one name, however it was typed."""
    if isinstance(step, tuple):
        return tuple(map(_with_unit, step))
    return f"{step}it" if str(step).isdecimal() else step


# The papers' protocols (Frankle & Carbin, figure 2 and appendices G to J) beside the demo; `replace` what a scale changes.
_LENET = Imp(
    data="mnist", budget="50000it", validation=5000, evaluate_every=100, evaluate_test="improved", rounds=21, repeats=3,
    controls=("reinit",),
)  # fmt: skip
_CONV = replace(_LENET, data="cifar-10", model="conv-2", lr=2e-4, budget="20000it", conv_factor=0.5)
# Convolutions alone are pruned, all together; momentum, mirrored and cropped images, the rate divided by ten twice.
_DEEP = Imp(
    data="cifar-10", model="resnet-20", optimizer="sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, batch_size=128,
    budget="30000it", warmup="20000it", milestones=("20000it", "25000it"), validation=5000, evaluate_every=500,
    evaluate_test="improved", augment="flip-crop", scope="global", output_factor=0.0, controls=("reinit",), rounds=21,
)  # fmt: skip
PRESETS = {
    "digits": Imp(),
    "lenet": _LENET,
    "conv2": _CONV,
    "conv4": replace(_CONV, model="conv-4", lr=3e-4, budget="25000it"),
    "conv6": replace(_CONV, model="conv-6", lr=3e-4, budget="30000it", conv_factor=0.75),
    "resnet18": _DEEP,
    "vgg19": replace(
        _DEEP, model="vgg-19", lr=0.1, batch_size=64, budget="160ep", warmup="10000it", milestones=("80ep", "120ep")
    ),
}


def changed(hparams) -> dict:
    """The fields that differ from their defaults: what a run is named by, so that a field added later renames no run."""
    return {f.name: asdict(hparams)[f.name] for f in fields(hparams) if getattr(hparams, f.name) != f.default}
