"""The networks of the papers (Frankle & Carbin, arXiv 1803.03635, figure 2), initialized from a seed.

The last layer is called `output`: pruning rates name it so. All weights are Gaussian Glorot, biases zero.

| name           | weights, all | convolutions | on |
|----------------|--------------|--------------|----|
| lenet-300-100  | 266,200      | -            | 1x28x28 |
| conv-2         | 4,300,992    | 38,592       | 3x32x32 |
| conv-4         | 2,425,024    | 259,776      | 3x32x32 |
| conv-6         | 2,261,184    | 1,144,512    | 3x32x32 |
| resnet-20      | 270,896      | 270,256      | 3x32x32 |
| vgg-19         | 20,024,000   | 20,018,880   | 3x32x32 |
| conv-bn-4      | 17,552       | 16,272       | 1x8x8   |

Biases and BatchNorm are not counted. The paper's figure gives 1.7M for conv-6; the layers it lists make 2.3M, of which 1.1M in
convolutions as it says. conv-bn-4 is no paper's: four convolutions with BatchNorm, small enough to prune channels of digits
in seconds.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.history import check_seed

CONV_CHANNELS = {"conv-2": (64, 64), "conv-4": (64, 64, 128, 128), "conv-6": (64, 64, 128, 128, 256, 256)}
VGG_GROUPS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # convolutions and their channels, a pool between groups
CONV_BN_CHANNELS = {"conv-bn-4": (16, 16, 32, 32)}


def make(name: str, input_shape: Sequence[int], classes: int, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A new network of `MODELS`, its weights drawn from `seed` alone (torch's generators are left as they are).

    Args:
        input_shape: of one example, (channels, height, width).
        dropout: probability of dropping before each fully connected layer of conv-2/4/6 (the paper's 0.5); the others have none.

    Raises:
        ValueError: unknown name, or an argument that does not fit the network.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability of at least 0 and below 1, got {dropout}")
    if dropout and name not in CONV_CHANNELS:
        raise ValueError(f"dropout: expected 0 for {name}, which has none, got {dropout}")
    check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](name, tuple(input_shape), classes, dropout)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def weights(model: nn.Module) -> dict[str, int]:
    """How many weights (biases and BatchNorm left out): {"all": .., "conv": ..}."""
    count = {"all": 0, "conv": 0}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            count["all"] += module.weight.numel()
            count["conv"] += module.weight.numel() * isinstance(module, nn.Conv2d)
    return count


def _lenet(name, input_shape, classes, dropout) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(input_shape), 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            output=nn.Linear(100, classes),
        )
    )


def _conv(name, input_shape, classes, dropout) -> nn.Module:
    channels, height, width = _image(name, input_shape)
    layers = OrderedDict()
    for i, out in enumerate(CONV_CHANNELS[name], 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, out, 3, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        channels = out
        if i % 2 == 0:
            layers[f"pool{i // 2}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    if not height or not width:
        halvings = len(CONV_CHANNELS[name]) // 2
        raise ValueError(
            f"input_shape: expected an image that {name} can halve {halvings} times, got {list(input_shape)}"
        )
    layers["flatten"] = nn.Flatten()
    features = channels * height * width
    for i, out in enumerate((256, 256, classes), 1):
        if dropout:
            layers[f"dropout{i}"] = nn.Dropout(dropout)
        layers["output" if i == 3 else f"fc{i}"] = nn.Linear(features, out)
        if i < 3:
            layers[f"fc_relu{i}"] = nn.ReLU()
        features = out
    return nn.Sequential(layers)


def _conv_bn(name, input_shape, classes, dropout) -> nn.Module:
    channels, height, width = _image(name, input_shape)
    if height < 4 or width < 4:
        raise ValueError(f"input_shape: expected an image that {name} can halve 2 times, got {list(input_shape)}")
    layers = OrderedDict()
    for i, out in enumerate(CONV_BN_CHANNELS[name], 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(out)
        layers[f"relu{i}"] = nn.ReLU()
        channels = out
        if i % 2 == 0:
            layers[f"pool{i // 2}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels * (height // 4) * (width // 4), classes)
    return nn.Sequential(layers)


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, inputs, height, width] -> [N, outputs, height / stride, width / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al., arXiv 1512.03385, section 4.2, n = 3; the "ResNet-18" of the lottery ticket paper."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for outputs in (16, 32, 64):
            for i in range(3):
                blocks.append(Block(inputs, outputs, 2 if i == 0 and outputs != 16 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, channels, height, width] -> [N, classes]."""
        return self.output(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def _resnet(name, input_shape, classes, dropout) -> nn.Module:
    return ResNet20(_image(name, input_shape)[0], classes)


def _vgg(name, input_shape, classes, dropout) -> nn.Module:
    """VGG-19 with BatchNorm and one fully connected layer after a global mean: the lottery ticket paper's for CIFAR-10."""
    channels, height, width = _image(name, input_shape)
    if min(height, width) < 16:
        raise ValueError(f"input_shape: expected an image of 16 x 16 or more for {name}, got {list(input_shape)}")
    layers = OrderedDict()
    for group, (count, out) in enumerate(VGG_GROUPS, 1):
        for i in range(1, count + 1):
            layers[f"conv{group}_{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers[f"bn{group}_{i}"] = nn.BatchNorm2d(out)
            layers[f"relu{group}_{i}"] = nn.ReLU()
            channels = out
        if group < len(VGG_GROUPS):
            layers[f"pool{group}"] = nn.MaxPool2d(2)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def _image(name, input_shape) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(f"input_shape: expected (channels, height, width) for {name}, got {list(input_shape)}")
    return input_shape


MODELS = {
    "lenet-300-100": _lenet,
    "conv-2": _conv,
    "conv-4": _conv,
    "conv-6": _conv,
    "resnet-20": _resnet,
    "vgg-19": _vgg,
    "conv-bn-4": _conv_bn,
}
