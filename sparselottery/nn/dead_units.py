"""Units whose value is known without the input, and units that nobody reads, taken out of a model: exact, and then smaller.

A unit (an output of a linear layer, a channel of a convolution) whose weights are all zero puts out its bias whatever comes
in; so does a channel that BatchNorm multiplies by zero. What follows makes another constant of it, which the next layer takes
into its bias. A unit whose outgoing weights are all zero is read by nobody. Both go, and with them what only they read, until
nothing changes: one walk forward finds the constants, one walk backward the readers. (Wen et al., arXiv 1608.03665, remove
such groups after training; here they are by-products of a mask.)

Exact means: the same function of every finite input, up to the order in which floating point adds. Where zero padding mixes
a constant with zeros (a convolution, an average pool that counts its padding), it stays a unit like the others.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..masks import Mask
from .conv import MaskedConv2d
from .convert import to_masked, to_plain
from .invariant import MaskedWeight
from .linear import MaskedLinear

# Each value by itself, the same at every place.
ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Threshold,
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
LINEAR, CONV = (nn.Linear, MaskedLinear), (nn.Conv2d, MaskedConv2d)


def remove_dead_units_(model: nn.Module, args: tuple = (), kwargs: Mapping | None = None) -> dict[str, str]:
    """Take dead units out of the nn.Sequentials of a model, in place, and make its layers smaller.

    Known are Linear and Conv2d, masked or not, element-wise activations, Dropout, BatchNorm, the 2-D pools and Flatten, all
    in eval mode. Anything else is left alone, and all that it reads or gives: modules that are shared or called elsewhere,
    that have hooks or a `forward` of their own. So are the inputs and outputs of each Sequential. A layer keeps one unit at
    least. Layers get new Parameters.

    Args:
        model: in eval mode.
        args, kwargs: of one call of the model, which shows what calls what, and the shapes.

    Returns:
        {name of a layer: what happened to it}, also kept in the layer as `_dead_units` for `explain`.
    """
    found = {}
    names = {id(module): name for name, module in model.named_modules()}
    calls = _watch_a_call(model, args, kwargs or {})
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def is_own(module):
        return places[id(module)] == 1 and all(
            holders[id(p)] == 1 for p in module._parameters.values() if p is not None
        )

    for sequential in _outermost(model):
        flat = list(_flat(sequential))
        often = len(calls[id(sequential)])
        if often == 0 or any(is_own(m) and len(calls[id(m)]) != often for m in flat):
            continue  # parts of it are called from elsewhere
        chain = _Chain([(m, calls[id(m)] if is_own(m) or type(m) in ELEMENTWISE else None) for m in flat])
        for module, note in chain.shrink_():
            module._dead_units = found[names[id(module)]] = note
    return found


def has_hook(module: nn.Module) -> bool:
    """Whether its call does more than its class says: by a hook, or by a `forward` of its own."""
    return any(value for name, value in vars(module).items() if name.endswith("_hooks") or name == "forward")


def _watch_a_call(model, args, kwargs) -> dict[int, list[tuple[int, ...] | None]]:
    """id(module) -> the shape of its input in each of its calls (None: no tensor)."""
    calls = {id(module): [] for module in model.modules()}
    handles = []

    def note(module, args):
        calls[id(module)].append(tuple(args[0].shape) if args and isinstance(args[0], Tensor) else None)

    hooked = [module for module in model.modules() if has_hook(module)]
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(note))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for module in hooked:
        calls[id(module)] = [None for _ in calls[id(module)]]  # counted, but not known
    return calls


def _is_sequential(module):
    return type(module).forward is nn.Sequential.forward and not has_hook(module)


def _outermost(module):
    if isinstance(module, nn.Sequential) and _is_sequential(module):
        yield module
        for inner in _flat(module):
            yield from _outermost(inner)
    else:
        for child in module.children():
            yield from _outermost(child)


def _flat(sequential):
    for module in sequential:
        if isinstance(module, nn.Sequential) and _is_sequential(module):
            yield from _flat(module)
        else:
            yield module


@dataclasses.dataclass
class _Units:
    """What is known of a tensor between two modules.

    Attributes:
        values: float64 `[units]`, NaN where the unit depends on the input.
        axis: 1 or -1, where the units are; of `[N, units]` both.
        ndim: dimensions of the tensor.
    """

    values: Tensor
    axis: int
    ndim: int

    def along(self, axis: int) -> bool:
        return self.ndim == 2 or axis == self.axis


@dataclasses.dataclass
class _Step:
    """A module of the chain, and what the walks find.

    Attributes:
        kind: "layer" (Linear, Conv2d), "norm", "depthwise", "same" (no parameters), "flatten"; None: unknown.
        known: whether the units that come in are those of a layer in the chain.
        alive: layers only: bool `[units out, units in]`, whether there is a weight between them after folding.
        bias: layers only: float64 `[units out]` with what was folded into it.
        folded: how many constants were.
        keep: bool `[units out]`.
        places: flatten only: features for each channel.
    """

    module: nn.Module
    shapes: list | None
    kind: str | None = None
    known: bool = False
    alive: Tensor | None = None
    bias: Tensor | None = None
    folded: int = 0
    keep: Tensor | None = None
    places: int = 1


class _Chain:
    def __init__(self, modules):
        self.steps = [_Step(module, shapes) for module, shapes in modules]
        self.find_constants()
        self.find_readers()

    # ---- forward: what is constant ----

    @torch.no_grad()
    def find_constants(self):
        units = None
        for step in self.steps:
            step.kind = _kind(step.module, step.shapes, units)
            step.known = units is not None and step.kind is not None
            if step.kind is None:
                units = None
            elif step.kind == "layer":
                units = self.through_layer(step, units)
            elif units is None:
                continue  # of a tensor that nobody here made: its units can't go
            elif step.kind == "flatten":
                step.places = _places(step.shapes)
                units = _Units(units.values.repeat_interleave(step.places), 1, 2)
            else:
                values = _through(step.module, step.kind, units.values)
                units = _Units(torch.where(values.isfinite(), values, torch.nan), units.axis, units.ndim)

    def through_layer(self, step, units):
        layer = step.module
        conv, weight = isinstance(layer, nn.Conv2d), _weight(layer)
        step.alive = (weight != 0).flatten(2).any(2) if conv else weight != 0
        step.bias = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
        if layer.bias is not None:
            step.bias += layer.bias.detach().double().cpu()
        if units is not None:
            constant = units.values.isfinite()
            if conv and _pads_with_zeros(layer):
                constant &= units.values == 0
            constant = constant.to(weight.device)
            taken = weight[:, constant].double()
            taken = taken.flatten(2).sum(2) if conv else taken
            step.bias += taken.cpu() @ units.values[constant.cpu()]
            step.folded = int((constant & step.alive.any(0)).sum())
            step.alive &= ~constant
        step.alive = step.alive.cpu()
        values = torch.where(step.alive.any(1) | ~step.bias.isfinite(), torch.nan, step.bias)
        return _Units(values, 1 if conv else -1, len(step.shapes[0]))

    # ---- backward: what is read ----

    def find_readers(self):
        read = None  # everything
        for step in reversed(self.steps):
            if step.kind == "layer":
                step.keep = torch.ones(len(step.alive), dtype=torch.bool, device="cpu") if read is None else read
                if not step.keep.any():
                    step.keep[0] = True  # torch has no convolution without channels
                read = step.alive[step.keep].any(0) if step.known else None
            elif not step.known:
                read = None
            elif step.kind == "flatten" and read is not None:
                read = read.view(-1, step.places).any(1)

    # ---- forward again: smaller layers ----

    @torch.no_grad()
    def shrink_(self):
        """(layer, what was done to it) of each that has changed."""
        keep = None  # of the units that come in; None: all
        for step in self.steps:
            if not step.known:
                keep = None
            if step.kind == "layer":
                note = _shrink_layer(step, keep)
                if note:
                    yield step.module, note
                keep = step.keep
            elif keep is None:
                continue
            elif step.kind == "flatten":
                keep = keep.repeat_interleave(step.places)
            elif step.kind in ("norm", "depthwise") and not keep.all():
                (_shrink_norm if step.kind == "norm" else _shrink_depthwise)(step.module, keep)
                yield step.module, f"{int((~keep).sum())} of {len(keep)} channels removed"


def _kind(module, shapes, units):
    """What `_Step.kind` says, or None where the module is not one of those that are known, or not used as such."""
    cls = type(module)
    if not shapes or None in shapes or has_hook(module):
        return None
    if cls in ELEMENTWISE:
        return "same"
    ndim = len(shapes[0])
    if any(len(s) != ndim for s in shapes):
        return None
    if cls in LINEAR:
        fits = _has_own_weight(module) and (units is None or units.along(-1)) and ndim >= 2
        return "layer" if fits else None
    if cls in CONV:
        if not _has_own_weight(module) or ndim != 4 or not (units is None or units.along(1)):
            return None
        if module.groups == 1:
            return "layer"
        return "depthwise" if module.groups == module.in_channels == module.out_channels else None
    if cls in DROPOUTS:
        return None if module.training else "same"
    along = units is None or units.along(1)
    if cls in (nn.BatchNorm1d, nn.BatchNorm2d):
        fits = ndim == (2 if cls is nn.BatchNorm1d else 4) and along
        return "norm" if fits and not module.training and module.running_mean is not None else None
    if cls in POOLS:
        plain = not getattr(module, "return_indices", False) and getattr(module, "dilation", 1) in (1, (1, 1))
        return "same" if plain and ndim == 4 and along else None
    if cls is nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, ndim - 1)) and along and ndim > 1:
        return "flatten" if len({_places([s]) for s in shapes}) == 1 else None
    return None


def _has_own_weight(layer):
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
        return False
    rows = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    return len(weight) == rows and (layer.bias is None or type(bias) is nn.Parameter)


def _weight(layer):
    if isinstance(layer, MaskedWeight):
        layer._restore()
    return layer.weight.detach()


def _places(shapes):
    return int(torch.Size(shapes[0][2:]).numel())


def _pads_with_zeros(conv):
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    if conv.padding == "same":
        return any(d * (k - 1) > 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return any(conv.padding)


def _through(module, kind, values):
    """float64 constants after a module; NaN where they are none any more."""
    if kind == "norm":
        mean, variance = module.running_mean.double().cpu(), module.running_var.double().cpu()
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        if module.weight is not None:
            scale, shift = module.weight.double().cpu(), module.bias.double().cpu()
        after = (values - mean) / (variance + module.eps).sqrt() * scale + shift
        return torch.where(scale == 0, shift, after)
    if kind == "depthwise":
        weight = _weight(module).double().cpu().flatten(1)
        bias = torch.zeros_like(values) if module.bias is None else module.bias.double().cpu()
        if _pads_with_zeros(module):
            values = torch.where(values == 0, values, torch.nan)
        return torch.where((weight == 0).all(1), bias, weight.sum(1) * values + bias)
    if type(module) in ELEMENTWISE:
        return torch.where(values.isfinite(), module(values.clone()), torch.nan)
    if type(module) is nn.AvgPool2d:
        padded = module.count_include_pad and module.padding not in (0, (0, 0))
        if padded or module.divisor_override is not None:
            return torch.where(values == 0, values, torch.nan)
    return values


# ---- smaller layers ----


def _shrink_layer(step, columns):
    """Drop the outputs that are not kept and the inputs that do not come any more; says what was done, or nothing."""
    layer, rows = step.module, step.keep
    columns = torch.ones(step.alive.shape[1], dtype=torch.bool, device="cpu") if columns is None else columns
    gone_out, gone_in = int((~rows).sum()), int((~columns).sum())
    if not (gone_out or gone_in or step.folded):
        return None
    alive = step.alive[rows][:, columns]
    weight = _weight(layer)
    masked = isinstance(layer, MaskedWeight)
    keep = layer.mask.to_dense() if masked else None

    def cut(t):
        part = t[rows.to(t.device)][:, columns.to(t.device)]
        return part * alive.view(*alive.shape, *[1] * (t.ndim - 2)).to(t)

    small, words = cut(weight), None
    if masked:
        words = Mask.from_dense(cut(keep))
        to_plain(layer)
    _replace(layer, "weight", small)
    bias = step.bias[rows]
    if layer.bias is not None or bool(bias.any()):
        like = weight if layer.bias is None else layer.bias
        _replace(layer, "bias", bias.to(like) if step.folded else layer.bias.detach()[rows.to(like.device)], like)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = small.shape[:2]
    else:
        layer.out_features, layer.in_features = small.shape
    if masked:
        to_masked(layer)
        layer.set_mask(words)
    parts = [f"{gone_out} of {len(rows)} outputs removed"] if gone_out else []
    parts += [f"{gone_in} of {len(columns)} inputs removed"] if gone_in else []
    parts += [f"{step.folded} constant inputs are now in the bias"] if step.folded else []
    return ", ".join(parts)


def _shrink_norm(norm, keep):
    for name in ("weight", "bias"):
        if norm._parameters.get(name) is not None:
            _replace(norm, name, norm._parameters[name].detach()[keep.to(norm._parameters[name].device)])
    for name in ("running_mean", "running_var"):
        norm._buffers[name] = norm._buffers[name][keep.to(norm._buffers[name].device)]
    norm.num_features = int(keep.sum())


def _shrink_depthwise(conv, keep):
    masked = isinstance(conv, MaskedWeight)
    mask = conv.mask.to_dense()[keep.to(conv.weight.device)] if masked else None
    if masked:
        to_plain(conv)
    for name in ("weight", "bias"):
        if conv._parameters.get(name) is not None:
            _replace(conv, name, conv._parameters[name].detach()[keep.to(conv._parameters[name].device)])
    conv.in_channels = conv.out_channels = conv.groups = int(keep.sum())
    if masked:
        to_masked(conv)
        conv.set_mask(Mask.from_dense(mask))


def _replace(module, name, value, like=None):
    before = module._parameters.get(name) if like is None else like
    module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=before.requires_grad)
