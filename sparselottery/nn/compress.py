"""compress: a model for inference, every layer in the form that was fastest here."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import _ext
from ..ops import bitmask, decode_linear, dispatch
from . import semi_structured
from .compiled_mlp import CompiledMLP, layers_of
from .convert import densify, to_plain, unpack
from .decode import DecodeLinear, to_decode
from .invariant import MaskedWeight
from .linear import is_transposed_linear
from .semi_structured import SemiStructuredLinear


def compress(model: nn.Module, example_input: Tensor | tuple | Mapping) -> nn.Module:
    """A copy of a model for inference in which each masked or packed layer has the fastest form measured on this machine.

    Each layer is timed on the input that it gets from `example_input`: plain (dense, with zeros), masked and

    - where its mask is 2:4 and the GPU has it, in torch's semi-structured form (`semi_structured`);
    - linear layers in float16 or bfloat16 on a GPU with up to 128 rows of input: packed for decoding
      (`decode.DecodeLinear`) in each format that reads fewer bytes than the dense weight.

    A network of linear layers and ReLU on a CPU is also tried as a whole in C++ (`compiled_mlp.CompiledMLP`). The whole is timed
    at the end: unless one form beats the plain model by dispatch's margin, all layers are plain. `explain` of
    the result says what was measured. So it is never slower than dense as far as this measurement can tell; measure with
    the batch you will use. Outputs are those of `model.eval()`, up to the order in which a sparse kernel adds.

    Args:
        model: stays as it is.
        example_input: a tensor, a tuple of positional arguments or a mapping of keyword arguments for `model`.

    Returns:
        A new module in eval mode whose parameters need no gradient.

    Raises:
        TypeError: `model` is not a module; `example_input` is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    args, kwargs = _arguments(example_input)
    result = unpack(copy.deepcopy(model)).eval().requires_grad_(False)
    layers = [module for module in result.modules() if isinstance(module, MaskedWeight)]
    with torch.no_grad():
        inputs = _inputs(result, layers, args, kwargs)
        for layer in layers:
            if id(layer) in inputs:
                _take_fastest_form(layer, *inputs[id(layer)])
            else:
                to_plain(layer)
        wholes = {"dense": result}  # with what was measured of each layer
        if any(isinstance(layer, (MaskedWeight, SemiStructuredLinear, DecodeLinear)) for layer in layers):
            wholes = {"dense": densify(unpack(copy.deepcopy(model))).eval().requires_grad_(False), "mixed": result}
        if layers and _ext.WHY_NOT is None:
            network = unpack(copy.deepcopy(model)).eval().requires_grad_(False)
            if not isinstance(layers_of(network), str):
                wholes["compiled"] = CompiledMLP(network).eval()
        if len(wholes) == 1:
            return result
        seconds = dispatch.measure({name: lambda m=m: m(*args, **kwargs) for name, m in wholes.items()})
        fastest = dispatch.fastest(seconds)
    if fastest == "compiled":
        times = ", ".join(f"{name} {s * 1e6:.4g}" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
        for layer in wholes[fastest].modules():
            if isinstance(layer, MaskedWeight):
                layer._why_this_form = f"in C++ with the whole network; compress, in µs: {times}"
    return wholes[fastest]


def _arguments(example):
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise TypeError(f"example_input: expected a tensor, a tuple or a mapping, got {type(example).__name__}")


def _inputs(model, layers, args, kwargs):
    """id(layer) -> the arguments of its first call."""
    seen = {}

    def note(layer, args, kwargs):
        seen.setdefault(id(layer), (args, kwargs))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _take_fastest_form(layer, args, kwargs):
    plain = densify(copy.deepcopy(layer))
    layer.forward(*args, **kwargs)  # its own backend is chosen here, not in the measurement
    forms = {"dense": plain, "masked": layer}
    refused, asked = semi_structured.why_not(layer), semi_structured.is_candidate(layer)
    if refused is None:
        try:
            forms["2:4"] = semi_structured.compress_(copy.deepcopy(plain))
            forms["2:4"].forward(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:  # torch's reasons differ from version to version
            refused = str(error).splitlines()[0]
            forms.pop("2:4", None)
    packed, no_kernel = _decode_forms(layer, plain, args, kwargs)
    forms |= packed
    seconds = dispatch.measure({name: lambda f=form: f.forward(*args, **kwargs) for name, form in forms.items()})
    fastest, density = dispatch.fastest(seconds), layer.density
    if fastest != "masked":
        to_plain(layer)
    if fastest == "2:4":
        semi_structured.compress_(layer)
    elif fastest in packed:
        to_decode(layer, packed[fastest].packed, density)
    times = ", ".join(f"{name} {s * 1e6:.4g}" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    if refused is not None and asked:
        times += f"; no 2:4 form: {refused}"
    if no_kernel is not None:
        times += f"; not packed for decoding: {no_kernel}"
    layer._why_this_form = f"compress, in µs: {times}"


def _decode_forms(layer, plain, args, kwargs):
    """format -> DecodeLinear, of the formats that may be faster than dense for this input; and why one is missing."""
    transposed = is_transposed_linear(plain)
    x = _first(args, kwargs)
    if not (transposed or isinstance(plain, nn.Linear)) or not isinstance(x, Tensor) or x.dtype != layer.weight.dtype:
        return {}, None
    if x.dtype not in decode_linear.DTYPES or dispatch.forced() not in (None, "cuda"):
        return {}, None
    weight = plain.weight.t() if transposed else plain.weight
    rows, columns = weight.shape
    density = layer.density
    batch = x.numel() // columns if columns else 0
    forms, reason = {}, None
    for name in decode_linear.candidates(rows, columns, density, batch):
        why = decode_linear.why_dense(weight.device, name, columns)
        reason = reason or why
        if why is None:
            mask = layer.mask.to_dense()
            packed = decode_linear.pack(weight, bitmask.pack(mask.t() if transposed else mask), name)
            forms[name] = DecodeLinear(packed, plain.bias, density=density)
    return forms, reason


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()), None)
