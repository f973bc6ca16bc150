"""The cases of ops "linear" and "conv": forward, or forward and all gradients, of one layer."""

import dataclasses
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from sparselottery.bench import setups_structures
from sparselottery.bench.setups_common import (
    TOLERANCE,
    Candidate,
    Work,
    kernel_backends,
    make_generator,
    our_candidates,
    random_mask,
)
from sparselottery.nn import MaskedLinear
from sparselottery.ops import reference

L2_BYTES = 50e6  # inputs on a GPU are rotated so that none is found in the cache


def _copies(case, nbytes: float) -> int:
    return 1 if case.device == "cpu" else max(1, min(16, math.ceil(2 * L2_BYTES / nbytes)))


def draw_layer(case, seed, weight_shape, x_shape, fan_in, memory_format=torch.contiguous_format):
    """Input sets [(x, weight, bias)], the mask and its words."""
    generator, dtype = make_generator(case, seed), getattr(torch, case.dtype)
    if case.structure:
        mask = setups_structures.mask(case, weight_shape, generator)
    else:
        mask = random_mask(weight_shape, case.density, generator)
    nbytes = (math.prod(weight_shape) + math.prod(x_shape)) * dtype.itemsize

    def draw(shape, scale=1.0):
        return torch.randn(shape, generator=generator, device=case.device) * scale

    training = case.direction != "forward"
    sets = []
    for _ in range(_copies(case, nbytes)):
        x, weight = draw(x_shape), draw(weight_shape, fan_in**-0.5) * mask
        if memory_format != torch.contiguous_format:
            x, weight = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
        tensors = (x, weight, draw(weight_shape[:1]))
        sets.append(tuple(t.to(dtype).requires_grad_(training) for t in tensors))
    return sets, mask, reference.bitmask_pack(mask), draw


def layer_work(case, sets, mask, draw, ours, baselines, plain, by_hand=lambda grad: {}) -> Work:
    """Forward, or forward and all gradients, of ours and of the baselines.

    `ours`, `plain` (the reference) and the values of `baselines` are functions of x, weight, bias; `by_hand` makes more
    candidates from the gradient that all are given.
    """
    training = case.direction != "forward"
    with torch.no_grad():
        grad = draw(ours(*sets[0]).shape).to(sets[0][0].dtype)

    def runner(function):
        def run(i):
            inputs = sets[i % len(sets)]
            y = function(*inputs)
            return (y, *torch.autograd.grad(y, inputs, grad)) if training else y

        return run

    def results(function):
        def compute():
            y = runner(function)(0)
            if not training:
                return [y]
            y, dx, dw, db = y
            return [y.detach(), dx, dw * mask, db]  # dense libraries compute the whole dW

        return compute

    def expected():
        inputs = [t.detach().double().requires_grad_(training) for t in sets[0]]
        y = plain(*inputs)
        if not training:
            return [y]
        dx, dw, db = torch.autograd.grad(y, inputs, grad.double())
        return [y.detach(), dx, dw * mask, db]

    candidates = our_candidates(case, runner(ours), results(ours), kernel_backends(case))
    candidates |= {name: Candidate(runner(f), results(f)) for name, f in baselines.items()} | by_hand(grad)
    x, weight, _ = sets[0]
    passes = 3 if training else 1
    kept = int(mask.sum())
    outputs = grad.numel()
    size = x.element_size()
    moved = passes * (kept * size + mask.numel() / 8 + (x.numel() + outputs) * size)
    work = Work(candidates, expected, TOLERANCE[case.dtype], moved)
    work.operations = passes * 2 * kept * outputs / weight.shape[0]
    return work


def linear(case, seed) -> Work:
    """MaskedLinear against nn.Linear, as layers are called, prune-style W * mask and torch.sparse CSR."""
    if case.structure:
        return setups_structures.linear(case, seed)
    inputs, outputs = case.sizes
    drawn, mask, words, draw = draw_layer(case, seed, (outputs, inputs), (case.batch, inputs), inputs)
    factor = mask.to(drawn[0][0].dtype)
    sets, masked, plain_layers = [], {}, {}
    for x, *parameters in drawn:
        weight, bias = (nn.Parameter(t.detach(), t.requires_grad) for t in parameters)
        layer = MaskedLinear(inputs, outputs, mask=mask.cpu(), device=x.device, dtype=x.dtype)
        plain_layers[weight] = nn.Linear(inputs, outputs, device=x.device, dtype=x.dtype)
        masked[weight] = layer
        for m in (layer, plain_layers[weight]):
            m.weight, m.bias = weight, bias
        sets.append((x, weight, bias))

    def ours(x, weight, bias):
        return masked[weight](x)

    baselines = {
        "dense": lambda x, weight, bias: plain_layers[weight](x),
        "prune-style": lambda x, weight, bias: F.linear(x, weight * factor, bias),
    }

    def plain(x, weight, bias):
        return reference.masked_linear(x, weight, words, bias)

    def by_hand(grad):
        if case.dtype == "float32":
            emulated = {"bf16x6": _emulated(case, sets, mask, grad)} if case.device == "cuda" else {}
            return {"torch.sparse CSR": _csr(case, sets[0], mask, grad)} | emulated
        if case.device != "cuda" or case.direction != "forward":
            return {}
        candidate = _csr(case, sets[0], mask, grad)
        try:
            candidate.run(0)
        except RuntimeError:  # no such product in 16 bits in this version of cuSPARSE
            return {}
        return {"torch.sparse CSR": candidate}

    work = layer_work(case, sets, mask, draw, ours, baselines, plain, by_hand)
    work.candidates |= _decode(case, sets, words)
    return work


