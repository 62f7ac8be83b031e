"""VGG-16 with batch norm for small images (Simonyan, Zisserman 2014, arXiv 1409.1556, configuration D).

Two heads are in use in the unlearning literature, told apart by their sizes for 10 classes: 15,311,818 parameters
(convolutions without bias, 2x2 pooling, 2048-256-256-C) and 14,728,266 (convolutions with bias, one linear layer).
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16BN(nn.Module):
    """VGG-16-BN; tensor names ``features.{k}`` and ``classifier.{k}`` (``classifier`` for the single-layer head).

    Args:
        n_classes: Number of logits.
        in_channels: Image channels.
        single_layer: The 14.7 M variant with one linear layer as its head (``vgg16_bn_lth``).
    """

    def __init__(self, n_classes: int = 10, in_channels: int = 3, *, single_layer: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for k, (outside, repeats) in enumerate(_STAGES):
            for _ in range(repeats):
                convolution = nn.Conv2d(width, outside, 3, padding=1, bias=single_layer)
                layers += [convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
                width = outside
            # The single-layer variant ends in an average instead of a last maximum; either has 512 channels.
            if k < len(_STAGES) - 1 or not single_layer:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if single_layer else 2)
        self.classifier: nn.Module = (
            nn.Linear(512, n_classes)
            if single_layer
            else nn.Sequential(
                nn.Linear(2048, 256),
                nn.ReLU(inplace=True),
                nn.Linear(256, 256),
                nn.ReLU(inplace=True),
                nn.Linear(256, n_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]``, side at least 32, to logits ``[B, n_classes]``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
