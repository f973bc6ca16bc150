"""Which layers the C++ network (csrc/network.h) knows, the runs of them in an nn.Sequential, and a run made in C++.

`describe` is the one place that says what is known; `plan` cuts a Sequential into runs; `Compiled` holds the copies of the
parameters in C++ and brings them up to date.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _ext
from ..ops import bitmask
from ..ops.masked_optim import increment_version
from .conv import MaskedConv2d
from .dead_units import DROPOUTS, has_hook
from .gradient_memory import GradientMemory
from .invariant import MaskedWeight
from .linear import MaskedLinear

# Up to these densities a layer is kept as survivors alone, above as a dense matrix: where a prototype of these kernels broke
# even with torch's dense layers (batches of 60 to 128, one thread).
LINEAR_DENSEST, CONV_DENSEST = 0.6, 0.5

LINEAR, CONV = (nn.Linear, MaskedLinear), (nn.Conv2d, MaskedConv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ALONE = "no layer with weights beside it"


# ---- one module ----


@dataclasses.dataclass
class Known:
    """What C++ is told of a module.

    Attributes:
        fields: of a layer of `CpuNetwork` but for its addresses; None: nothing to do (nn.Identity).
        takes, gives: "features" `[N, F]`, "image" `[N, C, H, W]`, None: either, which comes out as it came in.
    """

    fields: dict | None
    takes: str | None = None
    gives: str | None = None


def describe(module: nn.Module) -> Known | str:
    """What C++ is told of a module as it is now (its parameters, hooks and mode), or why it can't run it."""
    kind = type(module)
    if has_hook(module):
        return "it has a hook or a forward of its own"
    if kind is nn.Identity:
        return Known(None)
    if kind in DROPOUTS:
        return Known(None) if not module.training or module.p == 0 else f"{kind.__name__} drops while training"
    if kind is nn.ReLU:
        return Known({"kind": "relu"})
    if kind is nn.Flatten:
        whole = (module.start_dim, module.end_dim) == (1, -1)
        return Known({"kind": "flatten"}, None, "features") if whole else "it does not flatten all but the batch"
    if kind in LINEAR:
        return _unusable(module, (module.out_features, module.in_features)) or Known(
            {"kind": "linear", "outputs": module.out_features}, "features", "features"
        )
    if kind in CONV:
        return _conv(module)
    if kind in (nn.MaxPool2d, nn.AvgPool2d):
        return _pool(module)
    if kind in NORMS:
        return _norm(module)
    return f"{kind.__name__} is not known to it"


