"""CIFAR ResNets of depth 6n+2 with option-A shortcuts (He, Zhang, Ren, Sun 2015, arXiv 1512.03385, section 4.2).

Tensor names follow the widespread layout ``conv1, bn1, layer{1,2,3}.{k}.conv1 ... linear``, so that published weights
load unchanged. ResNet-20 has 269,722 parameters for 10 classes, ResNet-56 853,018.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class OptionABlock(nn.Module):
    """Two 3x3 convolutions; a shortcut that changes shape takes every second pixel and pads channels with zeros."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = (outside - inside) // 2
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inside, H, W]`` to ``[B, outside, H/stride, W/stride]``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            x = functional.pad(x, (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for small images: three stages of 16, 32 and 64 channels.

    Args:
        depth: 6n+2: 20, 32, 44, 56 ...
        n_classes: Number of logits.
        in_channels: Image channels.
    """

    def __init__(self, depth: int, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, n_classes]``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    first = OptionABlock(inside, outside, stride)
    return nn.Sequential(first, *(OptionABlock(outside, outside, 1) for _ in range(blocks - 1)))
