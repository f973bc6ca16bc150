"""Channel tickets made small: a network with fewer channels whose outputs are those of the masked one.

What belongs together (a convolution's outputs, their BatchNorm, the inputs of whatever reads them, everything that a shortcut
adds to them) is found by Torch-Pruning (Fang et al., arXiv 2301.12900: DepGraph), for any network that it can trace.

A shortcut adds channels of several BatchNorm layers to each other. Such a channel goes only where all of them drop it: then
nothing is left of it. Where one of them keeps it, it stays for all, and the others begin there with γ = β = 0. Networks with
shortcuts therefore shrink mainly inside their blocks, as in network slimming (Liu et al., arXiv 1708.06519, section 4.4).
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..masks import Mask
from ..nn.convert import densify
from .controls import derived_seed
from .ticket import Ticket, TicketError

TOLERANCE = 1e-4  # of outputs, relative to the largest: fp32 sums in another order
INSTALL = "pip install 'sparselottery[channels]'"


@dataclass
class Group:
    """Channels that belong together in all the layers that they run through.

    Attributes:
        root: the first BatchNorm layer among these; channels: which of its channels, int64 `[width]`.
        places: per BatchNorm layer of the ticket, its channels that are the i-th of the group: int64 `[width, k]` (k is 1
            but where flattening makes several of one).
        alive: bool `[width]`, what cannot go: a layer keeps it, or there is another reason, told in `stays`.
        readers: (layer, its input channels `[n]`, whose channels of the group they are `[n]`).
    """

    root: str
    channels: Tensor
    places: dict[str, Tensor] = field(default_factory=dict)
    alive: Tensor | None = None
    stays: str | None = None
    readers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return len(self.channels)


def torch_pruning():
    """The library.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
            import torch_pruning
    except ImportError as error:
        raise RuntimeError(f"channel tickets need Torch-Pruning ({error}): {INSTALL}") from None
    return torch_pruning


def shrink(
    model: nn.Module,
    ticket: Ticket,
    example_input,
    *,
    round_to: int | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A physically smaller network without the channels that a ticket drops, holding the weights the ticket starts from.

    Its outputs are those of the masked network, `ticket.apply(model)`, in which the dropped channels have γ = β = 0; that is
    checked on the example. It trains as any dense network does. Where channels cannot go, because they are the network's own
    inputs or outputs, or something makes more than zeros of them (a sigmoid), they stay with γ = β = 0, and a warning says so.

    Args:
        model: a network that the ticket fits; it stays as it is. Masked layers become plain ones.
        ticket: of `sl.EarlyBird` with channel structure: masks of BatchNorm layers.
        example_input: a tensor that `model` takes, or a tuple of its arguments; a batch of at least one.
        round_to: widths are rounded up to multiples of it by taking dropped channels in again, see `rounded`.
        scores: as for `rounded`.

    Raises:
        TypeError, ValueError: an argument is not as described, or the model cannot be traced.
        RuntimeError: Torch-Pruning is not installed, or what it made computes something else than the masked network.
    """
    if round_to is not None:
        ticket = rounded(ticket, model, example_input, round_to, scores)
    inputs = _inputs(example_input, model)
    small, graph, groups = _traced(model, ticket, inputs)
    whole = [f"{group.root} ({group.stays})" for group in groups if group.stays]
    if whole:
        warnings.warn(f"shrink: all channels stay in {', '.join(whole)}", stacklevel=2)
    before = _outputs(small, inputs)
    function = torch_pruning().prune_batchnorm_out_channels
    gone: dict[str, Tensor] = {name: torch.zeros(mask.shape, dtype=torch.bool) for name, mask in ticket.masks.items()}
    for group in groups:
        dead = ~group.alive
        if dead.any():
            chosen = group.channels[dead]
            now = chosen - gone[group.root].cumsum(0)[chosen]  # where they are after what has gone already
            graph.get_pruning_group(small.get_submodule(group.root), function, now.tolist()).prune()
            for name, places in group.places.items():
                gone[name][places[dead].flatten()] = True
    after = _outputs(small, inputs)
    largest = max((float(b.abs().max()) for b in before if b.numel()), default=0.0)
    same = [a.shape == b.shape for a, b in zip(after, before, strict=True)]
    if not all(same) or any(
        not float((a - b).abs().max()) <= TOLERANCE * largest for a, b in zip(after, before, strict=True) if b.numel()
    ):
        raise RuntimeError(
            "model: the smaller network's outputs differ from the masked network's; nothing was made of it"
        )
    for name, p in model.named_parameters():
        small.get_parameter(name).requires_grad_(p.requires_grad)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes[name]
    return small


def rounded(
    ticket: Ticket, model: nn.Module, example_input, round_to: int, scores: Mapping[str, Tensor] | None = None
) -> Ticket:
    """The ticket with widths rounded up to multiples of `round_to` (as far as there are channels), which GPUs like.

    The dropped channels of the highest score are taken in again, the first of equals: over all BatchNorm layers that share a
    channel, the sum of `scores` (`EarlyBird.scores`), or of |γ| in what the ticket starts from.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int):
        raise TypeError(f"round_to: expected an int, got {type(round_to).__name__}")
    if round_to < 1:
        raise ValueError(f"round_to: expected at least 1, got {round_to}")
    groups = groups_of(model, ticket, example_input)
    if scores is None:
        scores = {name: ticket.initial[f"{name}.weight"].abs() for name in ticket.masks}
    for name, mask in ticket.masks.items():
        if name not in scores or scores[name].shape != mask.shape:
            got = list(scores[name].shape) if name in scores else "none"
            raise ValueError(f"scores: expected {list(mask.shape)} for {name}, got {got}")
    masks = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    for group in groups:
        wanted = min(group.width, math.ceil(int(group.alive.sum()) / round_to) * round_to)
        score = sum(scores[name].detach().double().cpu()[places].sum(1) for name, places in group.places.items())
        order = score.masked_fill(group.alive, math.inf).argsort(descending=True, stable=True)
        taken = torch.zeros_like(group.alive)
        taken[order[:wanted]] = True
        for name, places in group.places.items():
            masks[name][places[taken & ~group.alive].flatten()] = True
    return Ticket({name: Mask.from_dense(mask) for name, mask in masks.items()}, ticket.initial)


