"""How a network's layers hang together: which nonlinearity follows a layer, and which layers read its units.

Read from a symbolic trace (torch.fx), as far as it goes. A model that cannot be traced (its forward branches on values, or
takes other arguments) has no known wiring: every layer then stands alone.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from ..nn.linear import is_transposed_linear
from ..nn.packed import PackedWeight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NONLINEAR = {
    "relu", "relu6", "leakyrelu", "rrelu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "softplus", "softsign", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid",
}  # fmt: skip
PER_UNIT = {"batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "identity", "contiguous"} | {
    f"{kind}dropout{dim}" for kind in ("", "alpha", "featurealpha") for dim in ("", "1d", "2d", "3d")
}
POOLS = {f"{kind}pool{dim}d" for kind in ("max", "avg", "lp", "adaptivemax", "adaptiveavg") for dim in (1, 2, 3)}


@dataclass(frozen=True)
class Wiring:
    """What is known about the layers of a model, by name.

    Attributes:
        after: the operations on a layer's output up to and including its nonlinearity, as functions of that output; all
            work on each unit by itself (BatchNorm, dropout, activation). Nothing where something else follows directly.
        readers: the layers that read a layer's units through such operations, pooling and flattening.
        followed: the layers all of whose uses end in `readers`.
        outputs: the layers whose units are (or may be) outputs of the network: no other layer comes after them.
    """

    after: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = field(default_factory=dict)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    followed: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolutional layers of a model by name, masked and packed ones too."""
    return {name: module for name, module in model.named_modules() if is_layer(module)}


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, PackedWeight, *CONVOLUTIONS)) or is_transposed_linear(module)


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) or (isinstance(module, PackedWeight) and len(module.weight_shape) > 2)


def wiring(model: nn.Module) -> Wiring:
    """Trace a model. Where that fails only `outputs` is known: the last layer in the order of `named_modules()`."""
    found = layers(model)
    graph = _trace(model)
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes if graph is not None else ():
        if node.op == "call_module" and node.target in found:
            nodes.setdefault(node.target, []).append(node)
    if not nodes:  # the model itself may be a layer: its trace shows no modules
        return Wiring(outputs=frozenset(list(found)[-1:]))
    modules = dict(model.named_modules(remove_duplicate=False))
    once = {name: where[0] for name, where in nodes.items() if len(where) == 1}
    after, readers, followed = {}, {}, set()
    for name, node in once.items():
        after[name] = _after(node, modules)
        ends, whole = _readers(node, found, modules, once)
        readers[name] = tuple(dict.fromkeys(ends))
        if whole and ends:
            followed.add(name)
    outputs = {name for name, where in nodes.items() if any(_reaches_output(node, nodes) for node in where)}
    return Wiring(after, readers, frozenset(followed), frozenset(outputs))


def _trace(model) -> fx.Graph | None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return is_layer(module) or super().is_leaf_module(module, name)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Tracer().trace(model)
    except Exception:  # somebody's forward may fail on a proxy in any way; it only means that nothing is known
        return None


def _kind(node: fx.Node, modules) -> str:
    """What a node does, as the lower-case name of a module, function or method without underscores at its end."""
    if node.op == "call_module":
        return type(modules[node.target]).__name__.lower()
    if node.op == "call_function":
        return getattr(node.target, "__name__", "").replace("_", "").lower()
    return str(node.target).rstrip("_").replace("_", "").lower() if node.op == "call_method" else node.op


def _first(node: fx.Node, value: fx.Node) -> bool:
    """Whether `value` is the first argument of a node and no other argument is computed."""
    return node.args[:1] == (value,) and all(other is value for other in node.all_input_nodes)


def _after(node: fx.Node, modules) -> tuple[Callable, ...]:
    chain = []
    while len(node.users) == 1:
        (user,) = node.users
        kind = _kind(user, modules)
        if kind not in NONLINEAR | PER_UNIT or not _first(user, node):
            break
        chain.append(_call(user, modules))
        node = user
        if kind in NONLINEAR:
            return tuple(chain)
    return tuple(chain)


