"""The published way, step by step: all rows on the CPU, float32 decomposition, 1 x 1 images for convolutions.

Kept to reproduce published numbers and to compare with. Written after the description of ``InTAct/intact.py`` at
commit e4f2367 of the BARRIER repository; its defects are kept on purpose and named below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import DataError
from expunge.protections.interval.collect import CollectSettings
from expunge.protections.interval.loss import IntervalPenalty, PenaltySettings, build
from expunge.protections.interval.regions import Bounds
from expunge.protections.interval.rows import as_finite
from expunge.protections.interval.statistics import Collected, Statistics
from expunge.protections.interval.tap import run

Batches = Callable[[], Iterable[Any]]


def flat_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows as published: all leading axes for Linear, input pixels for Conv2d (no unfolding), else one per sample."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module, nn.Conv2d):
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return x.reshape(x.shape[0], -1)


def gather(
    model: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[Any], Any], batches: Batches
) -> dict[str, Tensor]:
    """All input rows of every layer, ``[N, d]`` on the CPU, in the order of the batches."""
    kept: dict[str, list[Tensor]] = {}
    run(
        model,
        layers,
        lambda name, module, x: kept.setdefault(name, []).append(flat_rows(module, x).cpu()),
        batches(),
        forward,
    )
    silent = [n for n in layers if n not in kept]
    if silent:
        raise DataError(f"layers {silent} were not called while the forget set was passed; remove them from targets")
    return {n: torch.cat(kept[n]) for n in layers}


def directions(centred: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Right singular vectors as rows and singular values: ``min(N, d)`` of them for svd, ``d`` for pca."""
    if method == "svd":
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        return vh, s
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors.flip(1).T.contiguous(), values.flip(0).clamp_min(0).sqrt()


def summarise(rows: Tensor, settings: CollectSettings, method: str, retain: Tensor | None) -> Statistics:
    """Statistics of one layer as published, float32.

    Args:
        rows: Forget rows ``[N, d]``; non-finite entries count as 0.
        settings: Levels, ``reduced_dim``, margin and switches.
        method: ``svd`` or ``pca``.
        retain: Retain rows, for actual bounds.
    """
    x = as_finite(rows.float())
    mean = x.mean(0)
    centred = x - mean
    d = x.shape[1]
    if settings.skip_svd:
        basis, rest, scale, sigma = torch.eye(d), x.new_zeros(0, d), x.new_zeros(0), x.new_zeros(0)
    else:
        vectors, values = directions(centred, method)
        k = min(settings.reduced_dim, vectors.shape[0])
        basis, rest, scale = vectors[: 0 if settings.remove_top else k], vectors[k:], values[k:]
        sigma = values / x.shape[0] ** 0.5
    z = centred @ basis.T
    bounds = Bounds(*(x.new_zeros(0) for _ in range(4)))
    if basis.shape[0]:
        z_min, z_max = (torch.quantile(z, level, dim=0) for level in (settings.lower, settings.upper))
        low, high = z_min - settings.margin, z_max + settings.margin
        if settings.actual_bounds and retain is not None:
            z_r = (as_finite(retain.float()) - mean) @ basis.T
            inner = (low, high) if settings.skip_svd else (z.amin(0), z.amax(0))
            low, high = torch.minimum(inner[0], z_r.amin(0)), torch.maximum(inner[1], z_r.amax(0))
        bounds = Bounds(z_min, z_max, low, high)
    return from_published(mean, basis, rest, scale, bounds, n_rows=x.shape[0], sigma=sigma)


def from_published(
    mean: Tensor,
    basis: Tensor,
    rest: Tensor,
    scale: Tensor,
    bounds: Bounds,
    *,
    n_rows: int = 0,
    sigma: Tensor | None = None,
) -> Statistics:
    """Build :class:`Statistics` from the published tensors (``U_residual`` and its singular values stay scatter)."""
    weighted = rest.double() * scale.double()[:, None]
    return Statistics(
        mean, basis, sigma if sigma is not None else scale[:0], *bounds, weighted.T @ weighted,
        residual_dim=rest.shape[0], n_rows=n_rows, rank=basis.shape[0] + rest.shape[0],
        residual_basis=rest, residual_scale=scale, quantile_rows=n_rows,
    )  # fmt: skip


def collect_published(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    forward: Callable[[Any], Any],
    forget: Batches,
    settings: CollectSettings,
    method: str = "svd",
    retain: Batches | None = None,
) -> Collected:
    """Statistics of every layer as published; memory grows with the number of rows."""
    rows = gather(model, layers, forward, forget)
    held = gather(model, layers, forward, retain) if settings.actual_bounds and retain is not None else {}
    return {n: (summarise(rows.pop(n), settings, method, held.pop(n, None)),) for n in layers}


