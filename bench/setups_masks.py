"""The cases of ops "topk" and "bitmask": finding a global mask, and working on its bits."""

import math

import torch
from torch import Tensor
from torch.nn.utils import prune

from sparselottery.bench.setups_common import Candidate, Work, make_generator, our_candidates, random_mask


def topk(case, seed) -> Work:
    """The global magnitude threshold and its masks against what torch offers for it."""
    from sparselottery.ops.global_topk import global_topk

    generator, dtype = make_generator(case, seed), getattr(torch, case.dtype)
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

    candidates = our_candidates(case, ours, proof)
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


def bitmask(case, seed) -> Work:
    """Packing, unpacking, counting, comparing and applying masks against float and bool masks."""
    from sparselottery.ops import bitmask as op

    what, rows, columns = case.sizes
    generator = make_generator(case, seed)
    mask, other = (random_mask((rows, columns), case.density, generator) for _ in range(2))
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
    candidates = our_candidates(case, ours, lambda: tensors(ours(0)))
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
