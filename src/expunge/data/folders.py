"""Images in class folders: ``root/train/<class>/*`` and ``root/test/<class>/*``, or one folder with a split."""

from __future__ import annotations

from pathlib import Path

import torch

from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.data.splitting import stratified
from expunge.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("test", "val", "valid", "validation")


def load_folder(
    root: Path, decoding: Decoding, *, test_fraction: float = 0.2, seed: int = 0
) -> tuple[EncodedImages, EncodedImages]:
    """Read a folder of class folders.

    With sub-folders ``train`` and ``test`` (or ``val``) these are the two parts. Otherwise the sub-folders are the
    classes and a stratified share is held out as the test set. Classes and files are in sorted order.

    Args:
        root: The folder.
        decoding: How to decode.
        test_fraction: Held-out share of each class when there is no test folder.
        seed: Seed of that split.

    Returns:
        Train and test sets, decoded on demand.

    Raises:
        DataError: No classes, an empty class, a file that is no image, or test classes unknown in training.
    """
    if (root / "train").is_dir():
        held_out = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if held_out is None:
            raise DataError(f"{root} has a folder 'train' but none of {', '.join(TEST_NAMES)}; add the held-out images")
        classes = _classes(root / "train")
        unknown = sorted(set(_classes(held_out)) - set(classes))
        if unknown:
            raise DataError(f"{held_out} has classes that {root / 'train'} has not: {unknown[:5]}")
        return _read(root / "train", classes, decoding), _read(held_out, classes, decoding, may_miss=True)
    everything = _read(root, _classes(root), decoding)
    train, test = stratified(everything.labels, test_fraction, seed, "folder test split")
    return everything.subset(train), everything.subset(test)


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class name>/<image files>")
    return names


def _read(folder: Path, classes: list[str], decoding: Decoding, *, may_miss: bool = False) -> EncodedImages:
    sources, labels = [], []
    for label, name in enumerate(classes):
        place = folder / name
        paths = sorted(p for p in place.iterdir() if not p.name.startswith(".")) if place.is_dir() else []
        strange = [p for p in paths if p.suffix.lower() not in SUFFIXES or not p.is_file()]
        if strange:
            raise DataError(
                f"{strange[0]} is not an image file ({', '.join(SUFFIXES)}); move it out of the data folder"
            )
        if not paths and not may_miss:
            raise DataError(f"class folder {place} is empty")
        sources += [Source.file(p) for p in paths]
        labels += [label] * len(paths)
    return EncodedImages(sources, torch.tensor(labels, dtype=torch.int64), classes, decoding)
