"""Pictures of projections and distances: PNG, animated GIF. Common axes and colours for all models of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.analysis.tsne import Projection
from expunge.files import atomic_path
from expunge.report.model import clean
from expunge.report.svg import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AZIMUTHS = 49
_LEGEND_LIMIT = 20


@contextmanager
def _style() -> Iterator[None]:
    import warnings

    import matplotlib

    settings: Any = {"text.parse_math": False, "font.size": 10.0, "axes.titlelocation": "left"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def limits(projections: Sequence[Projection]) -> list[tuple[float, float]]:
    """Common range of every axis, with a margin; all axes have the same length."""
    everything = np.concatenate([a for p in projections for a in (p.points, p.prototypes)])
    low, high = everything.min(0), everything.max(0)
    half = 0.53 * max(float((high - low).max()), 1e-6)
    return [(float(m) - half, float(m) + half) for m in (low + high) / 2]


def _legend(figure: Figure, projection: Projection, colours: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    e = projection.embedding

    def dot(marker: str, label: str, face: str, edge: str, size: float = 7) -> Line2D:
        style: Any = {"marker": marker, "ls": "", "mfc": face, "mec": edge, "ms": size}
        return Line2D([], [], label=clean(label, 30), **style)

    entries = [dot("o", n, c, c, 6) for n, c in zip(e.classes, colours, strict=True)]
    if len(entries) > _LEGEND_LIMIT:
        entries = []
    entries.append(dot("X", "prototype", "white", "black", 9))
    if bool(e.forget.any()):
        entries.append(dot("o", "to be forgotten", "white", "black"))
    figure.legend(handles=entries, loc="outside right upper", frameon=False)


def scatter(projection: Projection, ranges: Sequence[tuple[float, float]], *, azimuth: float = -60.0) -> Figure:
    """One model in two or three dimensions; samples to be forgotten are ringed, prototypes are crosses."""
    from matplotlib.figure import Figure

    e, k = projection.embedding, projection.dims
    colours = class_colours(len(e.classes))
    with _style():
        figure = Figure(figsize=(8, 6), dpi=110, layout="constrained", facecolor="white")
        axis: Any = figure.add_subplot(projection="3d" if k == 3 else None)
        palette = np.array(colours)
        forget = e.forget.numpy()
        for chosen, size, edge in ((~forget, 16, "none"), (forget, 26, "black")):
            if chosen.any():
                tint: Any = palette[e.labels.numpy()[chosen]]
                axis.scatter(*projection.points[chosen].T, c=tint, s=size, edgecolors=edge, linewidths=0.7, alpha=0.85)
        axis.scatter(*projection.prototypes.T, c=colours, marker="X", s=130, edgecolors="black", linewidths=1.1)
        for which, ends in zip("xyz"[:k], ranges, strict=True):
            getattr(axis, f"set_{which}lim")(*ends)
            getattr(axis, f"set_{which}ticklabels")([])
        if k == 3:
            axis.view_init(elev=20, azim=azimuth)
        else:
            axis.tick_params(length=0)
            axis.set_box_aspect(1)
        s = projection.settings
        axis.set_title(clean(projection.name, 60), fontsize=13)
        about = f"{len(e)} {e.role} samples, joint t-SNE of {len(s['models'])} models"
        figure.supxlabel(f"{about}, perplexity {s['perplexity']:g}, seed {s['seed']}", fontsize=8.5, color="#59626c")
        _legend(figure, projection, colours)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, whole or not at all; the same figure gives the same bytes."""
    with atomic_path(path) as temporary, _style():
        figure.savefig(temporary, format="png", metadata={"Software": None})


def save_animation(
    projection: Projection, ranges: Sequence[tuple[float, float]], path: str | os.PathLike[str], *, delay: int = 80
) -> None:
    """Write an animated GIF of a turn in 49 steps around a three-dimensional map.

    Args:
        projection: A projection with three dimensions.
        ranges: Common axes.
        path: Target.
        delay: Milliseconds per frame.
    """
    import io

    from PIL import Image

    figure = scatter(projection, ranges)
    frames: list[Image.Image] = []
    with _style():
        for azimuth in np.linspace(0, 360, AZIMUTHS + 1)[:-1]:
            figure.axes[0].view_init(elev=20, azim=float(azimuth))  # type: ignore[attr-defined]
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=70)
            frame = Image.open(buffer).convert("RGB")
            # One palette for all frames, so that colours do not flicker.
            frames.append(frame.quantize(palette=frames[0]) if frames else frame.quantize(128))
    with atomic_path(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=delay, loop=0)


def heat_map(
    values: np.ndarray,
    classes: Sequence[str],
    title: str,
    *,
    centred: bool = False,
    scale: tuple[float, float] | None = None,
    note: str = "",
    rows: Sequence[str] | None = None,
) -> Figure:
    """Distances (viridis) or differences of distances (PiYG_r, centred at 0) between classes, upper triangle.

    Args:
        values: ``[C, C]``, or ``[len(rows), C]``; NaN stays empty.
        classes: Names.
        title: Headline.
        centred: A symmetric scale around 0.
        scale: Ends of the colour scale, from the values by default.
        note: A line below.
        rows: Names of the rows, if they are not the classes.
    """
    from matplotlib.figure import Figure

    known = values[~np.isnan(values)]
    if scale is None:
        top = float(np.abs(known).max()) if known.size else 1.0
        scale = (-top or -1.0, top or 1.0) if centred else (float(known.min()), float(known.max()))
    n = len(classes)
    with _style():
        side = min(4.2 + 0.36 * n, 14)
        height = side if rows is None else 2.2 + 0.42 * len(rows)
        figure = Figure(
            figsize=(side + (1.2 if rows is None else 3.2), height), dpi=110, layout="constrained", facecolor="white"
        )
        axis = figure.subplots()
        image = axis.imshow(values, cmap="PiYG_r" if centred else "viridis", vmin=scale[0], vmax=scale[1])
        names = [clean(c, 18) for c in classes]
        if n <= 40:
            axis.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(values)), names if rows is None else [clean(r, 40) for r in rows])
        if n <= 12 and len(values) <= 24:
            for (i, j), v in np.ndenumerate(values):
                if not np.isnan(v):
                    red, green, blue, _ = image.cmap(image.norm(v))
                    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                    text = f"{v:+.2f}" if centred else f"{v:.2f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(clean(title, 100), fontsize=12)
        label = "change of W1 (positive: further apart)" if centred else "W1"
        figure.colorbar(image, ax=axis, shrink=0.8, label=label)
        if note:
            figure.supxlabel(clean(note, 200), fontsize=8.5, color="#59626c")
    return figure
