"""Images of another domain, for methods that may not see the retain set: which ones, at the task's size, in uint8.

Choices are functions of the settings alone, so every process gets the same set, and a smaller ``quantity`` is part of a
larger one. Rows stay in stored order: neither the order of chunks nor that of classes matters.

Deviates from SCAR's released code: chunks are seeded (there: an unseeded shuffle, copied to disk), and every image is
resized (shorter side) and cropped in the centre to the task's size, as the paper's experiments did. The released code
lost that step for most networks and cut patches out of full-size photographs, or failed on images of different sizes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from expunge import rng
from expunge.data.base import ImageSet, MemoryImages, Subset
from expunge.data.encoded import EncodedImages, Source
from expunge.data.folders import SUFFIXES
from expunge.data.load import read_parts
from expunge.data.procedural import DRAW_VERSION, KINDS, draw_noise, draw_shapes, shape_kinds
from expunge.data.spec import SurrogateSpec
from expunge.data.splitting import balanced_prefix
from expunge.data.surrogate_index import IndexFile, read_index, write_index
from expunge.digest import json_digest, tensor_digest
from expunge.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)
#: Number of ``shapes`` or ``noise`` images when no number is given: that of SCAR's surrogate sets.
DRAWN_QUANTITY = 10_000
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Surrogate:
    """A surrogate set, and where it comes from.

    Args:
        images: uint8 images of the task's shape; labels and class names are those of the source.
        indices: Row of every image in the source, int64.
        source: Where the images come from, one sentence.
        notes: What was changed or left out on the way.
        names: File of every image, relative to the folder; empty for other sources.
        recorded: Computes what :meth:`write_index` records about the source.
    """

    images: MemoryImages
    indices: Tensor
    source: str
    notes: tuple[str, ...]
    names: tuple[str, ...]
    recorded: Callable[[], dict[str, Any]]

    def write_index(self, path: str | Path) -> None:
        """Write the choice as JSON: indices, file names, and the digest of what they stand for.

        Raises:
            ResourceError: The disk is full.
        """
        write_index(path, self.indices.tolist(), self.names, self.recorded())


@dataclass(frozen=True)
class _Pool:
    """What can be chosen from: labels first, pixels (and digests) only of the rows that are taken."""

    labels: Tensor
    classes: list[str]
    source: str
    names: tuple[str, ...]
    take: Callable[[Tensor], tuple[MemoryImages, list[str]]]
    fingerprint: Callable[[Tensor], str]


def load_surrogate(spec: SurrogateSpec, shape: Shape) -> Surrogate:
    """Choose and load a surrogate set at a task's image shape.

    Args:
        spec: What to load.
        shape: Channels, height, width of the task's images, e.g. ``load_data(spec).train.shape``.

    Raises:
        ConfigError: A setting is missing, names an unknown class, or asks for what the source cannot give.
        DataError: Images are missing or unreadable; the index file was made from other images.
    """
    listed = read_index(spec.index_file) if spec.index_file is not None else None
    pool = _drawn(spec, shape, listed) if spec.drawn else _stored(spec, shape)
    rows = listed.rows(len(pool.labels), pool.names) if listed is not None else _choose(spec, pool)

    def recorded() -> dict[str, Any]:
        return {"surrogate": spec.name, "part": spec.part, "sha256": pool.fingerprint(rows)}

    if listed is not None:
        listed.check(recorded)
    images, notes = pool.take(rows)
    if images.unreadable:
        notes.append(f"{len(images.unreadable)} of {len(images)} images cannot be read and are left out")
    for note in notes:
        log.info("surrogate: %s", note)
    names = tuple(pool.names[i] for i in rows.tolist()) if pool.names else ()
    return Surrogate(images, rows, pool.source, tuple(notes), names, recorded)


def class_rows(labels: Tensor, classes: Sequence[str], wanted: Sequence[int | str], *, exclude: bool = False) -> Tensor:
    """Rows of the named classes, or of all the others; sorted.

    Raises:
        ConfigError: An unknown or repeated class.
        DataError: A named class has no rows, or no rows are left.
    """
    names = list(classes)
    numbers = []
    for one in wanted:
        if isinstance(one, str) and one in names:
            numbers.append(names.index(one))
        elif str(one).isdigit() and int(one) < len(names):
            numbers.append(int(one))
        else:
            raise ConfigError(f"surrogate: no class {one!r} among {len(names)}{did_you_mean(str(one), names)}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"surrogate: classes must be named, each once; got {list(wanted)}")
    absent = sorted(set(numbers) - set(labels.tolist()))
    if absent and not exclude:
        raise DataError(f"surrogate: no images of class {names[absent[0]]!r}")
    rows = (torch.isin(labels, torch.tensor(numbers)) ^ exclude).nonzero().flatten()
    if not len(rows):
        raise DataError(f"surrogate: without classes {list(wanted)} no images are left")
    return rows


def chunk_rows(n: int, chunks: int, use: Sequence[int], seed: int = 0) -> Tensor:
    """Rows in some of ``chunks`` nearly equal parts of a seeded shuffle of ``0..n-1``; sorted.

    The parts are disjoint and cover everything; the order of ``use`` does not matter.

    Raises:
        ConfigError: More chunks than rows, or an unknown chunk.
    """
    if not 1 <= chunks <= n or not use or not set(use) <= set(range(chunks)):
        raise ConfigError(f"surrogate: chunks {list(use)} of {chunks} cannot be taken from {n} images")
    parts = rng.permutation(rng.key(seed, "surrogate chunks"), n).tensor_split(chunks)
    return torch.cat([parts[i] for i in sorted(set(use))]).sort().values


def drawn_rows(labels: Tensor, quantity: int | None, *, balanced: bool = False, seed: int = 0) -> Tensor:
    """A random choice of rows without replacement; sorted. A smaller quantity is part of a larger one.

    Args:
        labels: int64 ``[N]``.
        quantity: How many; None takes all (balanced: as many of every label as the rarest has).
        balanced: The same number of every label that occurs.
        seed: Seed of the draw.

    Raises:
        ConfigError: More than there are, or balanced with one label or an amount that the labels do not divide.
    """
    if not balanced:
        if quantity is not None and quantity > len(labels):
            raise ConfigError(f"surrogate: quantity {quantity}, but only {len(labels)} images can be chosen")
        return rng.permutation(rng.key(seed, "surrogate draw"), len(labels))[:quantity].sort().values
    kinds, counts = labels.unique(return_counts=True)
    if len(kinds) < 2:
        raise ConfigError("surrogate: 'balanced' needs images of at least two labels, here all have one")
    each = int(counts.min()) if quantity is None else quantity // len(kinds)
    if quantity is not None and (quantity % len(kinds) or not each):
        near = max(1, each) * len(kinds)
        raise ConfigError(f"surrogate: quantity {quantity} is no multiple of the {len(kinds)} labels; e.g. {near} is")
    rare = int(counts.argmin())
    if int(counts[rare]) < each:
        raise ConfigError(f"surrogate: label {int(kinds[rare])} has {int(counts[rare])} images, balanced needs {each}")
    picked = []
    for label in kinds.tolist():
        rows = (labels == label).nonzero().flatten()
        picked.append(rows[rng.permutation(rng.key(seed, "surrogate draw", label), len(rows))[:each]])
    return torch.cat(picked).sort().values


def class_subset(images: ImageSet, classes: Sequence[int | str], *, exclude: bool = False) -> Subset:
    """A view of the images of some classes (held-out classes as surrogate: the upper bound), see :func:`class_rows`."""
    return Subset(images, class_rows(images.labels, images.classes, classes, exclude=exclude))


def chunk_subset(images: ImageSet, chunks: int, use: Sequence[int], seed: int = 0) -> Subset:
    """A view of some of the chunks of a set, see :func:`chunk_rows`."""
    return Subset(images, chunk_rows(len(images), chunks, use, seed))


def drawn_subset(images: ImageSet, quantity: int | None, *, balanced: bool = False, seed: int = 0) -> Subset:
    """A view of a random choice, see :func:`drawn_rows`."""
    return Subset(images, drawn_rows(images.labels, quantity, balanced=balanced, seed=seed))


def fitted(images: MemoryImages, shape: Shape) -> MemoryImages:
    """The same images in uint8 with another shape: shorter side resized (bicubic), centre crop, grey or RGB.

    Grey becomes RGB by repetition; RGB becomes grey by Pillow's weights (ITU-R 601).

    Raises:
        ConfigError: A number of channels that is neither kept, nor a change between 1 and 3.
    """
    x = images.x if images.x.dtype == torch.uint8 else (images.x.double() * 255 + 0.5).floor().to(torch.uint8)
    x = _channels(_resized(x, shape[1:]), shape[0])
    return MemoryImages(x, images.labels, images.classes, images.unreadable)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    from PIL import Image, ImageOps

    if tuple(x.shape[2:]) == size:
        return x
    planes = x.flatten(0, 1).numpy()
    out = np.empty((len(planes), *size), dtype=np.uint8)
    for i, plane in enumerate(planes):
        out[i] = np.asarray(ImageOps.fit(Image.fromarray(plane), size[::-1], method=Image.Resampling.BICUBIC))
    return torch.from_numpy(out).unflatten(0, tuple(x.shape[:2]))


def _channels(x: Tensor, channels: int) -> Tensor:
    have = x.shape[1]
    if have == channels:
        return x
    if (have, channels) == (1, 3):
        return x.repeat(1, 3, 1, 1)
    if (have, channels) == (3, 1):
        r, g, b = x.to(torch.int32).unbind(1)
        return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8).unsqueeze(1)
    raise ConfigError(f"surrogate: {have} channels cannot be turned into the task's {channels}; draw 'shapes' instead")


def _choose(spec: SurrogateSpec, pool: _Pool) -> Tensor:
    rows = torch.arange(len(pool.labels))
    if spec.limit is not None:
        rows = balanced_prefix(pool.labels, spec.limit)
    named = spec.classes if spec.classes is not None else spec.exclude_classes
    if named is not None:
        rows = rows[class_rows(pool.labels[rows], pool.classes, named, exclude=spec.classes is None)]
    if spec.chunks is not None:
        rows = rows[chunk_rows(len(rows), spec.chunks, spec.used_chunks(), spec.seed)]
    if spec.quantity is not None or spec.balanced:
        rows = rows[drawn_rows(pool.labels[rows], spec.quantity, balanced=spec.balanced, seed=spec.seed)]
    return rows


def _drawn(spec: SurrogateSpec, shape: Shape, listed: IndexFile | None) -> _Pool:
    some = spec.chunks is not None or spec.balanced or spec.classes is not None or spec.exclude_classes is not None
    n = spec.limit or (None if some else spec.quantity) or max(DRAWN_QUANTITY, spec.quantity or 0)
    n = listed.end if listed is not None else n
    drawn_shape = (spec.channels or shape[0], *shape[1:])

    def take(rows: Tensor) -> tuple[MemoryImages, list[str]]:
        if spec.name == "shapes":
            images = draw_shapes(rows, drawn_shape, spec.seed)
        else:
            images = draw_noise(rows, drawn_shape, spec.seed, spec.noise_std)
        return fitted(images, shape), []

    def fingerprint(rows: Tensor) -> str:
        return json_digest([spec.name, DRAW_VERSION, spec.seed, spec.noise_std, rows.tolist()])

    every = torch.arange(n)
    shapes = spec.name == "shapes"
    labels, classes = (shape_kinds(every), list(KINDS)) if shapes else (torch.zeros_like(every), ["noise"])
    return _Pool(labels, classes, f"{spec.name} drawn with seed {spec.seed}", (), take, fingerprint)


def _stored(spec: SurrogateSpec, shape: Shape) -> _Pool:
    if shape[0] not in (1, 3):
        raise ConfigError(f"surrogate '{spec.name}' is grey or RGB, the task's images have {shape[0]} channels")
    channels = cast(Literal[1, 3], spec.channels or shape[0])
    data_spec = spec.data_spec(max(shape[1:]), channels)
    names: tuple[str, ...] = ()
    raw: ImageSet
    if spec.name == "folder":
        raw, names = _folder(spec, data_spec.decoding())
        source = f"image files in {Path(str(spec.path)).name}"
    else:
        train, test, source = read_parts(data_spec)
        raw, source = (train if spec.part == "train" else test), f"{source}, {spec.part} part"

    def take(rows: Tensor) -> tuple[MemoryImages, list[str]]:
        chosen = raw.subset(rows)
        if isinstance(chosen, EncodedImages):
            images = chosen.cached() if spec.cache else chosen.in_memory()
            return fitted(images, shape), [f"images are decoded, resized and cropped to {shape[1]} x {shape[2]}"]
        notes = []
        if chosen.shape != shape:
            notes.append(f"images of {list(chosen.shape)} are resized, cropped and converted to {list(shape)}")
        images = fitted(cast(MemoryImages, chosen), (channels, *chosen.shape[1:]))
        return fitted(images, shape), notes

    return _Pool(raw.labels, raw.classes, source, names, take, lambda rows: _content(raw.subset(rows)))


def _folder(spec: SurrogateSpec, decoding: Any) -> tuple[EncodedImages, tuple[str, ...]]:
    if not spec.path:
        raise ConfigError("surrogate 'folder' needs 'path'")
    root = Path(spec.path).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"surrogate: no folder at {root}; set 'path' to where the images are")
    visible = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    paths = sorted(p for p in visible if not p.is_dir())
    strange = [p for p in paths if p.suffix.lower() not in SUFFIXES or not p.is_file()]
    if strange:
        raise DataError(f"{strange[0]} is not an image file ({', '.join(SUFFIXES)}); move it out of the folder")
    if not paths:
        raise DataError(f"surrogate: no image files in {root}")
    classes = sorted({p.parent.name for p in paths})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[p.parent.name] for p in paths])
    images = EncodedImages([Source.file(p) for p in paths], labels, classes, decoding)
    return images, tuple(p.relative_to(root).as_posix() for p in paths)


def _content(images: ImageSet) -> str:
    """Digest of stored pixels or file bytes in order: the same whatever size they are decoded to."""
    if not isinstance(images, EncodedImages):
        return json_digest(tensor_digest(cast(MemoryImages, images).x))
    digest = hashlib.sha256()
    for source in images.sources:
        try:
            data = source.read() or b""
        except OSError as error:
            raise DataError(f"{source.name}: cannot be read: {error}") from error
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
