"""Networks that train in seconds on a CPU, for 8x8 digits and for tests."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional


class SmallCNN(nn.Module):
    """Three convolutions with batch norm and a hidden layer; 37,802 parameters for ``1 x 8 x 8`` and 10 classes.

    Args:
        n_classes: Number of logits.
        in_channels: Image channels; any image side of at least 4 works.
    """

    def __init__(self, n_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(64, 128)
        self.fc = nn.Linear(128, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, n_classes]``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        x = functional.relu(self.bn3(self.conv3(x)))
        return self.fc(functional.relu(self.fc1(x.mean(dim=(2, 3)))))


class MLP(nn.Module):
    """Fully connected network ``inputs-256-128-classes`` on flattened images; layers ``fc1, fc2, fc``.

    Args:
        input_shape: Channels, height, width.
        n_classes: Number of logits.
        hidden: Widths of the two hidden layers.
    """

    def __init__(self, input_shape: tuple[int, int, int], n_classes: int = 10, hidden: tuple[int, int] = (256, 128)):
        super().__init__()
        first, second = hidden
        self.fc1 = nn.Linear(math.prod(input_shape), first)
        self.fc2 = nn.Linear(first, second)
        self.fc = nn.Linear(second, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, n_classes]``."""
        return self.fc(functional.relu(self.fc2(functional.relu(self.fc1(x.flatten(1))))))
