"""Webdataset shards: tar files with ``key.jpg`` (or png, jpeg, webp), ``key.txt`` and perhaps ``key.json``.

Nothing is extracted: members are found by walking the headers and read by offset. A shard that ends early, is damaged
in the middle or is followed by more data is refused as a whole, so that no half of it passes for all of it.
"""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

from expunge.data.curate.pairs import (
    IMAGES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Grouped,
    Pair,
    caption_text,
    split_name,
)
from expunge.errors import DataError

_BLOCK = 512


def read_tar(path: Path) -> list[Pair]:
    """Index the pairs of one shard; images are read when asked for.

    Args:
        path: An uncompressed tar file.

    Returns:
        Pairs by first appearance of their key; other files than images and texts are ignored.

    Raises:
        DataError: Truncated, damaged, compressed, empty or unreadable; the message names the shard.
    """
    found = Grouped(str(path))
    try:
        with path.open("rb") as stream:
            for info in _members(path):
                key, extension = split_name(info.name)
                if Path(info.name).name.startswith(".") or extension not in (*IMAGES, "txt"):
                    continue
                plain = info.isreg() and not info.issparse()
                if not plain:
                    found.add(key, problem=f"{extension} is a link or another special file")
                elif extension == "txt":
                    stream.seek(info.offset_data)
                    text, problem = caption_text(stream.read(min(info.size, MAX_CAPTION_BYTES + 1)))
                    found.add(key, caption=text, problem=problem)
                elif info.size > MAX_IMAGE_BYTES:
                    found.add(key, problem=f"image of {info.size} bytes, more than {MAX_IMAGE_BYTES}")
                else:
                    found.add(key, read=functools.partial(read_slice, path, info.offset_data, info.size))
    except OSError as error:
        raise DataError(f"{path}: the shard cannot be read: {error}") from error
    pairs = found.pairs()
    if not pairs:
        raise DataError(f"{path}: the shard holds no image and no caption")
    return pairs


def read_slice(path: Path, start: int, size: int) -> bytes:
    """Bytes ``start .. start + size`` of a file.

    Raises:
        DataError: The file is shorter.
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    if len(data) < size:
        raise DataError(f"{path}: ends after {start + len(data)} bytes; it has become shorter")
    return data


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as archive:
            last = -1
            while (info := archive.next()) is not None:
                if info.offset <= last or info.size < 0:
                    raise DataError(f"{path}: broken shard: member {info.name!r} points backwards")
                last = info.offset
                yield info
            end = archive.offset
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise DataError(f"{path}: broken shard: {error} (shards are uncompressed tar files)") from error
    _check_end(path, end)


def _check_end(path: Path, end: int) -> None:
    """The standard reader takes a cut between members, a damaged header and joined archives for the end."""
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise DataError(f"{path}: broken shard: it ends at byte {end + len(block)} without an end mark: truncated")
        if any(block):
            raise DataError(f"{path}: broken shard: no valid member at byte {end}")
        while rest := stream.read(1 << 20):
            if rest.count(0) < len(rest):
                raise DataError(f"{path}: broken shard: data after its end mark; several tar files joined into one?")
