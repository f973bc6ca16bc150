"""compress: a model for inference, every layer in the form that was fastest here."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops import dispatch
from .convert import densify, to_plain, unpack
from .invariant import MaskedWeight


def compress(model: nn.Module, example_input: Tensor | tuple | Mapping) -> nn.Module:
    """A copy of a model for inference in which each masked or packed layer has the fastest form measured on this machine.

    Each layer is timed on the input that it gets from `example_input`, masked against plain (dense, with zeros), and
    the whole
    at the end: unless it beats the plain model by dispatch's margin, all layers are plain. So it is never slower than
    dense as far as this measurement can tell; measure with the batch you will use. Outputs are those of `model.eval()`,
    up to the order in which a sparse kernel adds.

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
            if id(layer) not in inputs or not _masked_is_faster(layer, *inputs[id(layer)]):
                to_plain(layer)
        if any(isinstance(layer, MaskedWeight) for layer in layers):
            plain = densify(copy.deepcopy(result))
            seconds = dispatch.measure(
                {"dense": lambda: plain(*args, **kwargs), "mixed": lambda: result(*args, **kwargs)}
            )
            if dispatch.fastest(seconds) == "dense":
                return plain
    return result


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


def _masked_is_faster(layer, args, kwargs):
    plain = densify(copy.deepcopy(layer))
    layer.forward(*args, **kwargs)  # its own backend is chosen here, not in the measurement
    return (
        dispatch.fastest(
            dispatch.measure(
                {"dense": lambda: plain.forward(*args, **kwargs), "masked": lambda: layer.forward(*args, **kwargs)}
            )
        )
        == "masked"
    )
