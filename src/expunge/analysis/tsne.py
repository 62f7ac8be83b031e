"""Joint t-SNE: several models, the same samples, one map."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from expunge.analysis.embedding import Embedding, check_comparable, save_parquet
from expunge.errors import ConfigError
from expunge.files import atomic_save_safetensors

Engine = Literal["sklearn", "opentsne"]
Init = Literal["pca", "random"]
#: (perplexity, seed) by number of dimensions, as published.
DEFAULTS: dict[int, tuple[float, int]] = {2: (50.0, 234), 3: (30.0, 42)}
KEY = "expunge_tsne"
FORMAT = 1


@dataclass(frozen=True)
class Projection:
    """The place of one model's samples and prototypes in the joint map.

    Args:
        name: Name of the model.
        points: float32 ``[S, k]``.
        prototypes: float32 ``[C, k]``.
        embedding: What was projected.
        settings: ``perplexity``, ``seed``, ``metric``, ``engine`` and the names of all ``models`` of the map.
    """

    name: str
    points: np.ndarray = field(repr=False)
    prototypes: np.ndarray = field(repr=False)
    embedding: Embedding = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        """Number of dimensions of the map."""
        return int(self.points.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``points``, ``prototypes``, ``labels``, ``ids`` and ``forget`` as safetensors."""
        e = self.embedding
        arrays = {"points": torch.from_numpy(self.points), "prototypes": torch.from_numpy(self.prototypes)}
        own = {"labels": e.labels, "ids": e.ids, "forget": e.forget}
        facts = {"format": FORMAT, "name": self.name, "role": e.role, "classes": list(e.classes)}
        digests = {"model_digest": e.model_digest, "data_digest": e.data_digest}
        atomic_save_safetensors(path, {**arrays, **own}, {KEY: json.dumps({**facts, **digests, **self.settings})})

    def save_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one row per sample and prototype with columns ``x``, ``y`` (and ``z``)."""
        e = self.embedding
        n, c = len(e), len(e.classes)
        labels = [*e.labels.tolist(), *range(c)]
        places = np.concatenate([self.points, self.prototypes])
        columns = {
            "model": [self.name] * (n + c),
            "kind": ["sample"] * n + ["prototype"] * c,
            "id": [*e.ids.tolist(), *[None] * c],
            "label": labels,
            "class_name": [e.classes[k] for k in labels],
            "forget": [*e.forget.tolist(), *[None] * c],
            **{axis: places[:, k] for k, axis in enumerate("xyz"[: self.dims])},
        }
        save_parquet(path, columns)


def tsne(
    embeddings: Sequence[Embedding],
    *,
    dims: Literal[2, 3] = 2,
    perplexity: float | None = None,
    seed: int | None = None,
    metric: str = "cosine",
    engine: Engine = "sklearn",
    init: Init = "pca",
    iterations: int = 1000,
) -> list[Projection]:
    """Project the samples and class prototypes of all models together, so that places can be compared.

    Args:
        embeddings: Models that show the same samples.
        dims: 2 or 3.
        perplexity: 50 in two dimensions and 30 in three by default; below the number of samples of one model.
        seed: 234 in two dimensions and 42 in three by default.
        metric: Distance between features.
        engine: ``sklearn``, or ``opentsne`` if that package is installed.
        init: Where the optimiser starts: ``pca`` (the principal components, so the seed hardly matters) or ``random``.
        iterations: Steps of the optimiser.

    Returns:
        One projection per model, in the order given.

    Raises:
        ConfigError: Perplexity not below the number of samples, unknown metric, or an engine that is not installed.
        NotComparableError: The embeddings do not show the same samples.

    Deviates: the published pictures show the prototype of the unlearned class only, at a place shifted by a constant;
    here all prototypes are projected with the samples and shown where they fall.
    """
    check_comparable(embeddings)
    if dims not in DEFAULTS:
        raise ConfigError(f"t-SNE maps have 2 or 3 dimensions, not {dims}")
    perplexity = DEFAULTS[dims][0] if perplexity is None else perplexity
    seed = DEFAULTS[dims][1] if seed is None else seed
    samples = len(embeddings[0])
    if not 1 <= perplexity < samples:
        raise ConfigError(
            f"perplexity {perplexity:g} does not fit {samples} samples per model: take one from 1 to {samples - 1}, "
            "or embed more samples"
        )
    stacked = np.concatenate([torch.cat([e.features, e.prototypes]).double().numpy() for e in embeddings])
    if init not in ("pca", "random"):
        raise ConfigError(f"t-SNE starts from 'pca' or 'random', not from {init!r}")
    run = {"sklearn": _sklearn, "opentsne": _opentsne}.get(engine)
    if run is None:
        raise ConfigError(f"unknown t-SNE engine {engine!r}; known: sklearn, opentsne")
    try:
        places = run(stacked, dims, perplexity, seed % 2**32, metric, init, iterations)
    except ValueError as error:
        raise ConfigError(f"t-SNE: {error}") from None
    settings = {
        "perplexity": perplexity,
        "seed": seed,
        "metric": metric,
        "engine": engine,
        "init": init,
        "iterations": iterations,
        "models": [e.name for e in embeddings],
    }
    found = []
    for e, part in zip(embeddings, np.split(places.astype(np.float32), len(embeddings)), strict=True):
        found.append(Projection(e.name, part[:samples].copy(), part[samples:].copy(), e, settings))
    return found


def _sklearn(
    x: np.ndarray, dims: int, perplexity: float, seed: int, metric: str, init: str, iterations: int
) -> np.ndarray:
    import inspect

    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # The name of this argument changed in scikit-learn 1.5; the old one was removed in 1.7.
    steps = "max_iter" if "max_iter" in inspect.signature(TSNE).parameters else "n_iter"
    options: dict[str, Any] = {steps: iterations, "init": init, "learning_rate": "auto"}
    maps = TSNE(dims, perplexity=perplexity, metric=metric, random_state=seed, **options)
    # On a busy machine the threads lose more by waiting for each other than they gain.
    with threadpool_limits(1):
        return maps.fit_transform(x.astype(np.float32))


def _opentsne(
    x: np.ndarray, dims: int, perplexity: float, seed: int, metric: str, init: str, iterations: int
) -> np.ndarray:
    try:
        import openTSNE
    except ImportError:
        raise ConfigError("the engine 'opentsne' needs the package openTSNE: pip install openTSNE") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"openTSNE\..*")
        if dims == 3:
            raise ConfigError("openTSNE maps three dimensions too slowly to be useful; use the engine 'sklearn'")
        start: dict[str, Any] = {"initialization": init}
        maps = openTSNE.TSNE(dims, perplexity=perplexity, metric=metric, random_state=seed, n_iter=iterations, **start)
        return np.asarray(maps.fit(x))
