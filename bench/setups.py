"""What each case runs: ours, the baselines, and the expected result in float64.

Candidates that carry `ours` are the package: "auto" is what a user gets (dense is among its choices), the others are
one backend forced. All candidates of a case share their inputs, drawn from a fixed seed.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import prune

from sparselottery.bench import setups_structures
from sparselottery.bench.setups_packed import packed
from sparselottery.bench.timing import backend
from sparselottery.ops import reference

L2_BYTES = 50e6  # inputs on a GPU are rotated so that none is found in the cache
TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-12}


@dataclasses.dataclass
class Candidate:
    """`run(i)` is what is timed, on input set i; `results()` computes the same once, in the form of Work.expected()."""

    run: Callable[[int], object]
    results: Callable[[], list[Tensor]] | None = None
    backend: str | None = None
    ours: bool = False


@dataclasses.dataclass
class Work:
    """A prepared case. `bytes`, `operations`: the least it must move and compute, for the roofline."""

    candidates: dict[str, Candidate]
    expected: Callable[[], list[Tensor]]
    tolerance: float
    bytes: float
    operations: float = 0.0


def _ours(case, run, results, backends=()) -> dict[str, Candidate]:
    """ "auto", and each of `backends` that can run this call."""
    found = {"auto": Candidate(run, results, None, True)}
    for name in backends:
        try:
            with backend(name):
                run(0)
        except ValueError as error:
            if "SPARSELOTTERY_BACKEND" not in str(error):
                raise
        else:
            found[name] = Candidate(run, results, name, True)
    return found


def _kernels(case):
    return ("cpu",) if case.device == "cpu" else ("triton", "cuda")


def _generator(case, seed):
    return torch.Generator(case.device).manual_seed(seed)


def _copies(case, nbytes: float) -> int:
    return 1 if case.device == "cpu" else max(1, min(16, math.ceil(2 * L2_BYTES / nbytes)))


def _mask(shape, density, generator) -> Tensor:
    """bool of `shape` with exactly round(density * count) survivors at random places."""
    count = math.prod(shape)
    order = torch.rand(count, generator=generator, device=generator.device).argsort()
    mask = torch.zeros(count, dtype=torch.bool, device=generator.device)
    mask[order[: round(density * count)]] = True
    return mask.view(shape)


def _layer(case, seed, weight_shape, x_shape, fan_in, memory_format=torch.contiguous_format):
    """Input sets [(x, weight, bias)], the mask and its words."""
    generator, dtype = _generator(case, seed), getattr(torch, case.dtype)
    if case.structure:
        mask = setups_structures.mask(case, weight_shape, generator)
    else:
        mask = _mask(weight_shape, case.density, generator)
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


def _layer_work(case, sets, mask, draw, ours, baselines, plain, by_hand=lambda grad: {}) -> Work:
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

    candidates = _ours(case, runner(ours), results(ours), _kernels(case))
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
    """y = x (W∘M)^T + b against nn.Linear, prune-style W * mask and torch.sparse CSR."""
    if case.structure:
        return setups_structures.linear(case, seed)
    from sparselottery.ops.masked_linear import masked_linear

    inputs, outputs = case.sizes
    sets, mask, words, draw = _layer(case, seed, (outputs, inputs), (case.batch, inputs), inputs)
    factor = mask.to(sets[0][0].dtype)

    def ours(x, weight, bias):
        return masked_linear(x, weight, words, bias, premasked=True)

    baselines = {"dense": F.linear, "prune-style": lambda x, weight, bias: F.linear(x, weight * factor, bias)}

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

    work = _layer_work(case, sets, mask, draw, ours, baselines, plain, by_hand)
    work.candidates |= _decode(case, sets, words)
    return work


def _decode(case, sets, words) -> dict[str, Candidate]:
    """The packed forms that `sl.compress` tries for inference at small batches, one candidate each."""
    from sparselottery.ops import decode_linear as op

    _, weight, bias = sets[0]
    if case.direction != "forward" or weight.dtype not in op.DTYPES:
        return {}
    found = {}
    for name in op.candidates(*weight.shape, case.density, case.batch):
        if op.why_dense(weight.device, name, weight.shape[1]) is not None:
            continue
        first = op.pack(weight, words, name)
        # Far smaller than the dense weight, so more copies until none is found in the cache.
        count = 1 if case.device == "cpu" else max(1, math.ceil(2 * L2_BYTES / first.nbytes))
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
    sets, mask, words, draw = _layer(case, seed, shape, (case.batch, cin, side, side), cin * kernel**2, last)
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
    work = _layer_work(case, sets, mask, draw, ours, baselines, expected)
    if case.device == "cpu":
        nhwc = [tuple(t.detach() for t in sets[0])]
        nhwc[0] = tuple(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in nhwc[0])
        for t in nhwc[0]:
            t.requires_grad_(case.direction != "forward")
        other = _layer_work(case, nhwc, mask, draw, ours, {"dense channels_last": baselines["dense"]}, expected)
        candidate = other.candidates["dense channels_last"]
        work.candidates["dense channels_last"] = Candidate(candidate.run)  # the same function on other strides
    return work


def topk(case, seed) -> Work:
    """The global magnitude threshold and its masks against what torch offers for it."""
    from sparselottery.ops.global_topk import global_topk

    generator, dtype = _generator(case, seed), getattr(torch, case.dtype)
    tensors = [torch.randn(n, generator=generator, device=case.device).to(dtype) for n in case.sizes]
    total = sum(case.sizes)
    keep = round(case.density * total)

    def by_topk(i):
        return torch.topk(torch.cat([t.abs() for t in tensors]), keep, sorted=False)

    def by_kthvalue(i):
        return torch.kthvalue(torch.cat([t.abs() for t in tensors]), total - keep + 1)

    def by_prune(i):
        holders = [torch.nn.ParameterDict({"weight": torch.nn.Parameter(t, requires_grad=False)}) for t in tensors]
        pairs = [(h, "weight") for h in holders]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=total - keep)
        return pairs

    def ours(i):
        return global_topk(tensors, keep)

    def proof():
        masks, threshold = ours(0)
        return [is_exact_topk(tensors, [m.to_dense() for m in masks], threshold, keep)]

    candidates = _ours(case, ours, proof)
    candidates["torch.topk"] = Candidate(by_topk)
    if case.device == "cpu" or total <= 100_000_000:  # beyond, one block of the GPU walks a whole slice for seconds
        candidates["torch.kthvalue"] = Candidate(by_kthvalue)
        candidates["prune.global_unstructured"] = Candidate(by_prune)
    moved = total * (dtype.itemsize + 1 / 8)
    return Work(candidates, lambda: [torch.ones(4, dtype=torch.bool)], 0.0, moved)


def is_exact_topk(tensors, masks, threshold: float, keep: int) -> Tensor:
    """Proves a selection without sorting: bool [4], all true exactly when it is the right one.

    The four facts: `keep` weights survive; all above the threshold do and none below; the threshold is attained (for
    keep 0: infinite); of the weights equal to it the survivors are the first ones in list order.
    """
    above = equal_kept = count = 0
    sound = ordered = True
    dropped_one = False
    for tensor, mask in zip(tensors, masks, strict=True):
        key = tensor.flatten().abs().double()
        kept = mask.flatten()
        higher, equal = key > threshold, key == threshold
        sound &= bool((kept[higher]).all()) and not bool(kept[key < threshold].any())
        above += int(higher.sum())
        count += int(kept.sum())
        ties = kept[equal]
        equal_kept += int(ties.sum())
        ordered &= not (dropped_one and bool(ties.any())) and bool((ties[:-1] >= ties[1:]).all())
        dropped_one |= not bool(ties.all())
    attained = math.isinf(threshold) if keep == 0 else equal_kept > 0
    return torch.tensor([count == keep, sound and above + equal_kept == keep, attained, ordered])


def optim(case, seed) -> Work:
    """One Adam step over many tensors against torch.optim.Adam; tensors of under a thousand weights stay dense.

    A case of bfloat16 has float32 masters: torch steps them and copies them to bfloat16.
    """
    from sparselottery.ops.masked_optim import tables

    generator = _generator(case, seed)
    masks = [_mask((n,), case.density if n >= 1000 else 1.0, generator) for n in case.sizes]
    words = [reference.bitmask_pack(m) if n >= 1000 else None for m, n in zip(masks, case.sizes, strict=True)]
    start = [
        torch.randn(n, generator=generator, device=case.device) * m for n, m in zip(case.sizes, masks, strict=True)
    ]
    half = getattr(torch, case.dtype) if case.dtype != "float32" else None
    grads = [torch.randn(n, generator=generator, device=case.device).to(half or torch.float32) for n in case.sizes]
    factors = [m.float() for m in masks]
    lr, steps = 1e-3, 3

    def masked():
        params = [t.clone() for t in start]
        first, second = ([torch.zeros_like(t) for t in start] for _ in range(2))
        copies = [t.to(half) for t in start] if half else None
        flags = [True] * len(start), [False] * len(start)
        # As sparselottery.optim keeps them from step to step.
        made = tables(params, grads, (first, second, []), words, *flags, copies)
        scalars = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        scalars |= {"decoupled": False, "maximize": False}
        step = 0

        def run(i):
            nonlocal step
            step += 1
            for positions, table in made:
                table.serves([grads[i] for i in positions])
                table.adam(step=[step] * len(positions), **scalars)
            return first, second, words, copies  # the tables keep addresses only

        return params, run

    def dense(double=False, multiply=True, **options):
        params = [t.double() if double else t.clone() for t in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer = torch.optim.Adam(params, lr=lr, **options)
        copies = [t.to(half) for t in start] if half else None

        def run(i):
            if half and not double:
                torch._foreach_copy_([p.grad for p in params], grads)
            if multiply:  # what prune-style hooks do to the gradient
                torch._foreach_mul_([p.grad for p in params], factors if not double else [f.double() for f in factors])
            optimizer.step()
            if half:
                torch._foreach_copy_(copies, params)

        return params, run

    def after_steps(make):
        params, run = make()
        for i in range(steps):
            run(i)
        return params

    candidates = _ours(case, masked()[1], lambda: after_steps(masked))
    for name, options in {"Adam": {}, "Adam(fused)": {"fused": True}}.items():
        candidates[name] = Candidate(dense(multiply=False, **options)[1])
    candidates["prune-style, Adam(fused)"] = Candidate(
        dense(fused=True)[1], lambda: after_steps(lambda: dense(fused=True))
    )
    kept = sum(int(m.sum()) for m in masks)
    moved = (28 if half is None else 24 + 2 * half.itemsize) * kept + sum(case.sizes) / 8
    return Work(candidates, lambda: after_steps(lambda: dense(double=True)), 1e-5, moved)


def step(case, seed) -> Work:
    """A whole training step (forward, loss, backward, Adam) of an MLP against the same one dense and prune-style.

    "auto" is a plain loop with masked layers and sl.optim; "Trainer" takes its steps as sl.Trainer does, in C++.
    """
    import sparselottery as sl

    generator = _generator(case, seed)
    layers = list(zip(case.sizes[:-1], case.sizes[1:], strict=True))
    # The output layer keeps ten times the density (at most all), so that no class loses its last weight.
    densities = [case.density] * (len(layers) - 1) + [min(1.0, case.density * 10)]
    masks = [_mask((o, i), d, generator) for (i, o), d in zip(layers, densities, strict=True)]
    x = torch.randn(case.batch, case.sizes[0], generator=generator, device=case.device)
    labels = torch.randint(case.sizes[-1], (case.batch,), generator=generator, device=case.device)
    steps, lr = 3, 1.2e-3

    def network(dtype=torch.float32):
        draw = torch.Generator().manual_seed(seed)
        modules = []
        for i, o in layers:
            module = torch.nn.Linear(i, o)
            with torch.no_grad():
                module.weight.normal_(0, i**-0.5, generator=draw)
                module.bias.zero_()
            modules += [module, torch.nn.ReLU()]
        return torch.nn.Sequential(*modules[:-1]).to(case.device, dtype)

    def trainer(kind, dtype=torch.float32, **options):
        model = network(dtype)
        if kind == "ours":
            sl.sparsify(model)
            for module, mask in zip(model[::2], masks, strict=True):
                module.set_mask(sl.Mask.from_dense(mask))
            optimizer = sl.optim.Adam(model.parameters(), lr=lr)
        else:
            if kind == "prune":
                for module, mask in zip(model[::2], masks, strict=True):
                    prune.custom_from_mask(module, "weight", mask)
            optimizer = torch.optim.Adam(model.parameters(), lr=lr, **options)
        inputs = x.to(dtype)

        def run(i):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            return loss

        return model, run

    def in_cpp():
        from sparselottery.training.whole_step import WholeStep

        model, _ = trainer("ours")
        whole = WholeStep(model, sl.optim.Adam(model.parameters(), lr=lr), {"train": (x, labels)})
        order = torch.arange(case.batch)

        def run(i):
            whole.run(order, [1.0])
            return torch.tensor(whole.take_loss())

        return model, run, whole

    def after_steps_in_cpp():
        model, run, whole = in_cpp()
        losses = torch.stack([run(i) for i in range(steps)])
        whole.store()
        return [losses, dead(model)]

    def dead(model):
        sums = [module.weight.detach()[~mask].abs().sum() for module, mask in zip(model[::2], masks, strict=True)]
        return torch.stack(sums)

    def after_steps(*arguments, **options):
        """Losses of the first steps, and the largest weight that should be zero."""
        model, run = trainer(*arguments, **options)
        losses = torch.stack([run(i).detach() for i in range(steps)])
        model(x.to(losses.dtype))  # prune-style weights are computed by the forward pass
        return [losses, dead(model)]

    candidates = _ours(case, trainer("ours")[1], lambda: after_steps("ours"), _kernels(case))
    if case.device == "cpu":
        candidates["Trainer"] = Candidate(in_cpp()[1], after_steps_in_cpp, None, True)
    candidates["dense, Adam"] = Candidate(trainer("dense")[1])
    candidates["dense, Adam(fused)"] = Candidate(trainer("dense", fused=True)[1])
    pruned = Candidate(trainer("prune", fused=True)[1], lambda: after_steps("prune", fused=True))
    candidates["prune-style, Adam(fused)"] = pruned
    kept = sum(int(m.sum()) for m in masks)
    work = Work(candidates, lambda: after_steps("prune", torch.float64), 1e-5, 28 * kept + 4 * x.numel())
    work.operations = 6 * kept * case.batch
    return work


def bitmask(case, seed) -> Work:
    """Packing, unpacking, counting, comparing and applying masks against float and bool masks."""
    from sparselottery.ops import bitmask as op

    what, rows, columns = case.sizes
    generator = _generator(case, seed)
    mask, other = (_mask((rows, columns), case.density, generator) for _ in range(2))
    words, others = op.pack(mask), op.pack(other)
    weight = torch.randn(rows, columns, generator=generator, device=case.device)
    factor = mask.float()
    cells = rows * columns
    shifts = torch.arange(32, dtype=torch.int32, device=case.device)

    def plain_pack(dense):
        return ((dense.view(rows, -1, 32).int() << shifts).sum(-1)).int()

    def plain_unpack(packed):
        return (packed.unsqueeze(-1).bitwise_right_shift(shifts) & 1).bool().view(rows, columns)

    def tensors(value):
        return [value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)]

    table = {
        "pack": (
            lambda i: op.pack(mask),
            {"torch": lambda i: plain_pack(mask)},
            lambda: plain_pack(mask),
            cells * 9 / 8,
        ),
        "unpack": (
            lambda i: op.unpack(words, (rows, columns)),
            {"torch": lambda i: plain_unpack(words)},
            lambda: mask,
            cells * 9 / 8,
        ),
        "count": (
            lambda i: op.count(words),
            {"bool mask": lambda i: int(mask.sum()), "float mask": lambda i: int(factor.sum())},
            lambda: int(mask.sum()),
            cells / 8,
        ),
        "hamming": (
            lambda i: op.hamming(words, others),
            {"bool mask": lambda i: int((mask ^ other).sum())},
            lambda: int((mask ^ other).sum()),
            cells / 4,
        ),
        "apply": (
            lambda i: op.apply_(weight, words),
            {"float mask": lambda i: weight.mul_(factor), "bool mask": lambda i: weight.masked_fill_(~mask, 0)},
            lambda: weight.double() * mask,
            cells * (8 + 1 / 8),
        ),
    }
    ours, baselines, expected, moved = table[what]
    if case.device == "cpu" and what in ("pack", "unpack"):
        bits = words.numpy().view("uint8")
        baselines["numpy"] = {
            "pack": lambda i: torch.from_numpy(np_packbits(mask.numpy())),
            "unpack": lambda i: torch.from_numpy(np_unpackbits(bits)),
        }[what]
    candidates = _ours(case, ours, lambda: tensors(ours(0)))
    candidates |= {name: Candidate(f, lambda f=f: tensors(f(0))) for name, f in baselines.items()}
    return Work(candidates, lambda: tensors(expected()), 0.0, moved)


def np_packbits(dense):
    """numpy's little-endian bits of each row as int32 words."""
    import numpy

    return numpy.packbits(dense, axis=-1, bitorder="little").view("int32")


def np_unpackbits(octets):
    """The reverse, as bool."""
    import numpy

    return numpy.unpackbits(octets, axis=-1, bitorder="little").view("bool")


SETUPS = {
    "topk": topk,
    "linear": linear,
    "conv": conv,
    "step": step,
    "optim": optim,
    "bitmask": bitmask,
    "packed": packed,
}
