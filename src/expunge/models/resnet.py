"""ResNet-18 with a stem for small images: 3x3, stride 1, no pooling (He et al. 2015, arXiv 1512.03385).

Tensor names are torchvision's (``conv1, bn1, layer1.0.conv1, layer2.0.downsample.0, fc``). 11,173,962 parameters for 10
classes, 11,220,132 for 100, the sizes used by the SalUn and BARRIER experiments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a 1x1 projection where the shape changes (option B)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inside, H, W]`` to ``[B, outside, H/stride, W/stride]``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + (x if self.downsample is None else self.downsample(x)))


class SmallImageResNet18(nn.Module):
    """ResNet-18 whose first convolution keeps the resolution.

    Args:
        n_classes: Number of logits.
        in_channels: Image channels.
    """

    def __init__(self, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for k in range(1, 5):
            stride = 1 if k == 1 else 2
            first = BasicBlock(widths[k - 1], widths[k], stride)
            self.add_module(f"layer{k}", nn.Sequential(first, BasicBlock(widths[k], widths[k], 1)))
        self.fc = nn.Linear(512, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, n_classes]``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
        return self.fc(torch.mean(x, dim=(2, 3)))
