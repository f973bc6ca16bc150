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
from .dead_units import has_hook, remove_dead_units_
from .decode import DecodeLinear, to_decode
from .invariant import MaskedWeight
from .linear import is_transposed_linear
from .resident import Resident, resident
from .semi_structured import SemiStructuredLinear

IN_CPP = (CompiledMLP, Resident)


def compress(model: nn.Module, example_input: Tensor | tuple | Mapping) -> nn.Module:
    """A copy of a model for inference in which each masked or packed layer has the fastest form measured on this machine.

    First what is dead goes: units that are constant or that nobody reads (`dead_units`), so that layers become smaller.
    Then each layer is timed on the input that it gets from `example_input`: plain (dense, with zeros), masked (of whose
    kernels dispatch chooses one for the batch) and

    - where its mask is 2:4 and the GPU has it, in torch's semi-structured form (`semi_structured`);
    - linear layers in float16 or bfloat16 on a GPU with up to 128 rows of input, in float32 or bfloat16 on a CPU with up to
      8: packed for decoding (`decode.DecodeLinear`) in each format that may be faster than the dense weight.

    On a CPU each nn.Sequential is also tried as a whole in C++: resident (`resident.resident`), and one of linear layers and
    ReLU as a `compiled_mlp.CompiledMLP`. The model is timed at the end: unless a form of it beats the plain model, dead units
    and all, by dispatch's margin, that is what comes back. `explain` of the result says what was measured and what was removed.
    So it is never slower than dense as far as this measurement can tell; measure with the batch you will use. Outputs are
    those of `model.eval()` for finite inputs, up to the order in which a sparse kernel adds and the rounding of constants.

    The result is saved whole (`torch.save(small, path)`), deep-copied, traced and exported (`torch.jit.trace`,
    `torch.export`: as its layers, masked ones as ops of this package). `densify` makes plain torch of it, for ONNX.

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
    plain = unpack(copy.deepcopy(model)).eval().requires_grad_(False)
    with torch.no_grad():
        start = _without_dead_units(plain, args, kwargs)
        result = copy.deepcopy(start)
        layers = [module for module in result.modules() if isinstance(module, MaskedWeight)]
        parts = [module for module in result.modules() if isinstance(module, nn.Sequential)]
        inputs = _inputs(result, [*layers, *parts], args, kwargs)
        for layer in layers:
            if id(layer) in inputs:
                _take_fastest_form(layer, *inputs[id(layer)])
            else:
                to_plain(layer)
        wholes = _in_cpp(copy.deepcopy(start)) if layers else {}
        if layers and not wholes:
            _take_parts_in_cpp(result, start, inputs, args, kwargs)
        if any(isinstance(m, (MaskedWeight, SemiStructuredLinear, DecodeLinear, *IN_CPP)) for m in result.modules()):
            wholes["mixed"] = result
            if start is not plain:
                wholes["smaller"] = densify(start)
        elif start is not plain:
            wholes["smaller"] = result
        else:
            plain = result  # with what was measured of each layer
        wholes = {"dense": densify(plain)} | wholes
        if len(wholes) == 1:
            return plain
        seconds = _measure(wholes, args, kwargs)
        fastest = dispatch.fastest(seconds)
    if isinstance(wholes[fastest], IN_CPP):
        _note_times(wholes[fastest], seconds)
    return wholes[fastest]


def _without_dead_units(model, args, kwargs):
    """A smaller copy, or the model itself where nothing is dead, or where a copy does not compute the same."""
    small = copy.deepcopy(model)
    if not remove_dead_units_(small, args, kwargs):
        return model
    return small if _computes(small, model(*args, **kwargs), args, kwargs) else model


def _computes(model, expected, args, kwargs) -> bool:
    """Whether a changed model still gives this output, up to rounding."""
    try:
        found = model(*args, **kwargs)
    except Exception:  # its own code counts on what its parts were
        return False
    found, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (found, expected))
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            precision = torch.finfo(b.dtype).eps ** 0.5  # rounding is far below, another function far above
            finite = b[b.isfinite()]
            atol = precision * (float(finite.abs().max()) if finite.numel() else 0.0)
            if not isinstance(a, Tensor) or not torch.allclose(a, b, rtol=precision, atol=atol, equal_nan=True):
                return False
    return True


def _in_cpp(model) -> dict[str, nn.Module]:
    """The forms of a Sequential of layers, not of parts of it, that run in C++."""
    if _ext.WHY_NOT is not None or not isinstance(model, nn.Sequential) or has_hook(model):
        return {}
    forms = {}
    if not isinstance(layers_of(model), str):
        forms["compiled"] = CompiledMLP(copy.deepcopy(model)).eval()
    if type(model).forward is nn.Sequential.forward and None in (form := resident(model)).where().values():
        forms["resident"] = form
    return forms


def _take_parts_in_cpp(model, masked, inputs, args, kwargs):
    """Put the Sequentials of a model in C++ where that is faster; `masked`: the same model, its layers masked."""
    originals, places = dict(masked.named_modules()), []
    for name, module in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if (
            not name
            or id(module) not in inputs
            or has_hook(module)
            or any(name.startswith(f"{p}.") for p, *_ in places)
        ):
            continue
        forms = {"dense": module} | _in_cpp(copy.deepcopy(originals[name]))  # "dense": the form that it has
        if len(forms) > 1:
            seconds = _measure(forms, *inputs[id(module)])
            fastest = dispatch.fastest(seconds)
            if fastest != "dense":
                _note_times(forms[fastest], seconds)
                places.append((name, model.get_submodule(path)._modules, last, module, forms[fastest]))
    expected = model(*args, **kwargs)
    for _, modules, last, _, form in places:
        modules[last] = form
    if places and not _computes(model, expected, args, kwargs):
        for _, modules, last, module, _ in places:
            modules[last] = module


def _note_times(network, seconds):
    times = _words(seconds)
    for layer in network.modules():
        if isinstance(layer, MaskedWeight):
            layer._why_this_form = f"in C++ with the whole network; compress, in µs: {times}"


def _words(seconds):
    return ", ".join(f"{name} {s * 1e6:.4g}" for name, s in sorted(seconds.items(), key=lambda item: item[1]))


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


def _measure(forms, args, kwargs):
    for form in forms.values():
        if isinstance(form, Resident):
            form(*args, **kwargs)  # its own way is chosen here, not in the measurement
    return dispatch.measure({name: lambda form=form: form(*args, **kwargs) for name, form in forms.items()})


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
    seconds = _measure({name: form.forward for name, form in forms.items()}, args, kwargs)
    fastest, density = dispatch.fastest(seconds), layer.density
    if fastest != "masked":
        to_plain(layer)
    if fastest == "2:4":
        semi_structured.compress_(layer)
    elif fastest in packed:
        to_decode(layer, packed[fastest].packed, density)
    times = _words(seconds)
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
    device = layer.weight.device.type
    if dispatch.forced() not in (None, device):
        return {}, None
    weight = plain.weight.t() if transposed else plain.weight
    rows, columns = weight.shape
    density = layer.density
    batch = x.numel() // columns if columns else 0
    forms, reason = {}, None
    for name in decode_linear.candidates(rows, columns, density, batch, device):
        if x.dtype not in decode_linear.dtypes(name):
            continue
        why = decode_linear.why_dense(weight.device, name, columns)
        reason = reason or why
        if why is None:
            mask = layer.mask.to_dense()
            packed = decode_linear.pack(weight, bitmask.pack(mask.t() if transposed else mask), name)
            forms[name] = DecodeLinear(packed, plain.bias, density=density)
    return forms, reason


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()), None)
