"""Index files: which images of a source make up a surrogate set, with a digest of what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import files
from expunge.errors import DataError, did_you_mean

_MAX_BYTES = 256 << 20
_KEYS = ("surrogate", "part", "sha256", "indices", "files")


@dataclass(frozen=True)
class IndexFile:
    """Indices or file names read from a file.

    Args:
        path: The file, for messages.
        entries: All numbers or all file names, none twice.
        recorded: Name, part and digest of the source; empty for a plain list.
    """

    path: Path
    entries: tuple[int, ...] | tuple[str, ...]
    recorded: dict[str, Any]

    @property
    def end(self) -> int:
        """One more than the largest index.

        Raises:
            DataError: The entries are file names.
        """
        if isinstance(self.entries[0], str):
            raise DataError(f"{self.path} lists files, but drawn images have none; list indices")
        return 1 + max(int(i) for i in self.entries)

    def rows(self, n: int, names: Sequence[str]) -> Tensor:
        """Row numbers in a source of ``n`` images, in the order of the file.

        A file is found by its path relative to the source's folder, or by its bare name where that is unique.

        Raises:
            DataError: An index is out of range; a file is not there, or its name is ambiguous.
        """
        if isinstance(self.entries[0], int):
            outside = [i for i in self.entries if not 0 <= int(i) < n]
            if outside:
                raise DataError(f"{self.path}: {len(outside)} indices are outside 0..{n - 1}, first {outside[0]}")
            return torch.tensor(self.entries, dtype=torch.int64)
        if not names:
            raise DataError(f"{self.path} lists files, which only the surrogate 'folder' has; list indices")
        full = {name: i for i, name in enumerate(names)}
        bare: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            bare.setdefault(name.rsplit("/", 1)[-1], []).append(i)
        found = []
        for entry in map(str, self.entries):
            here = [full[entry]] if entry in full else bare.get(entry, [])
            if len(here) != 1:
                why = f"{len(here)} files have that name" if here else f"not in the folder{did_you_mean(entry, full)}"
                raise DataError(f"{self.path}: {entry!r}: {why}")
            found.append(here[0])
        if len(set(found)) < len(found):
            raise DataError(f"{self.path} names {len(found) - len(set(found))} images twice")
        return torch.tensor(found, dtype=torch.int64)

    def check(self, actual: Callable[[], dict[str, Any]]) -> None:
        """Compare what the file records about its source with what is there now.

        Raises:
            DataError: Another source, or other content.
        """
        if not self.recorded:
            return
        now = actual()
        other = [k for k in ("surrogate", "part") if self.recorded.get(k) != now[k]]
        if other:
            at = other[0]
            raise DataError(f"{self.path} was written for {at} {self.recorded.get(at)!r}, this is {now[at]!r}")
        if self.recorded["sha256"] != now["sha256"]:
            raise DataError(
                f"{self.path}: the images it names have changed since it was written: sha256 "
                f"{str(self.recorded['sha256'])[:12]} there, {now['sha256'][:12]} here; use the source and the seed "
                "it was written with, or write it again"
            )


def read_index(path: str | Path) -> IndexFile:
    """Read an index file: one written by :func:`write_index`, or a plain JSON list of indices or of file names.

    Raises:
        DataError: Missing, malformed, empty, mixed or with repetitions.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"surrogate: no index file at {file}")
    if file.stat().st_size > _MAX_BYTES:
        raise DataError(f"{file}: {file.stat().st_size} bytes is too large for an index file")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a JSON file: {str(error)[:200]}") from None
    recorded: dict[str, Any] = {}
    if isinstance(data, dict):
        strange = [k for k in data if k not in _KEYS]
        absent = [k for k in ("surrogate", "sha256", "indices") if k not in data]
        if strange or absent:
            raise DataError(
                f"{file}: missing {absent}" if absent else f"{file}: unknown key {strange[0]!r}; known: {_KEYS}"
            )
        recorded = {k: data[k] for k in ("surrogate", "part", "sha256") if k in data}
        data = data.get("files") or data["indices"]
    if not isinstance(data, list) or not data:
        raise DataError(f"{file}: expected a JSON list of indices or of file names")
    kind = type(data[0])
    if kind not in (int, str) or any(type(i) is not kind for i in data):
        raise DataError(f"{file}: the entries must be all indices or all file names")
    if len(set(data)) < len(data):
        raise DataError(f"{file} names {len(data) - len(set(data))} images twice")
    return IndexFile(file, tuple(data), recorded)


def write_index(path: str | Path, indices: Sequence[int], names: Sequence[str], recorded: dict[str, Any]) -> None:
    """Write indices, file names (where the source has them) and what identifies the source, atomically.

    Raises:
        ResourceError: The disk is full.
    """
    body = {**recorded, "indices": list(indices), **({"files": list(names)} if names else {})}
    files.atomic_write(path, json.dumps(body) + "\n")
