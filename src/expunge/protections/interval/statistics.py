"""Statistics of a layer's forget inputs: mean, leading directions, quantile box, envelope, residual energy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from expunge.errors import ArtifactError
from expunge.protections.interval.regions import Bounds, flip

_FORMAT = "expunge.interval_statistics.1"
_FULL_EIGH_UP_TO = 512
_TENSORS = (
    "mean", "basis", "sigma", "z_min", "z_max", "low", "high", "residual",
    "residual_basis", "residual_scale", "retain_mean", "retain_cov",
)  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """What is known about the rows that one weight block (a layer, or a group of a convolution) is applied to.

    Args:
        mean: Mean of the forget rows, ``[d]``.
        basis: Leading directions as rows, ``[k, d]``, orthonormal.
        sigma: Standard deviations along the computed directions, descending; at least ``k`` of them.
        z_min: Lower quantile of the centred projections, ``[k]``.
        z_max: Upper quantile, ``[k]``.
        low: Lower end of the envelope, ``[k]``.
        high: Upper end of the envelope, ``[k]``.
        residual: Quadratic form of the energy outside the leading directions, ``[d, d]``: a covariance, or a scatter
            where the published scaling is kept.
        residual_dim: Number r that the residual term is divided by.
        n_rows: Number N of forget rows.
        rank: Numerical rank among the computed directions.
        residual_basis: ``[r, d]``, only as published.
        residual_scale: Singular values of the residual directions, ``[r]``, only as published.
        retain_mean: Mean of the retain rows, ``[d]``, if collected.
        retain_cov: Covariance of the retain rows, ``[d, d]``, if collected.
        quantile_rows: Rows the quantiles were taken from; fewer than ``n_rows`` means their level has standard error
            ``sqrt(p (1 - p) / quantile_rows)``.
    """

    mean: Tensor
    basis: Tensor
    sigma: Tensor
    z_min: Tensor
    z_max: Tensor
    low: Tensor
    high: Tensor
    residual: Tensor
    residual_dim: int
    n_rows: int
    rank: int
    residual_basis: Tensor | None = None
    residual_scale: Tensor | None = None
    retain_mean: Tensor | None = None
    retain_cov: Tensor | None = None
    quantile_rows: int = 0

    @property
    def bounds(self) -> Bounds:
        """Quantile box and envelope."""
        return Bounds(self.z_min, self.z_max, self.low, self.high)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the forget rows, ``[d, d]`` (meaningful with covariance scaling)."""
        k = self.basis.shape[0]
        return self.residual + (self.basis.T * self.sigma[:k] ** 2) @ self.basis

    def with_bounds(self, bounds: Bounds) -> Statistics:
        """The same directions with other bounds."""
        return replace(self, z_min=bounds.z_min, z_max=bounds.z_max, low=bounds.low, high=bounds.high)

    def flipped(self, signs: Tensor) -> Statistics:
        """Multiply directions by ``signs`` (``[k]`` of +-1); exact for symmetric quantile levels."""
        return replace(self.with_bounds(flip(self.bounds, signs)), basis=self.basis * signs[:, None])


Collected = dict[str, tuple[Statistics, ...]]


@dataclass(frozen=True)
class Directions:
    """Leading eigenvectors of a covariance: ``basis [k, d]``, ``sigma``, ``residual [d, d]``, numerical ``rank``."""

    basis: Tensor
    sigma: Tensor
    residual: Tensor
    rank: int


def canonical(basis: Tensor) -> Tensor:
    """Flip rows so that each one's entry of largest magnitude is positive."""
    if not basis.numel():
        return basis
    top = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return torch.where(top < 0, -basis, basis)


