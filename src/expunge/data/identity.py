"""The labelled sets on which SLUG is measured: CelebA by name, and ImageNet's validation set with plain templates.

Source: SLUG, section on data and ``src/clip/a0_eval_imagenet.py``; the templates are open_clip's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.data.caption_files import load_class_tree, make_decoding
from expunge.data.captions import Axis, CaptionedImages
from expunge.data.encoded import EncodedImages, Source
from expunge.errors import CapabilityError, ConfigError, DataError, did_you_mean

CELEBA_TEMPLATES = ("{}.",)
#: The seven templates that open_clip calls simple.
IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
_IMAGE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def load_celeba(
    root: str | Path,
    identity_file: str | Path,
    *,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    resize: int | None = None,
    on_bad: str = "raise",
    max_bad: float = 0.01,
    max_pixels: int | None = None,
) -> CaptionedImages:
    """Load aligned CelebA images with their names.

    The classes are all names of the file, sorted, whichever images are taken: zero-shot accuracy is among all of them.

    Args:
        root: Folder that holds ``img_align_celeba/`` (or is it).
        identity_file: Lines ``image_id Name_With_Underscores`` after two header lines, the first of which counts them.
        names: Take only images of these people, with blanks or underscores, in any case.
        limit: The first so many images of each person.
        resize: Side in pixels.
        on_bad: ``raise`` or ``skip``.
        max_bad: Largest share that ``skip`` tolerates.
        max_pixels: Larger images are not decoded.

    Returns:
        Images in the file's order, axis ``name``, caption and template ``"{}."``.

    Raises:
        ConfigError: ``limit`` below 1.
        DataError: The file is malformed, a name is unknown, or an image is missing.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    rows = _identities(Path(identity_file).expanduser())
    classes = sorted({name for _, name in rows})
    wanted = _chosen(names, classes)
    taken: list[tuple[str, str]] = []
    count: dict[str, int] = {}
    for image, name in rows:
        if (wanted is None or name in wanted) and (limit is None or count.get(name, 0) < limit):
            count[name] = count.get(name, 0) + 1
            taken.append((image, name))
    folder = Path(root).expanduser()
    folder = folder / "img_align_celeba" if (folder / "img_align_celeba").is_dir() else folder
    present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    missing = [image for image, _ in taken if image not in present]
    if missing:
        raise DataError(f"{len(missing)} of {len(taken)} images are not in {folder}, first {missing[0]}")
    number = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([number[name] for _, name in taken], dtype=torch.int64)
    axis = Axis(labels, tuple(classes), CELEBA_TEMPLATES)
    decoding = make_decoding(resize, 3, on_bad, max_bad, max_pixels)
    images = EncodedImages([Source.file(folder / image) for image, _ in taken], labels, classes, decoding)
    captions = [CELEBA_TEMPLATES[0].format(name) for _, name in taken]
    return CaptionedImages(images.scan() if on_bad == "skip" else images, captions, {"name": axis})


def read_names(path: str | Path) -> list[str]:
    """Names from a file with one per line, underscores read as blanks; empty lines do not count.

    Raises:
        DataError: Not readable, or no names.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable list of names: {error}") from error
    names = [_plain(line) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path}: no names")
    return names


def imagenet_subset(n: int = 50_000, k: int = 2_500) -> Tensor:
    """Ids of the fixed 5 % of ImageNet's validation images that SLUG's utility is measured on, int64 ``[k]``.

    A draw without replacement from NumPy's legacy generator, seed 0, over images in sorted order of class folder and
    file name.

    Raises:
        ConfigError: Not 1 <= k <= n.

    Example:
        >>> ids = imagenet_subset()
        >>> len(ids), len(ids.unique())
        (2500, 2500)
    """
    if not 1 <= k <= n:
        raise ConfigError(f"a subset has 1 to n = {n} images, got k = {k}")
    return torch.from_numpy(np.random.RandomState(0).choice(n, k, replace=False).astype(np.int64))


def load_imagenet(
    root: str | Path,
    *,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    resize: int | None = None,
    on_bad: str = "raise",
    max_bad: float = 0.01,
    max_pixels: int | None = None,
) -> CaptionedImages:
    """Load ImageNet images from class folders, with readable names and the seven simple templates.

    Args:
        root: Folder of class folders, e.g. ``n01440764``.
        names: One per folder in sorted order; by default open_clip's thousand. A name that occurs twice gets a blank
            at its end, which tokenizers drop: class names must differ, prompts need not.
        limit: The first so many images of each class.
        resize: Side in pixels.
        on_bad: ``raise`` or ``skip``.
        max_bad: Largest share that ``skip`` tolerates.
        max_pixels: Larger images are not decoded.

    Raises:
        CapabilityError: No names given and open_clip is not installed.
        DataError: Not as many folders as names, or broken images.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    found = list(_imagenet_names() if names is None else names)
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) != len(found):
        raise DataError(f"{folder} has {len(folders)} class folders for {len(found)} class names")
    shown: list[str] = []
    for name in found:
        shown.append(name + " " * sum(name == s.rstrip() for s in shown))
    return load_class_tree(
        folder,
        make_decoding(resize, 3, on_bad, max_bad, max_pixels),
        axis="object",
        templates=IMAGENET_TEMPLATES,
        class_names=dict(zip(folders, shown, strict=True)),
        limit=limit,
    )


def _imagenet_names() -> Sequence[str]:
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise CapabilityError('the names of the ImageNet classes need: pip install "expunge[clip]"') from error
    return IMAGENET_CLASSNAMES


def _identities(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable identity file: {error}") from error
    rows = []
    for number, line in enumerate(lines[2:], 3):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not _IMAGE_NAME.fullmatch(parts[0]) or not _plain(parts[1]):
            raise DataError(f"{path} line {number}: expected 'image_id Name_With_Underscores', got {line[:80]!r}")
        rows.append((parts[0], _plain(parts[1])))
    if not rows or not lines[0].strip().isdecimal() or int(lines[0]) != len(rows):
        raise DataError(f"{path}: the first line must be the number of images, which is {len(rows)}; truncated?")
    return rows


def _chosen(names: Sequence[str] | None, classes: Sequence[str]) -> set[str] | None:
    if names is None:
        return None
    known = {c.lower(): c for c in classes}
    for name in names:
        if _plain(name).lower() not in known:
            raise DataError(f"the identity file has no {name!r}{did_you_mean(_plain(name), classes)}")
    if not names:
        raise DataError("no names given")
    return {known[_plain(name).lower()] for name in names}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
