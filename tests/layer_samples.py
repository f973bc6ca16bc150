"""Random linear layers with masks, for the tests of masked_linear on the CPU."""

import torch

from sparselottery.ops.masked_linear import masked_linear


def sparse_sample(batch, inputs, outputs, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(batch, inputs, generator=g), torch.randn(batch, outputs, generator=g)
    w, b = torch.randn(outputs, inputs, generator=g), torch.randn(outputs, generator=g)
    keep = torch.rand(outputs, inputs, generator=g) < (density or 0)
    if density is None:
        keep[outputs // 2, inputs // 2] = True
    if outputs > 1 and inputs > 1:
        keep[outputs - 1] = False
        keep[:, 0] = False
    return x, w, b, grad, keep


def forward_on_cpu(x, w, words):
    with torch.no_grad():
        return masked_linear(x, w, words)
