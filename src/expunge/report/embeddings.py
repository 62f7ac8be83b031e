"""The embeddings in a report, as data: places on a joint map and changes of distances between classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from expunge.errors import DataError

Point = tuple[float, float]


@dataclass(frozen=True)
class EmbeddingMap:
    """One model on the joint map.

    Args:
        name: Shown name.
        role: ``before``, ``after`` or ``reference``.
        points: Place of every sample.
        prototypes: Place of every class prototype.
    """

    name: str
    role: str
    points: tuple[Point, ...]
    prototypes: tuple[Point, ...]


@dataclass(frozen=True)
class DistanceChange:
    """Distances between classes in one model minus those in the untouched one.

    Args:
        name: Shown name.
        role: ``after`` or ``reference``.
        values: ``[C][C]``, above the diagonal; ``None`` elsewhere.
    """

    name: str
    role: str
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class EmbeddingSection:
    """What the section "Embeddings" shows.

    Args:
        classes: Class names.
        labels: Class of every sample.
        forget: Was the sample to be forgotten?
        maps: The untouched model first.
        differences: In the same order, without the untouched model.
        samples_of: ``train`` or ``test``.
        perplexity: Of the t-SNE.
        seed: Of the choice of samples.
        unit: Are distances those of features of length one?
        noise: Median distance between two halves of one class in the untouched model.
        note: What is missing and why.

    Raises:
        DataError: Parts that do not fit each other, or numbers that are not finite.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    forget: tuple[bool, ...]
    maps: tuple[EmbeddingMap, ...]
    differences: tuple[DistanceChange, ...] = ()
    samples_of: str = "train"
    perplexity: float = 0.0
    seed: int = 0
    unit: bool = False
    noise: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        n, c = len(self.labels), len(self.classes)
        fits = n > 0 and len(self.forget) == n and all(0 <= k < c for k in self.labels) and len(self.maps) > 0
        for m in self.maps:
            fits = fits and len(m.points) == n and len(m.prototypes) == c
            fits = fits and all(len(p) == 2 and all(map(math.isfinite, p)) for p in (*m.points, *m.prototypes))
        for d in self.differences:
            fits = fits and len(d.values) == c and all(len(row) == c for row in d.values)
            fits = fits and all(v is None or math.isfinite(v) for row in d.values for v in row)
        if not fits:
            raise DataError("embeddings of a report: samples, classes, maps and distances do not fit each other")

    @property
    def has_reference(self) -> bool:
        """Is a retrained model shown?"""
        return any(d.role == "reference" for d in self.differences)

    @property
    def about(self) -> str:
        """A line below the map."""
        return (
            f"{len(self.labels)} {self.samples_of} images, the same for every model (seed {self.seed}); joint t-SNE of "
            f"{len(self.maps)} models, cosine distance, perplexity {self.perplexity:g}."
        )

    @property
    def distances_about(self) -> str:
        """A line below the distances."""
        per_class = [self.labels.count(k) for k in range(len(self.classes))]
        n = f"{min(per_class)}" + (f" to {max(per_class)}" if max(per_class) > min(per_class) else "")
        noise = "" if self.noise is None else f" Two random halves of one class are {self.noise:.2f} apart (median)."
        scale = ", embeddings scaled to length one" if self.unit else ""
        return f"Change of the exact 1-Wasserstein distance, n = {n} images per class{scale}.{noise}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            DataError: Parts that do not fit.
            TypeError: Missing or unknown keys.
        """
        maps = tuple(
            EmbeddingMap(**{**m, "points": _points(m["points"]), "prototypes": _points(m["prototypes"])})
            for m in data["maps"]
        )
        changes = tuple(
            DistanceChange(**{**d, "values": tuple(tuple(row) for row in d["values"])})
            for d in data.get("differences", ())
        )
        listed = {k: tuple(data[k]) for k in ("classes", "labels", "forget")}
        return cls(**{**data, **listed, "maps": maps, "differences": changes})


def _points(values: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in values)
