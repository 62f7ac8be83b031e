"""Image-text pairs as they are found, before anything is decoded, and the shards that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import DataError

#: Extensions of images in shards and folders; the four that the published scripts read.
IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 64 << 20
MAX_CAPTION_BYTES = 64 << 10


@dataclass(frozen=True)
class Pair:
    """One image and its caption, either of which may be missing.

    Args:
        shard: File or folder it lies in, for messages and the index.
        key: Its name there, without the extension.
        caption: The text, None if there is none.
        read: Reads the encoded image, None if there is none.
        problem: Why it cannot be used, empty if nothing is known against it.
    """

    shard: str
    key: str
    caption: str | None = None
    read: Callable[[], bytes] | None = None
    problem: str = ""

    @property
    def where(self) -> str:
        """Shard and key."""
        return f"{self.shard}: {self.key}"

    @property
    def identity(self) -> str:
        """File name of the shard and key: the same for a copy of a shard, different for equal keys of other shards."""
        return f"{Path(self.shard).name}/{self.key}"

    @property
    def defect(self) -> str:
        """What is wrong with the pair as far as this shows without decoding it, else empty."""
        if self.problem:
            return self.problem
        if self.caption is None:
            return "no caption"
        if not self.caption.strip():
            return "empty caption"
        return "" if self.read is not None else "no image"

    def data(self) -> bytes:
        """The encoded image.

        Raises:
            DataError: There is none, it cannot be read, or it is larger than what is accepted.
        """
        if self.read is None:
            raise DataError(f"{self.where}: no image")
        try:
            found = self.read()
        except OSError as error:
            raise DataError(f"{self.where}: the image cannot be read: {error}") from error
        if len(found) > MAX_IMAGE_BYTES:
            raise DataError(f"{self.where}: the image has {len(found)} bytes, more than {MAX_IMAGE_BYTES}")
        return found


@dataclass(frozen=True)
class Shard:
    """A source of pairs that is read as a whole or not at all.

    Args:
        name: Its path as the user gave it.
        pairs: Reads the pairs in their stored order; a shard that is damaged anywhere raises DataError.
        chosen: On the forget side every pair is forgotten, whatever its caption says.
    """

    name: str
    pairs: Callable[[], list[Pair]]
    chosen: bool = False


def image_suffix(data: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` by the first bytes of a file, None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member name; only the last dot of the last part separates them.

    >>> split_name("00000/photo.of.2019.JPG")
    ('00000/photo.of.2019', 'jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (folder + slash + stem, extension.lower()) if dot and stem else (name, "")


def caption_text(raw: bytes) -> tuple[str | None, str]:
    """A caption from the bytes of a text file, and the problem if they hold none."""
    if len(raw) > MAX_CAPTION_BYTES:
        return None, f"caption of more than {MAX_CAPTION_BYTES} bytes"
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError:
        return None, "caption is not UTF-8"


class Grouped:
    """Collects the files of a shard by key, in the order in which the keys first appear.

    Interleaved keys are put together; a key with two images or two captions is a problem of that pair.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self._pairs: dict[str, Pair] = {}

    def add(
        self, key: str, *, caption: str | None = None, read: Callable[[], bytes] | None = None, problem: str = ""
    ) -> None:
        """Add an image (``read``), a caption, or a problem to a key."""
        old = self._pairs.get(key, Pair(self.shard, key))
        if read is not None and old.read is not None:
            problem = problem or "two images"
        text = caption if old.caption is None else old.caption
        if caption is not None and old.caption is not None:
            problem, text = problem or "two captions", None
        self._pairs[key] = Pair(
            self.shard,
            key,
            text,
            old.read or read,
            old.problem or problem,
        )

    def pairs(self) -> list[Pair]:
        """All pairs so far."""
        return list(self._pairs.values())
