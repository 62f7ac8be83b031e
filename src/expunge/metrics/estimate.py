"""A number with its interval, its sample count and the way it was obtained; or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from expunge.errors import ArtifactError, DataError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """One measured value.

    Args:
        value: The figure, or None when the measurement was not made (then ``note`` gives the reason).
        low: Lower end of the 95 % interval, None when no interval can be given.
        high: Upper end of the 95 % interval.
        n: Samples (or runs) the value rests on.
        unit: ``"%"``, ``"s"``, ``"bytes"`` or empty.
        method: How value and interval were computed.
        note: Caveat, or the reason for a missing value.

    Raises:
        DataError: A non-finite number, half an interval, an interval that does not hold the value, or a missing
            value without a reason.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    method: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is not None:
                if not math.isfinite(number):
                    raise DataError(f"estimate: {name} is {number}; use not_run(reason) for a value that is missing")
                object.__setattr__(self, name, float(number))
        if self.n < 0:
            raise DataError(f"estimate: n is {self.n}; it counts samples")
        if self.value is None:
            if not self.note.strip():
                raise DataError("estimate: a missing value needs the reason in 'note'")
            if self.low is not None or self.high is not None:
                raise DataError("estimate: an interval without a value")
            return
        if (self.low is None) != (self.high is None):
            raise DataError("estimate: give both ends of the interval or none")
        if self.low is not None and self.high is not None:
            slack = 1e-9 * max(1.0, abs(self.value))
            if not self.low - slack <= self.value <= self.high + slack:
                raise DataError(f"estimate: interval [{self.low}, {self.high}] does not hold the value {self.value}")

    @property
    def ran(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def __str__(self) -> str:
        if self.value is None:
            return f"not run ({self.note})"
        unit = f" {self.unit}" if self.unit else ""
        text = f"{_number(self.value)}{unit}"
        if self.low is not None and self.high is not None:
            text += f" [{_number(self.low)}, {_number(self.high)}]"
        return text + (f", n={self.n}" if self.n else "")

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the two intervals overlap; None when one of them has no interval."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ArtifactError: Unknown keys, or values that do not form an estimate.
        """
        unknown = set(data) - {f.name for f in fields(cls)} if isinstance(data, Mapping) else {"(not a mapping)"}
        if unknown:
            raise ArtifactError(f"estimate: unknown keys {sorted(unknown)}")
        try:
            return cls(**data)
        except (TypeError, DataError) as error:
            raise ArtifactError(f"estimate: {error}") from None


def _number(x: float) -> str:
    if x != 0 and abs(x) < 0.01:
        return f"{x:.2g}"
    if abs(x) >= 10_000:
        return f"{x:,.0f}"
    return f"{x:.1f}" if abs(x) >= 1 or x == 0 else f"{x:.3f}"


def not_run(reason: str, *, unit: str = "", n: int = 0) -> Estimate:
    """The measurement was not made, and why."""
    return Estimate(None, n=n, unit=unit, note=reason)


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), as fractions."""
    from scipy.stats import norm

    z2 = float(norm.ppf(0.5 + level / 2)) ** 2
    p = k / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper and Pearson 1934), as fractions; never too narrow."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def proportion(k: int, n: int, *, interval: str = "wilson", note: str = "") -> Estimate:
    """``100 k / n`` percent with an interval.

    Args:
        k: Hits, ``0 <= k <= n``.
        n: Samples, at least 1.
        interval: ``"wilson"`` or ``"clopper_pearson"``.
        note: Caveat to carry along.

    Raises:
        DataError: No samples, or counts out of range.
    """
    k, n = int(k), int(n)
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"proportion: {k} of {n} samples is not a proportion")
    low, high = {"wilson": wilson, "clopper_pearson": clopper_pearson}[interval](k, n)
    name = {"wilson": "Wilson", "clopper_pearson": "Clopper-Pearson"}[interval]
    return Estimate(100 * k / n, 100 * low, 100 * high, n, "%", f"proportion, {name} 95 % interval", note)


def mean(values: Sequence[float], *, unit: str = "", note: str = "") -> Estimate:
    """Mean of independent runs with Student's t interval; one run alone has no interval.

    Raises:
        DataError: No values, or a non-finite one.
    """
    x = np.asarray(values, dtype=np.float64).reshape(-1)
    if x.size == 0:
        raise DataError("mean: no values")
    centre = float(x.mean())
    if x.size == 1:
        return Estimate(centre, n=1, unit=unit, method="single run, no interval", note=note)
    from scipy.stats import t

    half = float(t.ppf(0.5 + LEVEL / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(centre, centre - half, centre + half, x.size, unit, "mean of runs, t 95 % interval", note)


def bootstrap(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    draws: int = 1000,
    seed: int = 0,
    unit: str = "",
    note: str = "",
) -> Estimate:
    """Percentile bootstrap: each sample is resampled on its own, along its first axis.

    The interval is widened to hold the value itself, which a percentile interval of a biased statistic may not.

    Raises:
        DataError: An empty sample or fewer than 20 draws.
    """
    if draws < 20 or not samples or any(len(s) == 0 for s in samples):
        raise DataError(f"bootstrap: needs non-empty samples and at least 20 draws, got {draws}")
    rng = np.random.Generator(np.random.Philox(seed))
    value = float(statistic(*samples))
    drawn = np.array([statistic(*(s[rng.integers(0, len(s), len(s))] for s in samples)) for _ in range(draws)])
    return from_draws(value, drawn, n=len(samples[0]), unit=unit, method=f"bootstrap, {draws} draws", note=note)


def from_draws(value: float, drawn: np.ndarray, *, n: int, unit: str, method: str, note: str = "") -> Estimate:
    """An estimate whose interval is the central 95 % of bootstrap draws, widened to hold the value."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), n, unit, f"{method}, 95 % interval", note)
