"""The cases of op "resident": networks whose layers run in C++ in one layout, and what `compress` makes of them."""

import itertools
import math

import torch
from torch import nn
from torch.nn.utils import prune

from sparselottery.bench.setups_common import TOLERANCE, Candidate, Work, make_generator, random_mask


def network(sizes) -> tuple[nn.Sequential, tuple[int, ...]]:
    """The layers of a case, and the shape of one input.

    ("conv", layers, channels, kernel, side): convolutions with ReLU between them; ("mlp", widths...): linear layers so.
    """
    kind, *sizes = sizes
    modules = []
    if kind == "conv":
        layers, channels, kernel, side = sizes
        for _ in range(layers):
            modules += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()]
        return nn.Sequential(*modules[:-1]), (channels, side, side)
    for columns, rows in itertools.pairwise(sizes):
        modules += [nn.Linear(columns, rows), nn.ReLU()]
    return nn.Sequential(*modules[:-1]), (sizes[0],)


def _digits(shape, generator):
    return torch.randint(-2, 3, shape, generator=generator) / 2


def resident(case, seed) -> Work:
    """Forward, or forward and all gradients, in the resident layout, against the same network dense and prune-style.

    "auto" converts the layout at the edges of the network, which is in its time; "layers" does at every layer. "compress" is
    what a user gets for inference. The last of several linear layers keeps ten times the density (at most all).

    Inputs, weights and biases are few binary digits, so that forward sums are exact: with rounding, a value near zero would
    pass one ReLU and not the other, and no tolerance would tell that from a fault.
    """
    import sparselottery as sl

    generator = make_generator(case, seed)
    model, shape = network(case.sizes)
    training = case.direction != "forward"
    layers = [module for module in model if not isinstance(module, nn.ReLU)]
    masks = []
    for layer in layers:
        several = isinstance(layer, nn.Linear) and len(layers) > 1
        density = min(1.0, 10 * case.density) if several and layer is layers[-1] else case.density
        masks.append(random_mask(layer.weight.shape, density, generator))
        fan = layer.weight[0].numel()
        with torch.no_grad():
            scale = 2.0 ** round(math.log2((2 / (fan * density)) ** 0.5))
            layer.weight.copy_(_digits(layer.weight.shape, generator) * scale * masks[-1])
            layer.bias.copy_(_digits(layer.bias.shape, generator))
    x = _digits((case.batch, *shape), generator).requires_grad_(training)
    with torch.no_grad():
        grad = torch.randn(model(x).shape, generator=generator)

    def copy_of(dtype=torch.float32):
        other, _ = network(case.sizes)
        other.load_state_dict(model.state_dict())
        return other.to(dtype).requires_grad_(training)

    def masked():
        other = sl.sparsify(copy_of())
        for layer, mask in zip((m for m in other if not isinstance(m, nn.ReLU)), masks, strict=True):
            layer.set_mask(mask)
        return other

    def runner(other, inputs=x):
        parameters = list(other.parameters())

        def run(i):
            if not training:
                with torch.no_grad():
                    return (other(inputs),)
            y = other(inputs)
            return (y, *torch.autograd.grad(y, [inputs, *parameters], grad.to(y)))

        return run

    def results(run):
        def compute():
            y, *rest = run(0)
            dx, gradients = rest[:1], rest[1:]
            weights = [g * mask for g, mask in zip(gradients[::2], masks, strict=True)] if training else []
            return [y.detach(), *dx, *weights, *gradients[1::2]]

        return compute

    def expected():
        wide = x.detach().double().requires_grad_(training)
        return results(runner(copy_of(torch.float64), wide))()

    ours = {"auto": sl.resident(masked()), "layers": masked()}
    if not training:
        ours["compress"] = sl.compress(masked(), x)
    candidates = {}
    for name, other in ours.items():
        run = runner(other)
        candidates[name] = Candidate(run, results(run), None, True)
    candidates["dense"] = Candidate(runner(copy_of()))
    pruned = copy_of()
    for layer, mask in zip((m for m in pruned if not isinstance(m, nn.ReLU)), masks, strict=True):
        prune.custom_from_mask(layer, "weight", mask)
    candidates["prune-style"] = Candidate(runner(pruned))
    kept = sum(int(mask.sum()) for mask in masks)
    places = shape[1] * shape[2] if len(shape) > 1 else 1
    passes = 3 if training else 1
    work = Work(candidates, expected, 4 * TOLERANCE["float32"], passes * 4.0 * (kept + x.numel() + grad.numel()))
    work.operations = passes * 2.0 * kept * case.batch * places
    return work
