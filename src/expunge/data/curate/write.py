"""Curated sets on disk: two tar files and an index that appear together, and are the same bytes for the same input."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from expunge.data.curate.match import Taken
from expunge.errors import ConfigError, DataError, ResourceError
from expunge.files import sha256_file

FORGET, RETAIN, INDEX = "forget.tar", "retain.tar", "index.json"
_KEY_LENGTH = 80


class Keys:
    """Names of members: the pair's own key where it is plain and free, else made so by a digest.

    Most readers of shards cut keys at the first dot, so a key in a shard has none.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, taken: Taken) -> str:
        """A key that no other pair of either side has."""
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", taken.pair.key)[:_KEY_LENGTH]
        key = plain
        for salt in range(1000):
            if key.lower() not in self._used:  # some file systems do not tell cases apart
                break
            mark = hashlib.sha256(f"{taken.pair.identity}\n{taken.sha256}\n{salt}".encode()).hexdigest()[:10]
            key = f"{plain}-{mark}"
        self._used.add(key.lower())
        return key


def write_tar(path: Path, members: Sequence[tuple[str, Taken]]) -> str:
    """Write pairs as a webdataset shard, sorted by key, with no trace of when and by whom.

    Args:
        path: File to write.
        members: Key and pair; images are copied byte for byte.

    Returns:
        SHA-256 of the file.

    Raises:
        DataError: An image has changed since it was checked.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, taken in sorted(members, key=lambda member: member[0]):
            data = taken.pair.data()
            if hashlib.sha256(data).hexdigest() != taken.sha256:
                raise DataError(f"{taken.pair.where}: the image has changed while it was curated; run again")
            _add(archive, f"{key}.{taken.suffix}", data)
            _add(archive, f"{key}.txt", (taken.pair.caption or "").encode("utf-8"))
    return sha256_file(path)


def write_index(path: Path, content: dict[str, Any]) -> None:
    """Write the index as JSON, keys sorted."""
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def published(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``out``; on success it is synced and becomes ``out``, on any error it is removed.

    Args:
        out: The folder to make.
        overwrite: Replace an earlier curated set (and nothing else).

    Raises:
        ConfigError: ``out`` exists, and replacing is not allowed or it holds other files.
        ResourceError: The disk is full.
    """
    check_target(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    fresh, old = (out.parent / f".{out.name[:80]}.{token}.{end}" for end in ("tmp", "old"))
    try:
        fresh.mkdir()
        yield fresh
        for path in sorted(fresh.iterdir()):
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        check_target(out, overwrite=overwrite)
        replaced = out.exists()
        if replaced:
            out.rename(old)
        try:
            fresh.rename(out)
        except BaseException:
            if replaced:
                old.rename(out)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left while writing {out}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be replaced.

    Raises:
        ConfigError: See :func:`published`.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is not a folder")
    present = sorted(p.name for p in out.iterdir()) if out.exists() else []
    other = [name for name in present if name not in (FORGET, RETAIN, INDEX)]
    if other:
        raise ConfigError(f"{out} holds other files ({', '.join(other[:3])}); name a folder of its own")
    if present and not overwrite:
        raise ConfigError(f"{out} holds a curated set; name another folder or allow overwriting")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and group of a new entry are zero and empty
    info.size, info.mode = len(data), 0o644
    archive.addfile(info, io.BytesIO(data))
