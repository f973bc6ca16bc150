"""How much a neuron says about the label: mutual information of activations and labels on a held-out probe set."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nn.convert import Exclude, excluded_names
from ..pruning.wiring import is_convolution, layers, wiring

CORRECTIONS = ("miller-madow", "none")
POOLS = ("mean", "max")
_CHUNK = 1 << 22  # activations that are binned at once


def mutual_information(
    model: nn.Module,
    probe_inputs: Tensor | Iterable,
    probe_labels: Tensor | None = None,
    *,
    bins: int | None = None,
    correction: str = "miller-madow",
    pool: str = "mean",
    batch_size: int = 256,
    sample: int = 16384,
    exclude: Exclude = (),
) -> dict[str, Tensor]:
    """I(activation; label) of every neuron and channel, in bits.

    The activation is what a unit hands on: the layer's output after the operations that follow and work on each unit by
    itself (BatchNorm, dropout), up to and including its nonlinearity. Where a forward cannot be traced by torch.fx, or
    something else follows (a sum with a shortcut, LayerNorm, nothing), it is the output as far as that. Channels of
    convolutions are pooled over all positions, units of linear layers over everything between the first and the last
    dimension (the tokens of a sequence), and over calls where a layer is called several times. The model is run in
    evaluation mode, without gradients, and left as it was.

    The estimator: each unit's activations are put in `bins` bins by their own quantiles, (q_k, q_k+1]; a value that spans
    whole bins, such as the zeros of a ReLU, gets a bin for itself. From the counts of (bin, class) follows the plug-in
    estimate, sum of p(b, y) log2 p(b, y) / (p(b) p(y)), less its bias to first order, (m_by - m_b - m_y + 1) / (2 N ln 2)
    with m the numbers of occupied cells, bins and classes: Miller 1955, Note on the bias of information estimates; Panzeri
    & Treves 1996, Network 7:87 (whose "relevant" bins are the occupied ones here). Negative values become 0. The
    plug-in estimate is at most log2(bins), and at most the entropy of the labels.

    Examples go through in batches and only counts are kept, so memory does not grow with the probe set; the quantiles are
    those of `sample` examples drawn at random without replacement (always the same ones), of all where there are no more.

    Args:
        model: a network with linear or convolutional layers, on any device.
        probe_inputs: examples that the network was not trained on: a tensor `[N, *]`, or an iterable of pairs (x, y) that
            can be iterated twice, such as a DataLoader; x is what the model is called with (a mapping: by keywords).
        probe_labels: integers `[N]`, at least two different ones; None with an iterable.
        bins: 2 or more; None: floor(sqrt(N / classes)), from 2 to 16, which is as many bins as examples per (bin, class).
        correction: "miller-madow" as above, or "none": the plug-in estimate.
        pool: "mean" or "max".
        batch_size: examples in a forward pass, where `probe_inputs` is a tensor.
        sample: how many examples the quantiles are taken from.
        exclude: layers to leave out: names, patterns or classes, as for `sl.sparsify`.

    Returns:
        {layer name: float64 `[units]` on the CPU} in the order of `named_modules()`, the output layer too; without layers
        that the forward does not call. 0 for a unit that is constant.

    Raises:
        TypeError, ValueError: an argument is not as described; an empty probe set or one with a single class; a layer whose
            activations hold NaN or infinity (the message names it).
    """
    _check(model, bins, correction, pool, batch_size, sample)
    probe = _Probe(model, probe_inputs, probe_labels, batch_size)
    excluded = excluded_names(model, exclude)
    chosen = {name: layer for name, layer in layers(model).items() if name not in excluded}
    if not chosen:
        raise ValueError("model: expected a linear or convolutional layer that is not excluded, found none")
    with _recorder(model, chosen, pool) as activations:
        drawn, labels = _draw(probe, activations, sample)
        classes, positions = labels.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"probe_labels: expected at least two classes, got only {classes.tolist()}")
        bins = bins or min(16, max(2, math.isqrt(len(labels) // len(classes))))
        edges = {name: quantile_edges(values, bins) for name, values in drawn.values.items()}
        counts = {name: _Counts(e, bins, len(classes)) for name, e in edges.items()}
        if drawn.all:
            for name, values in drawn.values.items():
                counts[name].add(values, positions[drawn.order])
        else:
            _count(probe, activations, counts, classes, len(labels))
    return {name: bits(counts[name].table, correction) for name in chosen if name in counts}


def quantile_edges(values: Tensor, bins: int) -> Tensor:
    """The inner edges of bins with as equal counts as ties allow. values: `[n, units]` -> `[units, bins - 1]`, each a value
    that occurs."""
    ranks = torch.arange(1, bins, device=values.device) * len(values)
    ranks = torch.div(ranks + bins - 1, bins, rounding_mode="floor") - 1  # ceil(k n / bins)-th smallest
    return values.t().sort(1).values[:, ranks.clamp(min=0)].contiguous()


def bin_indices(values: Tensor, edges: Tensor) -> Tensor:
    """Which bin each value is in: values `[n, units]`, edges `[units, bins - 1]` -> int64 `[units, n]` from 0 to bins - 1.

    Bin k holds edge k-1 < value <= edge k. A value that two or more edges are equal to has the bin after the first of them
    to itself, which is empty otherwise.
    """
    transposed = values.t().contiguous()
    below = torch.searchsorted(edges, transposed, right=False)
    until = torch.searchsorted(edges, transposed, right=True)
    return below + (until - below >= 2)


def bits(table: Tensor, correction: str = "miller-madow") -> Tensor:
    """Mutual information from counts: int64 `[units, bins, classes]` -> float64 `[units]`, in bits, at least 0."""
    joint = table.cpu().double()
    rows, columns = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    total = joint.sum((1, 2))
    occupied = joint > 0
    ratio = torch.where(occupied, joint * total[:, None, None], 1) / torch.where(occupied, rows * columns, 1)
    nats = (joint * ratio.log()).sum((1, 2)) / total
    if correction == "miller-madow":
        cells = occupied.sum((1, 2)) - (rows > 0).sum((1, 2)) - (columns > 0).sum((1, 2)) + 1
        nats = nats - cells / (2 * total)
    return (nats / math.log(2)).clamp(min=0)


def _check(model, bins, correction, pool, batch_size, sample):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, number, least in (("bins", bins, 2), ("batch_size", batch_size, 1), ("sample", sample, 2)):
        if name == "bins" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
    if correction not in CORRECTIONS:
        raise ValueError(f"correction: expected one of {', '.join(CORRECTIONS)}, got {correction!r}")
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")


class _Probe:
    """The probe set as batches (x, y) on the model's device, as often as it is iterated."""

    def __init__(self, model, inputs, labels, batch_size):
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if isinstance(inputs, Tensor):
            _check_labels(labels)
            if inputs.ndim < 1 or len(inputs) != len(labels):
                raise ValueError(
                    f"probe_labels: expected one for each of the inputs {list(inputs.shape)}, got {list(labels.shape)}"
                )
            if len(inputs) == 0:
                raise ValueError("probe_inputs: expected at least one example, got an empty probe set")
        elif labels is not None or not isinstance(inputs, Iterable):
            wanted = "a tensor with labels, or an iterable of pairs (x, y) without"
            raise TypeError(f"probe_inputs: expected {wanted}, got {type(inputs).__name__}")
        elif isinstance(inputs, Iterator):
            raise TypeError("probe_inputs: expected an iterable that can be iterated twice, got an iterator")

    def __iter__(self) -> Iterator[tuple[object, Tensor]]:
        if isinstance(self.inputs, Tensor):
            pairs = zip(self.inputs.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        else:
            pairs = self.inputs
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"probe_inputs: expected pairs (x, y), got {type(pair).__name__}")
            x, y = pair
            _check_labels(y)
            if isinstance(x, Mapping):
                x = {key: v.to(self.device) if isinstance(v, Tensor) else v for key, v in x.items()}
            elif isinstance(x, Tensor):
                x = x.to(self.device)
            if len(y):
                yield x, y.to(self.device)


