"""From plain layers to masked and packed ones and back, in place: a layer changes its class and keeps everything else."""

import contextlib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from .. import masks
from ..masks import Mask
from ..ops import packed
from .conv import MaskedConv2d
from .decode import DecodeLinear, to_linear
from .invariant import MaskedWeight
from .linear import MaskedConv1D, MaskedLinear, is_transposed_linear
from .packed import PackedConv1D, PackedConv2d, PackedLinear, PackedWeight, rename, replace_data

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Exclude = str | type | Iterable[str | type]


def sparsify(model: nn.Module, *, exclude: Exclude = ()) -> nn.Module:
    """Turn every `nn.Linear`, `nn.Conv2d` and transformers' `Conv1D` of a model into a masked layer, in place.

    The modules stay the same objects and so do their Parameters: optimizers, hooks and references keep working, and
    `isinstance` finds what it found. state_dict keys are unchanged plus "<name>.weight_mask". Layers that share a
    weight share its mask. The masks keep everything until `prune` or `set_mask`.

    Left dense, see `left_dense`: a layer whose weight is also held by a module that cannot be masked (GPT-2's output
    layer is its embedding: pruning one would silently prune the other), and, with a warning, a layer with a forward of
    its own or whose weight is computed (parametrizations, weight_norm, torch.nn.utils.prune).

    Args:
        model: any module; a single layer too.
        exclude: what stays as it is: names as in `named_modules()`, patterns (`"layers.*.out"`) or classes; all below
            them too.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module, or `exclude` holds something else.
        ValueError: a name in `exclude` fits no module.
    """
    unexpected = []
    for name, module, reason in _candidates(model, exclude):
        if reason is None:
            to_masked(module)
        elif reason.startswith("!"):
            unexpected.append(f"{name or '(the model itself)'}: {reason[1:]}")
    if unexpected:
        warnings.warn("sparsify left dense: " + "; ".join(unexpected), stacklevel=2)
    return model


def sparsify_named(model: nn.Module, names: Iterable[str]) -> None:
    """Turn just these layers of a model into masked ones, in place; those that are already stay as they are.

    Raises:
        ValueError: a name that is no layer which can be masked; nothing has been changed then.
    """
    possible = {name: (module, reason) for name, module, reason in _candidates(model, ())}
    modules = dict(model.named_modules(remove_duplicate=False))
    todo = []
    for name in names:
        if isinstance(modules.get(name), MaskedWeight):
            continue
        module, reason = possible.get(name, (None, "it is not a linear or convolutional layer of the model"))
        if reason is not None:
            raise ValueError(f"{name or 'the model'} cannot be masked: {reason.removeprefix('!')}")
        todo.append(module)
    for module in todo:
        to_masked(module)


def left_dense(model: nn.Module, *, exclude: Exclude = ()) -> dict[str, str]:
    """The linear and convolutional layers that `sparsify` leaves dense: {name: reason}."""
    return {name: reason.removeprefix("!") for name, _, reason in _candidates(model, exclude) if reason is not None}


def densify(model: nn.Module) -> nn.Module:
    """Turn the masked and packed layers of a model back into the plain layers they were, in place, with zeros where they were.

    Parameters stay the same objects; the buffers "<name>.weight_mask" go. Nothing keeps the zeros from here on. What
    `compress` packed for decoding becomes an `nn.Linear` with a new weight. Returns `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the weight of a masked layer is computed by a parametrization or a hook. Nothing has changed then.
    """
    _check_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedWeight)}
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ValueError(
                f"{name or 'model'}: its weight is computed by a parametrization or a hook; remove that first"
            )
    unpack(model)
    for layer in [module for module in model.modules() if isinstance(module, MaskedWeight)]:
        to_plain(layer)
    for layer in [module for module in model.modules() if isinstance(module, DecodeLinear)]:
        to_linear(layer)
    return model


