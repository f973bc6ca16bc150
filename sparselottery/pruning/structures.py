"""What is pruned at once: single weights, blocks, whole channels, or M - N of every M weights in a row.

Weights are seen as matrices `[outputs, inputs]`, transformers' Conv1D transposed. For channels and N:M a convolution's
`[out, C / groups, kH, kW]` is one matrix, its last three dimensions flattened. For blocks it is one matrix
`[out / groups, C / groups]` for each of its groups and taps, because that is what tensor cores multiply by.

A group of weights is scored by the sum of its scores (of absolute weights for magnitude), and counts, densities and ties
are in groups, row by row, matrix by matrix. Where a matrix's edge cuts a block off, the rest is a group like any other:
`[100, 70]` has 2 x 2 blocks of 64x64, and a density of 0.5 keeps two of them. A group that still holds a weight is a
survivor; a group that is kept keeps the weights it had.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..nn.linear import is_transposed_linear
from ..ops.global_topk import global_topk
from .scope import Group

EXPECTED = "'unstructured', 'channel', 'block:RxC' such as 'block:4x4', or 'N:M' such as '2:4'"


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs x `columns` inputs (None: all that belong to the outputs); cut off at a matrix's edges."""

    rows: int
    columns: int | None


@dataclass(frozen=True)
class NofM:
    """In each row, at most `n` of every `m` neighbouring weights."""

    n: int
    m: int


Structure = Unstructured | Blocks | NofM


def parse(text: str) -> Structure:
    """Read the argument `structure`.

    Raises:
        TypeError, ValueError: it is not one of the known ones.
    """
    if not isinstance(text, str):
        raise TypeError(f"structure: expected {EXPECTED}, got {type(text).__name__}")
    if text == "unstructured":
        return Unstructured()
    if text == "channel":
        return Blocks(1, None)
    if match := re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", text):
        return Blocks(int(match[1]), int(match[2]))
    if (match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)) and int(match[1]) <= int(match[2]):
        return NofM(int(match[1]), int(match[2]))
    raise ValueError(f"structure: expected {EXPECTED}, got {text!r}")


class Selector:
    """Chooses survivors among the groups of weights of some layers.

    Args:
        structure: unstructured or blocks.
        layers: name -> masked layer.
        before: name -> mask; nothing outside it survives.
        scores: name -> tensor of the weight's shape; by: "magnitude" or "value", as for `global_topk`.
    """

    def __init__(self, structure, layers: dict[str, nn.Module], before: dict[str, Mask], scores: dict[str, Tensor], by):
        self.structure, self.layers, self.before, self.by = structure, layers, before, by
        if isinstance(structure, Unstructured):
            self.scores, self.eligible = scores, before
        else:
            self.by = "value"
            self.scores = {name: self._sums(name, s.abs() if by == "magnitude" else s) for name, s in scores.items()}
            self.eligible = {
                name: Mask.from_dense(self._sums(name, torch.ones_like(s)) > 0) for name, s in scores.items()
            }
        self.totals = {name: mask.numel for name, mask in self.eligible.items()}
        self.counts = {name: mask.count for name, mask in self.eligible.items()}

    def solve(self, groups: list[Group]) -> tuple[dict[str, Mask], float | None]:
        """The new masks of the layers in `groups`, each group with its `keep` best, and the smallest surviving score
        (None where there are several groups)."""
        after, threshold = {}, None
        for group in groups:
            kept, threshold = global_topk(
                [self.scores[name] for name in group.names],
                group.keep,
                eligible=[self.eligible[name] for name in group.names],
                by=self.by,
                names=[f"{name}.weight" for name in group.names],
            )
            after.update(zip(group.names, kept, strict=True))
        if not isinstance(self.structure, Unstructured):
            after = {name: self._expand(name, mask) & self.before[name] for name, mask in after.items()}
        return after, threshold if len(groups) == 1 else None

    def _block(self, columns):
        return self.structure.rows, max(1, columns if self.structure.columns is None else self.structure.columns)

    def _matrices(self, name, tensor):
        """A tensor of the weight's shape as `[matrices, outputs, inputs]`."""
        layer = self.layers[name]
        if tensor.ndim != 4 or self.structure.columns is None:
            return as_matrix(layer, tensor).unsqueeze(0)
        return tensor.unflatten(0, (layer.groups, -1)).flatten(3).permute(0, 3, 1, 2).flatten(0, 1)

    def _from_matrices(self, name, matrices):
        """The inverse of `_matrices`."""
        layer = self.layers[name]
        shape = layer.weight.shape
        if len(shape) != 4 or self.structure.columns is None:
            return from_matrix(layer, matrices[0], shape)
        return matrices.unflatten(0, (layer.groups, -1)).permute(0, 2, 3, 1).reshape(shape)

    def _sums(self, name, values):
        """Sum over each block of what is still there, float64 `[matrices, block rows, block columns]`."""
        kept = torch.where(self.before[name].to_dense(), values.double(), 0)
        if not bool(values.isfinite().all()):
            kept = kept + torch.where(values.isnan(), values.double(), 0)  # a NaN is found wherever it is
        matrices = self._matrices(name, kept)
        count, rows, columns = matrices.shape
        high, wide = self._block(columns)
        padded = torch.nn.functional.pad(matrices, (0, -columns % wide, 0, -rows % high))
        return padded.reshape(count, -(-rows // high), high, -(-columns // wide), wide).sum((2, 4))

    def _expand(self, name, mask):
        _, rows, columns = self._matrices(name, self.layers[name].weight).shape
        high, wide = self._block(columns)
        dense = mask.to_dense().repeat_interleave(high, 1).repeat_interleave(wide, 2)[:, :rows, :columns]
        return Mask.from_dense(self._from_matrices(name, dense))


def n_of_m(structure: NofM, layer: nn.Module, before: Mask, scores: Tensor, by: str, name: str) -> Mask:
    """Keep the best `n` survivors of every `m` neighbours in a row; ties to the lowest index.

    Raises:
        ValueError: the inputs are not a multiple of `m`, or a NaN.
    """
    if bool(scores.isnan().any()):
        raise ValueError(f"{name}.weight: holds NaN, which has no rank")
    keys = as_matrix(layer, scores.abs() if by == "magnitude" else scores).double()
    columns = keys.shape[1]
    if columns % structure.m:
        raise ValueError(
            f"structure: {structure.n}:{structure.m} needs inputs in multiples of {structure.m}, {name} has {columns};"
            f" exclude={name!r} leaves it alone"
        )
    alive = as_matrix(layer, before.to_dense())
    groups = keys.reshape(-1, structure.m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    ranked_alive = alive.reshape(-1, structure.m).gather(1, order)
    chosen = ranked_alive & (ranked_alive.cumsum(1) <= structure.n)
    dense = torch.zeros_like(chosen).scatter(1, order, chosen).reshape(keys.shape)
    return Mask.from_dense(from_matrix(layer, dense, before.shape))


def as_matrix(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as `[outputs, inputs]`."""
    return tensor.t() if is_transposed_linear(layer) else tensor.flatten(1)


def from_matrix(layer: nn.Module, matrix: Tensor, shape) -> Tensor:
    """The inverse of `as_matrix`."""
    return matrix.t() if is_transposed_linear(layer) else matrix.reshape(shape)
