"""Hugging Face image data sets: a local folder (saved or a clone) or a name on the hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.errors import ConfigError, DataError, did_you_mean

TEST_SPLITS = ("test", "validation", "valid", "val")


def load_hub(
    path: str, decoding: Decoding, *, image_column: str = "image", label_column: str = "label"
) -> tuple[EncodedImages, EncodedImages]:
    """Read an image classification data set with the ``datasets`` library.

    Args:
        path: A folder written by ``save_to_disk``, a folder that ``load_dataset`` understands, or a hub name.
        decoding: How to decode; the bytes are decoded here, not by ``datasets``.
        image_column: Name of the image column.
        label_column: Name of the label column.

    Returns:
        Train and test (or validation) sets, decoded on demand.

    Raises:
        ConfigError: ``datasets`` is not installed, or a column does not exist.
        DataError: Not found, not reachable, or without a train or held-out split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("reading Hugging Face data sets needs: pip install 'expunge[hub]'") from error

    local = Path(path).expanduser()
    try:
        if (local / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(str(local))
        else:
            loaded = datasets.load_dataset(str(local) if local.exists() else path)
    except Exception as error:
        # The library raises many types here: not found, offline, gated, malformed ...
        raise DataError(
            f"data set {path!r} could not be loaded ({type(error).__name__}: {str(error)[:300]}); without a network, "
            "save it with `datasets.load_dataset(name).save_to_disk(folder)` elsewhere and give that folder as path"
        ) from error
    if not isinstance(loaded, dict) or "train" not in loaded:
        raise DataError(f"data set {path!r} has no split 'train'; save it as a DatasetDict with train and test")
    held_out = next((name for name in TEST_SPLITS if name in loaded), None)
    if held_out is None:
        raise DataError(f"data set {path!r} has none of the splits {', '.join(TEST_SPLITS)}, only {sorted(loaded)}")
    train = _convert(loaded["train"], f"{path} train", decoding, image_column, label_column)
    test = _convert(loaded[held_out], f"{path} {held_out}", decoding, image_column, label_column)
    return train, test


def _convert(rows: Any, where: str, decoding: Decoding, image_column: str, label_column: str) -> EncodedImages:
    import datasets

    for wanted in (image_column, label_column):
        if wanted not in rows.column_names:
            raise ConfigError(f"{where} has no column {wanted!r}{did_you_mean(wanted, rows.column_names)}")
    feature = rows.features[label_column]
    labels = list(rows[label_column])
    if any(not isinstance(v, int) for v in labels):
        raise DataError(f"{where}: column {label_column!r} must hold integers without gaps")
    names = list(feature.names) if hasattr(feature, "names") else [str(k) for k in range(max(labels, default=-1) + 1)]
    raw = rows.cast_column(image_column, datasets.Image(decode=False))
    sources = [Source(f"{where} row {i}", functools.partial(_cell, raw, image_column, i)) for i in range(len(rows))]
    return EncodedImages(sources, torch.tensor(labels, dtype=torch.int64), names, decoding)


def _cell(rows: Any, column: str, row: int) -> bytes | None:
    value = rows[row][column]
    if value["bytes"] is not None:
        return value["bytes"]
    return Path(value["path"]).read_bytes() if value["path"] else None
