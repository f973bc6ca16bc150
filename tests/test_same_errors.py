"""Every public op and module says on CUDA tensors what it says on CPU tensors: checks come before a device is chosen.

The CUDA tensors are torch's fake ones, which need no GPU: a check that came after a kernel was chosen, or that looked at
values, would fail in another way on them.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparselottery as sl
from sparselottery.ops import (
    bitmask,
    block_linear,
    decode_linear,
    global_topk,
    masked_conv2d,
    masked_linear,
    masked_optim,
    packed,
    packed_layers,
)

F32, F64, I32 = torch.float32, torch.float64, torch.int32


class Make:
    """Tensors of one device."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.other = torch.device("meta" if device == "cpu" else "cpu")  # a device that does not fit

    def __call__(self, *shape, dtype=F32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def elsewhere(self, *shape, dtype=F32):
        return torch.empty(shape, dtype=dtype, device=self.other)

    def words(self, *shape):
        return self(*shape, dtype=I32)


def layer(m, kind="linear"):
    """A masked layer; on a CPU a pruned one, which asks as much of its input as one on another device."""
    new = nn.Linear(40, 6, device=m.device) if kind == "linear" else nn.Conv2d(4, 6, 3, device=m.device)
    masked = sl.sparsify(new)
    if m.device.type == "cpu":
        masked.set_mask(torch.arange(new.weight.numel()).view(new.weight.shape) % 2 == 0)
    return masked


def linear(m, x=(5, 40), weight=(6, 40), words=(6, 2), bias=(6,), **options):
    """A call of masked_linear, each argument a shape or whatever takes its place."""
    values = [m(*v) if isinstance(v, tuple) else v for v in (x, weight)]
    words = m.words(*words) if isinstance(words, tuple) else words
    bias = m(*bias) if isinstance(bias, tuple) else bias
    op = block_linear.block_linear if "block" in options else masked_linear.masked_linear
    return op(*values, words, bias, **options)


def conv(m, x=(2, 4, 8, 8), weight=(6, 4, 3, 3), words=(6, 2), bias=(6,), **options):
    values = [m(*v) if isinstance(v, tuple) else v for v in (x, weight)]
    words = m.words(*words) if isinstance(words, tuple) else words
    bias = m(*bias) if isinstance(bias, tuple) else bias
    return masked_conv2d.masked_conv2d(*values, words, bias, **options)


def adam(m, **change):
    lists = {n: [m(6, 40)] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {"words": [m.words(6, 2)]}
    lists |= {name: make(m) for name, make in change.items()}
    words = lists.pop("words")
    return masked_optim.masked_adam_(*lists.values(), [], words, step=1, lr=0.1)


def decode(m, x=(3, 40), bias=(6,), dtype=torch.float16):
    parts = m.words(7), m(0, 8, dtype=torch.uint8), m(0, 8, dtype=torch.float16)
    weight = decode_linear.DecodeWeight("gap8", 6, 40, *parts)
    x, bias = (m(*v, dtype=dtype) if isinstance(v, tuple) else v for v in (x, bias))
    return decode_linear.decode_linear(x, weight, bias)


def pconv(m, x=(2, 4, 8, 8), shape=(6, 4, 3, 3), words=(6, 2), **options):
    return packed_layers.packed_conv2d(m(*x), m(9), m.words(*words), m(6), shape, **options)


CASES = {
    "linear: no tensor": lambda m: linear(m, x=[1.0]),
    "linear: words of no kind": lambda m: linear(m, words=None),
    "linear: width": lambda m: linear(m, x=(5, 41)),
    "linear: no dimension": lambda m: linear(m, x=()),
    "linear: weight of three dimensions": lambda m: linear(m, weight=(6, 4, 10)),
    "linear: shape of words": lambda m: linear(m, words=(6, 3)),
    "linear: dtype of words": lambda m: linear(m, words=m(6, 2)),
    "linear: dtype of weight": lambda m: linear(m, weight=m(6, 40, dtype=F64)),
    "linear: integers": lambda m: linear(m, x=m(5, 40, dtype=I32)),
    "linear: bias": lambda m: linear(m, bias=(7,)),
    "linear: dtype of bias": lambda m: linear(m, bias=m(6, dtype=F64)),
    "linear: weight elsewhere": lambda m: linear(m, weight=m.elsewhere(6, 40)),
    "linear: words elsewhere": lambda m: linear(m, words=m.elsewhere(6, 2, dtype=I32)),
    "block_linear: no pair": lambda m: linear(m, block=16),
    "block_linear: empty block": lambda m: linear(m, block=(16, 0)),
    "block_linear: width": lambda m: linear(m, x=(5, 41), block=(16, 16)),
    "block_linear: weight elsewhere": lambda m: linear(m, weight=m.elsewhere(6, 40), block=(16, 16)),
    "conv2d: no tensor": lambda m: conv(m, weight=None),
    "conv2d: channels": lambda m: conv(m, x=(2, 5, 8, 8)),
    "conv2d: too small": lambda m: conv(m, x=(2, 4, 2, 8)),
    "conv2d: stride": lambda m: conv(m, stride=0),
    "conv2d: kind of stride": lambda m: conv(m, stride="1"),
    "conv2d: padding": lambda m: conv(m, padding="full"),
    "conv2d: same with stride": lambda m: conv(m, padding="same", stride=2),
    "conv2d: dilation": lambda m: conv(m, dilation=(1, 1, 1)),
    "conv2d: groups": lambda m: conv(m, groups=5),
    "conv2d: words": lambda m: conv(m, words=(6, 1)),
    "conv2d: dtype": lambda m: conv(m, x=m(2, 4, 8, 8, dtype=F64)),
    "conv2d: elsewhere": lambda m: conv(m, bias=m.elsewhere(6)),
    "bitmask.pack: dtype": lambda m: bitmask.pack(m(5)),
    "bitmask.pack: no tensor": lambda m: bitmask.pack([True]),
    "bitmask.unpack: shape": lambda m: bitmask.unpack(m.words(2, 2), (2, 9)),
    "bitmask.count: dtype": lambda m: bitmask.count(m(2, 2)),
    "bitmask.hamming: shape": lambda m: bitmask.hamming(m.words(2, 2), m.words(2, 3)),
    "bitmask.hamming: device": lambda m: bitmask.hamming(m.words(2, 2), m.elsewhere(2, 2, dtype=I32)),
    "bitmask.apply_: dtype": lambda m: bitmask.apply_(m(2, 9, dtype=I32), m.words(2, 1)),
    "bitmask.apply_: words": lambda m: bitmask.apply_(m(2, 9), m.words(2, 2)),
    "bitmask.apply_: device": lambda m: bitmask.apply_(m(2, 9), m.elsewhere(2, 1, dtype=I32)),
    "bitmask.apply_: expanded": lambda m: bitmask.apply_(m(1, 9).expand(2, 9), m.words(2, 1)),
    "global_topk: no list": lambda m: sl.global_topk(m(5), 2),
    "global_topk: no tensor": lambda m: sl.global_topk([m(5), 3], 2),
    "global_topk: integers": lambda m: sl.global_topk([m(5, dtype=I32)], 2),
    "global_topk: devices": lambda m: sl.global_topk([m(5), m.elsewhere(5)], 2),
    "global_topk: names": lambda m: sl.global_topk([m(5)], 2, names=["a", "b"]),
    "select: integers": lambda m: global_topk.select([m(5, dtype=I32)], 2),
    "select: too many": lambda m: global_topk.select([m(5)], 6),
    "select: less than none": lambda m: global_topk.select([m(5)], -1),
    "select: kind of keep": lambda m: global_topk.select([m(5)], 2.5),
    "select: by": lambda m: global_topk.select([m(5)], 2, by="size"),
    "select: eligible": lambda m: global_topk.select([m(5)], 2, eligible=[m(5)]),
    "select: shape of eligible": lambda m: global_topk.select([m(5)], 2, eligible=[m(6, dtype=torch.bool)]),
    "select: eligible elsewhere": lambda m: global_topk.select([m(5)], 2, eligible=[m.elsewhere(5, dtype=torch.bool)]),
    "adam: counts": lambda m: adam(m, grads=lambda m: []),
    "adam: dtype": lambda m: adam(m, grads=lambda m: [m(6, 40, dtype=F64)]),
    "adam: shape": lambda m: adam(m, exp_avgs=lambda m: [m(6, 41)]),
    "adam: device": lambda m: adam(m, exp_avg_sqs=lambda m: [m.elsewhere(6, 40)]),
    "adam: words": lambda m: adam(m, words=lambda m: [m.words(6, 1)]),
    "adam: no tensor": lambda m: adam(m, params=lambda m: [3.0]),
    "sgd: clean": lambda m: masked_optim.masked_sgd_([m(5)], [m(5)], [], [None], lr=0.1, clean=[True, False]),
    "expand: dtype": lambda m: packed.expand(m(5, dtype=I32), m.words(2, 1), (2, 9)),
    "expand: shape": lambda m: packed.expand(m(5, 1), m.words(2, 1), (2, 9)),
    "expand: words": lambda m: packed.expand(m(5), m.words(2, 1), (2, 33)),
    "expand: device": lambda m: packed.expand(m(5), m.elsewhere(2, 1, dtype=I32), (2, 9)),
    "gather: words": lambda m: packed.gather(m(2, 33), m.words(2, 1)),
    "gather: dtype": lambda m: packed.gather(m(2, 9, dtype=I32), m.words(2, 1)),
    "packed_linear: width": lambda m: packed_layers.packed_linear(m(5, 41), m(9), m.words(6, 2), m(6), (6, 40)),
    "packed_linear: bias": lambda m: packed_layers.packed_linear(m(5, 40), m(9), m.words(6, 2), m(7), (6, 40)),
    "packed_linear: dtype": lambda m: packed_layers.packed_linear(
        m(5, 40), m(9, dtype=F64), m.words(6, 2), m(6), (6, 40)
    ),
    "packed_conv2d: channels": lambda m: pconv(m, x=(2, 5, 8, 8)),
    "packed_conv2d: too small": lambda m: pconv(m, x=(2, 4, 2, 8)),
    "packed_conv2d: shape": lambda m: pconv(m, shape=(6, 36)),
    "packed_conv2d: stride": lambda m: pconv(m, stride=0),
    "packed_conv2d: kind of padding": lambda m: pconv(m, padding="same"),
    "packed_conv2d: groups": lambda m: pconv(m, groups=4),
    "decode_linear: width": lambda m: decode(m, x=(3, 41)),
    "decode_linear: dtype": lambda m: decode(m, dtype=F32),
    "decode_linear: no tensor": lambda m: decode(m, x=3),
    "decode_linear: bias": lambda m: decode(m, bias=(7,)),
    "decode_linear: elsewhere": lambda m: decode(m, x=m.elsewhere(3, 40, dtype=torch.float16)),
    "decode_linear: no packed weight": lambda m: decode_linear.decode_linear(m(3, 40), "gap8"),
    "decode_linear.pack: format": lambda m: decode_linear.pack(m(6, 40), m.words(6, 2), "gap5"),
    "decode_linear.pack: dtype": lambda m: decode_linear.pack(m(6, 40), m.words(6, 2), "gap8"),
    "decode_linear.pack: no tensor": lambda m: decode_linear.pack(m(6, 40).half(), None, "gap8"),
}

# Modules: tensors of the meta device in place of CUDA's, as torch's modules cannot be made of fake CUDA tensors.
MODULES = {
    "MaskedLinear: width": lambda m: layer(m)(m(5, 41)),
    "MaskedLinear: dtype": lambda m: layer(m)(m(5, 40, dtype=F64)),
    "MaskedLinear: no tensor": lambda m: layer(m)([1.0]),
    "MaskedLinear: shape of mask": lambda m: layer(m).set_mask(m(6, 41, dtype=torch.bool)),
    "MaskedLinear: kind of mask": lambda m: layer(m).set_mask(m(6, 40)),
    "MaskedConv2d: channels": lambda m: layer(m, "conv")(m(2, 5, 8, 8)),
    "MaskedConv2d: dtype": lambda m: layer(m, "conv")(m(2, 4, 8, 8, dtype=F64)),
    "MaskedConv2d: kind of mask": lambda m: layer(m, "conv").set_mask(3),
    "prune: density": lambda m: sl.prune(layer(m), density=1.5),
    "prune: structure": lambda m: sl.prune(layer(m), density=0.5, structure="block:0x0"),
}


def error_of(case, device):
    """What a case raises on a device, the devices' names left out."""
    fake = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    make = Make(device)
    with fake, pytest.raises((TypeError, ValueError)) as caught:
        case(make)
    text = str(caught.value)
    for name in ("cuda:0", "cuda", "cpu", "meta"):
        text = text.replace(name, "DEVICE")
    return type(caught.value), text


@pytest.mark.parametrize("name", CASES)
def test_the_same_error_on_both_devices(name):
    kind, text = error_of(CASES[name], "cpu")
    assert error_of(CASES[name], "cuda") == (kind, text)
    assert "\n" not in text and ": " in text, "names the argument"


@pytest.mark.parametrize("name", MODULES)
def test_the_same_error_of_modules(name):
    kind, text = error_of(MODULES[name], "cpu")
    assert error_of(MODULES[name], "meta") == (kind, text)
