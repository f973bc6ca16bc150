"""Dense blocks in a sparse matrix, found by reordering its rows and its columns.

No outside program partitions anything: two starting orders (by how much rows and columns hold; by likeness of their column
sets) are improved in turn, rows with the columns' groups fixed and columns with the rows', and the better end is taken.
Everything is deterministic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 12  # after these nothing moves any more, on masks of 300x784 to 512x512


@dataclass(frozen=True)
class Blocks:
    """What was found in matrices `[n, rows, columns]` of one order.

    Attributes:
        rows, columns: int64 permutations: place i of the new order is row rows[i] of the matrix.
        chosen: bool `[n, ceil(rows / R), ceil(columns / C)]`: which blocks of the reordered matrices are kept.
        covered: how many of the matrices' entries lie in them.
    """

    rows: Tensor
    columns: Tensor
    chosen: Tensor
    covered: int

    def mask(self, high: int, wide: int) -> Tensor:
        """The kept blocks `high` x `wide` in the matrices' own order, bool `[n, rows, columns]`."""
        dense = self.chosen.repeat_interleave(high, 1).repeat_interleave(wide, 2)
        dense = dense[:, : len(self.rows), : len(self.columns)]
        return dense[:, self.rows.argsort()][:, :, self.columns.argsort()]


def find(matrices: Tensor, high: int, wide: int, keep: int) -> Blocks:
    """The `keep` blocks of `high` x `wide` that hold most entries, over orders of rows and columns.

    Args:
        matrices: bool `[n, rows, columns]`; all get the same order (a convolution's taps).
        keep: 1 to the number of blocks.
    """
    flat = matrices.float().sum(0)
    best = None
    for rows, columns in (_by_mass(flat), _by_likeness(flat, high, wide)):
        for _ in range(SWEEPS):
            found = _choose(matrices, rows, columns, high, wide, keep)
            if best is None or found.covered > best.covered:
                best = found
            rows = _assigned(matrices, found, high, wide)
            found = _choose(matrices, rows, columns, high, wide, keep)
            if found.covered > best.covered:
                best = found
            turned = Blocks(columns, rows, found.chosen.transpose(1, 2), found.covered)
            columns = _assigned(matrices.transpose(1, 2), turned, wide, high)
    return best


def _choose(matrices, rows, columns, high, wide, keep) -> Blocks:
    """The fullest blocks of this order; ties to the first."""
    mass = _sums(matrices[:, rows][:, :, columns], high, wide)
    order = torch.sort(mass.flatten(), descending=True, stable=True).indices[:keep]
    chosen = torch.zeros(mass.numel(), dtype=torch.bool)
    chosen[order] = True
    return Blocks(rows, columns, chosen.view(mass.shape), int(mass.flatten()[order].sum()))


def _sums(matrices, high, wide) -> Tensor:
    """Entries in each block: int64 `[n, block rows, block columns]`."""
    n, rows, columns = matrices.shape
    padded = torch.nn.functional.pad(matrices.long(), (0, -columns % wide, 0, -rows % high))
    return padded.view(n, -(-rows // high), high, -(-columns // wide), wide).sum((2, 4))


def _by_mass(flat) -> tuple[Tensor, Tensor]:
    return tuple(torch.sort(flat.sum(d), descending=True, stable=True).indices for d in (1, 0))


def _by_likeness(flat, high, wide) -> tuple[Tensor, Tensor]:
    return _groups_of_like(flat, high), _groups_of_like(flat.t(), wide)


def _groups_of_like(flat, size) -> Tensor:
    """Rows in groups: the `size` left whose sets of columns are likest (Jaccard) to those of the fullest one left, then to the
    mean of these, twice."""
    sets = (flat > 0).float()
    counts = sets.sum(1)
    left = torch.ones(len(flat), dtype=torch.bool)
    order = []
    while bool(left.any()):
        middle = sets[int(torch.where(left, counts, -1).argmax())]
        for _ in range(3):
            common = sets @ middle
            likeness = common / (counts + middle.sum() - common).clamp(min=1e-6)
            ranked = torch.sort(torch.where(left, likeness, -1), descending=True, stable=True).indices
            group = ranked[: min(size, int(left.sum()))]
            middle = sets[group].mean(0)
        left[group] = False
        order.append(group)
    return torch.cat(order)


def _assigned(matrices, found: Blocks, high, wide) -> Tensor:
    """A new order of the rows: each goes to the group whose chosen blocks would take most of its entries, the surest first."""
    n, count, columns = matrices.shape
    padded = torch.nn.functional.pad(matrices[:, :, found.columns].float(), (0, -columns % wide))
    profile = padded.view(n, count, -1, wide).sum(3)  # [n, rows, block columns]
    gain = torch.einsum("nrc,ngc->rg", profile, found.chosen.float())  # [rows, groups]
    groups = gain.shape[1]
    room = [high] * (groups - 1) + [count - high * (groups - 1)]
    members: list[list[int]] = [[] for _ in range(groups)]
    ranked = torch.sort(gain, dim=1, descending=True, stable=True)
    best = ranked.values
    regret = best[:, 0] - best[:, min(1, groups - 1)]  # what a row loses where its first choice is full
    for row in torch.sort(regret, descending=True, stable=True).indices.tolist():
        for group in ranked.indices[row].tolist():
            if len(members[group]) < room[group]:
                members[group].append(row)
                break
    return torch.tensor([row for group in members for row in group])