def random_channels(ticket: Ticket, model: nn.Module, example_input, seed: int) -> Ticket:
    """A control: as many channels of each layer, chosen at random, and the same values to start from.

    Channels that belong together change places together, so that the small network has the same shape.
    """
    masks = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    for group in groups_of(model, ticket, example_input):
        generator = torch.Generator().manual_seed(derived_seed("random-mask", seed, group.root))
        order = torch.randperm(group.width, generator=generator)
        for name, places in group.places.items():
            masks[name][places] = masks[name][places[order]]
    return Ticket({name: Mask.from_dense(mask) for name, mask in masks.items()}, ticket.initial)


def groups_of(model: nn.Module, ticket: Ticket, example_input) -> list[Group]:
    """The channels of a ticket's BatchNorm layers, those together that belong together.

    Raises:
        TypeError, ValueError, RuntimeError: as for `shrink`.
    """
    return _traced(model, ticket, _inputs(example_input, model))[2]


def _traced(model, ticket, inputs):
    """A plain copy of the model with the ticket applied, its dependency graph, and the groups."""
    library = torch_pruning()
    masked = densify(copy.deepcopy(model))
    for name, mask in ticket.masks.items():
        if not isinstance(dict(masked.named_modules()).get(name), _BatchNorm):
            raise TicketError(
                f"ticket: expected masks of BatchNorm channels, but {name} is no BatchNorm layer of the model"
            )
        if not mask.count:
            raise TicketError(f"ticket: drops every channel of {name}; each layer needs one")
    masked = ticket.apply(masked).eval().requires_grad_(True)
    try:
        _outputs(masked, inputs)
    except Exception as error:  # whatever a forward may raise
        raise ValueError(f"example_input: the model fails on it: {type(error).__name__}: {error}") from error
    try:
        with torch.enable_grad():
            graph = library.DependencyGraph().build_dependency(masked, inputs, verbose=False)
    except Exception as error:
        raise ValueError(f"model: Torch-Pruning cannot trace it: {type(error).__name__}: {error}") from error
    groups = _groups(masked, ticket, graph, library.prune_batchnorm_out_channels)
    _keep_what_is_read(masked, groups, inputs)
    return masked, graph, groups


