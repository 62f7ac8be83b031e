"""What forgetting one class did to the classes near it: accuracy before and after, and where images went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from expunge.errors import DataError
from expunge.metrics.estimate import LEVEL, Estimate, not_run
from expunge.metrics.outputs import ClassifierOutputs, to_numpy
from expunge.metrics.zero_shot import exact

_NO_IMAGES = "no images of this class"


@dataclass(frozen=True)
class Neighbour:
    """One class that stays.

    Args:
        name: Class name.
        nearest: The forgotten class its name is most similar to.
        similarity: Cosine of the two names' embeddings in the untouched model.
        before: Top-1 accuracy of the untouched model on its images.
        after: Accuracy after forgetting, on the same images.
        change: ``after - before`` in points, with an interval for paired images.
        p: Exact McNemar test of no change, two-sided; None without images.
        taken: Share of its images that are now named as a forgotten class.
        received: Share of the forgotten images that are now named as this class.
    """

    name: str
    nearest: str
    similarity: float
    before: Estimate
    after: Estimate
    change: Estimate
    p: float | None
    taken: Estimate
    received: Estimate

    @property
    def damaged(self) -> bool:
        """Did the accuracy fall by more than chance: interval below zero, and McNemar's ``p < 0.05``?"""
        return self.p is not None and self.p < 1 - LEVEL and self.change.high is not None and self.change.high < 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            ArtifactError: Values that do not form an estimate.
            TypeError: Missing or unknown keys.
        """
        kinds = {f.name for f in fields(cls) if f.type == "Estimate"}
        values: dict[str, Any] = {k: Estimate.from_dict(v) if k in kinds else v for k, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class Neighbours:
    """The classes that stay, most similar to the forgotten ones first.

    Args:
        rows: The classes shown.
        forgotten: Names of the forgotten classes.
        tested: Number of classes with images, shown or not.
        n_forgotten: Images of the forgotten classes.
        still: Share of the forgotten images that still get a forgotten name.
    """

    rows: tuple[Neighbour, ...]
    forgotten: tuple[str, ...]
    tested: int
    n_forgotten: int
    still: Estimate

    @property
    def worst(self) -> Neighbour | None:
        """The class that lost most of those that lost more than chance explains."""
        damaged = [r for r in self.rows if r.damaged]
        return min(damaged, key=lambda r: r.change.value or 0.0, default=None)

    @property
    def worst_p(self) -> float | None:
        """McNemar's p of :attr:`worst`, times the number of classes tested (Bonferroni)."""
        worst = self.worst
        return None if worst is None or worst.p is None else min(1.0, worst.p * self.tested)

    def shown(self, nearest: int = 20, worst: int = 5, receiving: int = 5) -> Neighbours:
        """The nearest classes, those that lost most and those that received most, in the same order."""
        by_loss = sorted((r for r in self.rows if r.change.ran), key=lambda r: r.change.value or 0.0)
        by_gain = sorted((r for r in self.rows if r.received.value), key=lambda r: -(r.received.value or 0.0))
        names = {r.name for r in (*self.rows[:nearest], *by_loss[:worst], *by_gain[:receiving])}
        rows = tuple(r for r in self.rows if r.name in names)
        return Neighbours(rows, self.forgotten, self.tested, self.n_forgotten, self.still)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ArtifactError: Values that do not form an estimate.
            TypeError: Missing or unknown keys.
        """
        made = {
            "rows": tuple(Neighbour.from_dict(r) for r in data["rows"]),
            "forgotten": tuple(data["forgotten"]),
            "still": Estimate.from_dict(data["still"]),
        }
        return cls(**{**data, **made})


def neighbours(
    before: ClassifierOutputs,
    after: ClassifierOutputs,
    classifier: Any,
    names: Sequence[str],
    forgotten: Sequence[int],
) -> Neighbours:
    """The table of all classes that stay, by similarity of their names to the forgotten ones.

    Args:
        before: Zero-shot logits of the untouched model on held-out images of all classes, the forgotten ones included.
        after: Logits of the same images, in the same order, after forgetting.
        classifier: Text embeddings of the untouched model, ``[C, D]``, of any length.
        names: Class names, ``C`` different ones.
        forgotten: Forgotten classes, at least one.

    Raises:
        DataError: Shapes or images that do not fit, repeated names, or no forgotten class.
    """
    names, width = list(names), len(to_numpy(classifier))
    c, gone = len(names), sorted(set(forgotten))
    if before.table.shape != after.table.shape or not np.array_equal(before.labels, after.labels):
        raise DataError("neighbours: before and after must hold the same images in the same order")
    if before.ids is not None and after.ids is not None and not np.array_equal(before.ids, after.ids):
        raise DataError("neighbours: before and after hold other images (ids differ)")
    if before.table.shape[1] != c or width != c or len(set(names)) != c:
        raise DataError(
            f"neighbours: {c} names ({len(set(names))} different), {before.table.shape[1]} logits and a classifier of "
            f"{width} classes do not fit"
        )
    if not gone or gone[0] < 0 or gone[-1] >= c:
        raise DataError(f"neighbours: name at least one forgotten class out of 0 .. {c - 1}, got {list(forgotten)}")
    similar = name_cosines(classifier, gone)
    predicted = after.table.argmax(axis=1)
    lost, named = np.isin(before.labels, gone), np.isin(predicted, gone)
    n_gone = int(lost.sum())
    went = np.bincount(predicted[lost], minlength=c)
    none_gone = not_run("no images of a forgotten class", unit="%")
    rows = []
    for k in sorted(set(range(c)) - set(gone), key=lambda k: (-similar[k].max(), k)):
        own = before.labels == k
        right, kept, n = before.correct[own], after.correct[own], int(own.sum())
        change, p = paired_change(right, kept)
        rows.append(
            Neighbour(
                name=names[k],
                nearest=names[gone[int(similar[k].argmax())]],
                similarity=float(similar[k].max()),
                before=_share(int(right.sum()), n),
                after=_share(int(kept.sum()), n),
                change=change,
                p=p,
                taken=_share(int(named[own].sum()), n),
                received=exact(int(went[k]), n_gone) if n_gone else none_gone,
            )
        )
    still = exact(int(named[lost].sum()), n_gone) if n_gone else none_gone
    tested = sum(r.p is not None for r in rows)
    return Neighbours(tuple(rows), tuple(names[k] for k in gone), tested, n_gone, still)


def _share(k: int, n: int) -> Estimate:
    return exact(k, n) if n else not_run(_NO_IMAGES, unit="%")


def paired_change(before: np.ndarray, after: np.ndarray) -> tuple[Estimate, float | None]:
    """Change of a hit rate on the same samples in points, and the exact McNemar p.

    With ``b`` samples won and ``c`` lost of ``n``: interval of Bonett and Price (2012), which has a width also where
    nothing changed: ``d ± z sqrt((p + q - d^2) / (n + 2))`` with ``p = (b + 1) / (n + 2)``, ``q = (c + 1) / (n + 2)``,
    ``d = p - q``. The test is binomial, ``b`` of ``b + c`` at one half (McNemar 1947).

    Args:
        before: Bool ``[N]``.
        after: Bool ``[N]``, of the same samples.

    Raises:
        DataError: Lengths differ.
    """
    from scipy.stats import binomtest, norm

    if before.shape != after.shape:
        raise DataError(f"paired change: {before.shape} against {after.shape} samples")
    n, won, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    if n == 0:
        return not_run(_NO_IMAGES, unit="points"), None
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf(0.5 + LEVEL / 2)) * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = (100 * float(np.clip(p - q + s * half, -1, 1)) for s in (-1, 1))
    value = 100 * (won - lost) / n
    method = "paired difference, Bonett-Price 95 % interval"
    change = Estimate(value, min(low, value), max(high, value), n, "points", method, f"{won} won, {lost} lost")
    return change, float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def name_cosines(classifier: Any, classes: Sequence[int]) -> np.ndarray:
    """Cosines of all names with those of some classes, float64 ``[C, len(classes)]``.

    Raises:
        DataError: Not a matrix ``[C, D]``, or a row that is zero or not finite.
    """
    rows = _unit(classifier, "classifier")
    return rows @ rows[list(classes)].T


def class_cosines(images: Any, labels: Any, classifier: Any, rows: Sequence[int]) -> np.ndarray:
    """Mean cosine of the images of some classes with every name, float64 ``[len(rows), C]``.

    Args:
        images: Embeddings ``[N, D]``, of any length.
        labels: Classes ``[N]``.
        classifier: Text embeddings ``[C, D]``.
        rows: Classes whose images are wanted.

    Raises:
        DataError: A class without images, or an embedding that is zero or not finite.
    """
    x, labels = _unit(images, "images"), to_numpy(labels)
    empty = [k for k in rows if not (labels == k).any()]
    if empty:
        raise DataError(f"class cosines: no images of class {empty[0]}")
    return np.stack([x[labels == k].mean(axis=0) for k in rows]) @ _unit(classifier, "classifier").T


def _unit(x: Any, name: str) -> np.ndarray:
    rows = to_numpy(x).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True) if rows.ndim == 2 else np.zeros(1)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise DataError(f"{name}: embeddings [N, D] that are finite and not zero expected; the model is broken")
    return rows / lengths