def _check_labels(labels):
    if not isinstance(labels, Tensor):
        raise TypeError(f"probe_labels: expected a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"probe_labels: expected integers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"probe_labels: expected [N], got {list(labels.shape)}")


@contextmanager
def _recorder(model, chosen: Mapping[str, nn.Module], pool: str):
    """Inside: a function (x, n) -> {layer name: activations `[n, units]`} of the layers that the forward calls."""
    known = wiring(model).after
    calls: dict[str, list[Tensor]] = {}

    def hook_of(name, layer):
        def hook(module, arguments, output):
            for operation in known.get(name, ()):
                output = operation(output.clone())  # one of them may work in place
            calls.setdefault(name, []).append(_pooled(layer, output, pool))

        return hook

    def activations(x, count: int) -> dict[str, Tensor]:
        calls.clear()
        model(**x) if isinstance(x, Mapping) else model(x)
        found = {}
        for name in chosen:
            if name not in calls:
                continue
            values = calls[name][0] if len(calls[name]) == 1 else torch.stack(calls[name]).mean(0)
            if len(values) != count:
                raise ValueError(
                    f"{name}: expected activations of {count} examples, got {len(values)}; exclude={name!r} leaves it out"
                )
            if not bool(values.isfinite().all()):
                what = "NaN" if bool(values.isnan().any()) else "infinity"
                raise ValueError(f"{name or 'model'}: activations hold {what} on the probe set")
            found[name] = values
        calls.clear()
        return found

    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(hook_of(name, layer)) for name, layer in chosen.items()]
    try:
        model.eval()
        with torch.no_grad():
            yield activations
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _pooled(layer, output: Tensor, pool: str) -> Tensor:
    """`[n, units]`, float32 (float64 stays): of a convolution `[n, units, *]`, of a linear layer `[n, *, units]`."""
    output = output.detach().to(torch.promote_types(output.dtype, torch.float32), copy=True)
    flat = (
        output.flatten(2)
        if is_convolution(layer)
        else output.flatten(1, -2).transpose(1, -1)
        if output.ndim > 2
        else output
    )
    if flat.ndim < 3:
        return flat
    return flat.mean(2) if pool == "mean" else flat.amax(2)


