"""Image sets that are files or encoded bytes: decoded when asked for, or once into memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from expunge import files
from expunge.data.base import ImageSet, MemoryImages
from expunge.data.decode import DECODE_VERSION, MAX_PIXELS, decode_image
from expunge.digest import json_digest
from expunge.errors import ArtifactError, DataError, ResourceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One encoded image: how to read its bytes and what to call it."""

    name: str
    read: Callable[[], bytes | None]

    @classmethod
    def file(cls, path: Path) -> Source:
        """An image file."""
        return cls(str(path), path.read_bytes)


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, see :mod:`expunge.data.decode`.

    Args:
        channels: 3 or 1.
        size: Side to resize to, None to keep.
        max_pixels: Cap checked before decoding.
        on_bad: ``raise``, or ``skip`` to mark unreadable images and go on; required (forget) images always raise.
        max_bad: Largest share of unreadable images that ``skip`` tolerates.
    """

    channels: int = 3
    size: int | None = None
    max_pixels: int = MAX_PIXELS
    on_bad: Literal["raise", "skip"] = "raise"
    max_bad: float = 0.01


class EncodedImages(ImageSet):
    """Images decoded on demand.

    Args:
        sources: One per sample.
        labels: int64 ``[N]``.
        classes: Class names.
        decoding: Rules; with ``skip``, call :meth:`scan` (or :meth:`in_memory`) to find the unreadable ones.
        unreadable: Ids already known to be unreadable.

    Raises:
        DataError: Lengths differ.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Tensor,
        classes: Sequence[str],
        decoding: Decoding | None = None,
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(labels, classes, unreadable)
        if len(sources) != len(self):
            raise DataError(f"{len(sources)} images but {len(self)} labels")
        self.sources = list(sources)
        self.decoding = decoding or Decoding()

    def describe(self, i: int) -> str:
        """The file or row of sample ``i``."""
        return f"{self.sources[i].name} (id {i})"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width; that of the first readable image unless a size is set."""
        d = self.decoding
        if d.size is not None:
            return d.channels, d.size, d.size
        for i in range(len(self)):
            try:
                c, h, w = self._decode(i).shape
            except DataError:
                if d.on_bad == "raise":
                    raise
                continue
            return int(c), int(h), int(w)
        raise DataError("none of the images can be read")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all encoded bytes, labels, class names and decoding rules."""
        digest = hashlib.sha256(_rules(self.decoding).encode())
        for source in self.sources:
            data = _bytes(source)
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(self.labels.numpy().tobytes())
        return json_digest([digest.hexdigest(), self.classes])

    def images(self, ids: Tensor) -> Tensor:
        """Images of the given ids as float32 ``[B, C, H, W]`` in [0, 1], decoded now."""
        ids = self.checked_ids(ids)
        out = np.empty((len(ids), *self.shape), dtype=np.uint8)
        for row, i in enumerate(ids.tolist()):
            out[row] = self._same_shape(i)
        return torch.from_numpy(out).float().div_(255)

    def require(self, ids: Tensor) -> None:
        """Decode every image of ``ids`` once; see :meth:`ImageSet.require`."""
        super().require(ids)
        for i in ids.tolist():
            self._same_shape(i)

    def subset(self, ids: Tensor) -> EncodedImages:
        """A set with only these rows, renumbered from 0 in the order given."""
        rows = self.checked_ids(ids).tolist()
        sources = [self.sources[i] for i in rows]
        return EncodedImages(sources, self.labels[ids], self.classes, self.decoding, self.kept_unreadable(rows))

    def scan(self) -> EncodedImages:
        """Decode everything once without keeping it, and return a set that knows its unreadable ids.

        Raises:
            DataError: An image is unreadable under policy ``raise``, or too many are under ``skip``.
        """
        bad = []
        for i in range(len(self)):
            if self._attempt(i) is None:
                bad.append(i)
        return EncodedImages(self.sources, self.labels, self.classes, self.decoding, self._tolerated(bad))

    def in_memory(self) -> MemoryImages:
        """Decode everything into uint8 memory.

        Raises:
            DataError: As :meth:`scan`.
        """
        pixels = np.zeros((len(self), *self.shape), dtype=np.uint8)
        bad = []
        for i in range(len(self)):
            image = self._attempt(i)
            if image is None:
                bad.append(i)
            else:
                pixels[i] = image
        return MemoryImages(torch.from_numpy(pixels), self.labels, self.classes, self._tolerated(bad))

    def cached(self, folder: Path | None = None) -> MemoryImages:
        """Like :meth:`in_memory`, kept on disk under a digest of the encoded bytes, the labels and the rules.

        A cache file that is broken or does not hold what its digest says is rebuilt. A cache that cannot be written
        is logged and skipped: it saves time, nothing else.
        """
        path = (folder or files.cache_dir() / "images") / f"{self.digest}.safetensors"
        kept = self._from_cache(path) if path.is_file() else None
        if kept is not None:
            return kept
        fresh = self.in_memory()
        content = {"x": fresh.x, "labels": fresh.labels, "unreadable": torch.tensor(list(fresh.unreadable)).long()}
        try:
            files.atomic_save_safetensors(path, content, {"digest": _content(fresh)})
        except (OSError, ResourceError) as error:
            log.warning("decoded images were not cached: %s", error)
        return fresh

    def _from_cache(self, path: Path) -> MemoryImages | None:
        try:
            tensors, info = files.read_safetensors(path)
            if set(tensors) != {"x", "labels", "unreadable"}:
                raise ArtifactError(f"{path}: unexpected tensors {sorted(tensors)}")
            broken = {i: self.describe(i) for i in tensors["unreadable"].tolist()}
            kept = MemoryImages(tensors["x"], tensors["labels"], self.classes, broken)
        except (ArtifactError, DataError, IndexError) as error:
            log.warning("cache is broken (%s); decoding again", error)
            return None
        if _content(kept) != info.get("digest") or not torch.equal(kept.labels, self.labels):
            log.warning("cache %s does not hold what its digest says; decoding again", path)
            return None
        self._tolerated(list(kept.unreadable))
        return kept

    def _decode(self, i: int) -> np.ndarray:
        d, source = self.decoding, self.sources[i]
        name = self.describe(i)
        return decode_image(_bytes(source), where=name, channels=d.channels, size=d.size, max_pixels=d.max_pixels)

    def _same_shape(self, i: int) -> np.ndarray:
        image = self._decode(i)
        if image.shape != self.shape:
            raise DataError(
                f"{self.describe(i)}: image is {list(image.shape)} but the set is {list(self.shape)} "
                "[channels, height, width]; set `resize` to give all images one size"
            )
        return image

    def _attempt(self, i: int) -> np.ndarray | None:
        if self.decoding.on_bad == "raise":
            return self._same_shape(i)
        try:
            return self._same_shape(i)
        except DataError as error:
            log.warning("skipped: %s", error)
            return None

    def _tolerated(self, bad: list[int]) -> dict[int, str]:
        if len(bad) > self.decoding.max_bad * len(self):
            raise DataError(
                f"{len(bad)} of {len(self)} images cannot be read, more than the tolerated share of "
                f"{self.decoding.max_bad:g}; first: {self.describe(bad[0])}"
            )
        return {i: self.describe(i) for i in bad}


def _bytes(source: Source) -> bytes:
    try:
        data = source.read()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error}") from error
    return data or b""


def _content(images: MemoryImages) -> str:
    return json_digest([images.digest, list(images.unreadable)])


def _rules(decoding: Decoding) -> str:
    import PIL

    rules = replace(decoding, max_bad=0.0)
    return f"{rules!r} version {DECODE_VERSION} pillow {PIL.__version__}"
