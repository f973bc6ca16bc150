"""A ticket: a mask and the weights it starts from, as a value and as a file."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..masks import Mask
from ..nn.convert import masked_modules, sparsify_named
from ..nn.invariant import MaskedWeight
from ..nn.packed import PackedWeight
from ..ops import bitmask

FORMAT = 1
_MASK, _WEIGHT = "mask.", "initial."
TEMPORARY = re.compile(
    r"\..+\.(?:json|jsonl|safetensors|html|png|csv)\.[a-z0-9_]{8}"
)  # what write_atomic makes in a run
_DIGEST = re.compile(rb'sha256\\":\\"([0-9a-f]{64})\\"')


class TicketError(ValueError):
    """A file that is not a ticket, or a ticket that does not fit a model."""


class Ticket:
    """Masks and the weights they start from (Frankle & Carbin 2019: m and θ0).

    Args:
        masks: layer name -> `Mask` of its weight; of a BatchNorm layer, whose weight is the scale γ, a mask of its channels.
        initial: the whole state of the network to start from, parameters and buffers by state_dict key, without masks.

    Raises:
        TicketError: a mask whose "<name>.weight" is missing from `initial` or has another shape.
    """

    def __init__(self, masks: Mapping[str, Mask], initial: Mapping[str, Tensor]):
        self.masks = dict(masks)
        self.initial = dict(initial)
        if not self.masks:
            raise TicketError("masks: expected at least one, got none")
        for name, mask in self.masks.items():
            weight = self.initial.get(_key(name))
            if weight is None:
                raise TicketError(f"initial: no {_key(name)} for the mask of {name or 'the model'}")
            if weight.shape != mask.shape:
                raise TicketError(f"{_key(name)}: expected {list(mask.shape)} like its mask, got {list(weight.shape)}")

    @classmethod
    def of(cls, model: nn.Module, initial: nn.Module | Mapping[str, Tensor]) -> "Ticket":
        """The ticket of a pruned model: copies (on the CPU) of its masks and of the weights to start from.

        Args:
            model: has masked layers.
            initial: a state_dict or a model with the same keys, masked or not; its masks are not looked at.

        Raises:
            TypeError: one of them is something else.
            TicketError: no masked layers, or keys or shapes of `initial` that differ from the model's.
        """
        state = state_for(model, initial)
        return cls({name: layer.mask.to("cpu") for name, layer in masked_modules(model)}, state)

    def apply(self, model: nn.Module) -> nn.Module:
        """Give a model the masks and the weights of the ticket, in place; plain layers become masked ones. Returns it.

        Masked layers that the ticket does not know keep everything. Of a BatchNorm layer the scale γ and the shift β of
        channels off the mask become zero, and nothing keeps them there: `sl.shrink` makes such a network smaller instead.
        Nothing is changed when something does not fit.

        Raises:
            TypeError: not a module.
            TicketError: missing, unexpected or differently shaped keys, or a layer that cannot be masked.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        own = _plain_state(model)
        _check_keys(
            "model", {key: v.shape for key, v in self.initial.items()}, {key: v.shape for key, v in own.items()}
        )
        modules = dict(model.named_modules(remove_duplicate=False))
        norms = {name for name in self.masks if isinstance(modules.get(name), _BatchNorm)}
        try:
            sparsify_named(model, self.masks.keys() - norms)
        except ValueError as error:
            raise TicketError(f"model: {error}") from None
        model.load_state_dict(self.initial)  # a state without masks: every mask keeps everything
        for name, mask in self.masks.items():
            if name in norms:
                scale_and_shift = modules[name]._parameters.values()
                for value in (v for v in scale_and_shift if v is not None):
                    bitmask.apply_(value.data, mask.to(value.device).words)
            else:
                modules[name].set_mask(mask)
        return model

    @property
    def count(self) -> int:
        """How many weights are kept, of `total`; over the masked layers only."""
        return sum(mask.count for mask in self.masks.values())

    @property
    def total(self) -> int:
        return sum(mask.numel for mask in self.masks.values())

    @property
    def density(self) -> float:
        """The fraction of the masked layers' weights that is kept, 0..1."""
        return self.count / self.total if self.total else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of masks and weights; about the size of the file. Tied weights count once."""
        return sum(t.numel() * t.element_size() for t in _distinct(self._tensors())[0].values())

    def distance(self, other: "Ticket") -> float:
        """Normalized Hamming distance: the fraction of all maskable weights on which two tickets disagree, 0..1.

        Raises:
            TypeError: not a ticket.
            TicketError: tickets of other layers or shapes.
        """
        if not isinstance(other, Ticket):
            raise TypeError(f"other: expected a Ticket, got {type(other).__name__}")
        mine = {name: mask.shape for name, mask in self.masks.items()}
        _check_keys("other", mine, {name: mask.shape for name, mask in other.masks.items()})
        differing = sum(bitmask.hamming(m.words, other.masks[name].words) for name, m in self.masks.items())
        return differing / self.total if self.total else 0.0

    def __repr__(self) -> str:
        return f"Ticket({len(self.masks)} masks, {self.count} of {self.total} weights kept, density {self.density:.4g})"

    # ---- the file ----

    def save(self, path: str | os.PathLike) -> Path:
        """Write a safetensors file: masks as bits, weights as they are, a SHA-256 of all of it in the metadata.

        The file appears complete or not at all (temporary file, fsync, rename). Equal tickets give equal bytes. Returns
        `path`.
        """
        import safetensors.torch  # here: without ticket files only torch is needed

        path = Path(path)
        tensors, aliases = _distinct(self._tensors())

        def stored_as(key):
            return aliases.get(key, key)

        about = {
            "format": FORMAT,
            "masks": [[name, list(mask.shape), stored_as(_MASK + name)] for name, mask in self.masks.items()],
            "initial": [[key, stored_as(_WEIGHT + key)] for key in self.initial],
            "sha256": "0" * 64,
        }
        # One metadata entry: several would be written in random order.
        text = json.dumps(about, separators=(",", ":"))
        data = safetensors.torch.save(tensors, {"sparselottery": text})
        start, end = _find_digest(data)
        digest = hashlib.sha256(data).hexdigest().encode()
        write_atomic(path, data[:start] + digest + data[end:])
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Ticket":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is none.
            TicketError: it is truncated, damaged or something else; the message names it.
        """
        from safetensors import SafetensorError

        data = Path(path).read_bytes()
        try:
            start, end = _find_digest(data)
        except ValueError as error:
            raise TicketError(f"{path}: not a ticket ({error})") from None
        blank = data[:start] + b"0" * 64 + data[end:]
        if hashlib.sha256(blank).hexdigest().encode() != data[start:end]:
            raise TicketError(f"{path}: damaged (its SHA-256 does not fit its content)")
        try:
            return cls._parse(data)
        except TicketError as error:
            raise TicketError(f"{path}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, SafetensorError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise TicketError(f"{path}: undamaged, but not what a ticket of format {FORMAT} holds ({what})") from error

    @classmethod
    def _parse(cls, data: bytes) -> "Ticket":
        """The ticket in a file's content; any exception where that has another structure than `save` gives it."""
        import safetensors.torch

        about = json.loads(
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["sparselottery"]
        )
        if about["format"] != FORMAT:
            raise TicketError(f"a ticket of format {about['format']}, this version reads format {FORMAT}")
        tensors = safetensors.torch.load(data)
        for name in [entry[0] for entry in about["masks"] + about["initial"]]:
            if not isinstance(name, str):
                raise TypeError(f"expected names, got {name!r}")
        masks = {name: Mask(tensors[stored], shape) for name, shape, stored in about["masks"]}
        return cls(masks, {key: tensors[stored] for key, stored in about["initial"]})

    def _tensors(self) -> dict[str, Tensor]:
        words = {_MASK + name: mask.words for name, mask in self.masks.items()}
        return words | {_WEIGHT + key: value for key, value in self.initial.items()}


def state_for(model: nn.Module, initial: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of the values of `initial`, a model like `model` or its state_dict: what a ticket starts from.

    Raises:
        TypeError, TicketError: as for `Ticket.of`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(initial, nn.Module):
        initial = initial.state_dict()
    elif not isinstance(initial, Mapping):
        raise TypeError(f"initial: expected a state_dict or an nn.Module, got {type(initial).__name__}")
    own = _plain_state(model)
    mask_keys = {key for key in initial if key.endswith("weight_mask") and key.removesuffix("_mask") in initial}
    given = {  # a module of somebody else's may have such a buffer too: then the model has it without its masks
        key: value
        for key, value in initial.items()
        if (key in own or key not in mask_keys) and isinstance(value, Tensor)
    }
    _check_keys("initial", {key: v.shape for key, v in own.items()}, {key: v.shape for key, v in given.items()})
    copies: dict[tuple, Tensor] = {}
    state = {}
    for key in own:  # tied weights stay one tensor
        value = given[key].detach()
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else key
        if place not in copies:
            copies[place] = value.to("cpu", copy=True)
        state[key] = copies[place]
    return state


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replace a file by one with this content: a reader, or a crash at any moment, sees the old one or the new one."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _key(name):
    return f"{name}.weight" if name else "weight"


def _plain_state(model):
    """state_dict without the masks.

    Raises:
        TicketError: the model has packed layers, or a state that is no tensor.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            raise TicketError(
                f"{name or 'model'}: is packed; call sl.unpack on the model first (and sl.pack afterwards)"
            )
    skip = {
        f"{name}.weight_mask" if name else "weight_mask"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MaskedWeight)
    }
    state = {key: value for key, value in model.state_dict().items() if key not in skip}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TicketError(f"{key}: expected a tensor, got {type(value).__name__}; tickets hold only tensors")
    return state


def _check_keys(what, expected, got):
    missing = [key for key in expected if key not in got]
    if missing:
        raise TicketError(f"{what}: missing {_list(missing)}")
    unexpected = [key for key in got if key not in expected]
    if unexpected:
        raise TicketError(f"{what}: unexpected {_list(unexpected)}")
    for key, shape in expected.items():
        if tuple(got[key]) != tuple(shape):
            raise TicketError(f"{what}: {key}: expected shape {list(shape)}, got {list(got[key])}")


def _list(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _distinct(tensors):
    """Each tensor once (safetensors refuses shared memory), and {key: the key it is stored under}."""
    stored, aliases, places = {}, {}, {}
    for key, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else key
        if place in places:
            aliases[key] = places[place]
        else:
            places[place] = key
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            stored[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return stored, aliases


def _find_digest(data):
    """Where the 64 hexadecimal digits of the SHA-256 stand.

    Raises:
        ValueError: there are none: this is not the header of a ticket.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("truncated, or not a safetensors file")
    match = _DIGEST.search(data, 8, 8 + size)
    if match is None:
        raise ValueError("no ticket's metadata in its header")
    return match.span(1)