class _Drawn:
    """A uniform sample without replacement of a stream of examples: those with the smallest of random keys."""

    def __init__(self, size: int):
        self.size, self.values = size, {}
        self.generator = torch.Generator().manual_seed(0)
        self.keys, self.order, self.seen = torch.empty(0), torch.empty(0, dtype=torch.int64), 0

    @property
    def all(self) -> bool:
        """Whether it holds every example."""
        return self.seen <= self.size

    def add(self, activations: Mapping[str, Tensor], count: int) -> None:
        """The next `count` examples: fill up, then take the places of those with larger keys."""
        keys = torch.rand(count, generator=self.generator)
        order = torch.arange(self.seen, self.seen + count)
        self.seen += count
        free = min(count, self.size - len(self.keys))
        if free:
            self.keys, self.order = torch.cat([self.keys, keys[:free]]), torch.cat([self.order, order[:free]])
            for name, values in activations.items():
                held = [self.values[name]] if name in self.values else []
                self.values[name] = torch.cat([*held, values[:free]])
        if free < count:
            best = torch.cat([self.keys, keys[free:]]).topk(self.size, largest=False).indices
            stays = torch.zeros(self.size + count - free, dtype=torch.bool)
            stays[best] = True
            places, chosen = (~stays[: self.size]).nonzero()[:, 0], stays[self.size :].nonzero()[:, 0] + free
            self.keys[places], self.order[places] = keys[chosen], order[chosen]
            for name, values in activations.items():
                self.values[name][places.to(values.device)] = values[chosen.to(values.device)]


def _draw(probe, activations, size: int) -> tuple[_Drawn, Tensor]:
    """The sample that the quantiles are taken from, and all labels."""
    drawn, labels = _Drawn(size), []
    for x, y in probe:
        drawn.add(activations(x, len(y)), len(y))
        labels.append(y)
    if not labels:
        raise ValueError("probe_inputs: expected at least one example, got an empty probe set")
    return drawn, torch.cat(labels)


def _count(probe, activations, counts, classes: Tensor, expected: int) -> None:
    seen = 0
    for x, y in probe:
        seen += len(y)
        positions = torch.searchsorted(classes, y)
        if seen > expected or not torch.equal(classes[positions.clamp(max=len(classes) - 1)], y):
            break
        for name, values in activations(x, len(y)).items():
            counts[name].add(values, positions)
    else:
        if seen == expected:
            return
    raise ValueError(f"probe_inputs: gave other examples the second time ({expected} at first, then {seen})")


class _Counts:
    """How often a unit's activation was in a bin with a label of a class."""

    def __init__(self, edges: Tensor, bins: int, classes: int):
        self.edges = edges
        self.table = torch.zeros(len(edges), bins, classes, dtype=torch.int64, device=edges.device)

    def add(self, values: Tensor, positions: Tensor) -> None:
        """values: `[n, units]`; positions: int64 `[n]`, of the classes."""
        units, bins, classes = self.table.shape
        step = max(1, _CHUNK // max(1, len(values)))
        positions = positions.to(values.device)
        for begin in range(0, units, step):
            part = slice(begin, begin + step)
            index = bin_indices(values[:, part], self.edges[part]) * classes + positions
            index += torch.arange(len(index), device=index.device)[:, None] * (bins * classes)
            found = torch.bincount(index.flatten(), minlength=len(index) * bins * classes)
            self.table[part] += found.view(-1, bins, classes)
