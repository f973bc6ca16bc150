"""A mask as a value: one bit per weight, and which mask belongs to which parameter."""

import weakref

import torch
from torch import Tensor

from .ops import bitmask


class Mask:
    """One bit per weight of a tensor: 1 keeps it, 0 prunes it. An immutable value; compares by content.

    Args:
        words: int32 `[rows, ceil(columns / 32)]`; rows is `shape[0]` and columns the rest flattened (one row for fewer
            than two dimensions). Bit i of word w keeps column 32 w + i, padding bits are zero. Held, not copied: nobody
            may write to them afterwards.
        shape: the shape of the tensor that is masked.

    Raises:
        TypeError, ValueError: words that are not the int32 words of `shape`, or that have padding bits set.
    """

    __slots__ = ("_shape", "_words")
    __hash__ = None  # equal by content, so identity would be a wrong hash and content a slow one

    def __init__(self, words: Tensor, shape):
        shape = _size(shape)
        bitmask.check_words(words, shape)
        tail = bitmask.rows_columns(shape)[1] % 32
        if tail and bool((words[:, -1] & -(1 << tail)).any()):
            raise ValueError(f"words: expected zero padding bits for shape {list(shape)}, got some that are set")
        self._words, self._shape = words.detach(), shape

    @classmethod
    def _trusted(cls, words: Tensor, shape) -> "Mask":
        """A mask from words that an op has just made: no checks, no wait for the device."""
        mask = cls.__new__(cls)
        mask._words, mask._shape = words, torch.Size(shape)
        return mask

    @classmethod
    def from_dense(cls, dense: Tensor) -> "Mask":
        """The mask that keeps where the bool tensor `dense` `[*]` is True."""
        return cls._trusted(bitmask.pack(dense), dense.shape)

    @classmethod
    def ones(cls, shape, device=None) -> "Mask":
        """Keeps everything."""
        shape = _size(shape)
        return cls._trusted(bitmask.full_words(shape, True, device), shape)

    @classmethod
    def zeros(cls, shape, device=None) -> "Mask":
        """Keeps nothing."""
        shape = _size(shape)
        return cls._trusted(bitmask.full_words(shape, False, device), shape)

    def to_dense(self) -> Tensor:
        """bool tensor of `shape`."""
        return bitmask.unpack(self._words, self._shape)

    def to(self, device) -> "Mask":
        """The same mask on another device (itself when it is there already)."""
        words = self._words.to(device)
        return self if words is self._words else Mask._trusted(words, self._shape)

    @property
    def words(self) -> Tensor:
        """int32 `[rows, ceil(columns / 32)]`; not to be written to."""
        return self._words

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._words.device

    @property
    def numel(self) -> int:
        """How many weights are masked, kept or not."""
        return self._shape.numel()

    @property
    def count(self) -> int:
        """How many are kept."""
        return bitmask.count(self._words)

    @property
    def density(self) -> float:
        """The fraction kept, 0..1 (an empty mask prunes nothing: 1)."""
        return self.count / self.numel if self.numel else 1.0

    @property
    def sparsity(self) -> float:
        """The fraction pruned, 0..1."""
        return 1.0 - self.density

    def distance(self, other: "Mask") -> float:
        """Normalized Hamming distance: the fraction of the weights on which two masks of one shape disagree, 0..1."""
        self._check_other(other)
        return bitmask.hamming(self._words, other._words) / self.numel if self.numel else 0.0

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        self._check_other(other)
        return Mask._trusted(self._words & other._words, self._shape)

    def __or__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        self._check_other(other)
        return Mask._trusted(self._words | other._words, self._shape)

    def __invert__(self) -> "Mask":
        return Mask._trusted(self._words ^ bitmask.full_words(self._shape, True, self.device), self._shape)

    def __eq__(self, other) -> bool:
        """Same shape and same bits, on whatever devices."""
        if not isinstance(other, Mask):
            return NotImplemented
        return self._shape == other._shape and torch.equal(self._words, other._words.to(self.device))

    def __deepcopy__(self, memo) -> "Mask":
        return Mask._trusted(self._words.clone(), self._shape)

    def __reduce__(self):
        return Mask, (self._words, tuple(self._shape))

    def __repr__(self) -> str:
        where = "" if self.device.type == "cpu" else f", device={self.device}"
        return f"Mask(shape={list(self._shape)}, kept={self.count} of {self.numel}{where})"

    def _check_other(self, other):
        if not isinstance(other, Mask):
            raise TypeError(f"other: expected a Mask, got {type(other).__name__}")
        if other._shape != self._shape:
            raise ValueError(f"other: expected a mask of shape {list(self._shape)}, got {list(other._shape)}")
        if other.device != self.device:
            raise ValueError(f"other: expected a mask on {self.device}, got {other.device}")


def _size(shape) -> torch.Size:
    try:
        shape = torch.Size(shape)
    except TypeError:
        raise TypeError(f"shape: expected a sequence of ints, got {shape!r}") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"shape: expected sizes of at least 0, got {list(shape)}")
    return shape


# Which layer masks a parameter. Weak on both sides: neither a parameter nor a layer is kept alive by having been
# attached. A weight that several layers share has several owners. By id, because a lookup by tensor costs microseconds and
# optimizers ask for each parameter in each step; an entry goes with its parameter.
_owners: dict[int, tuple[weakref.ref, list[weakref.ref]]] = {}


def _refs(param):
    found = _owners.get(id(param))
    return found[1] if found is not None and found[0]() is param else ()


def attach(param: Tensor, owner) -> None:
    """Make `owner` (an object whose attribute `weight_mask` is int32 words) the one that masks `param`."""
    _put(param, [weakref.ref(owner), *_others(param, owner)])


def words_of(param: Tensor) -> Tensor | None:
    """The int32 mask words of a parameter, or None when no living layer masks it. The last attached owner answers."""
    for ref in _refs(param):
        owner = ref()
        if owner is not None:
            return owner.weight_mask
    return None


def owners_of(param: Tensor) -> list:
    """The living layers that mask a parameter, the last attached first."""
    found = []
    # A loop: torch.compile, which may look in here, goes wrong on a comprehension that calls `ref`.
    for ref in _refs(param):
        owner = ref()
        if owner is not None:
            found.append(owner)
    return found


def detach(param: Tensor, owner) -> None:
    """`owner` no longer masks `param`."""
    left = _others(param, owner)
    if left:
        _put(param, left)
    else:
        _owners.pop(id(param), None)


def _others(param, owner):
    return [ref for ref in _refs(param) if ref() is not None and ref() is not owner]


def _put(param, refs):
    key = id(param)

    def forget(gone, owners=_owners):  # at the end of the process the module's names may be gone
        if key in owners and owners[key][0] is gone:  # else another tensor has that id by now
            del owners[key]

    _owners[key] = (weakref.ref(param, forget), refs)
