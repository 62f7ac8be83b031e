"""Generated images in a report: what the model drew for the same prompts and the same noise, before and after."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from expunge.errors import DataError
from expunge.files import atomic_path, confined
from expunge.metrics.describe import definitions
from expunge.metrics.estimate import Estimate
from expunge.metrics.judge import GeneratedObserved, unit_pixels
from expunge.report.gallery import data_uri

if TYPE_CHECKING:
    from rich.table import Table

_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}\Z")
#: About the side of shown images in pixels; larger ones are shrunk to at most twice 64.
_SMALL, _LARGE = 96, 64
#: The figures beside the images: whether the concept is drawn, and comparisons with the original's images.
KEYS = (
    *("gen_ua", "gen_ua5", "gen_ira", "gen_cra", "gen_cra_all", "fid", "kid"),
    *("pair_mse", "pair_max", "lpips", "lpips_64", "style_loss"),
)
FORGOTTEN, OTHERS, PER_CELL = 4, 8, 4


@dataclass(frozen=True)
class Shot:
    """One generated image.

    Args:
        image: PNG as a data URI.
        seen: What the judge sees in it, in words.
        right: Whether that is what was asked for along the axis of what was forgotten; None where nothing was.

    Raises:
        DataError: ``image`` is no PNG data URI.
    """

    image: str
    seen: str = ""
    right: bool | None = None

    def __post_init__(self) -> None:
        if not _PNG.match(self.image):
            raise DataError("a generated image of a report is a PNG data URI")

    def pixels(self) -> Any:
        """The image for Pillow.

        Raises:
            DataError: It cannot be decoded.
        """
        from PIL import Image

        from expunge.data.decode import decode_image

        data = base64.b64decode(self.image.split(",", 1)[1])
        return Image.fromarray(decode_image(data, where="generated image").transpose(1, 2, 0))


@dataclass(frozen=True)
class SampleRow:
    """One prompt: images of every column, drawn from the same noise from left to right.

    Args:
        prompt: The prompt.
        forgotten: Whether it asks for what was to be forgotten.
        cells: One tuple of images per column, of equal lengths.
    """

    prompt: str
    forgotten: bool
    cells: tuple[tuple[Shot, ...], ...]


@dataclass(frozen=True)
class SamplesSection:
    """Grids of generated images and the figures that belong to them.

    Args:
        columns: Names of the models: "original", "after forgetting", other methods.
        rows: Prompts, those of what was forgotten first.
        metrics: Per column, estimates by registered name.
        named: What was to be forgotten, in words.
        judge: What the judge is.
        note: How the images were drawn, and what is missing and why.

    Raises:
        DataError: Rows or figures that do not fit the columns.
    """

    columns: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    metrics: tuple[dict[str, Estimate], ...] = ()
    named: str = ""
    judge: str = ""
    note: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.columns)
        if not n or not self.rows or any(len(r.cells) != n for r in self.rows) or len(self.metrics) not in (0, n):
            raise DataError(f"samples of a report: {n} columns need as many cells in every row, and figures for all")
        if any(len({len(c) for c in r.cells}) != 1 or not r.cells[0] for r in self.rows):
            raise DataError("samples of a report: every cell of a row needs as many images, at least one")
        if not self.labels:
            known = definitions([name for m in self.metrics for name in m])
            object.__setattr__(self, "labels", {name: d["label"] for name, d in known.items()})

    @property
    def groups(self) -> list[tuple[bool, list[SampleRow]]]:
        """Rows of what was forgotten, then the others; empty groups are left out."""
        both = [(gone, [r for r in self.rows if r.forgotten == gone]) for gone in (True, False)]
        return [(gone, rows) for gone, rows in both if rows]

    @property
    def figures(self) -> list[tuple[str, list[Estimate | None]]]:
        """Label and one estimate per column, for a table."""
        names = list(dict.fromkeys(name for m in self.metrics for name in m))
        return [(self.labels.get(name, name), [m.get(name) for m in self.metrics]) for name in names]

    @property
    def about(self) -> str:
        """The outcome in one sentence, or nothing if it was not measured."""
        parts = []
        for name, m in zip(self.columns, self.metrics or [{}] * len(self.columns), strict=True):
            ua = m.get("gen_ua")
            if ua is not None and ua.value is not None:
                shown = round(ua.n * (100 - ua.value) / 100)
                parts.append(f"{shown} of {ua.n} ({name})")
        what = self.named or "what was to be forgotten"
        return f"Images asked for {what} in which the judge recognises it: {', '.join(parts)}." if parts else ""

    def table(self) -> Table:
        """The figures for a terminal."""
        from rich.table import Table
        from rich.text import Text

        from expunge.report.model import clean

        table = Table(title=Text("Generated images"), caption=Text(clean(self.about, 400)))
        table.add_column("metric")
        for name in self.columns:
            table.add_column(Text(clean(name, 60)), justify="right")
        for label, values in self.figures:
            table.add_row(Text(clean(label, 60)), *(Text("-" if v is None else clean(v, 120)) for v in values))
        return table

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            DataError: Parts that do not fit.
            TypeError: Missing or unknown keys.
        """
        rows = tuple(
            SampleRow(**{**r, "cells": tuple(tuple(Shot(**s) for s in cell) for cell in r["cells"])})
            for r in data["rows"]
        )
        metrics = tuple({k: Estimate.from_dict(v) for k, v in m.items()} for m in data.get("metrics", ()))
        return cls(**{**data, "columns": tuple(data["columns"]), "rows": rows, "metrics": metrics})