def to_plain(layer: nn.Module) -> None:
    """Turn one masked layer back into the plain one, in place."""
    layer._restore()
    masks.detach(layer.weight, layer)
    layer._forget()
    del layer._buffers["weight_mask"]
    layer.__class__ = _plain_class(type(layer))


def pack(model: nn.Module, *, exclude: Exclude = (), optimizer: Optimizer | None = None) -> nn.Module:
    """Turn the masked layers of a model into packed ones, in place: only the survivors are stored, see `PackedLinear`.

    The Parameter that was `weight` becomes `values`: the same object with other data, so an optimizer that holds it goes on
    with `optimizer=`, or if it has no state yet. DistributedDataParallel has to be put around the model afterwards.
    state_dict keys: "<name>.values" and "<name>.weight_mask"; states of masked layers load as well. Layers that share a
    weight share its values.

    Args:
        exclude: what stays masked: names, patterns or classes, as for `sparsify`.
        optimizer: one that has begun to train the model: its state (momentum and the like) is packed too.

    Returns:
        `model` itself.

    Raises:
        TypeError: an argument is something else.
        ValueError: no masked layer is left to pack, or the weight of one is computed, on no device or also held by another
            module. Nothing has changed then.
    """
    _check_module(model)
    _check_optimizer(optimizer)
    excluded = excluded_names(model, exclude)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedWeight) and n not in excluded}
    if not layers:
        raise ValueError("model: expected masked layers to pack, found none; sl.prune or sl.sparsify makes them")
    for name, layer in layers.items():
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"{name or 'model'}: its weight is computed by a parametrization or a hook; remove that first"
            )
        if layer.weight.is_meta:
            raise ValueError(f"{name or 'model'}: its weight is on the meta device; give it values first")
    weights = {id(layer.weight) for layer in layers.values()}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in weights and not (name in layers and key == "weight"):
                raise ValueError(f"{name or 'model'}.{key}: is the weight of a layer to pack too; exclude that layer")
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # a tied weight changes only once
    for layer in layers.values():
        layer._restore()
    done = set()
    for name, layer in layers.items():
        weight, words, shape = layer.weight, layer.weight_mask, shapes[name]
        masks.detach(weight, layer)
        layer._forget()
        layer.plain_class = _plain_class(type(layer))
        layer.__class__ = _packed_class(type(layer))
        layer.weight_shape = shape
        rename(layer, "weight", "values")
        if id(weight) not in done:
            done.add(id(weight))
            _convert(weight, shape, optimizer, lambda t, words=words: packed.gather(t, words))
    return model


