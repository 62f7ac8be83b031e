"""How far a feature is from a class: squared Mahalanobis distance on the unit sphere, after a Tukey power."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from expunge.errors import DataError
from expunge.features.statistics import ClassStatistics, OffDiagonal, Tukey, correlation, shrink
from expunge.part import Frozen

#: ``explicit``: columns are mapped to class numbers. ``compact``: a label is compared with the column's position.
ColumnMap = Literal["explicit", "compact"]


class Metric(Frozen):
    """Settings of the distance to a class.

    Args:
        delta: Exponent of the Tukey power.
        tukey: Which power; by default the plain one unless there are negative features.
        tukey_eps: Offset of the power; 0 as published. Where a feature is exactly 0 the gradient is taken as 0.
        gamma1: Shrinkage on the diagonal.
        gamma2: Shrinkage elsewhere.
        passes: How often the covariances are shrunk.
        offdiag_mean: ``all`` entries, or ``nonzero`` ones as published, which may leave the metric indefinite.
        inverse: ``inv`` by Cholesky factors, or ``pinv``, the pseudo-inverse as published.
        column_map: ``explicit``, or ``compact`` as published: in a class request, samples whose nearest class comes
            right after the removed one are sent to their second choice.
    """

    delta: float = Field(default=0.5, gt=0)
    tukey: Tukey | None = None
    tukey_eps: float = Field(default=0.0, ge=0)
    gamma1: float = Field(default=3.0, ge=0)
    gamma2: float = Field(default=3.0, ge=0)
    passes: int = Field(default=2, ge=0)
    offdiag_mean: OffDiagonal = "all"
    inverse: Literal["inv", "pinv"] = "inv"
    column_map: ColumnMap = "explicit"


class ClassDistance:
    """Squared distance ``(u - v)' P_c (u - v)`` of features to classes.

    ``u = t / |t|`` with ``t`` the Tukey power of a feature, ``v`` the class mean brought to length 1, ``P_c`` the
    inverse of the class's shrunk covariance brought to unit diagonal. No square root, as in the code (the paper writes
    one): it is smooth at 0. Factors are computed in float64, one class at a time when first needed, and cast to the
    precision of the features.

    Source: SCAR, arXiv 2404.12922, and its code.

    Args:
        statistics: Moments of every class that may be a target.
        metric: Settings.
    """

    def __init__(self, statistics: ClassStatistics, metric: Metric) -> None:
        self.statistics, self.metric = statistics, metric
        self.classes = statistics.classes
        self._factors: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def correlation(self, index: int) -> Tensor:
        """Shrunk covariance of the class at a position, unit diagonal, float64 ``[D, D]``."""
        m, S = self.metric, self.statistics.covariance[index]
        return correlation(shrink(S, m.gamma1, m.gamma2, m.passes, m.offdiag_mean))

    def inverse(self, index: int) -> Tensor:
        """``P`` of the class at a position, float64 ``[D, D]``.

        Raises:
            DataError: Singular or indefinite; the class is named.
        """
        if self.metric.inverse == "pinv":
            return self._pseudo_inverse(index)
        return torch.cholesky_inverse(self._cholesky(index))

    def distance2(self, z: Tensor, targets: Tensor | None = None, *, exact_slope: bool = False) -> Tensor:
        """Squared distances.

        Args:
            z: Features ``[B, D]``.
            targets: One class number per row; ``None`` for the distances to all classes.
            exact_slope: See :func:`~expunge.features.statistics.tukey`.

        Returns:
            ``[B]``, or without targets ``[B, K]`` in the order of ``classes``. Only the factors of the classes asked
            for are computed.

        Raises:
            DataError: A covariance is not positive definite, or a target has no statistics.
        """
        t = self.statistics.tukey(z, exact_slope=exact_slope)
        u = functional.normalize(t, dim=1)
        if targets is None:
            return torch.stack([self._to_class(u, i) for i in range(len(self.classes))], dim=1)
        if not len(z):
            return z.sum(1)
        targets = targets.cpu()
        order = torch.argsort(targets, stable=True)
        parts, found = [], targets[order].unique_consecutive(return_counts=True)
        for c, rows in zip(found[0].tolist(), torch.split(order, found[1].tolist()), strict=True):
            at = (self.classes == c).nonzero()
            if not len(at):
                raise DataError(f"class {c} is a target but there are no statistics of it")
            parts.append(self._to_class(u[rows.to(u.device)], int(at[0, 0])))
        back = torch.argsort(order).to(u.device)
        return torch.cat(parts)[back]

    @torch.no_grad()
    def assign(self, z: Tensor, labels: Tensor, removed: Collection[int] = ()) -> Tensor:
        """The nearest class of each feature that is neither its own nor removed, int64 ``[B]`` on the CPU.

        Deviates:
            The released code compares labels with column positions; ``column_map = "compact"`` does so too.

        Raises:
            DataError: No class is left for a sample.
        """
        d2, labels = self.distance2(z).cpu(), labels.cpu()
        if self.metric.column_map == "compact":
            barred = torch.arange(len(self.classes))[None, :] == labels[:, None]
        else:
            gone = torch.isin(self.classes, torch.tensor(sorted(removed), dtype=torch.int64))
            barred = (self.classes[None, :] == labels[:, None]) | gone
        if bool(barred.all(1).any()):
            raise DataError("no class is left that a forget sample could be moved to; statistics of more are needed")
        return self.classes[d2.masked_fill(barred, torch.inf).argmin(1)]

    def keep_only(self, targets: Tensor) -> None:
        """Drop the statistics and factors of classes that are no targets, to free memory."""
        before = self.classes.tolist()
        self.statistics = self.statistics.select([c for c in targets.unique().tolist() if c >= 0])
        self.classes = self.statistics.classes
        index = {c: i for i, c in enumerate(self.classes.tolist())}
        own = {k: before[k[0]] for k in self._factors}
        self._factors = {(index[c], *k[1:]): self._factors[k] for k, c in own.items() if c in index}

    def _to_class(self, u: Tensor, index: int) -> Tensor:
        v, factor = self._factor(index, u)
        d = u - v
        if self.metric.inverse == "pinv":
            return ((d @ factor) * d).sum(1)
        return torch.linalg.solve_triangular(factor, d.T, upper=False).square().sum(0)

    def _factor(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Unit mean and, for ``inv``, the Cholesky factor of the matrix; for ``pinv`` the pseudo-inverse itself."""
        key = (index, like.dtype, like.device)
        if key not in self._factors:
            factor = self._pseudo_inverse(index) if self.metric.inverse == "pinv" else self._cholesky(index)
            v = functional.normalize(self.statistics.mean[index], dim=0)
            self._factors[key] = (v.to(like.device, like.dtype), factor.to(like.device, like.dtype))
        return self._factors[key]

    def _pseudo_inverse(self, index: int) -> Tensor:
        return torch.linalg.pinv(self._checked(index))

    def _cholesky(self, index: int) -> Tensor:
        R = self._checked(index)
        L, failed = torch.linalg.cholesky_ex(R)
        smallest = 0.0 if int(failed) else float(L.diagonal().square().min())
        if smallest <= len(R) * torch.finfo(R.dtype).eps:
            eigenvalue = float(torch.linalg.eigvalsh(R)[0])
            kind = "indefinite" if eigenvalue < -1e-9 else "singular"
            raise DataError(
                f"the shrunk covariance of {self.statistics.name(index)} is {kind} (smallest eigenvalue "
                f"{eigenvalue:.1e}, {int(self.statistics.count[index])} samples); raise 'gamma1' above 'gamma2', or "
                "use offdiag_mean = 'all'"
            )
        return L

    def _checked(self, index: int) -> Tensor:
        R = self.correlation(index)
        if not bool(torch.isfinite(R).all()):
            raise DataError(
                f"the shrunk covariance of {self.statistics.name(index)} has a feature without variance, or values "
                "that are not finite; use a larger 'gamma1'"
            )
        return R
