"""Images against texts and against each other: CLIP score, LPIPS, style and content loss, pixel differences.

Paper: Hessel et al., "CLIPScore", EMNLP 2021 (arXiv 2104.08718); Zhang et al., "LPIPS", CVPR 2018 (arXiv 1801.03924);
Gatys et al., CVPR 2016 (arXiv 1508.06576), style loss.
Deviates: the CLIP score is the plain cosine, neither scaled nor cut at 0, and the backbone is named; LPIPS is given at
the images' own size beside the published 64 pixels; every mean has an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from expunge.errors import DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, mean
from expunge.metrics.judge import resized, unit_pixels
from expunge.metrics.zero_shot import cosines
from expunge.models.towers import Towers
from expunge.registry import Info
from expunge.restore import evaluating

#: Distance ``[N]`` of images in [0, 1], row by row.
Perceptual = Callable[[Tensor, Tensor], Tensor]
#: Maps ``[N, C, H, W]`` after each of the first five convolutions, of images in [0, 1].
Maps = Callable[[Tensor], Sequence[Tensor]]
STYLE_WEIGHT = 1e6
_CONTENT = 3  # conv_4


def over_images(values: np.ndarray, note: str = "", unit: str = "") -> Estimate:
    """Mean of one value per image with a t interval.

    Raises:
        DataError: No values, or one that is not finite.
    """
    found = mean(np.asarray(values, dtype=np.float64).tolist(), unit=unit, note=note)
    return replace(found, method="mean over images, t 95 % interval") if found.n > 1 else found


def clip_cosines(towers: Towers, images: Tensor, prompts: Sequence[str], *, chunk: int = 64) -> np.ndarray:
    """Cosine of every image, uint8 ``[N, 3, H, W]``, with its own prompt, float64 ``[N]``.

    Raises:
        DataError: As many prompts as images are needed.
    """
    if len(images) != len(prompts):
        raise DataError(f"clip score: {len(images)} images and {len(prompts)} prompts")
    seen, said = [], []
    device = next(towers.model.parameters()).device
    with evaluating(towers.model):
        for i in range(0, len(images), chunk):
            pixels = unit_pixels(images[i : i + chunk]).to(device)
            seen.append(towers.image(towers.preprocess(pixels)))
            said.append(towers.text(towers.tokenize(list(prompts[i : i + chunk])).to(device)))
    return cosines(torch.cat(seen), torch.cat(said))


@metric(
    "clip_score",
    Info("Mean cosine of kept images with their prompts.", "Hessel et al., EMNLP 2021", needs=("towers",)),
    label="CLIP score, kept prompts",
    explain="How well the images of prompts that stay fit their prompts, as a CLIP model sees it (cosine). Should not "
    "fall. Other works multiply it by 100 or 2.5; models differ in level.",
    unit="",
    direction="higher",
    bounds=(-1.0, 1.0),
)
def clip_score(values: np.ndarray, *, backbone: str, note: str = "") -> Estimate:
    """Mean of :func:`clip_cosines`.

    Raises:
        DataError: No values, or one that is not finite.
    """
    return over_images(values, "; ".join(filter(None, (f"backbone: {backbone}", note))))


@metric(
    "clip_score_forget",
    Info("Mean cosine of images asked for what was forgotten.", "Hessel et al., EMNLP 2021", needs=("towers",)),
    label="CLIP score, forgotten prompts",
    explain="The same for prompts that name what was forgotten; it should fall.",
    unit="",
    direction="lower",
    bounds=(-1.0, 1.0),
)
def clip_score_forget(values: np.ndarray, *, backbone: str, note: str = "") -> Estimate:
    """Mean of :func:`clip_cosines` of prompts to forget."""
    return clip_score(values, backbone=backbone, note=note)


def paired_distances(
    distance: Perceptual, a: Tensor, b: Tensor, *, size: int | None = None, chunk: int = 32
) -> np.ndarray:
    """A perceptual distance of images in pairs, uint8 ``[N, 3, H, W]``, at a side; float64 ``[N]``.

    Raises:
        DataError: Images that are no pairs, or a distance of another shape.
    """
    _same_shape(a, b)
    found = []
    with torch.no_grad():
        for x, y in _pairs(a, b, chunk):
            part = distance(resized(x, size), resized(y, size))
            if part.shape != (len(x),):
                raise DataError(f"perceptual distance: [{len(x)}] expected, got {list(part.shape)}")
            found.append(part.double().cpu())
    return torch.cat(found).numpy()


@metric(
    "lpips",
    Info("Perceptual distance between paired images of kept prompts.", "Zhang et al., CVPR 2018", needs=("before",)),
    label="LPIPS to the original, kept prompts",
    explain="How different the images of prompts that stay look from those that the untouched model drew from the same "
    "noise. 0 is no change.",
    unit="",
    direction="lower",
    bounds=(0.0, None),
)
def lpips(values: np.ndarray, *, note: str = "") -> Estimate:
    """Mean of :func:`paired_distances` at the images' own size."""
    return over_images(values, note)


