"""Regions of projected activations on which drift is penalised.

Every region is a union of axis-aligned boxes ``[low_b, high_b]`` in the k projected coordinates. A row response
``delta . z`` over one box lies between ``delta.c - |delta|.w / 2`` and ``delta.c + |delta|.w / 2`` (centre c, width w),
so the two squared ends add up to ``2 (delta.c)^2 + (|delta|.w)^2 / 2``. Boxes therefore only enter the penalty through
``sum c c^T``, ``sum c`` and ``sum w w^T``.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Region = Literal["two_corner", "env_box", "two_random", "boxes_4", "boxes_8", "slabs_2k"]
IntervalMode = Literal["full", "width_only", "centre_only", "off"]


class Bounds(NamedTuple):
    """Per direction: quantile box ``[z_min, z_max]`` inside the envelope ``[low, high]``; each ``[k]``."""

    z_min: Tensor
    z_max: Tensor
    low: Tensor
    high: Tensor


class Moments(NamedTuple):
    """What the penalty needs of a region, for ``full`` mode and unit weight.

    Args:
        centre: ``sum_b 2 c_b c_b^T``, ``[k, k]``.
        linear: ``sum_b 2 c_b``, ``[k]``; couples the bias when it is included.
        width: ``sum_b w_b w_b^T``, ``[k, k]``; the width part is half the form of ``|delta|`` in it.
        legs: Number of squared terms.
        bias: Coefficient of the squared bias drift.
    """

    centre: Tensor
    linear: Tensor
    width: Tensor
    legs: int
    bias: float


def boxes(region: Region, bounds: Bounds, side: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower and upper corners of the boxes of a region, each ``[m, k]``.

    Args:
        region: ``two_corner`` (published), ``env_box`` (the whole envelope: same maximum as the complement of the
            quantile box, independent of signs), ``two_random``, ``boxes_4``/``boxes_8`` (2 or 4 coordinate groups, a
            low and a high box each) or ``slabs_2k`` (one coordinate per group: the exact complement).
        bounds: Quantile box and envelope.
        side: ``[k]``, for ``two_random``: 1 where the first box takes the high side.

    Raises:
        ValueError: ``two_random`` without ``side``.
    """
    z_min, z_max, low, high = bounds
    k = z_min.numel()
    if region == "env_box":
        return low[None], high[None]
    if region == "two_corner":
        return torch.stack([low, z_max]), torch.stack([z_min, high])
    if region == "two_random":
        if side is None:
            raise ValueError("region 'two_random' needs the side of every direction")
        up = side.bool()
        first = torch.where(up, z_max, low), torch.where(up, high, z_min)
        second = torch.where(up, low, z_max), torch.where(up, z_min, high)
        return torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]])
    m = {"boxes_4": 2, "boxes_8": 4, "slabs_2k": k}[region]
    coordinate = torch.arange(k, device=low.device)
    edges = [g * k // m for g in range(m + 1)] if m else [0]
    lows, highs = [], []
    for start, stop in itertools.pairwise(edges):
        inside = (coordinate >= start) & (coordinate < stop)
        lows += [low, torch.where(inside, z_max, low)]
        highs += [torch.where(inside, z_min, high), high]
    return torch.stack(lows) if lows else low[:0, None], torch.stack(highs) if highs else high[:0, None]


def moments(
    region: Region,
    bounds: Bounds,
    *,
    mode: IntervalMode = "full",
    normalize: bool = False,
    include_db: bool = False,
    side: Tensor | None = None,
) -> Moments:
    """Fold a region into the constants of the closed form.

    Args:
        region: See :func:`boxes`.
        bounds: Quantile box and envelope.
        mode: ``full``, ``width_only``, ``centre_only`` or ``off``.
        normalize: Divide by the number of squared terms (``full``: two per box, else one).
        include_db: Add the bias drift to every leg (``full`` only).
        side: See :func:`boxes`.
    """
    k = bounds.low.numel()
    if mode == "off" or k == 0:
        zero = bounds.low.new_zeros
        return Moments(zero(k, k), zero(k), zero(k, k), 0, 0.0)
    low, high = boxes(region, bounds, side)
    c, w, m = (low + high) / 2, high - low, low.shape[0]
    legs = 2 * m if mode == "full" else m
    scale = 1.0 / legs if normalize else 1.0
    centre = (2 * scale) * (c.T @ c) if mode != "width_only" else torch.zeros_like(c.T @ c)
    width = scale * (w.T @ w) if mode != "centre_only" else torch.zeros_like(w.T @ w)
    bias = 2.0 * m * scale if include_db and mode == "full" else 0.0
    linear = (2 * scale) * c.sum(0) if bias else torch.zeros_like(c.sum(0))
    return Moments(centre, linear, width, legs, bias)


def uniform_margin(bounds: Bounds) -> Bounds:
    """Give all directions one margin: the mean over directions of the smaller of the two margins."""
    margin = torch.minimum(bounds.z_min - bounds.low, bounds.high - bounds.z_max).mean()
    return bounds._replace(low=bounds.z_min - margin, high=bounds.z_max + margin)


def flip(bounds: Bounds, signs: Tensor) -> Bounds:
    """Bounds after multiplying directions by ``signs`` (``[k]`` of +-1); exact for symmetric quantile levels."""
    minus = signs < 0
    z_min, z_max, low, high = bounds
    return Bounds(
        torch.where(minus, -z_max, z_min),
        torch.where(minus, -z_min, z_max),
        torch.where(minus, -high, low),
        torch.where(minus, -low, high),
    )


def row_maximum(delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Largest ``|delta_i . z|`` over a union of boxes.

    Args:
        delta: ``[o, k]``.
        low: Lower corners ``[m, k]``.
        high: Upper corners ``[m, k]``.

    Returns:
        ``[o]``.
    """
    c, w = (low + high) / 2, high - low
    return ((delta @ c.T).abs() + (delta.abs() @ w.T) / 2).amax(1)
