"""UnlearnCanvas: images in ``root/{style}/{object}/{number}.jpg``, and what is forgotten of them.

Source: SLUG, ``src/clip/a0_create_prompts_uncanvas.py`` and ``a0_create_tar_ucanvas.py``.

Deviates: captions are made here (there: a step of its own, without which every tar is empty), with blanks for
underscores; ``Seed_Images`` are the photographs that the styles were made from, so they are captioned as such and are
not a style to forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expunge.data.curate.pairs import IMAGES, Pair, Shard
from expunge.errors import DataError, RequestError, did_you_mean

PHOTOS = "Seed_Images"
PER_CELL = 20


@dataclass(frozen=True)
class Canvas:
    """The forget and the retain side of one style or object.

    Args:
        forget: All images of the style or object.
        retain: All others; image numbers are outermost, so a limited set has all styles and objects.
        name: The folder name of what is forgotten.
        notes: Cells with another number of images than expected.
    """

    forget: Shard
    retain: Shard
    name: str
    notes: tuple[str, ...]


def caption(style: str, obj: str) -> str:
    """The prompt of a cell.

    >>> caption("Van_Gogh", "Dogs"), caption("Seed_Images", "Dogs")
    ('A Dogs image in Van Gogh style.', 'A Dogs image in Photo style.')
    """
    shown = "Photo" if style == PHOTOS else style.replace("_", " ")
    return f"A {obj.replace('_', ' ')} image in {shown} style."


def read_canvas(root: str | Path, kind: Literal["style", "object"], name: str, *, per_cell: int = PER_CELL) -> Canvas:
    """Divide an UnlearnCanvas folder.

    Args:
        root: Folder of style folders.
        kind: Whether ``name`` is a style or an object.
        name: With blanks or underscores, in any case.
        per_cell: Images expected of every style and object.

    Raises:
        DataError: Not such a folder, or what is to be forgotten has no images.
        RequestError: No such style or object, or the photographs are named as a style.
    """
    folder = Path(root).expanduser()
    styles = _folders(folder)
    cells = {style: _folders(folder / style) for style in styles}
    objects = sorted({obj for found in cells.values() for obj in found})
    if not objects:
        raise DataError(f"{folder} is not laid out as <style>/<object>/<number>.jpg")
    wanted = _known(name, styles if kind == "style" else objects, kind, folder)
    if wanted == PHOTOS and kind == "style":
        raise RequestError(
            f"{PHOTOS} is not a style: these are the photographs that all styles were made from; "
            f"name one of the {len(styles) - 1} styles"
        )
    forget: list[tuple[int, str, Pair]] = []
    retain: list[tuple[int, str, Pair]] = []
    notes = []
    for style in styles:
        for obj in objects:
            found = _cell(folder, style, obj) if obj in cells[style] else []
            if len(found) != per_cell:
                notes.append(f"{style}/{obj} has {len(found)} images, expected {per_cell}")
            (forget if wanted == (style if kind == "style" else obj) else retain).extend(found)
    if not forget:
        raise DataError(f"{folder}: no images of {wanted}")
    sides = [[pair for *_, pair in sorted(side, key=_order)] for side in (forget, retain)]
    return Canvas(
        Shard(str(folder), lambda: sides[0], chosen=True),
        Shard(str(folder), lambda: sides[1]),
        wanted,
        tuple(_few(notes)),
    )


def _cell(folder: Path, style: str, obj: str) -> list[tuple[int, str, Pair]]:
    found = []
    for path in (folder / style / obj).iterdir():
        if path.name.startswith(".") or path.suffix.lower().lstrip(".") not in IMAGES:
            continue
        if not path.stem.isdecimal():
            raise DataError(f"{path}: images are named by their number")
        pair = Pair(str(folder), f"{obj}_{style}_{path.stem}", caption(style, obj), path.read_bytes)
        found.append((int(path.stem), f"{style}/{obj}", pair))
    return found


def _order(row: tuple[int, str, Pair]) -> tuple[int, str, str]:
    return row[0], row[1], row[2].key


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _known(name: str, known: Sequence[str], kind: str, folder: Path) -> str:
    plain = {k.replace("_", " ").lower(): k for k in known}
    found = plain.get(" ".join(name.replace("_", " ").lower().split()))
    if found is None:
        raise RequestError(f"{folder} has no {kind} {name!r}{did_you_mean(name, known)}")
    return found


def _few(notes: list[str], limit: int = 10) -> list[str]:
    return notes if len(notes) <= limit else [*notes[:limit], f"{len(notes) - limit} more cells of unexpected size"]