@metric(
    "lpips_64",
    Info("Perceptual distance at 64 pixels.", "Zhang et al., CVPR 2018", needs=("before",)),
    label="LPIPS at 64 pixels",
    explain="The same after shrinking to 64 pixels, as published tables have it. Not comparable with the full size.",
    unit="",
    direction="lower",
    bounds=(0.0, None),
)
def lpips_64(values: np.ndarray, *, note: str = "") -> Estimate:
    """Mean of :func:`paired_distances` at 64 pixels."""
    return over_images(values, note)


def gram(maps: Tensor) -> Tensor:
    """Gram matrices ``F F^T / (C H W)`` of maps ``[N, C, H, W]``, ``[N, C, C]``."""
    n, c, h, w = maps.shape
    flat = maps.reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


def style_content(maps: Maps, a: Tensor, b: Tensor, *, chunk: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Style and content losses of images in pairs, uint8 ``[N, 3, H, W]``: two float64 ``[N]``.

    Style: sum over the five maps of the mean squared difference of their Gram matrices. Content: mean squared
    difference of the fourth. The published total is ``1e6 * style + content``.

    Raises:
        DataError: Images that are no pairs, or fewer than four maps.
    """
    _same_shape(a, b)
    style, content = [], []
    with torch.no_grad():
        for x, y in _pairs(a, b, chunk):
            p, q = ([m.double() for m in maps(z)] for z in (x, y))
            if len(p) <= _CONTENT:
                raise DataError(f"style loss: maps of five convolutions expected, got {len(p)}")
            grams = [(gram(m) - gram(n)).square().mean((1, 2)) for m, n in zip(p, q, strict=True)]
            style.append(torch.stack(grams).sum(0).cpu())
            content.append((p[_CONTENT] - q[_CONTENT]).square().mean((1, 2, 3)).cpu())
    return torch.cat(style).numpy(), torch.cat(content).numpy()


@metric(
    "style_loss",
    Info("Style and content loss between paired images of kept prompts.", "Gatys et al., CVPR 2016", needs=("before",)),
    label="Style and content loss, kept prompts",
    explain="Difference of textures (a million times the style loss) and of layout (content loss) between the images "
    "before and after, from the same noise. 0 is no change.",
    unit="",
    direction="lower",
    bounds=(0.0, None),
)
def style_loss(style: np.ndarray, content: np.ndarray, *, note: str = "") -> Estimate:
    """Mean of ``1e6 * style + content`` of :func:`style_content`."""
    parts = f"style {float(np.mean(style)):.3g}, content {float(np.mean(content)):.3g}"
    total = STYLE_WEIGHT * np.asarray(style) + np.asarray(content)
    return over_images(total, "; ".join(filter(None, (parts, note))))


@metric(
    "pair_mse",
    Info("Mean squared pixel difference to the original, same noise.", needs=("before",)),
    label="Pixel difference, kept prompts",
    explain="Mean squared difference of the pixels (black 0, white 1) between the images before and after, drawn from "
    "the same noise. 0 after an exact undo.",
    unit="",
    direction="lower",
    bounds=(0.0, 1.0),
)
def pair_mse(before: Tensor, after: Tensor, *, note: str = "") -> Estimate:
    """Mean over images of the mean squared difference of uint8 images ``[N, 3, H, W]`` scaled to [0, 1]."""
    _same_shape(before, after)
    pairs = zip(before.split(64), after.split(64), strict=True)
    found = [((a.double() - b.double()) / 255).square().flatten(1).mean(1) for a, b in pairs]
    return over_images(torch.cat(found).numpy(), note)


@metric(
    "pair_max",
    Info("Largest pixel difference to the original, same noise.", needs=("before",)),
    label="Largest pixel difference, kept prompts",
    explain="Largest difference of any pixel of any image, in steps of 255, between the images before and after. 0 "
    "means that not one pixel differs, as after an exact undo.",
    unit="",
    direction="lower",
    bounds=(0.0, 255.0),
)
def pair_max(before: Tensor, after: Tensor, *, note: str = "") -> Estimate:
    """Largest absolute difference of uint8 images ``[N, 3, H, W]``."""
    _same_shape(before, after)
    value = max(int((a.int() - b.int()).abs().max()) for a, b in zip(before.split(64), after.split(64), strict=True))
    return Estimate(value, n=len(before), method="maximum over all pixels, exact", note=note)


def _pairs(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1], piece by piece: as floating-point numbers they take four times their room."""
    for x, y in zip(a.split(chunk), b.split(chunk), strict=True):
        yield unit_pixels(x), unit_pixels(y)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or not len(a):
        raise DataError(f"paired images: equal shapes expected, got {list(a.shape)} and {list(b.shape)}")
