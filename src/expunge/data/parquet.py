"""Parquet files with one encoded image and one label per row (the layout of Hugging Face image data sets)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.errors import ConfigError, DataError, did_you_mean


def load_parquet(
    root: Path, decoding: Decoding, *, image_column: str = "image", label_column: str = "label"
) -> tuple[EncodedImages, EncodedImages]:
    """Read a folder with ``train*.parquet`` and ``test*.parquet``, at its top or in a folder ``data``.

    The image column holds the encoded bytes, or a struct with the fields ``bytes`` and ``path``. Class names come
    from the schema metadata (``class_names`` as a JSON list, or a ClassLabel under ``huggingface``), else the labels
    themselves are the names.

    Args:
        root: The folder.
        decoding: How to decode.
        image_column: Name of the image column.
        label_column: Name of the integer label column.

    Returns:
        Train and test sets, decoded on demand.

    Raises:
        ConfigError: A column does not exist.
        DataError: A part or a label is missing, or a file is not Parquet.
    """
    train, names = _read(_shards(root, "train"), image_column, label_column)
    test, test_names = _read(_shards(root, "test"), image_column, label_column)
    if names is None:
        top = max(max(train[1]), max(test[1]))
        names = [str(k) for k in range(top + 1)]
    elif test_names is not None and test_names != names:
        raise DataError(f"{root}: class names of train and test differ")
    parts = [EncodedImages(sources, torch.tensor(labels), names, decoding) for sources, labels in (train, test)]
    return parts[0], parts[1]


def _shards(root: Path, role: str) -> list[Path]:
    for folder in (root, root / "data"):
        found = sorted(p for p in folder.glob("*.parquet") if p.stem == role or p.stem.startswith(f"{role}-"))
        if found:
            return found
    raise DataError(f"{root} has no {role}.parquet (nor {role}-*.parquet, there or in {root / 'data'})")


def _read(
    shards: list[Path], image_column: str, label_column: str
) -> tuple[tuple[list[Source], list[int]], list[str] | None]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow: pip install pyarrow") from error

    sources: list[Source] = []
    labels: list[int] = []
    names: list[str] | None = None
    for shard in shards:
        try:
            schema = pq.read_schema(shard)
            for wanted in (image_column, label_column):
                if wanted not in schema.names:
                    raise ConfigError(f"{shard} has no column {wanted!r}{did_you_mean(wanted, schema.names)}")
            if not pa.types.is_integer(schema.field(label_column).type):
                raise DataError(f"{shard}: column {label_column!r} is {schema.field(label_column).type}, not integer")
            table = pq.read_table(shard, columns=[image_column, label_column])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shard}: not a readable Parquet file: {error}") from error
        shard_names = _class_names(schema.metadata or {}, label_column, shard)
        if names is not None and shard_names != names:
            raise DataError(f"{shard}: class names differ from those of {shards[0]}")
        names = shard_names
        column = table.column(label_column).to_pylist()
        if None in column:
            raise DataError(f"{shard}: row {column.index(None)} has no label")
        labels += column
        images = table.column(image_column)
        sources += [Source(f"{shard} row {i}", functools.partial(_cell, images, i)) for i in range(len(images))]
    if not labels:
        raise DataError(f"{shards[0]}: no rows")
    return (sources, labels), names


def _cell(column: Any, row: int) -> bytes | None:
    value = column[row].as_py()
    return value.get("bytes") if isinstance(value, dict) else value


def _class_names(metadata: dict[bytes, bytes], label_column: str, shard: Path) -> list[str] | None:
    try:
        if b"class_names" in metadata:
            return [str(n) for n in json.loads(metadata[b"class_names"])]
        if b"huggingface" in metadata:
            features = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {})
            names = features.get(label_column, {}).get("names")
            return [str(n) for n in names] if names else None
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{shard}: the class names in the schema metadata are not readable: {error}") from error
    return None