def _decode(case, sets, words) -> dict[str, Candidate]:
    """The packed forms that `sl.compress` tries for inference at small batches, one candidate each."""
    from sparselottery.nn import DecodeLinear
    from sparselottery.ops import decode_linear as op

    _, weight, bias = sets[0]
    if case.direction != "forward":
        return {}
    found = {}
    for name in op.candidates(*weight.shape, case.density, case.batch, case.device):
        if weight.dtype not in op.dtypes(name) or op.why_dense(weight.device, name, weight.shape[1]) is not None:
            continue
        first = op.pack(weight, words, name)
        if case.device == "cpu":  # as its user calls it: of a small layer's time the call is a good part
            layer = DecodeLinear(first, bias, density=case.density)

            def run(i, layer=layer):
                return layer(sets[i % len(sets)][0])

        else:
            # Far smaller than the dense weight, so more copies until none is found in the cache.
            count = max(1, math.ceil(2 * L2_BYTES / first.nbytes))
            tensors = {field: getattr(first, field) for field in ("starts", "codes", "values")}
            copies = [
                first,
                *(dataclasses.replace(first, **{f: t.clone() for f, t in tensors.items()}) for _ in range(count - 1)),
            ]

            def run(i, copies=copies):
                return op.decode_linear(sets[i % len(sets)][0], copies[i % len(copies)], bias)

        found[f"decode {name}"] = Candidate(run, lambda run=run: [run(0)], None, True)
    return found


def _csr(case, inputs, mask, grad) -> Candidate:
    """The same products by hand with torch.sparse: W X^T, W^T dY^T, and dY^T X sampled at the mask."""
    x, weight, bias = (t.detach() for t in inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # torch calls its CSR tensors a beta feature
        csr, transposed = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()
        pattern = mask.to(weight.dtype).to_sparse_csr()
    pattern.values().zero_()

    def run(i):
        y = (csr @ x.t()).t() + bias
        if case.direction == "forward":
            return y
        columns = grad.t()
        dw = torch.sparse.sampled_addmm(pattern, columns, x)
        return y, (transposed @ columns).t(), dw, grad.sum(0)

    def results():
        if case.direction == "forward":
            return [run(0)]
        y, dx, dw, db = run(0)
        return [y, dx, dw.to_dense(), db]

    return Candidate(run, results)


def _emulated(case, sets, mask, grad) -> Candidate:
    """float32 through bfloat16 tensor cores: what allow_fp32_emulation adds to the dispatcher's choice."""
    from sparselottery.ops import fp32_linear

    def run(i):
        x, weight, bias = (t.detach() for t in sets[i % len(sets)])
        y = fp32_linear.forward(x, weight, bias)
        return [y] if case.direction == "forward" else [y, *fp32_linear.backward(grad, x, weight), grad.sum(0)]

    def results():
        y, *gradients = run(0)
        return [y, *(g * mask if g.shape == mask.shape else g for g in gradients)]

    return Candidate(run, results)


def conv(case, seed) -> Work:
    """Padded 2-D convolution against nn.Conv2d in both memory formats and prune-style W * mask."""
    from sparselottery.ops.masked_conv2d import masked_conv2d

    cin, cout, kernel, side = case.sizes
    last = torch.channels_last if case.device == "cuda" else torch.contiguous_format
    shape = (cout, cin, kernel, kernel)
    sets, mask, words, draw = draw_layer(case, seed, shape, (case.batch, cin, side, side), cin * kernel**2, last)
    factor = mask.to(sets[0][0].dtype)
    pad = kernel // 2

    def ours(x, weight, bias):
        return masked_conv2d(x, weight, words, bias, padding=pad, premasked=True)

    def expected(x, weight, bias):
        return reference.masked_conv2d(x, weight, words, bias, (1, 1), (pad, pad), (1, 1), 1)

    baselines = {
        "dense": lambda x, weight, bias: F.conv2d(x, weight, bias, padding=pad),
        "prune-style": lambda x, weight, bias: F.conv2d(x, weight * factor, bias, padding=pad),
    }
    work = layer_work(case, sets, mask, draw, ours, baselines, expected)
    if case.device == "cpu":
        nhwc = [tuple(t.detach() for t in sets[0])]
        nhwc[0] = tuple(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in nhwc[0])
        for t in nhwc[0]:
            t.requires_grad_(case.direction != "forward")
        other = layer_work(case, nhwc, mask, draw, ours, {"dense channels_last": baselines["dense"]}, expected)
        candidate = other.candidates["dense channels_last"]
        work.candidates["dense channels_last"] = Candidate(candidate.run)  # the same function on other strides
    return work
