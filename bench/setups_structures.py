"""Masks with a structure, and the linear layers that have kernels of their own for them. What `linear` and `conv` of
setups_layers.py run for a case with a `structure`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparselottery.bench.setups_common import Candidate, random_mask


def block_of(structure: str) -> tuple[int, int]:
    """ "block:64x32" -> (64, 32)."""
    rows, columns = structure.removeprefix("block:").split("x")
    return int(rows), int(columns)


def mask(case, shape, generator) -> Tensor:
    """bool of a weight's shape: round(density * count) of its blocks at random places (a convolution's for each tap), or
    N random ones of every M neighbours in a row."""
    if not case.structure.startswith("block:"):
        n, m = map(int, case.structure.split(":"))
        order = torch.rand(math.prod(shape) // m, m, generator=generator, device=generator.device).argsort(1)
        return (order < n).view(shape)
    rows, columns = block_of(case.structure)
    live = random_mask((-(-shape[0] // rows), -(-shape[1] // columns), *shape[2:]), case.density, generator)
    return live.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]].contiguous()


def linear(case, seed):
    """Blocks: block_linear against nn.Linear, prune-style and torch's BSR. N:M: what `compress` makes of the layer."""
    return (_blocks if case.structure.startswith("block:") else _n_of_m)(case, seed)


def _blocks(case, seed):
    from sparselottery.bench.setups_layers import draw_layer, layer_work
    from sparselottery.ops import reference
    from sparselottery.ops.block_linear import block_linear

    inputs, outputs = case.sizes
    sets, keep, words, draw = draw_layer(case, seed, (outputs, inputs), (case.batch, inputs), inputs)
    factor, block = keep.to(sets[0][0].dtype), block_of(case.structure)

    def ours(x, weight, bias):
        return block_linear(x, weight, words, bias, block=block, premasked=True)

    def plain(x, weight, bias):
        return reference.masked_linear(x, weight, words, bias)

    def by_hand(grad):
        if case.direction != "forward" or case.device == "cpu" or outputs % block[0] or inputs % block[1]:
            return {}  # torch's BSR has no gradients, and no blocks that an edge cuts off
        weights = [weight.to_sparse_bsr(block) for _, weight, _ in sets]

        def run(i):
            x, _, bias = sets[i % len(sets)]
            return F.linear(x, weights[i % len(sets)], bias)

        try:
            run(0)
        except (RuntimeError, NotImplementedError):  # some versions and devices have no such product
            return {}
        return {"torch BSR": Candidate(run, lambda: [run(0)])}

    baselines = {"dense": F.linear, "prune-style": lambda x, weight, bias: F.linear(x, weight * factor, bias)}
    return layer_work(case, sets, keep, draw, ours, baselines, plain, by_hand)


def _n_of_m(case, seed):
    import sparselottery as sl
    from sparselottery.bench.setups_layers import draw_layer, layer_work
    from sparselottery.nn import semi_structured
    from sparselottery.ops import reference

    inputs, outputs = case.sizes
    sets, keep, words, draw = draw_layer(case, seed, (outputs, inputs), (case.batch, inputs), inputs)
    layers = []
    for _, weight, bias in sets:
        layer = sl.MaskedLinear(inputs, outputs, mask=keep, device=case.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight), layer.bias.copy_(bias)
        layers.append(layer)
    compressed = [sl.compress(layer, x) for layer, (x, _, _) in zip(layers, sets, strict=True)]
    places = {id(weight): i for i, (_, weight, _) in enumerate(sets)}

    def ours(x, weight, bias):
        with torch.no_grad():
            return compressed[places[id(weight)]](x)

    def plain(x, weight, bias):
        return reference.masked_linear(x, weight, words, bias)

    def by_hand(grad):
        if semi_structured.why_not(sl.MaskedLinear(inputs, outputs, mask=keep, device=case.device, dtype=grad.dtype)):
            return {}
        weights = [torch.sparse.to_sparse_semi_structured(weight) for _, weight, _ in sets]

        def run(i):
            x, _, bias = sets[i % len(sets)]
            return F.linear(x, weights[i % len(sets)], bias)

        return {"torch semi-structured": Candidate(run, lambda: [run(0)])}

    factor = keep.to(sets[0][0].dtype)
    baselines = {"dense": F.linear, "prune-style": lambda x, weight, bias: F.linear(x, weight * factor, bias)}
    return layer_work(case, sets, keep, draw, ours, baselines, plain, by_hand)
