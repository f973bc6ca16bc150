"""explain: for every layer what it keeps, which backend runs it, and the measurements that say so."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .. import kernels
from ..ops import block_linear, dispatch
from ..ops.masked_conv2d import live_bucket
from . import semi_structured
from .compiled_mlp import CompiledMLP, layers_of
from .convert import left_dense
from .decode import DecodeLinear
from .invariant import MaskedWeight
from .linear import MaskedConv1D
from .packed import PackedWeight
from .resident import Resident
from .semi_structured import SemiStructuredLinear

HEADER = ("layer", "kind", "weight", "density", "backend", "measured, in µs")


@dataclass(frozen=True)
class LayerRow:
    """One layer of an `Explanation`.

    Attributes:
        name, kind, shape: of the layer and its weight.
        density: the fraction kept, 0..1.
        backend: what runs it: one name, or "forward: cpu, backward: dense"; "undecided" before the first call.
        note: why, where there is nothing measured, and what else there is to say.
        measurements: rows of `dispatch.table()` that fit the layer: its shape, density and device, for the present
            number of threads. Key "us": backend -> median microseconds.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    backend: str
    note: str = ""
    measurements: list[dict] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        shape = "×".join(map(str, self.shape))
        return (
            self.name,
            self.kind,
            shape,
            f"{self.density:.2%}",
            self.backend,
            "; ".join(filter(None, (self.note, self._times()))),
        )

    def _times(self):
        parts = []
        for row in self.measurements:
            times = ", ".join(f"{name} {us:.4g}" for name, us in sorted(row["us"].items(), key=lambda item: item[1]))
            parts.append(f"{row['direction']}, batch {row['batch']}: {times}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Explanation:
    """A table with one row per linear or convolutional layer; `str()` or `print` shows it, `rows` holds it."""

    rows: list[LayerRow]
    forced: str | None = None

    def __str__(self) -> str:
        lines = [HEADER, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if self.forced:
            text.append(f"SPARSELOTTERY_BACKEND={self.forced} overrides what was measured.")
        return "\n".join(text)

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Say for each layer of a model which backend runs it on this machine, and why.

    The times are those that the choice was made from (see `ops.dispatch`): measured on the first call with a batch of
    about that size, or read from this machine's cache. Run the model once with the batch that matters before asking.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `SPARSELOTTERY_BACKEND` names no backend.
    """
    reasons = left_dense(model)  # raises for what is not a module
    measured = dispatch.table()
    rows = []
    whole = {
        id(part)
        for network in model.modules()
        if isinstance(network, CompiledMLP) and not isinstance(layers_of(network.network), str)
        for part in network.modules()
    }
    residents = _in_residents(model)
    for name, module in model.named_modules():
        if id(module) in residents and residents[id(module)] is None and isinstance(module, (nn.Linear, nn.Conv2d)):
            note = getattr(module, "_why_this_form", "in C++ with its neighbours")
            rows.append(_plain_row(name, module, note, "cpu (resident)"))
        elif id(module) in whole and isinstance(module, nn.Linear):
            rows.append(
                _plain_row(name, module, getattr(module, "_why_this_form", "in C++ with the whole network"), "cpu")
            )
        elif isinstance(module, MaskedWeight):
            rows.append(_masked_row(name, module, measured))
        elif isinstance(module, PackedWeight):
            rows.append(_packed_row(name, module, measured))
        elif isinstance(module, SemiStructuredLinear):
            rows.append(_semi_structured_row(name, module))
        elif isinstance(module, DecodeLinear):
            rows.append(_decode_row(name, module))
        elif isinstance(module, (nn.Linear, nn.Conv2d)) or name in reasons:
            reason = reasons.get(name, "not masked: sparsify or prune changes that")
            rows.append(_plain_row(name, module, getattr(module, "_why_this_form", reason)))
        else:
            continue
        notes = [rows[-1].note]
        if residents.get(id(module)):
            notes.append(f"not resident: {residents[id(module)]}")
        if hasattr(module, "_dead_units"):
            notes.append(f"dead units: {module._dead_units}")
        rows[-1] = replace(rows[-1], note="; ".join(filter(None, notes)))
    return Explanation(rows, dispatch.forced())


def _in_residents(model):
    """id -> None for a layer that runs in C++ with its neighbours, else why it does not."""
    found = {}
    for network in model.modules():
        if isinstance(network, Resident):
            modules = dict(network.named_modules())
            found |= {id(modules[name]): why for name, why in network.where().items()}
    return found


def _plain_row(name, module, reason, backend="dense"):
    weight = getattr(module, "weight", None)
    known = isinstance(weight, torch.Tensor) and not isinstance(weight, nn.parameter.UninitializedParameter)
    shape = tuple(weight.shape) if known else ()
    with torch.no_grad():
        density = float((weight != 0).double().mean()) if known and weight.numel() else 1.0
    return LayerRow(name, type(module).__name__, shape, density, backend, reason)


def _semi_structured_row(name, layer):
    weight = layer.dense_weight()
    density = float((weight != 0).double().mean())
    arguments = (name, type(layer).__name__, tuple(weight.shape), density, "2:4 (torch's semi-structured tensors)")
    return LayerRow(*arguments, layer._why_this_form)


def _packed_row(name, layer, measured):
    shape, bucket = tuple(layer.weight_shape), dispatch.bucket_density(dispatch.density_bucket(layer.density))
    arguments = (name, type(layer).__name__, shape, layer.density)
    fitting = [
        row
        for row in measured
        if (row["op"], tuple(row["shape"])) == ("packed_linear", shape)
        and row.get("density") == bucket
        and row.get("device") == layer.values.device.type
        and row["threads"] == torch.get_num_threads()
    ]
    if not fitting:
        return LayerRow(*arguments, "dense", f"packed: {layer.values.numel()} values, expanded for each call")
    return LayerRow(*arguments, _backend_of(fitting), "", fitting)


def _decode_row(name, layer):
    shape, reason = (layer.out_features, layer.in_features), layer.why_dense()
    arguments = (name, type(layer).__name__, shape, layer.density)
    if reason is not None:
        return LayerRow(*arguments, "dense", f"unpacked for each call: {reason}")
    return LayerRow(
        *arguments, f"{layer.values.device.type} ({layer.format})", layer._why_this_form or "packed for decoding"
    )


def _masked_row(name, layer, measured):
    conv, transposed, shape = isinstance(layer, nn.Conv2d), isinstance(layer, MaskedConv1D), tuple(layer.weight.shape)
    arguments = (name, type(layer).__name__, shape, layer.density)
    if layer.density == 1:
        return LayerRow(*arguments, "dense", "nothing is pruned")
    note = ""
    if semi_structured.is_candidate(layer):
        refused = semi_structured.why_not(layer)
        note = f"2:4, no semi-structured form: {refused}" if refused else "2:4: compress tries the semi-structured form"
    block = None
    if not conv:
        words = layer._words_by_output(cached=layer._premasked()) if transposed else layer.weight_mask
        block = block_linear.blocks_for(layer.weight, words, shape[::-1] if transposed else shape)
    op = "masked_conv2d" if conv else "masked_linear" if block is None else block_linear.OP
    seen = shape[::-1] if transposed else shape
    bucket = dispatch.bucket_density(dispatch.density_bucket(layer.density))
    threads = torch.get_num_threads()
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    fitting = [
        row
        for row in measured
        if row["op"] == op
        and tuple(row["shape"])[: len(seen)] == seen
        and (not conv or tuple(row["shape"])[-7:] == (*layer.stride, *_padding(layer), *layer.dilation, layer.groups))
        and (block is None or row["extra"][:1] == (block,))
        and (not conv or not layer.weight.is_cuda or row["extra"][1] == live_bucket(layer.weight_mask, layer.weight))
        and row.get("density") == bucket
        and str(row.get("dtype")).removeprefix("torch.") == dtype
        and row.get("device") == layer.weight.device.type
        and (row["device"] != "cpu" or row["threads"] == threads)
    ]
    if not fitting:
        if block is not None and not kernels.AVAILABLE:
            return LayerRow(*arguments, "dense", f"blocks of {block[0]}x{block[1]} need Triton: {kernels.WHY_NOT}")
        undecided = "not yet measured: not run so far, or only dense comes into question"
        return LayerRow(*arguments, "undecided", "; ".join(filter(None, (undecided, note))))
    backend = _backend_of(fitting)
    to_library, names = (None, None) if layer._call is None else layer._call[1]
    if names is not None and names[0] == names[1]:
        backend = names[0]  # as the last call had them, both passes considered together
    if backend != "dense" and to_library:
        reason = "the library's own layer: sparse kernels would save less than a call of them costs"
        return LayerRow(*arguments, "dense", "; ".join(filter(None, (reason, note))), fitting)
    if block is not None and "triton" in backend:
        backend += f" (blocks of {block[0]}x{block[1]})"
    return LayerRow(*arguments, backend, note, fitting)


def _backend_of(fitting):
    """What was chosen in these measurements, which are put in order."""
    fitting.sort(key=lambda row: (row["direction"] != "forward", row["batch"]))
    chosen = {}
    for row in fitting:
        chosen.setdefault(row["direction"], []).append(row["backend"])
    if len({backend for found in chosen.values() for backend in found}) == 1:
        return fitting[0]["backend"]
    return ", ".join(f"{direction}: {'/'.join(dict.fromkeys(found))}" for direction, found in chosen.items())


def _padding(layer):
    """The padding that reaches the op, as the pair in its key."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding
