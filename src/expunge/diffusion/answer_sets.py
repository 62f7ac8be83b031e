"""Images that any tool has drawn for a list of prompts: which file answers which prompt, and reading them all."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.data.decode import FORMATS, decode_image
from expunge.diffusion.asks import Ask, about
from expunge.diffusion.image_folder import MANIFEST, recorded
from expunge.errors import ConfigError, DataError

#: How tools name images, tried in turn: ours and ESD's, and UnlearnCanvas'.
PATTERNS = tuple(f"{stem}.{end}" for stem in ("{case}_{n}", "{style}_{object}_seed{seed}") for end in ("png", "jpg"))
_ENDS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
_SHOWN = 5
Names = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class AnswerSet:
    """The files of a folder in the order of the asks.

    Args:
        folder: Where they lie.
        paths: One per ask.
        pattern: How they are named.
        others: Images in the folder that nothing asks for.
        facts: What drew them, where the folder says so.
    """

    folder: Path
    paths: tuple[Path, ...]
    pattern: str
    others: int
    facts: Mapping[str, object]


def find_answers(
    folder: str | Path, asks: Sequence[Ask], names: Names | None = None, pattern: str | None = None
) -> AnswerSet:
    """Find the image of every ask.

    Args:
        folder: Where the images are.
        asks: What they answer.
        names: Names of the labels by axis and number, for patterns that have them.
        pattern: How files are named, with ``{case}``, ``{n}``, ``{seed}``, ``{prompt}`` or an axis such as
            ``{style}``; by default the first of :data:`PATTERNS` that fits any file.

    Raises:
        ConfigError: A pattern with other fields, or by which two asks have one file.
        DataError: No such folder, images that are missing, or a folder drawn for other prompts under the same names.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of images")
    if pattern is not None:
        expected = _expected(asks, names or {}, pattern)
    else:
        for candidate in PATTERNS:
            try:
                expected, pattern = _expected(asks, names or {}, candidate), candidate
            except ConfigError:
                continue
            if any((root / name).is_file() for name in expected):
                break
        else:
            raise DataError(
                f"{root}: no image is named as one of the {len(asks)} asks ({', '.join(PATTERNS)}); "
                "give --files with the pattern of the names"
            )
    missing = [name for name in expected if not (root / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise DataError(f"{root}: {len(missing)} of {len(expected)} images are missing: {shown}")
    facts = _facts(root, asks, expected) if (root / MANIFEST).is_file() else {}
    there = sum(p.suffix.lower() in _ENDS for p in root.iterdir())
    return AnswerSet(root, tuple(root / name for name in expected), str(pattern), there - len(expected), facts)


def _facts(root: Path, asks: Sequence[Ask], expected: Sequence[str]) -> Mapping[str, object]:
    """What drew the images; their list must hold the same prompts and seeds."""
    facts, drawn = recorded(root)
    listed = {a.name: a for a in drawn}
    for ask, name in zip(asks, expected, strict=True):
        own = listed.get(name)
        if own is not None and (own.prompt, own.seed) != (ask.prompt, ask.seed):
            raise DataError(
                f"{root / name} was drawn for {about(own)}, seed {own.seed}, not for {about(ask)}, seed {ask.seed}"
            )
    return facts


def _expected(asks: Sequence[Ask], names: Names, pattern: str) -> list[str]:
    try:
        wanted = {f for _, f, _, _ in string.Formatter().parse(pattern) if f is not None}
    except ValueError as error:
        raise ConfigError(f"pattern {pattern!r}: {error}") from None
    known = {"case", "n", "seed", "prompt", *names}
    if not wanted <= known or not wanted:
        raise ConfigError(f"pattern {pattern!r}: fields are {', '.join(sorted(known))}")
    found: dict[str, Ask] = {}
    for ask in asks:
        fields = {"case": ask.case, "n": ask.n, "seed": ask.seed, "prompt": ask.prompt}
        lost = [a for a in wanted & set(names) if a not in ask.labels]
        if lost:
            raise ConfigError(f"pattern {pattern!r}: {about(ask)} has no {lost[0]}")
        name = pattern.format(**fields, **{a: names[a][n] for a, n in ask.labels.items() if a in names})
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"pattern {pattern!r}: {name!r} leaves the folder")
        if name in found:
            raise ConfigError(f"pattern {pattern!r}: {name!r} would answer {about(ask)} and {about(found[name])}")
        found[name] = ask
    return list(found)


def image_files(folder: str | Path) -> list[Path]:
    """All images below a folder, in the order of their names.

    Raises:
        DataError: None there.
    """
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _ENDS and p.is_file())
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(FORMATS)})")
    return found


def read_images(paths: Sequence[Path], advance: Callable[[int], None] = lambda count: None) -> tuple[Tensor, str]:
    """Images as uint8 ``[N, 3, H, W]``, and a digest of the files in their order.

    Raises:
        DataError: Files that are no images, with all their names (the first few); images of different sizes.
    """
    found: Tensor | None = None
    broken: list[str] = []
    digest = hashlib.sha256()
    for i, path in enumerate(paths):
        try:
            data = path.read_bytes()
            pixels = torch.from_numpy(decode_image(data, where=path.name))
        except (OSError, DataError) as error:
            broken.append(str(error))
            continue
        digest.update(hashlib.sha256(data).digest())
        if found is None:
            found = torch.empty(len(paths), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != found.shape[1:]:
            raise DataError(
                f"{path}: {list(pixels.shape)}, others are {list(found.shape[1:])}; images of one set have one size"
            )
        found[i] = pixels
        advance(1)
    if broken or found is None:
        shown = "; ".join(broken[:_SHOWN]) + (" ..." if len(broken) > _SHOWN else "")
        where = paths[0].parent if paths else "no files"
        raise DataError(f"{where}: {len(broken)} of {len(paths)} images cannot be read: {shown}")
    return found, digest.hexdigest()