def _conv(module):
    padding = module.padding
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        around = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(n % 2 for n in around):
            return "it pads one side more than the other"
        padding = tuple(n // 2 for n in around)
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    fields = {"kind": "conv2d", "outputs": module.out_channels, "kernel": module.kernel_size, "stride": module.stride}
    fields |= {"padding": padding, "dilation": module.dilation, "groups": module.groups}
    return _unusable(module, shape) or Known(fields, "image", "image")


def _pool(module):
    if module.ceil_mode:
        return "ceil_mode"
    fields = {"kernel": _pair(module.kernel_size), "stride": _pair(module.stride), "padding": _pair(module.padding)}
    if type(module) is nn.AvgPool2d:
        if module.divisor_override is not None:
            return "divisor_override"
        return Known({"kind": "avg_pool2d", "count_include_pad": module.count_include_pad} | fields, "image", "image")
    if module.return_indices:
        return "return_indices"
    if _pair(module.dilation) != (1, 1):
        return "dilation"
    return Known({"kind": "max_pool2d"} | fields, "image", "image")


# What `describe` reads of a module besides its tensors, its mode and its hooks; the rest does not change after it was made.
_WINDOW = operator.attrgetter("kernel_size", "stride", "padding")
_SETTINGS = {
    nn.Flatten: operator.attrgetter("start_dim", "end_dim"),
    nn.MaxPool2d: lambda m: (_WINDOW(m), m.dilation, m.ceil_mode, m.return_indices),
    nn.AvgPool2d: lambda m: (_WINDOW(m), m.ceil_mode, m.count_include_pad, m.divisor_override),
    **dict.fromkeys(DROPOUTS, operator.attrgetter("p")),
    **dict.fromkeys(CONV, operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode")),
    **dict.fromkeys(NORMS, operator.attrgetter("momentum", "eps", "track_running_stats")),
}


def settings(module: nn.Module) -> object:
    """What of a module somebody may have set since, so that `describe` would say something else."""
    read = _SETTINGS.get(type(module))
    return None if read is None else read(module)


def _norm(module):
    if module.running_mean is None or not module.track_running_stats:
        return "it has no running statistics"
    if module.momentum is None:
        return "its momentum is a cumulative average"
    kind = "features" if type(module) is nn.BatchNorm1d else "image"
    tensors = [module.weight, module.bias, module.running_mean, module.running_var]
    for t in tensors:
        if t is not None and (reason := _unusable_tensor(t, (module.num_features,))):
            return reason
    if (module.weight is None) != (module.bias is None):
        return "a weight without a bias"
    return Known({"kind": "batch_norm", "momentum": module.momentum, "eps": module.eps}, kind, kind)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _unusable(layer, shape) -> str | None:
    """Why the parameters of a layer can't be read by C++, which goes as far as the shape says."""
    weight, bias = layer._parameters.get("weight"), getattr(layer, "bias", None)
    if weight is None:
        return "its weight is computed"
    if bias is not layer._parameters.get("bias"):
        return "its bias is computed"
    reason = _unusable_tensor(weight, shape) or (bias is not None and _unusable_tensor(bias, shape[:1]))
    if reason:
        return reason
    if any(p is not None and type(p) is not nn.Parameter for p in (weight, bias)):
        return "a weight or bias that is no Parameter of its own"
    if not isinstance(layer, MaskedWeight):
        return None
    words = layer.weight_mask
    fits = words.is_cpu and words.dtype is torch.int32 and tuple(words.shape) == bitmask.words_shape(shape)
    return None if fits and words.is_contiguous() else "a mask that does not fit its weight"


def _unusable_tensor(t: Tensor, shape) -> str | None:
    if t.dtype is not torch.float32:
        return f"its parameters are {str(t.dtype).removeprefix('torch.')}, not float32"
    if not t.is_cpu:
        return f"its parameters are on {t.device.type}, not the CPU"
    if tuple(t.shape) != tuple(shape) or t.numel() == 0:
        return "a parameter that is empty or not of the shape that the layer names"
    if 0 in t.stride() or (t.ndim == 1 and not t.is_contiguous()):  # a weight may be in channels_last
        return "a parameter that is expanded, or a strided vector"
    if t.is_neg() or t.is_inference():
        return "a parameter that is a negative view or made in inference mode"
    return None


# ---- a Sequential ----


@dataclasses.dataclass
class Run:
    """Neighbours in a Sequential that go to C++ together.

    Attributes:
        first, last: places in the flat list of modules.
        layers: (module, fields) of those that C++ has something to do for.
        takes: "features", "image", or "any": flattened first.
        gives: "features" or "image".
        training: whether its BatchNorms take the statistics of the batch.
    """

    first: int
    last: int
    layers: list[tuple[nn.Module, dict]]
    takes: str
    gives: str
    training: bool


def flat(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) in order, those of a Sequential inside too; a Sequential that has a hook as itself."""
    for name, module in model._modules.items():
        if type(module) is nn.Sequential and not has_hook(module):
            yield from flat(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def plan(modules: list[nn.Module]) -> tuple[list[Run], dict[int, str]]:
    """The runs in a list of modules, and why the others are in none: {place: reason}."""
    runs, reasons, current = [], {}, _Open(0)
    often = Counter(id(module) for module in modules if isinstance(module, NORMS))
    for i, module in enumerate(modules):
        known = describe(module)
        if isinstance(known, Known) and often[id(module)] > 1:
            known = "it is used twice"
        if isinstance(known, Known) and isinstance(module, NORMS) and not current.agrees(module):
            current = current.end(runs, reasons, i)  # a frozen BatchNorm among others: a run of its own
        if isinstance(known, Known) and not current.fits(known):
            current = current.end(runs, reasons, i)
        if isinstance(known, str):
            reasons[i] = known
            current = current.end(runs, reasons, i + 1, skip=1)
        else:
            current.add(module, known)
    current.end(runs, reasons, len(modules))
    return runs, reasons


def whole(model: nn.Module) -> Run | str:
    """All of an nn.Sequential as one run, or what is in it that C++ can't run."""
    if type(model) is not nn.Sequential:
        return f"a {type(model).__name__}, not an nn.Sequential"
    if has_hook(model):
        return "a hook on the model"
    modules = [module for _, module in flat(model)]
    runs, reasons = plan(modules)
    if reasons:
        place = min(reasons, key=lambda i: (reasons[i] == ALONE, i))  # what is left out because of another one, last
        return f"a {type(modules[place]).__name__}: {reasons[place]}"
    return runs[0] if len(runs) == 1 else "layers that do not fit together" if runs else "no layer with weights"


class _Open:
    """A run that is being gathered."""

    def __init__(self, first):
        self.first, self.layers, self.takes, self.gives, self.training = first, [], None, None, None
        self.works = False  # holds a layer with weights: others alone are faster by themselves

    def agrees(self, norm):
        return self.training in (None, norm.training)

    def fits(self, known):
        return None in (self.gives, known.takes) or known.takes == self.gives

    def add(self, module, known):
        if self.takes is None:
            self.takes = known.takes or ("any" if known.gives else None)
        self.gives = known.gives or known.takes or self.gives
        if known.fields is not None:
            self.layers.append((module, known.fields))
            self.works |= known.fields["kind"] in ("linear", "conv2d")
        if isinstance(module, NORMS):
            self.training = module.training

    def end(self, runs, reasons, place, skip=0):
        """Close before `place - skip` and open the next one at `place`."""
        last = place - skip - 1
        if self.works:
            runs.append(Run(self.first, last, self.layers, self.takes, self.gives, bool(self.training)))
        else:
            for i in range(self.first, last + 1):
                reasons[i] = ALONE
        return _Open(place)


# ---- in C++ ----


class Compiled:
    """A run as a `CpuNetwork` with copies of its parameters.

    Args:
        run: from `plan`.
        shape: (channels, height, width) of an example; vectors are (features, 1, 1).

    Attributes:
        network: the `CpuNetwork`.
        output: the shape of an example that comes out.
        places: (layer, 0 for weight or 1 for bias) of each parameter.
        memory: for the gradient of each.

    Raises:
        ValueError: C++ refuses the layers, or they do not fit together.
    """

    def __init__(self, run: Run, shape: tuple[int, int, int]):
        self.run, self.shape = run, shape
        self.norms = [i for i, (module, _) in enumerate(run.layers) if isinstance(module, NORMS)]
        self.places = [
            (i, k)
            for i, (module, _) in enumerate(run.layers)
            for k, name in enumerate(("weight", "bias"))
            if module._parameters.get(name) is not None
        ]
        self._make()

    def _make(self):
        check_shapes(self.run, self.shape)
        self.network = make(self.run, self.shape)
        shape = self.network.output_shape()
        self.output = shape if self.run.gives == "image" else shape[:1]
        self.memory = [GradientMemory(self.run.layers[i][0], weight=k == 0) for i, k in self.places]
        self.seen = [_Seen(module) for module, _ in self.run.layers]
        # Where the vectors are: these are compared in full, a write through `.data` moves no version. The run goes when they do.
        held = [values(module) for module, _ in self.run.layers]
        self.vectors = [addresses([t if t is not None and t.ndim == 1 else None for t in one]) for one in held]
        self.steps = _steps

    def refresh(self) -> None:
        """Bring C++ up to date with what the tensors of the modules hold; that they are the same ones, the caller knows."""
        stepped, self.steps = self.steps != _steps, _steps
        for i, seen in enumerate(self.seen):
            if seen.mask_changed():
                self._make()
                return
            if seen.values_changed(stepped):
                self._load(i)
        for i in self.network.changed(self.vectors):
            self._load(i)

    def _load(self, i) -> None:
        held = values(self.run.layers[i][0])
        self.network.load(i, addresses(held))
        self.seen[i].look()

    def take_statistics(self) -> None:
        """Write BatchNorm's running statistics, which a forward pass in training mode has moved on in C++, to the modules."""
        for i in self.norms:
            module = self.run.layers[i][0]
            self.network.store(i, (0, 0, *self.vectors[i][2:]))
            increment_version([module.running_mean, module.running_var])
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
            self.seen[i].look()


def make(
    run: Run,
    shape: tuple[int, int, int],
    optimizer: dict[str, float] | None = None,
    *,
    linear_densest: float = LINEAR_DENSEST,
    conv_densest: float = CONV_DENSEST,
):
    """A `CpuNetwork` of a run with copies of its parameters.

    Args:
        optimizer: the numbers that it then trains with, by name.
        linear_densest, conv_densest: up to these densities layers are kept as survivors alone.
    """
    layers, keep = [], []
    for module, fields in run.layers:
        keep.append(values(module))
        weight, bias, mean, variance = addresses(keep[-1])
        layer = fields | {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
        premasked = isinstance(module, MaskedWeight) and module._premasked()
        if isinstance(module, MaskedWeight) and not (premasked and module._nothing_pruned()):
            layer["words"] = module.weight_mask.data_ptr()
            if not premasked:  # lent by functional_call: as it comes, and not to be written to
                mask = bitmask.unpack(module.weight_mask, module.weight.shape)
                keep.append(torch.where(mask, module.weight.detach(), 0.0))
                layer["weight"] = keep[-1].data_ptr()
        layers.append(layer)
    densest = {"linear_densest": linear_densest, "conv_densest": conv_densest}
    return _ext.extension().CpuNetwork(shape, layers, **densest, optimizer=optimizer)


def check_shapes(run: Run, shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The shape of an example behind each layer. C++ goes by these shapes and would read that much of each parameter.

    Raises:
        ValueError: a layer is made for another shape than comes to it.
    """
    channels, height, width = shape
    shapes = []
    for module, fields in run.layers:
        if fields["kind"] in ("linear", "flatten"):
            channels, height, width = channels * height * width, 1, 1
        names = {"linear": "in_features", "conv2d": "in_channels", "batch_norm": "num_features"}
        expected = getattr(module, names[fields["kind"]]) if fields["kind"] in names else channels
        if channels != expected:
            raise ValueError(f"{type(module).__name__}: expected {expected} channels or features, got {channels}")
        channels = fields.get("outputs", channels)
        if "kernel" in fields:
            window = zip(
                (height, width),
                *(fields.get(n, (1, 1)) for n in ("kernel", "stride", "padding", "dilation")),
                strict=True,
            )
            height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window)
            if height < 1 or width < 1:
                raise ValueError(f"{type(module).__name__}: its kernel is larger than the image")
        shapes.append((channels, height, width))
    return shapes


class _Seen:
    """What the tensors of a layer held when C++ read them."""

    def __init__(self, module):
        self.module = module
        parameters, buffers = module._parameters, module._buffers
        found = [parameters.get(n) for n in ("weight", "bias")] + [
            buffers.get(n) for n in ("running_mean", "running_var")
        ]
        self.tensors = [t for t in found if t is not None]
        self.trains = any(t.requires_grad for t in self.tensors)
        self.words = buffers.get("weight_mask")
        self.mask = None if self.words is None else self.words._version
        # One survivor: a write to the whole tensor behind autograd's back (`.data`) changes it.
        self.probe = None if found[0] is None else found[0].data[_survivor(module)]
        self.look()

    def look(self) -> None:
        self.versions = [t._version for t in self.tensors]
        self.value = None if self.probe is None else self.probe.tolist()

    def mask_changed(self) -> bool:
        return self.words is not None and self.words._version != self.mask

    def values_changed(self, stepped: bool) -> bool:
        """stepped: an optimizer has made a step since the last look, and some write without a new version."""
        if stepped and self.trains:
            return True
        if self.versions != [t._version for t in self.tensors]:
            return True
        return self.probe is not None and self.probe.tolist() != self.value


def _survivor(module) -> tuple[int, ...]:
    """The place of a weight that survives, of the first word of the mask that has one."""
    words, shape = module._buffers.get("weight_mask"), module.weight.shape
    rows = () if words is None else words.any(1).nonzero()
    if not len(rows):
        return (0,) * len(shape)
    row = int(rows[0])
    word = int(words[row].nonzero()[0])
    bits = int(words[row, word]) & 0xFFFFFFFF
    column = 32 * word + (bits & -bits).bit_length() - 1
    return row, *(int(i) for i in torch.unravel_index(torch.tensor(column, device="cpu"), shape[1:]))


def values(module: nn.Module) -> list[Tensor | None]:
    """Weight, bias, running mean and running variance, contiguous: copies where they are not."""
    parameters, buffers = module._parameters, module._buffers
    found = parameters.get("weight"), parameters.get("bias"), buffers.get("running_mean"), buffers.get("running_var")
    return [None if t is None else t.detach().contiguous() for t in found]


def addresses(values: list[Tensor | None]) -> list[int]:
    """Of tensors that the caller keeps; 0 for none."""
    return [0 if t is None else t.data_ptr() for t in values]


def store(network, i: int, module: nn.Module) -> None:
    """Write the values of layer i of a `CpuNetwork` to the tensors of its module, past their versions."""
    held = values(module)
    network.store(i, addresses(held))
    weight = module._parameters.get("weight")
    if weight is not None and not weight.is_contiguous():
        weight.data.copy_(held[0])


# ---- optimizers ----

_steps = 0  # of all optimizers of the process
_watching = False


def watch() -> None:
    """Count the steps of torch's optimizers: some write without a new version of their parameters. Once per process."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _after_step(optimizer, args, kwargs) -> None:
    global _steps
    _steps += 1
