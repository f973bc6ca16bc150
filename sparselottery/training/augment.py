"""Training images changed at random, the same ones for the same seed and iteration."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_crop(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image mirrored left to right with probability 1/2, and cut at random out of itself padded with zeros on all sides.

    The usual augmentation of CIFAR-10 (He et al., arXiv 1512.03385, section 4.2). Here zeros are the mean pixel where images
    were normalized.

    Args:
        x: [N, channels, height, width]; left as it is. generator: on the CPU.
        padding: zeros on each side, so that an image moves by up to so many pixels.

    Raises:
        ValueError: x is no batch of images.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected images [N, channels, height, width], got {list(x.shape)}")
    count, channels, height, width = x.shape
    flip = torch.rand(count, generator=generator) < 0.5
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # [N, height]
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).flatten(1)  # [N, height * width]
    padded = F.pad(x, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels[:, None].expand(-1, channels, -1).to(x.device)).view_as(x)


def generator_of(seed: int, iteration: int) -> torch.Generator:
    """The random numbers of one minibatch: a function of both alone, so that training may begin at any iteration."""
    mixed = hashlib.sha256(f"augment {seed} {iteration}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


AUGMENTATIONS = {"none": None, "flip-crop": flip_crop}
