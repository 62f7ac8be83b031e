"""Distances between sets of images by their features: FID and KID. The features decide what is compared: name them.

Paper: Heusel et al. 2017 (arXiv 1706.08500), FID; Binkowski et al. 2018 (arXiv 1801.01401), KID.
Deviates: computed in float64 from features (any extractor); the root of the product of covariances is taken from a
symmetric matrix, so that equal sets have distance 0; no remainder batch is dropped; KID uses all images instead of
random subsets and has a jackknife interval.
"""

from __future__ import annotations

import numpy as np

from expunge.errors import DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import LEVEL, Estimate
from expunge.registry import Info

FID_PAPER = "Heusel et al., NeurIPS 2017, arXiv 1706.08500"
KID_PAPER = "Binkowski et al., ICLR 2018, arXiv 1801.01401"
Features = np.ndarray


def frechet(a: Features, b: Features) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)`` of two sets of features ``[N, D]``.

    Raises:
        DataError: Fewer than two rows, widths that differ, or values that are not finite.
    """
    x, y = _pair(a, b)
    if np.array_equal(_ordered(x), _ordered(y)):
        return 0.0  # the same set in any order: rounding must not show up as a distance
    s, t = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ t @ root), 0)).sum()
    return max(0.0, float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross))


def _distance(a: Features, b: Features, backbone: str, note: str) -> Estimate:
    value = frechet(a, b)
    n, width = min(len(a), len(b)), np.shape(a)[1]
    small = f"{n} images for {width} features: the value is too large by an unknown amount" if n <= width else ""
    text = "; ".join(filter(None, (f"features: {backbone}", small, note)))
    return Estimate(value, n=n, method="Frechet distance of Gaussians fitted to features, no interval", note=text)


@metric(
    "fid",
    Info("Frechet distance between the images of the original and of the edited model.", FID_PAPER, needs=("before",)),
    label="FID to the original, kept prompts",
    explain="How far the images of prompts that stay have moved as a set from those of the untouched model. 0 is no "
    "change. Values depend on the features and on the number of images and compare within one table only.",
    unit="",
    direction="lower",
    bounds=(0.0, None),
)
def fid(before: Features, after: Features, *, backbone: str, note: str = "") -> Estimate:
    """FID between two sets of features ``[N, D]``; see :func:`frechet`."""
    return _distance(before, after, backbone, note)


@metric(
    "fid_real",
    Info("Frechet distance between real images and those of the model.", FID_PAPER, needs=("real",)),
    label="FID to real images",
    explain="How far the images of prompts that stay are as a set from real ones. Compare with the untouched model; "
    "values depend on the features and on the number of images.",
    unit="",
    direction="lower",
    bounds=(0.0, None),
)
def fid_real(real: Features, drawn: Features, *, backbone: str, note: str = "") -> Estimate:
    """FID to real images; see :func:`frechet`."""
    return _distance(real, drawn, backbone, note)


def kernel_distance(a: Features, b: Features, *, paired: bool) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel ``(x . y / D + 1)^3``, and its jackknife standard error.

    Args:
        a: ``[N, D]``.
        b: ``[M, D]``.
        paired: Row ``i`` of both stems from the same ask and noise. The terms ``k(x_i, y_i)`` are then left out, which
            keeps the estimate unbiased although pairs are dependent, and makes equal sets exactly 0.

    Raises:
        DataError: As :func:`frechet`, fewer than three rows, or pairs of different number.
    """
    x, y = _pair(a, b, least=3)
    if paired and len(x) != len(y):
        raise DataError(f"kid: {len(x)} and {len(y)} images are no pairs")

    def kernel(p: Features, q: Features) -> Features:
        found: Features = (p @ q.T / p.shape[1] + 1) ** 3
        return found

    within_x, within_y, across = kernel(x, x), kernel(y, y), kernel(x, y)
    m, n = len(x), len(y)
    if paired:
        h = within_x + within_y - across - across.T
        np.fill_diagonal(h, 0)
        value = h.sum() / (m * (m - 1))
        left = (h.sum() - 2 * h.sum(1)) / ((m - 1) * (m - 2))
        return float(value), float(np.sqrt((m - 1) / m * ((left - left.mean()) ** 2).sum()))
    for table in (within_x, within_y):
        np.fill_diagonal(table, 0)
    sx, sy, sc = within_x.sum(), within_y.sum(), across.sum()
    value = sx / (m * (m - 1)) + sy / (n * (n - 1)) - 2 * sc / (m * n)
    variance = 0.0
    for own, total, other, size, rest in ((within_x, sx, across.sum(1), m, n), (within_y, sy, across.sum(0), n, m)):
        left = (total - 2 * own.sum(1)) / ((size - 1) * (size - 2)) - 2 * (sc - other) / ((size - 1) * rest)
        variance += (size - 1) / size * ((left - left.mean()) ** 2).sum()
    return float(value), float(np.sqrt(variance))


def _kernel(a: Features, b: Features, backbone: str, paired: bool, note: str) -> Estimate:
    from scipy.stats import norm

    value, error = kernel_distance(a, b, paired=paired)
    half = float(norm.ppf(0.5 + LEVEL / 2)) * error
    text = "; ".join(filter(None, (f"features: {backbone}", note)))
    method = f"unbiased MMD^2, cubic kernel, {'pairs left out, ' if paired else ''}jackknife 95 % interval"
    return Estimate(value, value - half, value + half, min(len(a), len(b)), "", method, text)


@metric(
    "kid",
    Info("Kernel distance between the images of the original and of the edited model.", KID_PAPER, needs=("before",)),
    label="KID to the original, kept prompts",
    explain="The same question as FID, by another distance that is fair for few images and has an interval. 0 is no "
    "change; slightly negative values are chance.",
    unit="",
    direction="lower",
    bounds=(None, None),
)
def kid(before: Features, after: Features, *, backbone: str, paired: bool = True, note: str = "") -> Estimate:
    """KID between two sets of features; see :func:`kernel_distance`."""
    return _kernel(before, after, backbone, paired, note)


@metric(
    "kid_real",
    Info("Kernel distance between real images and those of the model.", KID_PAPER, needs=("real",)),
    label="KID to real images",
    explain="How far the images of prompts that stay are as a set from real ones, fair for few images.",
    unit="",
    direction="lower",
    bounds=(None, None),
)
def kid_real(real: Features, drawn: Features, *, backbone: str, note: str = "") -> Estimate:
    """KID to real images."""
    return _kernel(real, drawn, backbone, False, note)


def _ordered(x: Features) -> Features:
    return x[np.lexsort(x.T[::-1])]


def _pair(a: Features, b: Features, least: int = 2) -> tuple[Features, Features]:
    x, y = (np.asarray(z, dtype=np.float64) for z in (a, b))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise DataError(f"features: two sets [N, D] of at least {least} rows expected, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("features: a value is not finite")
    return x, y
