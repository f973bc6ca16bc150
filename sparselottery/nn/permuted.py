"""A layer whose weight is stored in another order of its inputs and outputs than the network has."""

import torch
from torch import Tensor, nn

from .linear import is_transposed_linear


class Permuted(nn.Module):
    """Gathers inputs, goes through `inner` and puts the outputs back, so that `inner` may have them in an order of its own.

    Attributes:
        inner: a masked layer: its input j is this layer's input `columns[j]`, its output i this layer's output `rows[i]`.
        columns, place: int64 buffers; `place` is the inverse of `rows`.

    Shapes: those of `inner`.
    """

    def __init__(self, inner: nn.Module, rows: Tensor, columns: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("columns", columns)
        self.register_buffer("place", rows.argsort())
        self._dim = -3 if isinstance(inner, nn.Conv2d) else -1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.index_select(self._dim, self.columns)).index_select(self._dim, self.place)


def permute_layer(model: nn.Module, name: str, rows: Tensor, columns: Tensor) -> None:
    """Replace a masked layer of `model` by a `Permuted` around it, in place. Its Parameters stay the same objects, in the new
    order.

    Args:
        rows, columns: int64 permutations of the outputs and inputs: place i of the new order is output `rows[i]`.
    """
    layer = model.get_submodule(name)
    rows, columns = rows.to(layer.weight.device), columns.to(layer.weight.device)
    first, second = (columns, rows) if is_transposed_linear(layer) else (rows, columns)
    mask = layer.mask.to_dense().index_select(0, first).index_select(1, second)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.index_select(0, first).index_select(1, second))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[rows])
    layer.set_mask(mask)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Permuted(layer, rows, columns))