def exact(module: nn.Module) -> bool:
    """Whether the closed form equals the published value: Linear, and ungrouped 1 x 1 convolutions without padding."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


class PublishedLayer:
    """The published terms of one layer, by automatic differentiation, with buffers on the device.

    Statistics of a convolution are laid on 1 x 1 images and convolved with the drift, so with padding most taps of a
    kernel are never seen, an unpadded kernel larger than 1 x 1 raises, and with ``skip_svd`` bounds and taps do not
    line up (they raise for grouped convolutions).

    Args:
        module: Linear or Conv2d.
        stats: Published statistics.
        skip_svd: Raw coordinates.
        use_interval: False drops the interval term.
        weight: Snapshot, else the current weight.
        bias: Snapshot of the bias.
    """

    def __init__(
        self,
        module: nn.Module,
        stats: Statistics,
        *,
        skip_svd: bool = False,
        use_interval: bool = True,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.module, self.skip_svd, self.use_interval = module, skip_svd, use_interval
        source: Tensor = module.weight if weight is None else weight  # type: ignore[assignment]
        dtype = dtype or (torch.float64 if source.dtype == torch.float64 else torch.float32)
        like: dict[str, Any] = {"dtype": dtype, "device": source.device}
        self.weight = source.detach().to(copy=True, **like)
        own: Any = getattr(module, "bias", None)
        start: Any = own if bias is None else bias
        self.bias: Tensor | None = start.detach().to(copy=True, **like) if own is not None else None
        self.mean, self.basis = stats.mean.to(**like), stats.basis.to(**like)
        rest = stats.residual_basis if stats.residual_basis is not None else stats.basis[:0]
        scale = stats.residual_scale if stats.residual_scale is not None else stats.sigma[:0]
        self.rest, self.scale = rest.to(**like), scale.to(**like)
        self.bounds = Bounds(*(b.to(**like) for b in stats.bounds))

    def terms(self) -> Tensor:
        """``[3]``: mean, residual and interval term at the current weights."""
        dtype = self.weight.dtype
        module: Any = self.module
        dw: Tensor = module.weight.to(dtype) - self.weight
        db: Tensor | None = module.bias.to(dtype) - self.bias if self.bias is not None else None
        zero = dw.new_zeros(())
        moved = self._respond(self.mean[None], dw)
        if db is not None:
            moved = moved + (db[:, None, None] if moved.dim() == 4 else db)
        mean = (moved**2).mean()
        residual = zero
        if self.rest.shape[0]:
            out = self._respond(self.rest, dw)
            residual = ((out * self.scale.reshape(-1, *[1] * (out.dim() - 1))) ** 2).mean()
        if not self.use_interval or not self.basis.shape[0]:
            return torch.stack([mean, residual, zero])
        z_min, z_max, low, high = self.bounds
        if self.skip_svd and isinstance(self.module, nn.Conv2d):
            delta = dw.permute(0, 2, 3, 1).reshape(dw.shape[0], -1)
            taps = dw.shape[2] * dw.shape[3]
            z_min, z_max, low, high = (b.repeat_interleave(taps) for b in self.bounds)
        else:
            out = self._respond(self.basis, dw)
            delta = out.movedim(0, -1).reshape(-1, out.shape[0]) if out.dim() == 4 else out.T
        up, down = delta.clamp_min(0), (-delta).clamp_min(0)
        legs = (
            up @ low - down @ z_min,
            up @ z_min - down @ low,
            up @ z_max - down @ high,
            up @ high - down @ z_max,
        )
        interval = sum(((leg**2).mean() for leg in legs[1:]), start=(legs[0] ** 2).mean())
        return torch.stack([mean, residual, interval])

    def _respond(self, vectors: Tensor, dw: Tensor) -> Tensor:
        m = self.module
        if not isinstance(m, nn.Conv2d):
            return vectors @ dw.T
        return F.conv2d(vectors[:, :, None, None], dw, None, m.stride, m.padding, m.dilation, m.groups)

    def __call__(self, scale: float = 1.0) -> Tensor:
        """Sum of the three terms, times ``scale``."""
        return self.terms().sum() * scale


def build_published(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, tuple[Statistics, ...]],
    settings: PenaltySettings,
    *,
    skip_svd: bool = False,
    snapshot: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> IntervalPenalty:
    """The published penalty: closed form where it is the same number, else 1 x 1 images.

    Args:
        layers: Modules by name; others than Linear and Conv2d cost nothing and are not counted, as published.
        statistics: Published statistics, one entry per layer.
        settings: Lambda, normalisation and region options.
        skip_svd: Statistics are raw coordinates.
        snapshot: Weights and biases by parameter name; current ones when absent.
        dtype: Precision of the penalty.
        force: Never use the closed form.
    """
    counted = {n: m for n, m in layers.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
    easy = {} if force else {n: m for n, m in counted.items() if exact(m)}
    closed = build(easy, statistics, settings, conv="channels", snapshot=snapshot, dtype=dtype).layers
    snapshot = snapshot or {}
    values = {
        n: closed[n]
        if n in closed
        else PublishedLayer(
            m,
            statistics[n][0],
            skip_svd=skip_svd,
            use_interval=settings.interval > 0,
            dtype=dtype,
            weight=snapshot.get(f"{n}.weight"),
            bias=snapshot.get(f"{n}.bias"),
        )
        for n, m in counted.items()
    }
    return IntervalPenalty(values, settings)
