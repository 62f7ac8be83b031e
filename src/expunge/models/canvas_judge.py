"""The judge of drawn figures: a small network that names the object and the style of an image of ``canvas``.

Its weights come with the package (``assets/canvas_judge``, made by ``scripts/train_canvas_judge.py``). It decides
whether a generated image shows what its prompt asked for, and its features serve as those of FID and KID.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import expunge
from expunge import files
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.errors import ArtifactError, DataError
from expunge.models.weights import load_weights

#: Output channels and stride of each convolution.
_LAYERS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2))
FOLDER = Path(expunge.__file__).parent / "assets" / "canvas_judge"


class Verdict(NamedTuple):
    """Logits of the objects ``[B, 8]`` and of the styles ``[B, 6]``, in the order of ``SHAPES`` and ``STYLES``."""

    object: Tensor
    style: Tensor


class JudgeFeatures(nn.Module):
    """Six convolutions with batch norm, averaged over the image; usable as ``feature`` of torchmetrics' FID and KID."""

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        stages, before = [], 3
        for width, stride in _LAYERS:
            conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            stages.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.stages = nn.Sequential(*stages)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] to features ``[B, 128]``.

        Raises:
            DataError: The pixels are integers, or the shape is another one.
        """
        if not x.is_floating_point() or x.ndim != 4 or x.shape[1] != 3:
            raise DataError(f"the judge sees float images [B, 3, H, W] in [0, 1], not {x.dtype} {list(x.shape)}")
        out: Tensor = self.stages(2 * x - 1).mean(dim=(2, 3))
        return out


class CanvasJudge(nn.Module):
    """Names object and style of an image: shared features, one linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.features = JudgeFeatures()
        self.object = nn.Linear(JudgeFeatures.num_features, len(SHAPES))
        self.style = nn.Linear(JudgeFeatures.num_features, len(STYLES))

    @override
    def forward(self, x: Tensor) -> Verdict:
        """Images ``[B, 3, H, W]`` in [0, 1] to logits of both axes."""
        features = self.features(x)
        return Verdict(self.object(features), self.style(features))


def load_judge(folder: Path | None = None) -> CanvasJudge:
    """The judge with its trained weights, float32, in eval mode and without gradients.

    Args:
        folder: Where ``model.safetensors`` lies; the one in the package by default.

    Raises:
        ArtifactError: The weights are missing, broken, or another model's.
    """
    file = (folder or FOLDER) / "model.safetensors"
    if not file.is_file():
        raise ArtifactError(f"the judge's weights are not where they belong ({file}); install the package again")
    stored, _ = files.read_safetensors(file)
    judge = CanvasJudge()
    for name, tensor in judge.state_dict(keep_vars=True).items():
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    load_weights(judge, file)
    return judge.float().eval().requires_grad_(False)


@torch.no_grad()
def judged(judge: CanvasJudge, images: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Numbers of the object and the style the judge sees in each image.

    Args:
        judge: In eval mode.
        images: ``[N, 3, H, W]`` in [0, 1].
        chunk: Images at a time.

    Returns:
        int64 ``[N]`` into ``SHAPES`` and int64 ``[N]`` into ``STYLES``.
    """
    verdicts = [judge(part) for part in images.split(chunk)]
    return torch.cat([v.object.argmax(1) for v in verdicts]), torch.cat([v.style.argmax(1) for v in verdicts])
