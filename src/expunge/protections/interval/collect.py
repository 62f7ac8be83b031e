"""Streaming collection of interval statistics, in memory that does not grow with the number of forget rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.errors import DataError, RequestError
from expunge.protections.interval import rows as rows_of
from expunge.protections.interval.accumulate import Extremes, Sample, Scatter
from expunge.protections.interval.displaced import PatchScatter, worthwhile
from expunge.protections.interval.regions import Bounds
from expunge.protections.interval.statistics import Collected, Statistics, box, decompose
from expunge.protections.interval.tap import run
from expunge.rng import key

Batches = Callable[[], Iterable[Any]]
Forward = Callable[[Any], Any]

#: Projected rows kept per layer when forget inputs are passed a second time.
SECOND_PASS_ROWS = 1 << 16


@dataclass(frozen=True)
class CollectSettings:
    """What to collect.

    Args:
        lower: Lower quantile level.
        upper: Upper quantile level.
        reduced_dim: Leading directions kept, at most.
        margin: Distance of the envelope from the quantile box.
        actual_bounds: Envelope = smallest and largest projection over forget and retain rows.
        skip_svd: Raw coordinates instead of leading directions; no residual.
        remove_top: No leading directions, only mean and residual.
        conv: Rows of a convolution, see :func:`expunge.protections.interval.rows.iterate`.
        residual: ``covariance``, or ``scatter`` (grows with the number of rows, as published).
        retain_moments: Also collect mean and covariance of the retain rows.
        buffer_bytes: Size of the row sample per distinct input; while all rows fit, quantiles are exact.
        passes: 2 passes the forget inputs a second time when they do not fit the sample, for finer quantiles.
        seed: Seed of the row sample.
    """

    lower: float = 0.05
    upper: float = 0.95
    reduced_dim: int = 32
    margin: float = 20.0
    actual_bounds: bool = False
    skip_svd: bool = False
    remove_top: bool = False
    conv: rows_of.ConvRows = "patches"
    residual: Literal["covariance", "scatter"] = "covariance"
    retain_moments: bool = False
    buffer_bytes: int = 4 << 20
    passes: int = 1
    seed: int = 0


class _UnsharedError(Exception):
    """Two layers that had the same input in one batch had different ones in another."""


@dataclass
class _Gathered:
    scatter: list[Scatter | PatchScatter]
    sample: list[Sample]

    def update(self, x: Tensor, module: nn.Module, conv: rows_of.ConvRows) -> bool:
        """Add an input; return False when it contains a non-finite number."""
        finite = True
        if isinstance(self.scatter[0], PatchScatter):
            conv2d: nn.Conv2d = module  # type: ignore[assignment]
            x = x[None] if x.dim() == 3 else x
            for g, (scatter, part) in enumerate(zip(self.scatter, x.chunk(conv2d.groups, 1), strict=True)):
                before = scatter.n
                finite = scatter.update(part) and finite
                self.sample[g].offer(scatter.n - before, partial(rows_of.patches_at, x, conv2d, g))
            return finite
        for g, rows in rows_of.iterate(x, module, conv):
            finite = self.scatter[g].update(rows) and finite
            self.sample[g].update(rows)
        return finite


@dataclass
class _Frame:
    mean: Tensor
    basis: Tensor | None
    extremes: Extremes = field(default_factory=Extremes)
    sample: Sample | None = None
    retain: Scatter | None = None

    def project(self, rows: Tensor) -> Tensor:
        centred = rows.to(self.mean.dtype) - self.mean
        return centred if self.basis is None else centred @ self.basis.T


class _FirstPass:
    """Gathers forget rows; layers that see the very same tensor in every batch are gathered once."""

    def __init__(self, settings: CollectSettings, share: bool) -> None:
        self.settings, self.share = settings, share
        self.gathered: dict[str, _Gathered] = {}
        self.leader: dict[str, str] = {}
        self._seen: dict[tuple[object, ...], tuple[Tensor, str]] = {}
        self._called: set[str] = set()
        self._first_batch = True

    def observe(self, name: str, module: nn.Module, x: Tensor) -> None:
        conv = self.settings.conv
        tag = (x.data_ptr(), x.shape, x.stride(), x._version, *rows_of.signature(module, conv))
        first_call = name not in self._called
        self._called.add(name)
        # the tensor is kept until the batch ends, so that its address cannot be reused
        holder = self._seen.setdefault(tag, (x, name))[1]
        if self.share and (name in self.leader or (holder != name and self._first_batch and first_call)):
            if not first_call or holder != self.leader.setdefault(name, holder):
                raise _UnsharedError
            return
        if self.share and not first_call and name in self.leader.values():
            raise _UnsharedError
        if name not in self.gathered:
            d, g = rows_of.width(module, conv), rows_of.groups(module, conv)
            capacity = max(1, self.settings.buffer_bytes // (d * g * x.element_size()))
            seeds = [key(self.settings.seed, "interval rows", i) for i in range(g)]
            quick = worthwhile(module, x, conv)
            scatter: list[Scatter | PatchScatter] = [
                PatchScatter(module) if quick else Scatter(d)  # type: ignore[arg-type]
                for _ in range(g)
            ]
            self.gathered[name] = _Gathered(scatter, [Sample(capacity, s) for s in seeds])
        if not self.gathered[name].update(x, module, conv):
            raise DataError(
                f"layer '{name}': a forget input holds NaN or infinite values; find the sample that causes "
                f"them, or take the layer out of targets"
            )

    def end_batch(self) -> None:
        if any((name in self._called) != (leader in self._called) for name, leader in self.leader.items()):
            raise _UnsharedError
        self._seen.clear()
        self._called.clear()
        self._first_batch = False


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    forward: Forward,
    forget: Batches,
    settings: CollectSettings,
    retain: Batches | None = None,
) -> Collected:
    """Collect statistics of the inputs of ``layers`` on the forget set.

    One pass gathers count, mean and covariance (float64 sums) and a bounded uniform sample of rows for the quantiles;
    a second one, only where rows exceed the sample and actual bounds or ``passes=2`` are asked for, gathers exact
    extremes. Retain inputs are passed at most once.

    Args:
        model: Run in evaluation mode without gradients; its modes are put back and hooks removed in any case.
        layers: Linear and Conv2d modules by name.
        forward: Called with each batch; has to run every layer.
        forget: Returns one pass over the forget batches; called once or twice.
        settings: What to collect.
        retain: Returns one pass over the retain batches.

    Returns:
        One tuple per layer with one entry per group; layers with the same input share the same tuple object.

    Raises:
        DataError: A layer never ran, or an input is not finite.
        RequestError: Retain statistics are asked for without retain batches, or a layer is not supported.
    """
    if retain is None and settings.retain_moments:
        raise RequestError("retain statistics need a retain set; name one or set retain_weight to 0")
    share = quick = True
    while True:
        first = _FirstPass(settings, share)
        try:
            if run(model, layers, first.observe, forget(), forward, first.end_batch, stop_early=quick):
                break
            quick = False
        except _UnsharedError:
            share = False
    silent = [n for n in layers if n not in first.gathered and n not in first.leader]
    if silent:
        raise DataError(f"layers {silent} were not called while the forget set was passed; remove them from targets")
    actual = settings.actual_bounds and retain is not None
    result = {name: _finish(name, gathered, settings) for name, gathered in first.gathered.items() if name in layers}
    del first.gathered
    leaders = {n: layers[n] for n in result}
    frames = {n: [f for _, f, _ in parts] for n, parts in result.items()}
    again = {
        n: m for n, m in leaders.items()
        if not all(c for _, _, c in result[n]) and (actual or settings.passes > 1)
    }  # fmt: skip
    if again:
        for n in again:
            for frame in frames[n]:
                frame.sample = Sample(SECOND_PASS_ROWS, key(settings.seed, "interval projections"))
        run(model, again, _observer(frames, settings, "forget"), forget(), forward)
    if retain is not None and (actual or settings.retain_moments):
        for n in leaders:
            for frame in frames[n]:
                frame.retain = Scatter(frame.mean.numel()) if settings.retain_moments else None
        run(model, leaders, _observer(frames, settings, "retain"), retain(), forward)
    final = {n: tuple(_bound(s, f, settings, actual) for s, f, _ in parts) for n, parts in result.items()}
    return {n: final[first.leader.get(n, n)] for n in layers}


def _finish(name: str, gathered: _Gathered, settings: CollectSettings) -> list[tuple[Statistics, _Frame, bool]]:
    parts = []
    while gathered.scatter:
        scatter, sample = gathered.scatter.pop(0), gathered.sample.pop(0)
        mean, cov = scatter.finish()
        # products of float32 rows leave noise of a few units in the last place of the largest eigenvalue
        tolerance = 1e-7 if scatter.compute == torch.float64 else 1e-3
        d = mean.numel()
        if settings.skip_svd:
            basis, sigma, rank = torch.eye(d, dtype=cov.dtype, device=cov.device), cov.diagonal().sqrt(), d
            residual, r = torch.zeros_like(cov), 0
        else:
            found = decompose(cov, settings.reduced_dim, tolerance=tolerance, drop_top=settings.remove_top)
            basis, sigma, residual, rank = found.basis, found.sigma, found.residual, found.rank
            r = d - min(settings.reduced_dim, rank)
        if settings.residual == "scatter":
            residual *= scatter.n
        frame = _Frame(mean.to(scatter.compute), None if settings.skip_svd else basis.to(scatter.compute))
        z = frame.project(sample.rows())
        bounds = box(z.double(), settings.lower, settings.upper, settings.margin)
        if basis.shape[0]:
            frame.extremes.update(z)
        residual = residual.to(scatter.compute)
        stats = Statistics(
            mean, basis, sigma, *bounds, residual, r, scatter.n, rank, quantile_rows=sample.rows().shape[0]
        )
        parts.append((stats, frame, sample.complete))
    return parts


def _observer(
    frames: Mapping[str, list[_Frame]], settings: CollectSettings, role: str
) -> Callable[[str, nn.Module, Tensor], None]:
    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        for g, rows in rows_of.iterate(x, module, settings.conv):
            frame = frames[name][g]
            z = frame.project(rows)
            if z.shape[1]:
                frame.extremes.update(z)
            if role == "forget" and frame.sample is not None:
                frame.sample.update(z)
            if role == "retain" and frame.retain is not None:
                frame.retain.update(rows)
            if not bool(torch.isfinite(z).all()):
                raise DataError(f"layer '{name}': a {role} input holds NaN or infinite values")

    return observe


def _bound(stats: Statistics, frame: _Frame, settings: CollectSettings, actual: bool) -> Statistics:
    if frame.sample is not None and stats.basis.shape[0]:
        z = frame.sample.rows()
        bounds = box(z.double(), settings.lower, settings.upper, settings.margin)
        stats = replace(stats.with_bounds(bounds), quantile_rows=z.shape[0])
    if actual and stats.basis.shape[0]:
        stats = stats.with_bounds(
            Bounds(stats.z_min, stats.z_max, frame.extremes.low.double(), frame.extremes.high.double())
        )
    if frame.retain is not None:
        mean, cov = frame.retain.finish()
        stats = replace(stats, retain_mean=mean, retain_cov=cov)
    return stats