def decompose(cov: Tensor, reduced_dim: int, *, tolerance: float = 1e-7, drop_top: bool = False) -> Directions:
    """Leading directions of a covariance with canonical signs.

    Args:
        cov: ``[d, d]``, float64. Overwritten with the residual.
        reduced_dim: Directions wanted; ``k = min(reduced_dim, numerical rank)``.
        tolerance: Standard deviations up to this fraction of the largest count as zero.
        drop_top: Keep no directions, but leave the leading ones out of the residual all the same.

    Deviates:
        The published code also keeps directions without energy when ``reduced_dim`` exceeds the rank, and leaves the
        signs to the linear algebra library.
    """
    d = cov.shape[0]
    wanted = min(reduced_dim, d)
    if d <= _FULL_EIGH_UP_TO or cov.is_cuda:
        values, vectors = torch.linalg.eigh(cov)
    else:
        from scipy.linalg import eigh

        found = eigh(cov.numpy(), subset_by_index=[d - wanted, d - 1], driver="evr", check_finite=False)
        values, vectors = torch.from_numpy(found[0]), torch.from_numpy(found[1])
    values = values.flip(0).clamp_min(0)
    sigma = values.sqrt()
    rank = int((sigma > tolerance * sigma[0]).sum()) if sigma.numel() and float(sigma[0]) > 0 else 0
    k = min(wanted, rank)
    basis = canonical(vectors.flip(1)[:, :k].T.contiguous())
    residual = cov.addmm_(basis.T * values[:k], basis, alpha=-1)
    return Directions(basis[:0] if drop_top else basis, sigma, residual, rank)


def span(stats: Statistics, *, tolerance: float = 1e-6, up_to: int = 4096) -> int:
    """Number of directions that the forget inputs have, the residual's included.

    Args:
        stats: Of one input.
        tolerance: Standard deviations up to this fraction of the largest count as zero.
        up_to: For wider inputs the answer is their width, since finding out would take too long.
    """
    d, known = stats.mean.numel(), stats.sigma.numel()
    if stats.rank < known or known >= d or not stats.residual.numel():
        return stats.rank
    if d > up_to:
        return d
    values = torch.linalg.eigvalsh(stats.residual.double())
    top = max(float(stats.sigma[0]) ** 2 if known else 0.0, float(values[-1]))
    return stats.rank + int((values > tolerance**2 * top).sum())


def box(z: Tensor, lower: float, upper: float, margin: float) -> Bounds:
    """Linear-interpolated quantiles per column of ``z [n, k]`` and the envelope ``margin`` beyond them."""
    if not z.shape[1]:
        return Bounds(*(z.new_zeros(0) for _ in range(4)))
    levels = torch.tensor([lower, upper], dtype=z.dtype, device=z.device)
    # column-wise: torch.quantile refuses more than 2**24 elements at once
    both = torch.stack([torch.quantile(column, levels) for column in z.T.contiguous()])
    z_min, z_max = both[:, 0].contiguous(), both[:, 1].contiguous()
    return Bounds(z_min, z_max, z_min - margin, z_max + margin)


def save(collected: Mapping[str, tuple[Statistics, ...]], path: Path) -> None:
    """Write statistics to a safetensors file; entries shared between layers are stored once."""
    tensors: dict[str, Tensor] = {}
    index: dict[int, int] = {}
    layers: dict[str, int] = {}
    numbers: list[list[dict[str, int]]] = []
    for name, parts in collected.items():
        if id(parts) not in index:
            index[id(parts)] = len(index)
            numbers.append(
                [{f: getattr(s, f) for f in ("residual_dim", "n_rows", "rank", "quantile_rows")} for s in parts]
            )
            for g, stats in enumerate(parts):
                for field in _TENSORS:
                    value = getattr(stats, field)
                    if value is not None:
                        tensors[f"{index[id(parts)]}.{g}.{field}"] = value.detach().cpu().contiguous().clone()
        layers[name] = index[id(parts)]
    header = {"format": _FORMAT, "layers": json.dumps(layers), "numbers": json.dumps(numbers)}
    save_file(tensors, str(path), metadata=header)


def load(path: Path) -> Collected:
    """Read what :func:`save` wrote, bit for bit.

    Raises:
        ArtifactError: The file is missing, broken or of another kind.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(f"cannot read interval statistics from {path}: {error}") from error
    if header.get("format") != _FORMAT:
        raise ArtifactError(f"{path} holds no interval statistics (format {header.get('format')!r}, want {_FORMAT!r})")
    try:
        entries = []
        for i, groups in enumerate(json.loads(header["numbers"])):
            entries.append(
                tuple(
                    Statistics(**{f: tensors[f"{i}.{g}.{f}"] for f in _TENSORS if f"{i}.{g}.{f}" in tensors}, **ints)
                    for g, ints in enumerate(groups)
                )
            )
        return {name: entries[i] for name, i in json.loads(header["layers"]).items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: interval statistics are incomplete: {error}") from error
