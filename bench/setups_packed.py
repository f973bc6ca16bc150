"""The cases of op "packed": expanding and gathering values against torch's own ways, a layer's forward and backward."""

import torch
from torch.nn import functional as F

from sparselottery.bench.setups_common import TOLERANCE, Candidate, Work, make_generator, our_candidates, random_mask


def packed(case, seed):
    """`case.sizes`: (what, rows, columns), what one of "expand", "gather" and "layer" (forward and all gradients)."""
    from sparselottery.ops import packed as op
    from sparselottery.ops import reference
    from sparselottery.ops.masked_linear import masked_linear
    from sparselottery.ops.packed_layers import packed_linear

    what, rows, columns = case.sizes
    generator, dtype = make_generator(case, seed), getattr(torch, case.dtype)
    mask = random_mask((rows, columns), case.density, generator)
    words = reference.bitmask_pack(mask)
    dense = torch.randn(rows, columns, generator=generator, device=case.device).mul(columns**-0.5).to(dtype)
    values = dense[mask]
    kept, size = values.numel(), dtype.itemsize
    places = mask.flatten().nonzero().flatten()
    if what == "expand":
        ours = lambda i: op.expand(values, words, (rows, columns))  # noqa: E731
        baselines = {
            "masked_scatter": lambda i: torch.zeros_like(dense).masked_scatter_(mask, values),
            "int64 indices": lambda i: (
                dense.new_zeros(rows * columns).index_copy_(0, places, values).view(rows, columns)
            ),
        }
        expected = lambda: torch.where(mask, dense, 0)  # noqa: E731
        moved = rows * columns * (size + 1 / 8) + kept * size
    elif what == "gather":
        ours = lambda i: op.gather(dense, words, kept)  # noqa: E731
        baselines = {"dense[mask]": lambda i: dense[mask], "int64 indices": lambda i: dense.view(-1)[places]}
        expected = lambda: dense[mask]  # noqa: E731
        moved = rows * columns / 8 + 2 * kept * size
    else:
        x = torch.randn(case.batch, columns, generator=generator, device=case.device).to(dtype).requires_grad_()
        grad = torch.randn(case.batch, rows, generator=generator, device=case.device).to(dtype)
        factor = mask.to(dtype)
        weight, packed_values = (t.clone().requires_grad_() for t in (torch.where(mask, dense, 0), values))

        def both(y, *inputs):
            return (y.detach(), *torch.autograd.grad(y, inputs, grad))

        def ours(i):
            return both(packed_linear(x, packed_values, words, None, (rows, columns)), x, packed_values)

        def packed_dw(result):
            y, dx, dw = result
            return [y, dx, dw if dw.ndim == 1 else dw[mask]]

        plain = {
            "masked": lambda i: both(masked_linear(x, weight, words, premasked=True), x, weight),
            "dense": lambda i: both(F.linear(x, weight), x, weight),
            "prune-style": lambda i: both(F.linear(x, weight * factor), x, weight),
        }
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]

        def expected_layer():
            y = F.linear(*wide)
            return packed_dw((y.detach(), *torch.autograd.grad(y, wide, grad.double())))

        candidates = our_candidates(case, ours, lambda: packed_dw(ours(0)))
        candidates |= {name: Candidate(f, lambda f=f: packed_dw(f(0))) for name, f in plain.items()}
        moved = 3 * kept * size + rows * columns / 8 + 2 * size * (x.numel() + grad.numel())
        return Work(candidates, expected_layer, TOLERANCE[case.dtype], moved, 6.0 * kept * case.batch)
    candidates = our_candidates(case, ours, lambda: [ours(0)])
    candidates |= {name: Candidate(f, lambda f=f: [f(0)]) for name, f in baselines.items()}
    return Work(candidates, lambda: [expected()], 0.0, moved)
