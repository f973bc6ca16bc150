"""What backends compute from a mask (lists of live tiles, index structures, counts), kept with the mask."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT = WeakTensorKeyDictionary()  # words -> (their version, what was computed from that version)
_CAPTURED: dict[int, dict] = {}  # by id: what a CUDA graph reads at each replay lives on, whatever becomes of the mask


def of(words: Tensor) -> dict:
    """A dict to keep things in that follow from `words` alone (put whatever else they depend on into their keys).

    It goes when the tensor goes, and is empty again once the tensor has been changed in place. A change behind
    autograd's back (`words.data`) goes unnoticed. Inference tensors do not count their changes, so nothing is kept for them.
    """
    if words.is_inference():
        return {}
    version, kept = _KEPT.get(words, (None, None))
    if version != words._version:
        kept = {}
        _KEPT[words] = (words._version, kept)
    if words.is_cuda and torch.cuda.is_current_stream_capturing():
        _CAPTURED[id(kept)] = kept
    return kept


def live_blocks(words: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """bool `[ceil(shape[0] / rows), ceil(shape[1] / columns)]`: which blocks of a matrix hold a survivor.

    `columns` is a multiple of 16, since words are read by their halves.
    """
    halves = words.contiguous().view(torch.int16) != 0
    down, across = -(-shape[0] // rows), -(-shape[1] // columns)
    pad = (0, max(0, across * (columns // 16) - halves.shape[1]), 0, down * rows - shape[0])
    halves = torch.nn.functional.pad(halves, pad)[
        :, : across * (columns // 16)
    ]  # the last word may hold more than there are
    return halves.reshape(down, rows, across, columns // 16).any(3).any(1)