def _call(node: fx.Node, modules) -> Callable[[Tensor], Tensor]:
    arguments, named = node.args[1:], node.kwargs
    if node.op == "call_module":
        return modules[node.target]
    if node.op == "call_function":
        return lambda value: node.target(value, *arguments, **named)
    return lambda value: getattr(value, node.target)(*arguments, **named)


def _readers(start: fx.Node, found, modules, once) -> tuple[list[str], bool]:
    """The layers that read the units of a node, and whether all its uses were followed to such a layer."""
    source = found[start.target]
    spatial = is_convolution(source)
    units = unit_count(source)
    ends, whole = [], True
    todo = [(start, spatial)]  # whether there are positions beside the units yet
    while todo:
        node, positions = todo.pop()
        for user in node.users:
            kind = _kind(user, modules)
            if kind in ("size", "dim", "getattr"):  # asks for the shape only
                continue
            if kind in ("view", "reshape") and _flattens(user, kind, modules) and user.args[0] is node:
                todo.append((user, False))
            elif not _first(user, node):
                whole = False
            elif user.op == "call_module" and user.target in once and not _is_read_otherwise(found, user.target):
                if _reads(found[user.target], units, spatial, positions):
                    ends.append(user.target)
                else:
                    whole = False
            elif kind in NONLINEAR | PER_UNIT or (kind in POOLS and spatial):
                todo.append((user, positions))
            elif _flattens(user, kind, modules):
                todo.append((user, False))
            else:
                whole = False
    return ends, whole


def _is_read_otherwise(found, name) -> bool:
    """Whether another layer has the same weight: pruning its columns would prune the other's."""
    weight = getattr(found[name], "weight", None)
    return weight is not None and any(getattr(m, "weight", None) is weight for n, m in found.items() if n != name)


def _reads(layer, units: int, spatial: bool, positions: bool) -> bool:
    """Whether a layer's inputs are these units in order, each once or as a run of neighbours (a flattened image)."""
    if is_convolution(layer):
        return spatial and positions and getattr(layer, "groups", 1) == 1 and layer.in_channels == units
    inputs = input_count(layer)
    return (not positions and inputs % units == 0) if spatial else inputs == units


def _flattens(node: fx.Node, kind: str, modules) -> bool:
    """Whether a node turns `[N, units, *]` into `[N, units * positions]`, or averages the positions away."""
    if node.op == "call_module":
        module = modules[node.target]
        return isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1
    arguments = node.args[1:]
    if kind == "flatten":
        return (arguments == (1,) and not node.kwargs) or (not arguments and dict(node.kwargs) == {"start_dim": 1})
    if kind in ("view", "reshape"):
        return len(arguments) == 2 and _is_batch(arguments[0], modules) and arguments[1] == -1
    if kind == "mean":
        dims = arguments[0] if arguments else node.kwargs.get("dim")
        return isinstance(dims, list | tuple) and set(dims) in ({2, 3}, {-1, -2}) and not node.kwargs.get("keepdim")
    return False


def _is_batch(value, modules) -> bool:
    """Whether an argument is the first entry of a shape: `x.size(0)` or `x.shape[0]`."""
    asks = isinstance(value, fx.Node) and _kind(value, modules) in ("size", "getitem")
    return asks and value.args[1:] == (0,)


def _reaches_output(start: fx.Node, nodes) -> bool:
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.op == "output":
                return True
            if user not in seen and not (user.op == "call_module" and user.target in nodes):
                seen.add(user)
                todo.append(user)
    return False


def unit_count(layer: nn.Module) -> int:
    """How many neurons or channels a layer gives."""
    shape = layer.weight_shape if isinstance(layer, PackedWeight) else layer.weight.shape
    return shape[1] if is_transposed_linear(layer) or type(layer).__name__ == "PackedConv1D" else shape[0]


def input_count(layer: nn.Module) -> int:
    """How many inputs a linear layer reads."""
    shape = layer.weight_shape if isinstance(layer, PackedWeight) else layer.weight.shape
    return shape[0] if is_transposed_linear(layer) or type(layer).__name__ == "PackedConv1D" else shape[1]
