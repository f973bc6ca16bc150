"""What backends compute from a mask (lists of live tiles, index structures, counts), kept with the mask."""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT = WeakTensorKeyDictionary()  # words -> (their version, what was computed from that version)


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
    return kept
