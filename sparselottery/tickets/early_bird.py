"""Early-Bird tickets: the mask settles long before the weights do (You et al., arXiv 1909.11957).

After every epoch the mask that pruning would give now is compared with those of the epochs before; once it has stopped moving,
training can end: the ticket is drawn. Works with any training loop:

    bird = sl.EarlyBird(density=0.5)
    for epoch in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x), y) + bird.penalty(model)
            ...
        if bird.update(model):
            break
    small = sl.shrink(make_model(), bird.ticket, x)   # the same outputs from fewer channels; train this one
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..masks import Mask
from ..nn.convert import Exclude, excluded_names, maskable_modules
from ..ops import bitmask
from ..ops.global_topk import global_topk
from .ticket import Ticket, state_for

STRUCTURES = ("channel", "unstructured")


class EarlyBird:
    """Watches a network in training and draws its ticket (You et al. 2020, section 3 and algorithm 1).

    The mask of an epoch keeps the fraction `density` of all channels, those of largest BatchNorm scale |γ| over all layers
    together, or of all weights, those of largest magnitude. The last `window` masks wait in a queue; the ticket is drawn when
    every normalized Hamming distance from the newest to another one in the full queue is below `threshold`.

    Masks also settle where nothing is learned; a warning says so where nothing at all has changed from one epoch to the next.
    Look at the accuracy, too: the driver, `sl.early_bird`, tells trainings that are no better than chance.

    A layer that would lose everything keeps its best channel (weight), at the expense of the worst of the others, and a
    warning says so once: a network with an empty layer computes a constant.

    Args:
        density: the fraction to keep, between 0 and 1; the paper's pruning ratios of 30, 50 and 70 % are 0.7, 0.5 and 0.3.
        structure: "channel" (of BatchNorm layers) or "unstructured" (weights of linear and convolutional layers).
        window: masks in the queue, at least 2.
        threshold: above 0, at most 1.
        l1: the factor of `penalty`, which makes |γ| tell channels apart (Liu et al., arXiv 1708.06519).
        exclude: layers that are not pruned: names, patterns or classes, as for `sl.sparsify`.
        initial: what the ticket starts from: the model as it is before training, or its state_dict; copied at once. None: the
            weights with which it was drawn.

    Attributes:
        drawn: whether there is a ticket.
        epoch: the epoch at which it was drawn, counted from 1; None until then.
        epochs: how many epochs were seen.
        ticket: a `sl.Ticket`, None until it is drawn. Its masks are those of the BatchNorm layers' channels, or of the weights.
        scores: layer name -> |γ| `[channels]` (weights: None) as they were when it was drawn.
        guarded: the layers that the newest mask would have emptied.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """

    def __init__(
        self,
        density: float = 0.5,
        structure: str = "channel",
        window: int = 5,
        threshold: float = 0.1,
        *,
        l1: float = 1e-4,
        exclude: Exclude = (),
        initial: nn.Module | Mapping[str, Tensor] | None = None,
    ):
        self.density = _number("density", density)
        if not 0 < density < 1:
            raise ValueError(f"density: expected a fraction above 0 and below 1 to keep, got {density}")
        if structure not in STRUCTURES:
            raise ValueError(f"structure: expected one of {', '.join(STRUCTURES)}, got {structure!r}")
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window: expected an int, got {type(window).__name__}")
        if window < 2:
            raise ValueError(f"window: expected at least 2 masks to compare, got {window}")
        self.threshold = _number("threshold", threshold)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a distance above 0 and up to 1, got {threshold}")
        self.l1 = _number("l1", l1)
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1: expected a finite factor of at least 0, got {l1}")
        if initial is not None and not isinstance(initial, nn.Module | Mapping):
            raise TypeError(f"initial: expected a state_dict or an nn.Module, got {type(initial).__name__}")
        self.structure, self.window, self.exclude = structure, window, exclude
        self._initial = _copied(initial)
        self.epoch: int | None = None
        self.epochs = 0
        self.ticket: Ticket | None = None
        self.scores: dict[str, Tensor] | None = None
        self.guarded: tuple[str, ...] = ()
        self._warned = False
        self._before: tuple[float, ...] = ()
        self._masks: list[dict[str, Mask]] = []  # of every epoch, on the CPU
        self._distances: list[list[float]] = []  # row e: from epoch e to each before it

    @property
    def drawn(self) -> bool:
        return self.epoch is not None

    @property
    def distances(self) -> Tensor:
        """float64 `[epochs, epochs]`: the normalized Hamming distance between the masks of any two epochs, 0..1."""
        found = torch.zeros(self.epochs, self.epochs, dtype=torch.float64)
        for i, row in enumerate(self._distances):
            found[i, :i] = found[:i, i] = torch.tensor(row, dtype=torch.float64)
        return found

    @property
    def masks(self) -> dict[str, Mask]:
        """layer name -> the newest mask (of channels, or of weights), on the CPU; empty before the first epoch."""
        return dict(self._masks[-1]) if self._masks else {}

    def update(self, model: nn.Module) -> bool:
        """Look at the model after an epoch; True once the ticket is drawn. The model stays as it is.

        Later calls go on recording masks and distances; the ticket and its epoch stay what they are.

        Raises:
            TypeError: not a module.
            ValueError: no layer to prune, a NaN in γ (in a weight), fewer channels to keep than layers, or other layers than
                at the first update.
        """
        model = _unwrapped(model)
        layers = self._layers(model)
        if self._masks:
            before = {name: tuple(mask.shape) for name, mask in self._masks[0].items()}
            now = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
            if now != before:
                name = next(n for n in [*before, *now] if before.get(n) != now.get(n))
                raise ValueError(
                    f"model: expected the layers of the first update, but {name} was {before.get(name)} and is {now.get(name)}"
                )
        elif self._initial is not None:
            self._initial = state_for(model, self._initial)
        masks = self._mask(layers)
        row = [_distance(masks, other) for other in self._masks]
        self._masks.append(masks)
        self._distances.append(row)
        self.epochs += 1
        before, self._before = self._before, _fingerprint(layers)
        if not self.drawn and self.epochs >= self.window and max(row[1 - self.window :]) < self.threshold:
            self.epoch = self.epochs
            self.ticket = self.ticket_of(model)
            self.scores = self.scores_of(model)
            if self._before == before:
                what = "scale γ" if self.structure == "channel" else "weight"
                warnings.warn(
                    f"EarlyBird: the mask has settled, but no {what} has changed since the epoch before: the network may not "
                    "be learning",
                    stacklevel=2,
                )
        return self.drawn

    def check(self, model: nn.Module) -> None:
        """See whether `update` could rank this model, without doing it.

        Raises:
            TypeError, ValueError: as for `update`.
        """
        self._keep(self._layers(_unwrapped(model)))

    def scores_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """layer name -> |γ| `[channels]` as they are now, on the CPU; None for unstructured masks."""
        if self.structure != "channel":
            return None
        layers = self._layers(_unwrapped(model))
        return {name: layer.weight.detach().abs().to("cpu", torch.float32) for name, layer in layers.items()}

    def ticket_of(self, model: nn.Module) -> Ticket:
        """The ticket of the newest mask, drawn or not; without `initial` it starts from the values of `model`.

        Raises:
            ValueError: nothing was seen yet.
        """
        if not self._masks:
            raise ValueError("bird: expected at least one update before there is a mask")
        model = _unwrapped(model)
        return Ticket(self.masks, state_for(model, model) if self._initial is None else self._initial)

    def penalty(self, model: nn.Module) -> Tensor:
        """`l1` * Σ|γ| over the BatchNorm layers that may be pruned, a scalar to add to the loss; 0 for unstructured masks.

        Raises:
            ValueError: channels are to be pruned, and there is no BatchNorm layer.
        """
        model = _unwrapped(model)
        if self.structure != "channel" or not self.l1:
            return torch.zeros((), device=next((p.device for p in model.parameters()), None))
        return self.l1 * torch.stack([layer.weight.abs().sum() for layer in self._layers(model).values()]).sum()

    def __repr__(self) -> str:
        state = f"drawn at epoch {self.epoch}" if self.drawn else "not drawn"
        return f"EarlyBird({self.structure}, density {self.density:g}, {state}, {self.epochs} epochs seen)"

    def _layers(self, model) -> dict[str, nn.Module]:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if self.structure == "unstructured":
            layers = maskable_modules(model, exclude=self.exclude)
            if not layers:
                raise ValueError("model: expected linear or convolutional layers to prune, found none")
            return layers
        excluded = excluded_names(model, self.exclude) if self.exclude else set()
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.weight is not None and name not in excluded
        }
        if not layers:
            raise ValueError(
                "model: expected BatchNorm layers with a scale γ to rank channels by, found none; "
                'structure="unstructured" ranks weights'
            )
        return layers

    def _mask(self, layers) -> dict[str, Mask]:
        """Exactly round(density * total) survivors over all layers, at least one in each."""
        names = list(layers)
        values = [layer.weight.detach() for layer in layers.values()]
        if self.structure == "channel":  # a few numbers, perhaps on several devices
            values = [value.cpu() for value in values]
        masks, emptied = _guarded_topk(values, self._keep(layers), [f"{name}.weight" for name in names])
        self.guarded = tuple(names[i] for i in emptied)
        if emptied and not self._warned:
            self._warned = True
            what = "channel" if self.structure == "channel" else "weight"
            warnings.warn(
                f"EarlyBird: density {self.density:g} would empty {', '.join(self.guarded)}; each keeps its best {what}",
                stacklevel=3,
            )
        return {name: mask.to("cpu") for name, mask in zip(names, masks, strict=True)}

    def _keep(self, layers) -> int:
        """How many survive."""
        total = sum(layer.weight.numel() for layer in layers.values())
        keep = round(self.density * total)
        if keep < len(layers):
            raise ValueError(
                f"density: {self.density:g} keeps {keep} of {total}, fewer than the {len(layers)} layers, each of which needs one"
            )
        return keep


def _guarded_topk(values: list[Tensor], keep: int, names: list[str]) -> tuple[list[Mask], list[int]]:
    """`global_topk` by magnitude with at least one survivor in every tensor, and which tensors needed that."""
    forced: dict[int, Mask] = {}
    while True:
        eligible = [~forced[i] if i in forced else None for i in range(len(values))]
        masks, _ = global_topk(values, keep - len(forced), eligible=eligible, names=names)
        masks = [mask | forced[i] if i in forced else mask for i, mask in enumerate(masks)]
        empty = [i for i, mask in enumerate(masks) if mask.numel and mask.count == 0]
        if not empty:
            return masks, sorted(forced)
        for i in empty:  # making room for these may empty others
            forced[i] = global_topk([values[i]], 1, names=[names[i]])[0][0]


def _fingerprint(layers: Mapping[str, nn.Module]) -> tuple[float, ...]:
    """Sums that tell whether what is ranked has changed, without a copy of it."""
    values = [layer.weight.detach() for layer in layers.values()]
    return tuple(
        float(s) for v in values for s in (v.sum(dtype=torch.float64), torch.linalg.vector_norm(v, dtype=torch.float64))
    )


def _distance(masks: dict[str, Mask], others: dict[str, Mask]) -> float:
    differing = sum(bitmask.hamming(mask.words, others[name].words) for name, mask in masks.items())
    return differing / sum(mask.numel for mask in masks.values())


def _copied(initial) -> dict[str, Tensor] | None:
    """The values of a model or a state_dict, whose own tensors training will overwrite."""
    if isinstance(initial, nn.Module):
        initial = _unwrapped(initial).state_dict()
    if initial is None:
        return None
    return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in initial.items()}


def _unwrapped(model):
    """The network inside DistributedDataParallel, DataParallel and torch.compile: names and keys are its own."""
    while True:
        inner = "module" if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else "_orig_mod"
        if not isinstance(getattr(model, inner, None), nn.Module):
            return model
        model = getattr(model, inner)


def _number(name, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)
