"""DecodeLinear: a linear layer for inference at small batches, its weight packed for reading (ops/decode_linear.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _ext
from ..ops import decode_cpu
from ..ops import decode_linear as op
from ..ops.huge_pages import settled
from ..ops.library import autocasts, nothing_watches

PARTS = ("starts", "codes", "values")


class DecodeLinear(nn.Module):
    """y = x (W∘M)ᵀ + b for inference, of which only the survivors are stored, in the form that the device reads fastest.

    Made by `sl.compress` where it is faster than the dense layer. Elsewhere (another device or dtype, on a GPU batches of
    more than 128) it computes the same from a transient dense weight; `sl.explain` says so and why.

    Attributes:
        format: "gap4", "gap8" or "tiles" (ops/decode_linear.py) on a GPU, one of ops/decode_cpu.py on a CPU.
        in_features, out_features: as in `nn.Linear`.
        density: the fraction of the weights that is kept.
        starts, codes, values: buffers, the packed weight; their sizes depend on the mask.
        bias: Parameter `[out_features]` or None.

    Shapes: x `[*, in_features]` -> `[*, out_features]`.

    Args:
        packed: from `ops.decode_linear.pack`.
        bias: `[out_features]` or None.
        density: how much of the weight is kept.
    """

    _why_this_form: str | None = None  # what `compress` measured, for `explain`

    def __init__(self, packed: op.DecodeWeight, bias: Tensor | None = None, *, density: float):
        super().__init__()
        self._take(packed, density)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def _take(self, packed, density):
        self.format, self.density = packed.format, density
        self.in_features, self.out_features = packed.columns, packed.rows
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name))

    @property
    def packed(self) -> op.DecodeWeight:
        """The weight as the op takes it."""
        return op.DecodeWeight(
            self.format, self.out_features, self.in_features, *(self._buffers[name] for name in PARTS)
        )

    @property
    def weight(self) -> Tensor:
        """A dense copy `[out_features, in_features]`, made anew each time."""
        return op.unpack(self.packed)

    def why_dense(self) -> str | None:
        """Why this layer is computed from a dense weight; None: its kernel runs (for batches that it is made for)."""
        dtypes = op.dtypes(self.format)
        if self.values.dtype not in dtypes:
            expected = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"the decode kernels take {expected}, the values are {self.values.dtype}"
        return op.why_dense(self.values.device, self.format, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._is_plain(input):
            buffers, bias = self._buffers, self._parameters["bias"]
            parts = buffers["starts"], buffers["codes"], buffers["values"]
            code = decode_cpu.FORMATS[self.format]
            return decode_cpu.product(input, *parts, bias, code, self.out_features, self.in_features)
        dtype = self.values.dtype
        if isinstance(input, Tensor) and autocasts(input.device):
            wanted = torch.get_autocast_dtype(input.device.type)
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(input.device.type, enabled=False):
                return self._product(input.to(dtype), bias).to(wanted)
        return self._product(input, self.bias)

    def _is_plain(self, x) -> bool:
        """Whether a call is one of float32 on a CPU that nobody watches: the op and its checks would take as long as C++."""
        values, bias = self._buffers["values"], self._parameters["bias"]
        return (
            self.format in decode_cpu.FORMATS
            and not torch._C._get_tracing_state()  # first: what follows would become constants of a trace
            and type(x) is Tensor
            and x.dtype is torch.float32
            and values.dtype is torch.float32
            and x.is_cpu
            and values.is_cpu
            and type(values) is Tensor
            and x.layout is torch.strided
            and x.is_contiguous()
            and x.ndim > 0
            and x.shape[-1] == self.in_features
            and x.numel() > 0
            and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            and not torch.is_autocast_enabled("cpu")
            and nothing_watches()
            and not torch._C._are_functorch_transforms_active()
            and not x.is_neg()
            and not x._is_zerotensor()
            and (bias is None or self._is_plain_bias(bias))
            and _ext.WHY_NOT is None
        )

    def _is_plain_bias(self, bias) -> bool:
        """Parameters may have been converted, or replaced, without the buffers; C++ would read on past a short one."""
        return (
            bias.dtype is torch.float32
            and bias.is_cpu
            and bias.shape == (self.out_features,)
            and bias.is_contiguous()
            and not bias.is_neg()
        )

    def _product(self, x, bias):
        if self.values.dtype not in op.dtypes(self.format):
            return F.linear(x, self.weight, bias)
        return op.decode_linear(x, self.packed, bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, format={self.format}, density={self.density:.4g}"

    # ---- saving and loading ----

    def __setstate__(self, state: dict) -> None:  # also what copy.deepcopy goes by
        super().__setstate__(state)
        self._settle()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _settle(self):
        if self.format in decode_cpu.FORMATS:
            for name in ("codes", "values"):
                self._buffers[name] = settled(self._buffers[name])

    def get_extra_state(self) -> dict:
        fields = ("format", "density", "in_features", "out_features")
        return {name: getattr(self, name) for name in fields} | {"why": self._why_this_form}

    def set_extra_state(self, state: dict) -> None:
        self.format, self.density, self._why_this_form = state["format"], state["density"], state["why"]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        whole = (*PARTS, "_extra_state")
        found = [name for name in whole if prefix + name in state_dict]
        if found and len(found) < len(whole):  # codes read as those of another format lead out of the buffers
            error_msgs.append(f"{prefix}values: expected {', '.join(whole)} together, got {', '.join(found)} alone")
            return
        extra = state_dict.get(prefix + "_extra_state")
        tensors = [state_dict.get(prefix + name) for name in PARTS]
        if extra is not None and all(isinstance(t, Tensor) for t in tensors):
            shape, found = (self.out_features, self.in_features), (extra["out_features"], extra["in_features"])
            if found != shape:
                error_msgs.append(f"{prefix}values: expected a weight {list(shape)}, got {list(found)}")
                return
            for name, tensor in zip(PARTS, tensors, strict=True):  # another mask or format: other sizes
                mine = self._buffers[name]
                if mine.shape != tensor.shape:
                    self._buffers[name] = mine.new_empty(tensor.shape)
            self.format = extra["format"]  # says whether the buffers had better lie elsewhere
            self._settle()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def to_linear(layer: DecodeLinear) -> None:
    """Turn a DecodeLinear into a plain linear layer in place, with zeros off its mask."""
    weight = layer.weight
    for name in PARTS:
        del layer._buffers[name]
    del layer.format, layer.density
    layer.__dict__.pop("_why_this_form", None)
    layer.__class__ = nn.Linear
    layer.weight = nn.Parameter(weight, requires_grad=False)


def to_decode(layer: nn.Module, packed: op.DecodeWeight, density: float) -> None:
    """Turn a plain linear layer (transformers' Conv1D too) into a DecodeLinear in place: hooks and names stay."""
    del layer._parameters["weight"]
    layer.__class__ = DecodeLinear
    layer._take(packed, density)
