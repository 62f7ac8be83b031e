"""Pairs from tables: Parquet files, and folders with a ``metadata.jsonl`` or ``metadata.csv``."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.curate.pairs import Grouped, Pair, split_name
from expunge.errors import ConfigError, DataError, did_you_mean
from expunge.files import confined

METADATA = ("metadata.jsonl", "metadata.csv")
_IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "file_name")
_CAPTION_COLUMNS = ("caption", "text", "TEXT")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; None takes the first customary name that exists.

    Args:
        image: Encoded bytes, a struct with ``bytes`` and ``path``, or a path relative to the table.
        caption: The text.
    """

    image: str | None = None
    caption: str | None = None


def read_parquet(path: Path, columns: Columns) -> list[Pair]:
    """Pairs of a Parquet file; one row group of images is in memory at a time.

    Keys are those of a column ``key`` if there is one, else the row numbers.

    Raises:
        ConfigError: No such column, or pyarrow is missing.
        DataError: Not a readable Parquet file, no rows, or columns of other types.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        image = _column(columns.image, _IMAGE_COLUMNS, names, path, "image")
        text = _column(columns.caption, _CAPTION_COLUMNS, names, path, "caption")
        wanted = [text, "key"] if "key" in names else [text]
        table = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    kind = file.schema_arrow.field(image).type
    if not (pa.types.is_struct(kind) or _is_binary(pa, kind) or _is_string(pa, kind)):
        raise DataError(f"{path}: column {image!r} is {kind}; images are bytes, a struct with bytes, or a path")
    if not _is_string(pa, table.schema.field(text).type):
        raise DataError(f"{path}: column {text!r} is {table.schema.field(text).type}, not text")
    if not table.num_rows:
        raise DataError(f"{path}: no rows")
    captions = table.column(text).to_pylist()
    keys = table.column("key").to_pylist() if "key" in names else [f"{i:09d}" for i in range(table.num_rows)]
    found, cells = Grouped(str(path)), _Cells(path, file, image)
    for row, (key, caption) in enumerate(zip(keys, captions, strict=True)):
        found.add(str(key), caption=caption, read=functools.partial(cells.read, row))
    return found.pairs()


def read_metadata(path: Path, columns: Columns) -> list[Pair]:
    """Pairs of a folder whose ``metadata.jsonl`` or ``metadata.csv`` gives ``file_name`` and a caption per row.

    Raises:
        ConfigError: No such column.
        DataError: Not readable, or a file name leaves the folder.
    """
    found = Grouped(str(path.parent))
    for number, row in _rows(path):
        name = row.get(_column(columns.image, ("file_name",), row, path, "image"))
        caption = row.get(_column(columns.caption, _CAPTION_COLUMNS, row, path, "caption"))
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise DataError(f"{path} line {number}: file name and caption must be text")
        try:
            file = confined(path.parent, name)
        except ConfigError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        missing = "" if file.is_file() else "no image"
        found.add(split_name(name)[0], caption=caption, read=None if missing else file.read_bytes, problem=missing)
    pairs = found.pairs()
    if not pairs:
        raise DataError(f"{path}: no rows")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            if path.suffix == ".csv":
                yield from ((number, dict(row)) for number, row in enumerate(csv.DictReader(stream, strict=True), 2))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path} line {number}: not a JSON object")
                    yield number, row
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{path}: not readable: {error}") from error


def _column(chosen: str | None, customary: Sequence[str], present: Any, path: Path, what: str) -> str:
    names = list(present)
    if chosen is not None:
        if chosen not in names:
            raise ConfigError(f"{path} has no column {chosen!r}{did_you_mean(chosen, names)}")
        return chosen
    found = next((name for name in customary if name in names), None)
    if found is None:
        raise ConfigError(
            f"{path} has none of the {what} columns {', '.join(customary)}, only {', '.join(map(str, names)) or 'none'}"
            "; name the column"
        )
    return found


class _Cells:
    """Images of one Parquet file; the row group read last is kept, since neighbours are read together."""

    def __init__(self, path: Path, file: Any, column: str) -> None:
        self._path, self._file, self._column = path, file, column
        self._ends: list[int] = []
        for group in range(file.metadata.num_row_groups):
            self._ends.append((self._ends[-1] if self._ends else 0) + file.metadata.row_group(group).num_rows)
        self._held: tuple[int, Any] | None = None

    def read(self, row: int) -> bytes:
        """The encoded image of a row; empty if the cell is."""
        import pyarrow as pa

        group = next(i for i, end in enumerate(self._ends) if row < end)
        if self._held is None or self._held[0] != group:
            try:
                self._held = group, self._file.read_row_group(group, columns=[self._column]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self._path}: row group {group} cannot be read: {error}") from error
        value = self._held[1][row - (self._ends[group - 1] if group else 0)].as_py()
        path = value.get("path") if isinstance(value, dict) else value
        value = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, bytes):
            return value
        if not isinstance(path, str):
            return b""
        try:
            return confined(self._path.parent, path).read_bytes()
        except ConfigError as error:
            raise DataError(f"{self._path} row {row}: {error}") from error


def _is_binary(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_string(pa: Any, kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
