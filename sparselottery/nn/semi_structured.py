"""2:4 masks through torch's semi-structured tensors: a form of a linear layer for inference that `compress` tries on a GPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import derived
from .linear import MaskedLinear

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # the sizes that torch's CUTLASS and cuSPARSELt forms both take are multiples of these


def is_two_of_four(words: Tensor) -> bool:
    """Whether of every 4 neighbours in a row at most 2 survive. Asked once per mask: it waits for the device."""
    kept = derived.of(words)
    if "2:4" not in kept:
        pairs = (words & 0x55555555) + ((words >> 1) & 0x55555555)
        counts = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)  # 0 to 4 in every 4 bits
        more = (counts >> 2) | (counts & (counts >> 1))
        kept["2:4"] = not bool((more & 0x11111111).any())
    return kept["2:4"]


def is_candidate(layer: nn.Module) -> bool:
    """Whether a layer's mask looks like one of N:M with at most 2 of 4; a few scattered survivors do not."""
    return type(layer) is MaskedLinear and 0.2 <= layer.density < 1 and is_two_of_four(layer.weight_mask)


def why_not(layer: nn.Module) -> str | None:
    """Why a masked layer has no semi-structured form here; None where it has one."""
    if type(layer) is not MaskedLinear:
        return f"only linear layers have one, not {type(layer).__name__}"
    return _why_not(layer.weight) or (
        None if is_two_of_four(layer.weight_mask) else "the mask keeps more than 2 of 4 neighbours somewhere"
    )


def _why_not(weight):
    if not weight.is_cuda:
        return f"needs a CUDA device, the weight is on {weight.device.type}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    if weight.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}"
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS or 0 in weight.shape:
        return f"needs outputs in multiples of {ROWS} and inputs of {COLUMNS}, got {list(weight.shape)}"
    return None


class SemiStructuredLinear(nn.Linear):
    """y = x Wᵀ + b for inference, W compressed to half its size; made from a plain layer by `compress_`.

    It has no `weight`: `dense_weight()` gives a copy. It is saved and copied with its dense weight, moves to devices that
    have no such form as an nn.Linear, and trains no more.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._compressed, self.bias)

    def dense_weight(self) -> Tensor:
        """The weight `[out_features, in_features]`, zeros where they were."""
        return self._compressed.to_dense()

    def to_plain_(self) -> None:
        """Become an nn.Linear again."""
        self._expand()
        del self.__dict__["_compressed"]
        self.__class__ = nn.Linear

    def _expand(self) -> None:
        self._parameters["weight"] = nn.Parameter(self.dense_weight(), requires_grad=False)

    def _settle(self) -> None:
        """Compress the dense weight that is there, or be an nn.Linear where it is on a device that can't."""
        if _why_not(self._parameters["weight"]) is None:
            compress_(self)
        else:
            self.__dict__.pop("_compressed", None)
            self.__class__ = nn.Linear

    def _apply(self, *args, **kwargs):  # torch's compressed tensors can't be moved or cast
        self._expand()
        super()._apply(*args, **kwargs)
        self._settle()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, *args):
        self._expand()
        super()._load_from_state_dict(*args)
        self._settle()

    def __getstate__(self):
        weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        state = self.__dict__ | {"_parameters": self._parameters | {"weight": weight}}
        del state["_compressed"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._settle()


def compress_(layer: nn.Linear) -> SemiStructuredLinear:
    """Turn a plain layer whose weight is 2:4 into its semi-structured form, in place.

    Raises:
        RuntimeError: torch refuses this weight on this device.
    """
    compressed = torch.sparse.to_sparse_semi_structured(layer._parameters["weight"].detach().contiguous())
    layer.__class__ = SemiStructuredLinear
    layer._parameters["weight"] = None
    layer.__dict__["_compressed"] = compressed
    return layer