def unpack(model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Turn the packed layers of a model back into masked ones, in place; the inverse of `pack`. Other layers stay.

    Args:
        optimizer: one that trains the model: its state is unpacked too, with zeros off the masks.

    Returns:
        `model` itself.

    Raises:
        TypeError: an argument is something else.
    """
    _check_module(model)
    _check_optimizer(optimizer)
    done = set()
    for layer in [module for module in model.modules() if isinstance(module, PackedWeight)]:
        values, words, shape = layer.values, layer.weight_mask, layer.weight_shape
        if id(values) not in done:
            done.add(id(values))
            count = values.shape
            _convert(values, count, optimizer, lambda t, words=words, shape=shape: packed.expand(t, words, shape))
        rename(layer, "values", "weight")
        layer.__class__ = masked_class(layer.plain_class)
        layer.__dict__.pop("plain_class", None)  # of the class where the layer was made as a packed one
        del layer.weight_shape
        layer._adopt()
        layer._restore()
    return model


@contextlib.contextmanager
def unpacked(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Within it the packed layers of a model, and what the optimizer keeps for them, are masked ones; packed again after."""
    _check_module(model)
    names = {name for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    if not names:
        yield
        return
    unpack(model, optimizer=optimizer)
    try:
        yield
    finally:
        others = [n for n, module in model.named_modules() if isinstance(module, MaskedWeight) and n not in names]
        pack(model, exclude=others, optimizer=optimizer)


def _convert(param, shape, optimizer, change: Callable[[Tensor], Tensor]):
    """Apply `change` to a Parameter, its gradient and every tensor of its shape that an optimizer keeps for it."""
    with torch.no_grad():
        grad = param.grad
        if grad is not None and grad.layout != torch.strided:
            grad = None
        replace_data(param, change(param.data), None if grad is None else change(grad))
        state = {} if optimizer is None else optimizer.state.get(param, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape and value.is_floating_point():
                state[key] = change(value)


def _packed_class(masked):
    if issubclass(masked, MaskedConv1D):
        return PackedConv1D
    return PackedLinear if issubclass(masked, MaskedLinear) else PackedConv2d


def _check_optimizer(optimizer):
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")


def from_torch_prune(model: nn.Module) -> nn.Module:
    """Turn layers pruned by `torch.nn.utils.prune` (`weight_orig`, `weight_mask` and a hook) into masked layers, in
    place.

    `weight` is the Parameter that was `weight_orig`, times the mask, so that an optimizer that holds it goes on. A
    pruned bias keeps its zeros for now but loses its mask, with a warning. Layers that were not pruned stay as they
    are. Returns `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no layer was pruned by torch.nn.utils.prune, or one that was cannot be a masked layer.
    """
    _check_module(model)
    found = [(name, module) for name, module in model.named_modules() if "weight_orig" in module._parameters]
    if not found:
        raise ValueError("model: expected layers pruned by torch.nn.utils.prune, found none")
    for name, module in found:
        if not isinstance(module, (nn.Linear, nn.Conv2d)) and not is_transposed_linear(module):
            kinds = "nn.Linear, nn.Conv2d and transformers' Conv1D"
            raise ValueError(f"{name}: {type(module).__name__} cannot be a masked layer ({kinds} can)")
    for name, module in found:
        if "bias_orig" in module._parameters:
            torch_prune.remove(module, "bias")
            warnings.warn(f"{name}: the bias was pruned too; its zeros stay, its mask goes", stacklevel=2)
        keep = module._buffers.pop("weight_mask") != 0
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == "weight":
                del module._forward_pre_hooks[key]
        weight = module._parameters.pop("weight_orig")
        module.__dict__.pop("weight", None)  # the product that the hook left there
        with torch.no_grad():
            weight.masked_fill_(~keep, 0)
        module._parameters = {"weight": weight, **module._parameters}  # first again, as in a fresh layer
        to_masked(module)
        module.set_mask(Mask.from_dense(keep))
    return model


def masked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every masked layer, in the order of `named_modules()`, once per distinct weight."""
    _check_module(model)
    seen = {}  # holds the weights, too: one that a parametrization computes would leave its id to the next
    for name, module in model.named_modules():
        if isinstance(module, MaskedWeight) and id(weight := module.weight) not in seen:
            seen[id(weight)] = weight
            yield name, module


def maskable_modules(model: nn.Module, *, exclude: Exclude = ()) -> dict[str, nn.Module]:
    """name -> layer of every layer that `sparsify` has masked or would mask, in the order of `named_modules()`, once per
    distinct weight. The model stays as it is.

    Raises:
        TypeError, ValueError: as for `sparsify`.
    """
    excluded = excluded_names(model, exclude)
    plain = {name for name, _, reason in _candidates(model, exclude) if reason is None}
    masked = {name for name, _ in masked_modules(model)} - excluded
    seen, found = set(), {}
    for name, module in model.named_modules():
        if (name in plain or name in masked) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    return found


def as_tuple(exclude: Exclude) -> tuple:
    """What `exclude` lists, to be read more than once; a single name or class is one too.

    Raises:
        TypeError: it is neither a name, a class nor iterable.
    """
    if isinstance(exclude, str | type):
        return (exclude,)
    if not isinstance(exclude, Iterable):
        raise TypeError(f"exclude: expected names or classes, got {type(exclude).__name__}")
    return tuple(exclude)


def excluded_names(model: nn.Module, exclude: Exclude) -> set[str]:
    """The names of the modules that `exclude` means, with everything below them.

    Raises:
        TypeError: an entry is neither a name nor a class.
        ValueError: a name or pattern fits no module of the model.
    """
    names = set()
    for item in as_tuple(exclude):
        if not isinstance(item, (str, type)):
            raise TypeError(f"exclude: expected names or classes, got {type(item).__name__}")
        hits = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (isinstance(module, item) if isinstance(item, type) else fnmatch.fnmatchcase(name, item))
        ]
        if not hits and isinstance(item, str):
            raise ValueError(f"exclude: no module is called {item!r}")
        names.update(hits)
    below = {name for name, _ in model.named_modules(remove_duplicate=False) for hit in names if _is_below(name, hit)}
    return names | below


def _is_below(name, ancestor):
    return not ancestor or name.startswith(ancestor + ".")


# ---- which layers, and how ----


def _check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _candidates(model, exclude):
    """(name, module, reason) of each plain layer that could be masked; reason None: it can, "!": it is a surprise."""
    _check_module(model)
    excluded = excluded_names(model, exclude)
    layers, holders = [], {}
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, nn.Conv2d)) or is_transposed_linear(module)
        if linear:
            layers.append((name, module))
        for key, parameter in module._parameters.items():
            if parameter is not None and not (linear and key == "weight"):
                holders.setdefault(id(parameter), f"{name or 'the model'} ({type(module).__name__})")
    for name, module in layers:
        if isinstance(module, MaskedWeight):
            continue
        if name in excluded:
            yield name, module, "excluded"
        else:
            yield name, module, _why_not(module, holders)


def _why_not(module, holders):
    weight = module._parameters.get("weight")
    if weight is None:
        if "weight_orig" in module._parameters and "weight_mask" in module._buffers:
            return "!pruned by torch.nn.utils.prune (from_torch_prune converts it)"
        return "!its weight is computed by a parametrization or a hook; remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "!its shape is not known yet: run a batch through the model first"
    if weight.dtype not in FLOATS:
        return f"!its weight is {weight.dtype}"
    if id(weight) in holders:
        return f"shares its weight with {holders[id(weight)]}"
    if type(module).forward is not _plain_forward(module):
        return f"!{type(module).__name__} has a forward of its own"
    return None


def _plain_forward(module):
    if isinstance(module, nn.Linear):
        return nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        overridden = type(module)._conv_forward is not nn.Conv2d._conv_forward
        return None if overridden else nn.Conv2d.forward
    return next(cls for cls in type(module).__mro__ if cls.__name__ == "Conv1D").forward


def to_masked(module):
    module.__class__ = masked_class(type(module))
    module._start()


@functools.cache
def masked_class(plain: type) -> type:
    """The masked version of a layer class, a subclass of it, so that `isinstance` and its own methods keep working."""
    if plain is nn.Linear:
        return MaskedLinear
    if plain is nn.Conv2d:
        return MaskedConv2d
    if issubclass(plain, nn.Linear):
        base = MaskedLinear
    elif issubclass(plain, nn.Conv2d):
        base = MaskedConv2d
    else:
        base = MaskedConv1D
    return type("Masked" + plain.__name__, (base, plain), {"__doc__": base.__doc__, "__reduce_ex__": _reduce})


def _plain_class(masked):
    if masked.__reduce_ex__ is _reduce:
        return masked.__bases__[1]
    return nn.Linear if issubclass(masked, nn.Linear) else nn.Conv2d


def _reduce(module, protocol):
    """Pickle a layer of a class that only exists here, by the name of the plain class."""
    return _rebuild, (_plain_class(type(module)),), module.__getstate__()


def _rebuild(plain):
    masked = masked_class(plain)
    return masked.__new__(masked)
