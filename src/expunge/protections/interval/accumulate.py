"""Bounded-memory accumulators: mean and covariance, a uniform sample of rows, extremes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from expunge import rng

_PANEL = 128
_DOUBLE_BELOW = 128


def compute_dtype(dtype: torch.dtype, d: int) -> torch.dtype:
    """Precision of products of rows of length ``d``: their own, but float64 when narrow."""
    return torch.float32 if dtype != torch.float64 and d > _DOUBLE_BELOW else torch.float64


class Scatter:
    """Count, mean and covariance of rows, independent of batch size and order up to rounding.

    Rows are shifted by the mean of the first chunk, multiplied in their own precision (float64 when narrow) and added
    up in float64. Only the block upper triangle is computed and kept.

    Args:
        d: Row length.
    """

    def __init__(self, d: int) -> None:
        self.d, self.n = d, 0
        self._edges = [*range(0, d, _PANEL), d] if d > 2 * _PANEL else [0, d]
        self._panels: list[Tensor] = []
        self._shift = torch.empty(0)
        self._sum = torch.empty(0)
        self.compute: torch.dtype = torch.float64

    def update(self, rows: Tensor) -> bool:
        """Add ``rows [n, d]``; return False when they contain a non-finite number."""
        if not self.n:
            self.compute = compute_dtype(rows.dtype, self.d)
            self._shift = rows.to(self.compute).mean(0)
            self._sum = torch.zeros(self.d, dtype=torch.float64, device=rows.device)
            sizes = [(b - a) * (self.d - a) for a, b in itertools.pairwise(self._edges)]
            flat = torch.zeros(sum(sizes), dtype=torch.float64, device=rows.device).split(sizes)
            self._panels = [p.view(-1, self.d - a) for p, a in zip(flat, self._edges[:-1], strict=True)]
        x = rows.to(self.compute) - self._shift
        total = x.sum(0)
        self.n += rows.shape[0]
        self._sum += total
        for panel, a, b in zip(self._panels, self._edges[:-1], self._edges[1:], strict=True):
            panel += x[:, a:b].T @ x[:, a:]
        return bool(torch.isfinite(total).all())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the mean ``[d]`` and the covariance (divided by N) ``[d, d]`` in float64, and free the sums."""
        offset = self._sum / self.n
        cov = torch.empty(self.d, self.d, dtype=torch.float64, device=self._sum.device)
        for panel, (a, b) in zip(self._panels, itertools.pairwise(self._edges), strict=True):
            cov[a:b, a:] = panel
            cov[a:, a:b] = panel.T
        self._panels = []
        cov /= self.n
        for a, b in itertools.pairwise(self._edges):
            cov[a:b] -= torch.outer(offset[a:b], offset)
        return self._shift.double() + offset, cov


class Sample:
    """A uniform sample of rows without replacement, of fixed size and independent of how rows are batched.

    Every row gets a pseudo-random number from its index; the smallest ones stay. While all rows fit, all are kept,
    in order. The level of a quantile taken from n kept rows has standard error ``sqrt(p (1 - p) / n)``.
    """

    def __init__(self, capacity: int, seed_key: int) -> None:
        self.capacity, self.seed_key, self.seen = capacity, seed_key, 0
        self._rows = torch.empty(0)
        self._keys = np.empty(0, dtype=np.uint64)

    @property
    def complete(self) -> bool:
        """Whether every row seen is still here."""
        return self.seen <= self.capacity

    def update(self, rows: Tensor) -> None:
        """Offer ``rows [n, d]``."""
        self.offer(rows.shape[0], rows.__getitem__)

    def offer(self, n: int, rows: Callable[[Tensor], Tensor]) -> None:
        """Offer ``n`` rows of which only those that enter the sample are made.

        Args:
            n: How many.
            rows: Gives the rows ``[m, d]`` of increasing or arbitrary indices ``[m]`` below ``n``, int64 on the CPU.
        """
        keys = rng.uniform_bits(self.seed_key, torch.arange(self.seen, self.seen + n))
        free = max(0, min(self.capacity - self.seen, n))
        if free:
            first = rows(torch.arange(free))
            if not self.seen:
                self._rows = first.new_empty(self.capacity, first.shape[1])
                self._keys = np.empty(self.capacity, dtype=np.uint64)
            self._rows[self.seen : self.seen + free] = first
            self._keys[self.seen : self.seen + free] = keys[:free]
        self.seen += n
        keys = keys[free:]
        candidates = np.flatnonzero(keys < self._keys.max()) if len(keys) else keys
        if not candidates.size:
            return
        both = np.concatenate([self._keys, keys[candidates]])
        keep = np.argpartition(both, self.capacity - 1)[: self.capacity]
        stay = np.zeros(self.capacity, dtype=bool)
        stay[keep[keep < self.capacity]] = True
        new = candidates[keep[keep >= self.capacity] - self.capacity]
        slots = np.flatnonzero(~stay)
        self._keys[slots] = keys[new]
        self._rows[torch.from_numpy(slots).to(self._rows.device)] = rows(torch.from_numpy(new + free))

    def rows(self) -> Tensor:
        """The kept rows ``[min(seen, capacity), d]``."""
        return self._rows[: min(self.seen, self.capacity)]


class Extremes:
    """Smallest and largest value per coordinate."""

    def __init__(self) -> None:
        self.low = torch.empty(0)
        self.high = torch.empty(0)

    def update(self, z: Tensor) -> None:
        """Add projections ``[n, k]``."""
        low, high = z.aminmax(dim=0)
        self.low = torch.minimum(self.low, low) if self.low.numel() else low
        self.high = torch.maximum(self.high, high) if self.high.numel() else high