def _groups(model, ticket, graph, function) -> list[Group]:
    names = {module: name for name, module in model.named_modules()}
    keeps = {name: mask.to_dense() for name, mask in ticket.masks.items()}
    taken = {name: torch.zeros_like(mask) for name, mask in keeps.items()}
    groups = []
    for root in keeps:
        free = (~taken[root]).nonzero().flatten()
        if not len(free):
            continue
        group = Group(root, free)
        position = {int(channel): i for i, channel in enumerate(free)}
        group.alive = torch.zeros(len(free), dtype=torch.bool)
        made = False
        for item in graph.get_pruning_group(model.get_submodule(root), function, free.tolist()):
            module, handler = item.dep.target.module, item.dep.handler
            name, indices = names.get(module), torch.tensor(item.idxs)
            owners = torch.tensor([position[int(i)] for i in item.root_idxs])
            if isinstance(module, _BatchNorm):
                per_channel = torch.bincount(owners, minlength=group.width)
                if name not in keeps:
                    group.stays = f"{name} is not pruned"
                elif len(owners) == 0 or (per_channel != per_channel[0]).any():
                    group.stays = f"{name} has other channels"
                else:
                    group.places[name] = indices[owners.argsort(stable=True)].view(group.width, -1)
                    taken[name][indices] = True
            elif isinstance(module, _ConvNd) and 1 < module.groups < module.out_channels:
                group.stays = f"{name} is a grouped convolution"
            elif isinstance(module, nn.Linear | _ConvNd) and not graph.is_out_channel_pruning_fn(handler):
                group.readers.append((name, indices, owners))
            elif isinstance(module, nn.Linear | _ConvNd):
                made = True
        if group.stays:
            pass
        elif not made:
            group.stays = "its channels are those of the input"
        elif not group.readers:
            group.stays = "its channels are those of the output"
        taken[root][free] = True
        group.places.setdefault(root, free.unsqueeze(1))
        for name, places in group.places.items():
            group.alive |= keeps[name][places].any(1)
        if group.stays:
            group.alive[:] = True
        groups.append(group)
    return groups


def _keep_what_is_read(model, groups, inputs) -> None:
    """Channels that are not silent at their readers must stay: what follows BatchNorm may make something of a zero (a
    sigmoid), or other things may be added to it. Found by trying, on random values: what is silent can be cut off."""
    trial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for module in trial.modules():
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is None or not value.is_floating_point() or value.ndim == 0:
                    continue
                dead = value == 0 if isinstance(module, _BatchNorm) and key in ("weight", "bias") else None
                if key == "running_var":
                    value.copy_(random_like(value).abs() + 0.5)
                else:
                    value.copy_(random_like(value) / math.sqrt(value[0].numel() if value.ndim > 1 else 1))
                if dead is not None and key == "weight":
                    value.masked_fill_(dead, 0)
    for name in {name for group in groups for name in group.places}:  # β is 0 in a new network everywhere: γ tells
        layer = trial.get_submodule(name)
        if layer.bias is not None:
            layer.bias.data[layer.weight == 0] = 0
    inputs = tuple(random_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    before = _outputs(trial, inputs)

    def silent(some) -> bool:
        with _cut_off(trial, some):
            after = _outputs(trial, inputs)
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(after, before, strict=True))

    if not silent(groups):
        for group in groups:
            if not silent([group]):
                group.stays = "what reads them sees more than zeros"
                group.alive[:] = True


@contextlib.contextmanager
def _cut_off(model, groups):
    """Inside, the readers of the groups' dead channels have zero weights for them."""
    touched = []
    with torch.no_grad():
        for group in groups:
            for name, indices, owners in group.readers:
                module = model.get_submodule(name)
                touched.append((module.weight, module.weight.clone()))
                by_input = module.weight if isinstance(module, _ConvTransposeNd) else module.weight.transpose(0, 1)
                by_input[indices[~group.alive[owners]]] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in reversed(touched):
                weight.copy_(before)


def _inputs(example_input, model) -> tuple:
    """As a tuple of arguments, on the model's device."""
    inputs = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
    if not any(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example_input: expected a tensor or a tuple of arguments, got {type(example_input).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)


def _outputs(model, inputs) -> list[Tensor]:
    """Every floating-point tensor that the model returns."""

    def leaves(value):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from leaves(list(value.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                yield from leaves(item)

    with torch.no_grad():
        return [t for t in leaves(model(*inputs)) if t.is_floating_point()]