def samples_section(
    columns: Mapping[str, GeneratedObserved],
    *,
    axis: str,
    forgotten: Sequence[int],
    metrics: Mapping[str, Mapping[str, Estimate]] | None = None,
    forgotten_rows: int = FORGOTTEN,
    other_rows: int = OTHERS,
    per_cell: int = PER_CELL,
    note: str = "",
) -> SamplesSection:
    """Choose images for a report: prompts of what was forgotten, and of one other class after another.

    Args:
        columns: What each model drew, by shown name; all for the same asks.
        axis: The axis of what was forgotten.
        forgotten: Its classes.
        metrics: Figures by column name; of these :data:`KEYS` are shown.
        forgotten_rows: Largest number of prompts of what was forgotten.
        other_rows: Largest number of other prompts.
        per_cell: Largest number of images per prompt and model.
        note: How the images were drawn.

    Raises:
        DataError: No columns, or columns of other asks.
    """
    first = next(iter(columns.values()), None)
    if first is None or any(seen.asks != first.asks for seen in columns.values()):
        raise DataError("samples of a report: models that drew images for the same asks expected")
    labels = first.labels(axis)
    gone = np.isin(labels, list(forgotten))
    prompts: dict[tuple[str, bool, int], list[int]] = {}
    for i, ask in enumerate(first.asks):
        prompts.setdefault((ask.prompt, bool(gone[i]), int(labels[i])), []).append(i)
    rows = []
    for which, limit in ((True, forgotten_rows), (False, other_rows)):
        for key in _in_turn([k for k in prompts if k[1] == which])[:limit]:
            chosen = prompts[key][:per_cell]
            cells = tuple(tuple(_shot(seen, i, axis) for i in chosen) for seen in columns.values())
            rows.append(SampleRow(key[0], which, cells))
    kept = [{k: e for k, e in (metrics or {}).get(name, {}).items() if k in KEYS} for name in columns]
    names = ", ".join(first.named(axis, c) for c in forgotten)
    shown = tuple(kept) if any(kept) else ()
    return SamplesSection(tuple(columns), tuple(rows), shown, names, first.judge, note)


def save_grids(section: SamplesSection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the grids as ``samples_forgotten.png`` and ``samples_others.png``; images below 96 pixels are enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap, left, line = ImageFont.load_default(), 6, 190, 16
    saved = []
    for gone, rows in section.groups:
        shots = [[[s.pixels() for s in cell] for cell in row.cells] for row in rows]
        side = max(_SMALL, *(max(p.size) for row in shots for cell in row for p in cell))
        across = max(len(cell) for row in shots for cell in row)
        width = left + len(section.columns) * (across * (side + gap) + 2 * gap)
        sheet = Image.new("RGB", (width, line + gap + len(rows) * (side + gap)), "white")
        draw = ImageDraw.Draw(sheet)
        for k, name in enumerate(section.columns):
            draw.text((left + k * (across * (side + gap) + 2 * gap), 2), _ascii(name, 40), "black", font)
        for r, row in enumerate(rows):
            top = line + gap + r * (side + gap)
            for part, text in enumerate(_broken(_ascii(row.prompt or "(empty prompt)", 120), 30)):
                draw.text((2, top + part * line), text, "black", font)
            for k, cell in enumerate(shots[r]):
                for j, picture in enumerate(cell):
                    scale = max(1, side // max(picture.size))
                    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
                    sheet.paste(large, (left + k * (across * (side + gap) + 2 * gap) + j * (side + gap), top))
        target = confined(folder, f"samples_{'forgotten' if gone else 'others'}.png")
        with atomic_path(target) as temporary:
            out = io.BytesIO()
            sheet.save(out, "PNG")
            temporary.write_bytes(out.getvalue())
        saved.append(target)
    return saved


def _shot(seen: GeneratedObserved, row: int, axis: str) -> Shot:
    said = {a: int(logits[row].argmax()) for a, logits in seen.judged.items()}
    wanted = seen.asks[row].labels.get(axis)
    image = unit_pixels(seen.images[row : row + 1])[0]
    side = _SMALL if max(image.shape) <= _SMALL else _LARGE
    words = ", ".join(seen.named(a, c) for a, c in said.items())
    return Shot(data_uri(image, side), words, None if wanted is None or axis not in said else said[axis] == wanted)


def _in_turn(keys: list[tuple[str, bool, int]]) -> list[tuple[str, bool, int]]:
    """The first prompt of every class, then the second ... each class starting one further, so that prompts vary."""
    by_class: dict[int, list[tuple[str, bool, int]]] = {}
    for key in keys:
        by_class.setdefault(key[2], []).append(key)
    turned = [own[k % len(own) :] + own[: k % len(own)] for k, own in enumerate(by_class.values())]
    longest = max((len(own) for own in turned), default=0)
    return [own[i] for i in range(longest) for own in turned if i < len(own)]


def _ascii(text: str, limit: int) -> str:
    """The built-in font knows no more."""
    return text[:limit].encode("ascii", "replace").decode()


def _broken(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)[:4]
