"""All-convolutional network (Springenberg et al. 2015, arXiv 1412.6806) with the two-layer head used by SCAR."""

from __future__ import annotations

from torch import Tensor, nn

#: Width, kernel side and stride of the convolutions.
_LAYERS = ((96, 3, 1), (96, 3, 1), (192, 3, 2), (192, 3, 1), (192, 3, 1), (192, 3, 2), (192, 3, 1), (192, 1, 1))


class AllCNN(nn.Module):
    """Eight convolutions with batch norm, an average, and ``Linear-ReLU-Linear`` with dropout before both.

    The average leaves a square of ``side // 32`` positions: one for 32 pixels, four (768 features) for 64.

    Deviates: the released model averages windows of 8 and has a head for 64 pixels only, so at 32 it fails; here the
    head follows the image side. The dropout rate is not published; 0.5 as in the network's own paper.

    Args:
        n_classes: Number of logits.
        in_channels: Image channels.
        side: Shorter side of the images.
        dropout: Share of the features that is dropped in training.
    """

    def __init__(self, n_classes: int = 10, in_channels: int = 3, side: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for outside, kernel, stride in _LAYERS:
            convolution = nn.Conv2d(width, outside, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
            width = outside
        cells = max(1, side // 32)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(cells)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width * cells * cells, 384),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(384, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, n_classes]``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
