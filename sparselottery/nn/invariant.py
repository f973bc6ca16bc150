"""Keeps W == W∘M: the pruned weights of a masked layer are exactly zero, whoever writes to them.

Who writes, and what restores zeros before anybody can compute with the result:

- an optimizer of torch (momentum, weight decay, foreach, fused): a hook after `Optimizer.step`, for every optimizer of
  the process. Optimizers that keep the zeros themselves say so with a class attribute `masks_weights = True`;
- `load_state_dict`, `set_mask`, `reset_parameters`: the layer's own methods;
- anything else in place (`nn.init`, `copy_` under no_grad, `weight = nn.Parameter(...)`, a broadcast): the layer
  remembers the version of weight and mask, and looks before its next forward. A write through `weight.data` leaves no
  version; it is noticed when the storage is another one, when one pruned weight (the first) is no longer zero, as after
  any write to the whole tensor, and in any case after the next step of an optimizer of torch (those of
  `sparselottery.optim` go by versions), `train()`, `eval()` or `state_dict()`.

A Parameter that `torch.func.functional_call` lends to a layer is only read, and a weight that a parametrization computes
is not kept at zero; the op multiplies both by the mask. So no other forward pays for a multiply by the mask. While
torch.compile or torch.export traces, none of this can be seen, and the op multiplies by the mask itself. The gradient of
a masked layer is zero off the mask; where the weight is also used outside of masked layers, its gradient is the true
one, and only the weight is kept at zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import masks
from ..masks import Mask
from ..ops import bitmask, dispatch
from ..ops.library import autocasts
from . import averaging
from .states import to_masked_state

_unmasked_gradients = 0


@contextlib.contextmanager
def unmasked_gradients() -> Iterator[None]:
    """Within it, a layer that runs dense leaves its weight's gradient off the mask as it comes.

    For training loops of which nobody but `sl.optim` sees the gradients: its optimizers read none off the mask, and on small
    layers masking them costs as much as the arithmetic. The survivors' gradients are the same, bit for bit.
    """
    global _unmasked_gradients
    _unmasked_gradients += 1
    try:
        yield
    finally:
        _unmasked_gradients -= 1


def leaves_gradients_unmasked() -> bool:
    """Whether an `unmasked_gradients` block is active."""
    return _unmasked_gradients > 0


class MaskedWeight:
    """What every masked layer has, to be put before an `nn.Module` that has a `weight`.

    Attributes:
        weight: the module's own Parameter, exactly 0 wherever the mask is 0.
        weight_mask: buffer, int32 words of the mask (`masks.Mask`); shared by layers that share one weight.
    """

    weight: nn.Parameter
    weight_mask: Tensor
    _transient = (
        "_seen",
        "_dead",
        "_probe",
        "_call",
    )  # caches of one object on one device: never copied, never pickled
    _seen: tuple | None = None  # versions of weight and mask that are known to satisfy the invariant
    _dead: tuple[int, ...] | None = None  # where the mask has its first 0; None: nothing is pruned
    _probe: Tensor | None = None  # the weight at that place
    _call: tuple | None = (
        None  # the kind of call that came last, whether it goes to the library, and what else was found
    )

    # ---- the mask ----

    @property
    def mask(self) -> Mask:
        """A copy of the mask as a value, of the shape of `weight`."""
        return Mask(self.weight_mask.clone(), self.weight.shape)

    @property
    def density(self) -> float:
        """The fraction of the weights that is kept, 0..1 (1 for an empty weight)."""
        return bitmask.count(self.weight_mask) / self.weight.numel() if self.weight.numel() else 1.0

    @torch.no_grad()
    def set_mask(self, mask: Mask | Tensor) -> None:
        """Replace the mask, and zero what it prunes. Weights that come back start from 0.

        Args:
            mask: a `Mask` or a bool tensor, of the shape of `weight`; on any device.

        Raises:
            TypeError: something else.
            ValueError: another shape.
        """
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool:
                raise TypeError(f"mask: expected a Mask or a torch.bool tensor, got {mask.dtype}")
        elif not isinstance(mask, Mask):
            raise TypeError(f"mask: expected a Mask or a torch.bool tensor, got {type(mask).__name__}")
        if mask.shape != self.weight.shape:
            raise ValueError(f"mask: expected shape {list(self.weight.shape)} like weight, got {list(mask.shape)}")
        if isinstance(mask, Tensor):
            mask = Mask.from_dense(mask)
        self.weight_mask.copy_(mask.words)
        if not self.weight.is_meta:
            bitmask.apply_(self.weight, self.weight_mask)  # on the weight itself: a graph that waits must notice
        self._restore()

    # ---- before a forward ----

    def _premasked(self) -> bool:
        """True when `weight` is known to be zero off the mask, restoring the zeros if they may be gone.

        Compiled code cannot know it: a graph has no guard on a version counter, so a write past the optimizers
        (`weight.add_(1)`) would go unnoticed and its dead weights would count. It masks a copy instead, which costs a large
        layer about a tenth of its forward pass.
        """
        if is_compiling() or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
            return False  # torch.func's transforms: a hook that masks the gradient would see none of their gradients
        weight, words = self._parameters.get("weight"), self._buffers["weight_mask"]
        if type(weight) is not nn.Parameter:  # functional_call, vmap, replicas: somebody else's tensor
            return False
        try:
            now = (id(weight), weight._version, weight.data_ptr(), id(words), words._version)
        except RuntimeError:  # tensors of inference_mode have no version, fake ones no address
            return False
        if now != self._seen or (self._probe is not None and self._probe.tolist()):  # tolist: no operation
            return self._restore()
        return True

    def _nothing_pruned(self) -> bool:
        """True when the mask is known to keep everything; asked after `_premasked()` said True."""
        return self._dead is None

    def _wanted(self, input: Tensor) -> tuple[bool, bool, bool] | None:
        """Which gradients a backward pass will ask for: of input, weight and bias; None where there will be none."""
        if not torch.is_grad_enabled():
            return None
        bias = self._parameters["bias"]
        wanted = (
            input.requires_grad,
            self._parameters["weight"].requires_grad,
            bias is not None and bias.requires_grad,
        )
        return wanted if True in wanted else None

    def _kind_of_call(self, input: Tensor, layout=None) -> tuple:
        """All that the way of a call depends on but the mask, and a weight's dtype and device: `_restore` looks after those.

        `layout`: what else of the input the answer depends on. Each forward asks this, so calls into Python are few.
        """
        on_cpu = input.is_cpu
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return (
            input.shape,
            input.dtype,
            on_cpu or input.device,
            weight.shape,
            torch.is_grad_enabled()
            and (input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad),
            dispatch.state(),
            torch.is_autocast_enabled("cpu") if on_cpu else autocasts(input.device),
            layout,
        )

    def _route(self, input: Tensor, decide: Callable[[tuple | None], tuple[bool | None, object]], layout=None) -> tuple:
        """What `decide` says of such a call, asked anew only when something about it changes.

        That is: whether it goes to the library (None: not known yet, to be asked again), and anything that goes with the answer.
        """
        if not isinstance(input, Tensor):
            return None, None  # the op says what is wrong
        kind, last = self._kind_of_call(input, layout), self._call
        if last is not None and last[0] == kind:
            return last[1]
        answer = decide(self._wanted(input))
        if answer[0] is not None:
            self.__dict__["_call"] = (kind, answer)
        return answer

    def _weight_for_library(self) -> Tensor:
        """The weight for torch's own dense layers: what comes back as its gradient through this use is masked.

        A custom autograd function in Python would cost a small layer as much as its arithmetic.
        """
        weight = self._parameters["weight"]
        if _unmasked_gradients or not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        alias = weight.view_as(weight)
        alias.register_hook(self._mask_gradient)
        return alias

    def _mask_gradient(self, grad: Tensor) -> Tensor:
        words = self._buffers["weight_mask"]
        if (
            torch.is_grad_enabled() or grad.dtype not in bitmask.FLOATS
        ):  # create_graph=True: grad has a history of its own
            return torch.where(bitmask.unpack(words, grad.shape), grad, 0)
        return bitmask.zero_dead_(grad, words)  # fresh from the layer's backward pass: nobody else has seen it

    def _restore(self) -> bool:
        """Zero what the mask prunes; False where the weight is not the layer's own, and left alone.

        Writes through `.data`: what changes has no say in any graph, so none is told.
        """
        weight, words = self._parameters.get("weight"), self._buffers["weight_mask"]
        if type(weight) is not nn.Parameter or weight.is_meta or not self._owns(weight):
            return False
        data = weight.data
        bitmask.apply_(data, words)
        try:
            seen = (id(weight), weight._version, weight.data_ptr(), id(words), words._version)
        except RuntimeError:
            self._forget()
            return True
        if self._seen is None or seen[3:] != self._seen[3:]:
            self.__dict__["_dead"] = _first_zero(words, weight.shape)
        if self._seen is None or seen[2:] != self._seen[2:]:  # other memory: perhaps another dtype or device
            self.__dict__["_call"] = None
        on_cpu = weight.device.type == "cpu"  # elsewhere a look would wait for the device
        self.__dict__["_probe"] = data[self._dead] if on_cpu and self._dead is not None else None
        self.__dict__["_seen"] = seen
        return True

    def _note_version(self, weight: nn.Parameter) -> None:
        """The weight has changed and is known to be zero off the mask: nothing to look for before the next forward."""
        if self._seen is not None and self._seen[0] == id(weight):
            self.__dict__["_seen"] = (id(weight), weight._version, *self._seen[2:])

    def _forget(self) -> None:
        for name in self._transient:
            self.__dict__.pop(name, None)

    def _join(self, weight: nn.Parameter) -> None:
        """Become one of the layers that mask this weight: with the mask that it has, or with the own one."""
        for other in masks.owners_of(weight):
            if other.weight_mask.device == weight.device and other.weight.shape == weight.shape:
                self._buffers["weight_mask"] = other.weight_mask
                break
        masks.attach(weight, self)
        _watch()

    def _owns(self, weight: nn.Parameter) -> bool:
        return any(owner is self for owner in masks.owners_of(weight))

    def _adopt(self) -> None:
        """Own the weight even if it was put there past `register_parameter`; not asked in a forward, see `_premasked`."""
        weight = self._parameters.get("weight")
        if type(weight) is nn.Parameter and not self._owns(weight):
            self._join(weight)
        self._forget()

    def _start(self, mask: Mask | Tensor | None = None) -> None:
        """Make the module a masked layer that keeps everything, or what `mask` says."""
        weight = self._parameters["weight"]
        self.register_buffer("weight_mask", bitmask.full_words(weight.shape, True, weight.device))
        self._join(weight)
        if mask is not None:
            self.set_mask(mask)

    # ---- nn.Module's own doings ----

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        before = self._parameters.get("weight")
        super().register_parameter(name, param)
        if name == "weight" and "weight_mask" in self._buffers:  # layer.weight = ..., as when weights are tied
            if before is not None and before is not param:
                masks.detach(before, self)
            self._adopt()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name == "weight_mask" and name in self._buffers and tensor is not None and tensor.dtype != torch.int32:
            raise ValueError(  # from torch.nn.utils.prune, whose masks have this name and the weight's dtype
                f"weight_mask: expected int32 words, got {tensor.dtype}; torch.nn.utils.prune cannot prune a masked layer:"
                " prune it with sl.prune, or prune a plain layer with torch and convert it with sl.from_torch_prune"
            )
        super().register_buffer(name, tensor, persistent)

    def __delattr__(self, name: str) -> None:
        weight = self._parameters.get("weight") if name == "weight" else None
        super().__delattr__(name)
        if weight is not None:  # a parametrization takes it: what it holds from now on is not the masked weight
            masks.detach(weight, self)
            self._forget()

    def train(self, mode: bool = True):
        self._adopt()
        return super().train(mode)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "weight_mask" in self._buffers:  # the first call comes from the constructor
            self._restore()

    def extra_repr(self) -> str:
        kept = "" if self.weight_mask.is_meta else f", density={self.density:.4g}"
        return super().extra_repr() + kept

    def _apply(self, *args, **kwargs):
        was_meta = self._buffers["weight_mask"].is_meta
        super()._apply(*args, **kwargs)
        self._adopt()
        words, weight = self._buffers["weight_mask"], self._parameters.get("weight")
        if was_meta and not words.is_meta:  # to_empty: no bits have ever been there
            words.copy_(bitmask.full_words(self.weight.shape, True, words.device))
        if weight is None:
            return self
        for other in masks.owners_of(weight):  # the move made a copy of the words for each of them: one again
            other._buffers["weight_mask"] = words
            other._forget()
        return self

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        if not torch.compiler.is_compiling():
            self._adopt()
            self._restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest) -> None:
        key = prefix + "weight_mask"
        try:
            to_masked_state(state_dict, prefix, self.weight.shape)
        except (TypeError, ValueError) as error:
            rest[-1].append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
            return
        plain = key not in state_dict and prefix + "weight" in state_dict
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        weight, words = self.weight, self._buffers["weight_mask"]
        if plain:  # the state of a layer without a mask: everything is kept
            if key in missing_keys:
                missing_keys.remove(key)
            full = bitmask.full_words(weight.shape, True, weight.device)
            if words.device == weight.device:
                words.copy_(full)
            else:  # assign=True brought the weight to another device
                self._buffers["weight_mask"] = full
        elif tuple(words.shape) == bitmask.words_shape(weight.shape) and not words.is_meta:
            words &= bitmask.full_words(weight.shape, True, words.device)  # padding is 0, whatever the file says
        self._adopt()
        self._restore()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in self._transient}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if isinstance(self._parameters.get("weight"), nn.Parameter):
            self._join(self._parameters["weight"])


def _first_zero(words: Tensor, shape) -> tuple[int, ...] | None:
    """The index of the first weight that is pruned, None if none is."""
    pruned = words ^ bitmask.full_words(shape, True, words.device)
    rows = pruned.any(1).nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    word = int(pruned[row].nonzero()[0])
    bits = int(pruned[row, word]) & 0xFFFFFFFF
    column = 32 * word + (bits & -bits).bit_length() - 1
    rest = tuple(shape) if len(shape) < 2 else tuple(shape)[1:]
    index = []
    for size in reversed(rest):
        column, i = divmod(column, size)
        index.append(i)
    return ((row,) if len(shape) >= 2 else ()) + tuple(reversed(index))


# ---- after an optimizer's step, and in averages ----

_watching = False


def _watch() -> None:
    """Ask torch to call `_after_step`, and `averaging` to look after averages: once per process, from the first layer on."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        averaging.watch()
        _watching = True


@torch._disable_dynamo  # lazily: bookkeeping on weak references has nothing to compile, and traced it is compiled again and again
def _after_step(optimizer: Optimizer, args, kwargs) -> None:
    keeps_zeros = getattr(optimizer, "masks_weights", False)
    for group in optimizer.param_groups:
        for param in group["params"]:
            owners = masks.owners_of(param)
            if not owners:  # most parameters of most models: this is asked of every optimizer in the process
                continue
            owners = [owner for owner in owners if isinstance(owner, MaskedWeight)]
            if not owners:
                continue
            first = owners[0]
            if keeps_zeros:
                first._note_version(param)
            else:
                first._restore()
            for other in owners[1:]:
                other._note_version(param)
