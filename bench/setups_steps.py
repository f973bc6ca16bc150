"""The cases of ops "optim" and "step": an optimizer's step, and a whole training step."""

import torch
from torch.nn import functional as F
from torch.nn.utils import prune

from sparselottery.bench.setups_common import (
    Candidate,
    Work,
    kernel_backends,
    make_generator,
    our_candidates,
    random_mask,
)
from sparselottery.ops import reference


def optim(case, seed) -> Work:
    """One Adam step over many tensors against torch.optim.Adam; tensors of under a thousand weights stay dense.

    A case of bfloat16 has float32 masters: torch steps them and copies them to bfloat16.
    """
    from sparselottery.ops.masked_optim import tables

    generator = make_generator(case, seed)
    masks = [random_mask((n,), case.density if n >= 1000 else 1.0, generator) for n in case.sizes]
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
            return params, first, second, words, copies  # the tables keep addresses only

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

    candidates = our_candidates(case, masked()[1], lambda: after_steps(masked))
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

    "auto" is a plain loop with masked layers and sl.optim; "Trainer" takes its steps as sl.Trainer does, in C++. With the
    structure "CUDA graph" ours and torch's fused one are captured and replayed.
    """
    import sparselottery as sl

    generator = make_generator(case, seed)
    layers = list(zip(case.sizes[:-1], case.sizes[1:], strict=True))
    # The output layer keeps ten times the density (at most all), so that no class loses its last weight.
    densities = [case.density] * (len(layers) - 1) + [min(1.0, case.density * 10)]
    masks = [random_mask((o, i), d, generator) for (i, o), d in zip(layers, densities, strict=True)]
    x = torch.randn(case.batch, case.sizes[0], generator=generator, device=case.device)
    labels = torch.randint(case.sizes[-1], (case.batch,), generator=generator, device=case.device)
    steps, lr = 3, 1.2e-3
    own, graphed = getattr(torch, case.dtype), case.structure == "CUDA graph"

    def network(dtype):
        draw = torch.Generator(case.device).manual_seed(seed)
        modules = []
        for i, o in layers:
            module = torch.nn.Linear(i, o, device=case.device)
            with torch.no_grad():
                module.weight.normal_(0, i**-0.5, generator=draw)
                module.bias.zero_()
            modules += [module, torch.nn.ReLU()]
        return torch.nn.Sequential(*modules[:-1]).to(case.device, dtype)

    def trainer(kind, dtype=own, **options):
        model = network(dtype)
        if kind == "ours":
            sl.sparsify(model)
            for module, mask in zip(model[::2], masks, strict=True):
                module.set_mask(sl.Mask.from_dense(mask))
            optimizer = sl.optim.Adam(model.parameters(), lr=lr, capturable=graphed)
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

    def captured(run):
        with torch.cuda.stream(side := torch.cuda.Stream()):
            side.wait_stream(torch.cuda.default_stream())
            for i in range(3):
                run(i)
        torch.cuda.default_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(0)

        def replay(i, kept=run):  # the graph knows addresses only
            graph.replay()

        return replay

    forced = () if graphed else kernel_backends(case)
    candidates = our_candidates(case, trainer("ours")[1], lambda: after_steps("ours"), forced)
    if graphed:
        candidates["auto"].run = captured(trainer("ours")[1])
        baseline = captured(trainer("dense", fused=True, capturable=True)[1])
        candidates["dense, Adam(fused), CUDA graph"] = Candidate(baseline)
    if case.device == "cpu" and case.dtype == "float32":
        candidates["Trainer"] = Candidate(in_cpp()[1], after_steps_in_cpp, None, True)
    candidates["dense, Adam"] = Candidate(trainer("dense")[1])
    candidates["dense, Adam(fused)"] = Candidate(trainer("dense", fused=True)[1])
    pruned = Candidate(trainer("prune", fused=True)[1], lambda: after_steps("prune", fused=True))
    candidates["prune-style, Adam(fused)"] = pruned
    kept = sum(int(m.sum()) for m in masks)
    tolerance = 1e-5 if own == torch.float32 else 5e-2
    moved = (7 * kept + x.numel()) * own.itemsize
    work = Work(candidates, lambda: after_steps("prune", torch.float64), tolerance, moved)
    work.operations = 6 * kept * case.batch
    return work
