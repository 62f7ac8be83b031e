"""From folders of embeddings to folders of pictures and data, laid out alike.

``embeddings/a/b.safetensors`` becomes ``images/tsne_2D/a/b.png``. All models of one folder are projected together.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from expunge.analysis import pictures
from expunge.analysis.embedding import Embedding, load_folder, save_parquet
from expunge.analysis.interactive import save_page
from expunge.analysis.tsne import Engine, Init, tsne
from expunge.analysis.wasserstein import (
    Solver,
    wasserstein_between,
    wasserstein_difference,
    wasserstein_matrix,
)
from expunge.errors import ConfigError
from expunge.files import atomic_save_safetensors, atomic_write, confined

ROOT = "embeddings"
Form = Literal["gif", "html", "both"]
Dims = Literal["2", "3", "animated"]
KEY = "expunge_wasserstein"


def mirrored(folder: Path, given: Path) -> Path:
    """Where the outputs of a folder go, relative to the root of its kind.

    The path below the last folder called ``embeddings``, else below the parent of the folder that was named.

    >>> mirrored(Path("embeddings/a"), Path("embeddings")).as_posix()
    'a'
    >>> mirrored(Path("x/a/b"), Path("x/a")).as_posix()
    'a/b'
    """
    parts = folder.parts
    if ROOT in parts:
        return Path(*parts[len(parts) - parts[::-1].index(ROOT) :])
    return folder.relative_to(given.parent) if given.name else folder.relative_to(given)


def groups(folders: Sequence[str | Path]) -> Iterator[tuple[Path, list[Embedding]]]:
    """Every folder that holds embeddings, at or below the named ones, with the place of its outputs.

    Raises:
        ConfigError: A folder does not exist, holds none, or two have one place for their outputs.
    """
    seen: dict[Path, Path] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise ConfigError(f"{given}: no such folder")
        holding = sorted({p.parent for p in given.rglob("*.safetensors")})
        if not holding:
            raise ConfigError(f"{given}: no embedding (*.safetensors) in it or below")
        for folder in holding:
            place = mirrored(folder, given)
            if place in seen:
                raise ConfigError(f"the outputs of {seen[place]} and {folder} would both go to '{place}'")
            seen[place] = folder
            yield place, load_folder(folder)


def write_tsne(
    folders: Sequence[str | Path],
    output: str | Path = "images",
    *,
    dims: Dims = "2",
    perplexity: float | None = None,
    seed: int | None = None,
    metric: str = "cosine",
    engine: Engine = "sklearn",
    init: Init = "pca",
    form: Form = "gif",
    parquet: bool = False,
) -> list[Path]:
    """Project every folder and write one picture and one file of coordinates per model.

    Args:
        folders: Folders of embeddings.
        output: Root of the pictures; ``tsne_2D``, ``tsne_3D`` or ``tsne_animated`` is made below it.
        dims: ``2`` or ``3`` (PNG), or ``animated``: three dimensions as a turning GIF, an interactive page, or both.
        perplexity: See :func:`expunge.analysis.tsne.tsne`, as are ``seed``, ``metric``, ``engine``, ``init``.
        seed: See there.
        metric: See there.
        engine: See there.
        init: See there.
        form: What ``animated`` writes.
        parquet: Write the coordinates as Parquet, too.

    Returns:
        The pictures.
    """
    if dims not in ("2", "3", "animated") or form not in ("gif", "html", "both"):
        raise ConfigError(f"dims is 2, 3 or animated and form gif, html or both; got {dims!r} and {form!r}")
    root = Path(output) / {"2": "tsne_2D", "3": "tsne_3D", "animated": "tsne_animated"}[dims]
    written = []
    for place, embeddings in groups(folders):
        options: dict[str, Any] = {"metric": metric, "engine": engine, "init": init}
        maps = tsne(embeddings, dims=2 if dims == "2" else 3, perplexity=perplexity, seed=seed, **options)
        ranges = pictures.limits(maps)
        for projection in maps:
            base = str(place / projection.name)
            if dims != "animated":
                written.append(confined(root, f"{base}.png"))
                pictures.save_figure(pictures.scatter(projection, ranges), written[-1])
            if dims == "animated" and form != "html":
                written.append(confined(root, f"{base}.gif"))
                pictures.save_animation(projection, ranges, written[-1])
            if dims == "animated" and form != "gif":
                written.append(confined(root, f"{base}.html"))
                save_page(projection, ranges, written[-1])
            projection.save(confined(root, f"{base}.safetensors"))
            if parquet:
                projection.save_parquet(confined(root, f"{base}.parquet"))
    return written


def write_wasserstein(
    folders: Sequence[str | Path],
    output: str | Path = "images",
    *,
    unit: bool = False,
    solver: Solver = "auto",
    seed: int = 0,
    parquet: bool = False,
) -> list[Path]:
    """Distances inside every model, between models, and their differences: heat maps and data per folder.

    Args:
        folders: Folders of embeddings.
        output: Root; ``wasserstein`` (``wasserstein_unit`` for unit features) is made below it.
        unit: Scale features to length one.
        solver: See :func:`expunge.analysis.wasserstein.w1`.
        seed: Seed of the noise floor.
        parquet: Write the table as Parquet, too.

    Returns:
        ``MODEL.png``, ``delta/B_minus_A.png``, ``between.png`` (several models), ``distances.csv`` and
        ``distances.safetensors`` of every folder.
    """
    root = Path(output) / ("wasserstein_unit" if unit else "wasserstein")
    written: list[Path] = []
    for place, embeddings in groups(folders):
        found = [wasserstein_matrix(e, unit=unit, solver=solver, seed=seed) for e in embeddings]
        first = found[0]
        classes, counts = list(first.classes), first.counts
        pairs = list(itertools.combinations(range(len(found)), 2))
        deltas = {(a, b): wasserstein_difference(found[a], found[b]) for a, b in pairs}
        across = {(a, b): wasserstein_between(embeddings[a], embeddings[b], unit=unit, solver=solver) for a, b in pairs}

        def path(name: str, place: Path = place) -> Path:
            written.append(confined(root, str(place / name)))
            return written[-1]

        scale = _ends([d.values for d in found])
        for d in found:
            note = f"n = {_span(counts)} per class; two halves of one class: {d.noise:.2f} (median)"
            title = f"{d.name}: distances between classes"
            figure = pictures.heat_map(d.values, classes, title, scale=scale, note=note)
            pictures.save_figure(figure, path(f"{d.name}.png"))
        top = max((_ends([np.abs(v)])[1] for v in deltas.values()), default=1.0) or 1.0
        for (a, b), values in deltas.items():
            title = f"{found[b].name} minus {found[a].name}"
            note = f"n = {_span(counts)} per class; noise floor {first.noise:.2f}"
            figure = pictures.heat_map(values, classes, title, centred=True, scale=(-top, top), note=note)
            pictures.save_figure(figure, path(f"delta/{found[b].name}_minus_{found[a].name}.png"))
        if pairs:
            rows = [f"{found[a].name} / {found[b].name}" for a, b in pairs]
            title = "The same class in two models"
            figure = pictures.heat_map(np.stack([across[p] for p in pairs]), classes, title, rows=rows)
            pictures.save_figure(figure, path("between.png"))
        arrays: dict[str, np.ndarray] = {"counts": counts}
        for d in found:
            arrays |= {f"within/{d.name}": d.values, f"floor/{d.name}": d.floor}
        for a, b in pairs:
            arrays[f"delta/{found[b].name}_minus_{found[a].name}"] = deltas[a, b]
            arrays[f"between/{found[a].name}/{found[b].name}"] = across[a, b]
        facts = {"format": 1, "classes": classes, "models": [d.name for d in found], "unit": unit, "seed": seed}
        facts["model_digests"] = [e.model_digest for e in embeddings]
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        atomic_save_safetensors(path("distances.safetensors"), tensors, {KEY: json.dumps(facts)})
        table = _table(arrays, classes, counts)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        atomic_write(path("distances.csv"), text.getvalue())
        if parquet:
            save_parquet(path("distances.parquet"), table)
    return written


def _table(arrays: dict[str, np.ndarray], classes: list[str], counts: np.ndarray) -> dict[str, list[Any]]:
    """Long form: one row per known value."""
    columns: dict[str, list[Any]] = {k: [] for k in ("kind", "models", "class_i", "class_j", "n_i", "n_j", "value")}
    for key, values in arrays.items():
        kind, _, models = key.partition("/")
        if kind == "counts":
            continue
        for where in np.argwhere(~np.isnan(values)):
            i, j = int(where[0]), int(where[-1])
            row = (kind, models, classes[i], classes[j], int(counts[i]), int(counts[j]), float(values[tuple(where)]))
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return columns


def _ends(grids: Sequence[np.ndarray]) -> tuple[float, float]:
    known = np.concatenate([g[~np.isnan(g)] for g in grids])
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _span(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"
