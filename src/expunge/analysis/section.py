"""The section "Embeddings" of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from expunge.analysis.embed import embed
from expunge.analysis.tsne import DEFAULTS, tsne
from expunge.analysis.wasserstein import Distances, wasserstein_difference, wasserstein_matrix
from expunge.errors import DataError
from expunge.report.embeddings import DistanceChange, EmbeddingMap, EmbeddingSection
from expunge.tasks.base import Split
from expunge.tasks.classifier import ClassifierTask

if TYPE_CHECKING:
    from expunge.evaluation import Candidate
    from expunge.patch import Patch

#: Below this mean number of samples per class, distances between classes are mostly noise and are left out.
MIN_PER_CLASS = 5


def analysis_section(
    task: ClassifierTask,
    split: Split,
    candidates: Sequence[Candidate],
    *,
    role: str = "train",
    samples: int = 200,
    seed: int = 0,
    unit: bool = True,
) -> EmbeddingSection:
    """Map the untouched model, the first one with role ``after`` and the reference together, and compare distances.

    Args:
        task: The base model (no patch applied) and data.
        split: The request's index sets.
        candidates: Models as patches; those without a patch are left out.
        role: ``train`` or ``test``.
        samples: Number of samples; all of them if the set has fewer.
        seed: Seed of the choice of samples.
        unit: Compare distances of features of length one. Unlearning often shrinks all features, and raw distances
            then show little else.

    Raises:
        CapabilityError: The task has no features.
    """
    available = len((task.data.train if role == "train" else task.data.test).readable())
    samples = min(samples, available)
    wanted: list[tuple[str, str, Patch | None]] = [("before", "untouched", None)]
    for kind in ("after", "reference"):
        found = next((c for c in candidates if c.role == kind and c.patch is not None), None)
        if found is not None:
            wanted.append((kind, found.name, found.patch))
    embeddings = [
        embed(task, split, patch, role=role, samples=samples, seed=seed, name=name) for _, name, patch in wanted
    ]
    perplexity = min(DEFAULTS[2][0], max(1.0, (samples - 1) / 3))
    maps = [
        EmbeddingMap(p.name, kind, _rows(p.points), _rows(p.prototypes))
        for p, (kind, _, _) in zip(tsne(embeddings, perplexity=perplexity), wanted, strict=True)
    ]
    first, note = embeddings[0], ""
    changes: list[DistanceChange] = []
    noise: float | None = None
    if samples < MIN_PER_CLASS * task.n_classes:
        note = (
            f"Distances between classes were not computed: {samples} images for {task.n_classes} classes are too few. "
            "Use `expunge analyze` with more samples."
        )
    else:
        try:
            before = wasserstein_matrix(first, seed=seed, unit=unit)
            noise = None if np.isnan(before.noise) else before.noise
            for e, (kind, name, _) in zip(embeddings[1:], wanted[1:], strict=True):
                after = wasserstein_matrix(e, repeats=0, unit=unit)
                changes.append(DistanceChange(name, kind, _grid(before, after)))
        except DataError as error:  # a feature vector without a direction; the map is still worth showing
            changes, noise, note = [], None, f"Distances between classes were not computed: {error}."
    return EmbeddingSection(
        classes=first.classes,
        labels=tuple(first.labels.tolist()),
        forget=tuple(first.forget.tolist()),
        maps=tuple(maps),
        differences=tuple(changes),
        samples_of=role,
        perplexity=perplexity,
        seed=seed,
        unit=unit,
        noise=noise,
        note=note,
    )


def _rows(points: np.ndarray) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in points)


def _grid(before: Distances, after: Distances) -> tuple[tuple[float | None, ...], ...]:
    change = wasserstein_difference(before, after)
    return tuple(tuple(None if np.isnan(v) else float(v) for v in row) for row in change)
