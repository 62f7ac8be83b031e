"""Class-balanced splits and prefixes, functions of labels and a seed only."""

from __future__ import annotations

import torch
from torch import Tensor

from expunge import rng
from expunge.errors import DataError


def stratified(labels: Tensor, fraction: float, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Split row numbers into a rest and a held-out part with the same class balance.

    Args:
        labels: int64 ``[N]``.
        fraction: Held-out share of each class, in (0, 1); rounded to the nearest count.
        seed: Seed of the draw.
        purpose: Name of the draw, so that different splits with one seed are independent.

    Returns:
        Sorted row numbers of the rest and of the held-out part.

    Raises:
        DataError: A class would lose all its rows, or nothing would be held out.
    """
    if not 0 < fraction < 1:
        raise DataError(f"{purpose}: the held-out share must lie between 0 and 1, got {fraction}")
    held = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        count = round(len(rows) * fraction)
        if count == len(rows):
            raise DataError(f"{purpose}: class {label} has only {len(rows)} rows, none would be left for training")
        held.append(rows[rng.permutation(rng.key(seed, purpose, label), len(rows))[:count]])
    out = torch.cat(held).sort().values
    if len(out) == 0:
        raise DataError(f"{purpose}: {fraction:g} of every class rounds to no row at all; take a larger share")
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[out] = False
    return rest.nonzero().flatten(), out


def balanced_prefix(labels: Tensor, limit: int) -> Tensor:
    """Row numbers of the first ``limit`` rows when classes take turns, sorted.

    Raises:
        DataError: ``limit`` is larger than the set or not positive.
    """
    if not 0 < limit <= len(labels):
        raise DataError(f"limit {limit} must be between 1 and the {len(labels)} rows there are")
    rank = torch.empty_like(labels)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        rank[rows] = torch.arange(len(rows))
    return rank.sort(stable=True).indices[:limit].sort().values
