"""How far a surrogate set is from the training data, in figures and as a contact sheet."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge import files
from expunge.data.base import ImageSet
from expunge.errors import DataError

_BATCH = 512


@dataclass(frozen=True)
class ChannelStatistics:
    """One channel of both sets, pixels in [0, 1].

    Args:
        mean: Mean of all surrogate pixels.
        std: Their standard deviation.
        train_mean: Mean of all training pixels.
        train_std: Their standard deviation.
        ks: Kolmogorov-Smirnov statistic between the image means of the two sets.
        p: Its p-value (asymptotic, two-sided).
    """

    mean: float
    std: float
    train_mean: float
    train_std: float
    ks: float
    p: float


@dataclass(frozen=True)
class SurrogateStatistics:
    """Statistics of a surrogate set beside those of the training set.

    Args:
        n: Readable surrogate images.
        n_train: Readable training images.
        channels: One entry per channel.
        shared: Surrogate images that are, byte for byte in uint8, also training images.
    """

    n: int
    n_train: int
    channels: tuple[ChannelStatistics, ...]
    shared: int

    @property
    def p(self) -> float:
        """Smallest p-value over the channels, multiplied by their number (Bonferroni), at most 1."""
        return min(1.0, len(self.channels) * min(c.p for c in self.channels))


@dataclass(frozen=True)
class _Summary:
    image_means: np.ndarray
    mean: Tensor
    std: Tensor
    hashes: list[bytes]


def surrogate_statistics(surrogate: ImageSet, train: ImageSet) -> SurrogateStatistics:
    """Compare a surrogate set with the training set, channel by channel.

    The two-sample Kolmogorov-Smirnov test compares the distributions of the image means (SCAR's own check). A small p
    is evidence that the sets differ in brightness or colour. A large p is no evidence that they are alike: image
    means know nothing of what an image shows.

    Args:
        surrogate: Images of the task's shape.
        train: The task's training images.

    Raises:
        DataError: The shapes differ, or a set has fewer than two readable images.
    """
    from scipy.stats import ks_2samp

    if surrogate.shape != train.shape:
        raise DataError(f"surrogate images are {list(surrogate.shape)}, training images {list(train.shape)}")
    ours, theirs = _summary(surrogate, "surrogate"), _summary(train, "training")
    channels = []
    for c in range(surrogate.shape[0]):
        test = ks_2samp(ours.image_means[:, c], theirs.image_means[:, c], method="asymp")
        mean, std, train_mean, train_std = (float(s[c]) for s in (ours.mean, ours.std, theirs.mean, theirs.std))
        ks, p = float(test.statistic), float(test.pvalue)
        channels.append(ChannelStatistics(mean, std, train_mean, train_std, ks, p))
    known = set(theirs.hashes)
    shared = sum(h in known for h in ours.hashes)
    return SurrogateStatistics(len(ours.hashes), len(theirs.hashes), tuple(channels), shared)


def contact_sheet(images: ImageSet, path: str | Path, columns: int = 12, rows: int = 8, side: int = 64) -> None:
    """Save a PNG with images from all over a set, row by row in stored order.

    Args:
        images: The set.
        path: PNG file.
        columns: Images side by side.
        rows: At most so many rows.
        side: Images smaller than this are enlarged by whole factors.

    Raises:
        DataError: No image can be read.
        ResourceError: The disk is full.
    """
    from PIL import Image

    readable = images.readable()
    if not len(readable):
        raise DataError("no image can be shown: none is readable")
    n = min(len(readable), columns * rows)
    x = images.images(readable[torch.arange(n) * len(readable) // n])
    x = x if x.shape[1] == 3 else x.mean(1, keepdim=True).repeat(1, 3, 1, 1)
    zoom = max(1, side // max(x.shape[2:]))
    x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    height, width, across = x.shape[2] + 2, x.shape[3] + 2, min(columns, n)
    sheet = torch.ones(3, math.ceil(n / across) * height, across * width)
    for i, image in enumerate(x):
        top, left = i // across * height, i % across * width
        sheet[:, top + 1 : top + height - 1, left + 1 : left + width - 1] = image
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with files.atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def _summary(images: ImageSet, which: str) -> _Summary:
    """Image means ``[N, C]``, pixel moments ``[C]`` and a hash per image, in one pass."""
    ids = images.readable()
    if len(ids) < 2:
        raise DataError(f"the {which} set has {len(ids)} readable images; statistics need two")
    means, squares, hashes = [], [], []
    for some in torch.split(ids, _BATCH):
        x = images.images(some)
        means.append(x.double().mean((2, 3)))
        squares.append(x.double().square().mean((2, 3)))
        pixels = (x * 255).round().to(torch.uint8).numpy()
        hashes += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
    image_means = torch.cat(means)
    mean = image_means.mean(0)
    std = (torch.cat(squares).mean(0) - mean.square()).clamp_min(0).sqrt()
    return _Summary(image_means.numpy(), mean, std, hashes)
