"""Masks under `torch.optim.swa_utils.AveragedModel`: bits have no mean.

With `use_buffers=True` torch averages every buffer, the words of masks too, and the result is a mask of nobody's. Neither a
module nor a buffer is told of it, so `update_parameters` itself is: an average has the masks that its model has now.
"""

import functools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def watch() -> None:
    """Let every AveragedModel, present and to come, take over its model's masks; to be called once per process."""
    average = AveragedModel.update_parameters

    @functools.wraps(average)
    def update_parameters(self, model: nn.Module) -> None:
        ours, theirs = _masks(self.module), _masks(model)
        if len(ours) != len(theirs):
            raise ValueError(
                f"model: expected {len(ours)} masked layers as in its AveragedModel, got {len(theirs)}; make the average of a "
                "model whose layers are masked already (sl.sparsify)"
            )
        average(self, model)
        for words, now in zip(ours, theirs, strict=True):
            words.copy_(now)

    AveragedModel.update_parameters = update_parameters


def _masks(model: nn.Module) -> list[Tensor]:
    found = (module._buffers.get("weight_mask") for module in model.modules())
    return [words for words in found if words is not None and words.dtype == torch.int32]
