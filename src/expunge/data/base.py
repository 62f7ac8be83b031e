"""Labelled image sets: stable ids, checked labels, a digest of the content."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from expunge.data.augment import Augment
from expunge.digest import combine, json_digest, state_digests
from expunge.errors import DataError

_SHOWN = 5


class ImageSet(ABC):
    """Labelled images addressed by ids ``0..len-1``.

    Args:
        labels: True classes, int64 ``[N]``.
        classes: Class names; label ``k`` is ``classes[k]``.
        unreadable: Ids whose image could not be decoded and which policy ``skip`` left in place, with their origin.

    Raises:
        DataError: Empty set, labels out of range, repeated class names.
    """

    def __init__(self, labels: Tensor, classes: Sequence[str], unreadable: Mapping[int, str] | None = None) -> None:
        self.classes: list[str] = [str(c) for c in classes]
        self.labels: Tensor = checked_labels(labels, self.classes)
        self.unreadable: dict[int, str] = {int(i): where for i, where in sorted((unreadable or {}).items())}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) of the content: pixels or file bytes, labels and class names."""

    @abstractmethod
    def images(self, ids: Tensor) -> Tensor:
        """Images of the given ids as float32 ``[B, C, H, W]`` in [0, 1].

        Raises:
            DataError: An id is out of range or its image is unreadable.
        """

    @abstractmethod
    def subset(self, ids: Tensor) -> Self:
        """A set with only these rows, renumbered from 0 in the order given."""

    def require(self, ids: Tensor) -> None:
        """Make sure that every image of ``ids`` can be read: the forget side is never skipped.

        Raises:
            DataError: Some cannot; the message names them.
        """
        self.checked_ids(ids)
        wanted = set(ids.tolist())
        bad = [i for i in self.unreadable if i in wanted]
        if bad:
            shown = ", ".join(self.describe(i) for i in bad[:_SHOWN])
            raise DataError(
                f"{len(bad)} of the {len(ids)} required images cannot be read: {shown}"
                f"{' ...' if len(bad) > _SHOWN else ''}; repair them or take them out of the request explicitly"
            )

    def readable(self) -> Tensor:
        """Ids of all images that can be read, int64."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[list(self.unreadable)] = False
        return keep.nonzero().flatten()

    def describe(self, i: int) -> str:
        """Where sample ``i`` comes from, for messages."""
        return self.unreadable.get(i, f"row {i}")

    def kept_unreadable(self, rows: list[int]) -> dict[int, str]:
        """The unreadable ones among ``rows``, under the numbers they get in a subset."""
        return {new: self.unreadable[old] for new, old in enumerate(rows) if old in self.unreadable}

    def checked_ids(self, ids: Tensor) -> Tensor:
        """Return ``ids`` if they are int64, one-dimensional and in range.

        Raises:
            DataError: They are not.
        """
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise DataError(f"sample ids must be a one-dimensional int64 tensor, got {ids.dtype} {list(ids.shape)}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
            bad = ids[(ids < 0) | (ids >= len(self))]
            raise DataError(f"{len(bad)} sample ids are out of range 0..{len(self) - 1}: {bad[:_SHOWN].tolist()}")
        return ids.cpu()


class MemoryImages(ImageSet):
    """Images held in memory.

    Args:
        x: ``[N, C, H, W]``, uint8 (0..255) or floating point in [0, 1].
        labels: int64 ``[N]``.
        classes: Class names.
        unreadable: Ids whose pixels are placeholders.

    Raises:
        DataError: Wrong rank or dtype, length mismatch, values outside [0, 1] or not finite.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, classes: Sequence[str], unreadable: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(labels, classes, unreadable)
        if x.ndim != 4:
            raise DataError(f"images must be [N, C, H, W], got {list(x.shape)}")
        if len(x) != len(self):
            raise DataError(f"{len(x)} images but {len(self)} labels")
        if x.dtype != torch.uint8:
            if not x.is_floating_point():
                raise DataError(f"images must be uint8 or floating point, got {x.dtype}")
            low, high = float(x.min()), float(x.max())
            if not (low >= 0.0 and high <= 1.0):
                raise DataError(f"floating-point images must be finite and in [0, 1], got range {low:g}..{high:g}")
        self.x = x.detach().cpu().contiguous()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.x.shape[1:]
        return int(c), int(h), int(w)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and class names."""
        content = combine(state_digests({"x": self.x, "labels": self.labels}))
        return json_digest([content, self.classes, list(self.unreadable)])

    def images(self, ids: Tensor) -> Tensor:
        """Images of the given ids as float32 ``[B, C, H, W]`` in [0, 1]."""
        ids = self.checked_ids(ids)
        if self.unreadable:
            self.require(ids)
        picked = self.x[ids]
        return picked.float().div_(255) if picked.dtype == torch.uint8 else picked.float()

    def subset(self, ids: Tensor) -> MemoryImages:
        """A set with only these rows, renumbered from 0 in the order given."""
        ids = self.checked_ids(ids)
        return MemoryImages(self.x[ids], self.labels[ids], self.classes, self.kept_unreadable(ids.tolist()))


class Subset(ImageSet):
    """A view of some rows of another set: no pixels are copied, labels and class names stay.

    Args:
        base: The set that holds the images.
        rows: Its ids, int64, without repetition; row ``rows[i]`` is sample ``i`` of the view.

    Raises:
        DataError: No rows, repeated or out of range.
    """

    def __init__(self, base: ImageSet, rows: Tensor) -> None:
        rows = base.checked_ids(rows)
        if len(rows.unique()) < len(rows):
            raise DataError(f"a subset names {len(rows) - len(rows.unique())} rows more than once")
        super().__init__(base.labels[rows], base.classes, base.kept_unreadable(rows.tolist()))
        self.base, self.rows = base, rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.base.shape

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the base's digest and the rows."""
        return json_digest(["subset", self.base.digest, self.rows.tolist()])

    def images(self, ids: Tensor) -> Tensor:
        """Images of the given ids as float32 ``[B, C, H, W]`` in [0, 1]."""
        return self.base.images(self.rows[self.checked_ids(ids)])

    def require(self, ids: Tensor) -> None:
        """Make sure that every image of ``ids`` can be read."""
        self.base.require(self.rows[self.checked_ids(ids)])

    def describe(self, i: int) -> str:
        """Where sample ``i`` comes from."""
        return self.base.describe(int(self.rows[i]))

    def subset(self, ids: Tensor) -> Subset:
        """A view of the same base with only these rows."""
        return Subset(self.base, self.rows[self.checked_ids(ids)])


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Args:
        name: Name of the data set.
        train: What forget and retain sets are taken from.
        test: Held-out images.
        val: Held-out part of the training data, None when none was asked for.
        source: Where the data come from, one sentence for reports.
        augment: The training augmentation that is customary for this set.

    Raises:
        DataError: The parts have different classes or image shapes.
    """

    name: str
    train: ImageSet
    test: ImageSet
    val: ImageSet | None = None
    source: str = ""
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for role, part in (("test", self.test), ("val", self.val)):
            if part is None:
                continue
            if part.classes != self.train.classes:
                raise DataError(f"{self.name}: the classes of train and {role} differ")
            if part.shape != self.train.shape:
                raise DataError(f"{self.name}: image shape of train is {self.train.shape}, of {role} {part.shape}")

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self.train.classes

    @property
    def digest(self) -> str:
        """SHA-256 over all parts."""
        return json_digest([self.train.digest, self.test.digest, self.val.digest if self.val else None])


def checked_labels(labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Return labels as int64 ``[N]`` on the CPU after checking them against the class names.

    Raises:
        DataError: Empty, not integer, out of range; or class names empty or repeated.
    """
    repeated = sorted({c for c in classes if list(classes).count(c) > 1}) if len(set(classes)) < len(classes) else []
    if not classes or repeated:
        raise DataError(f"class names must be present and different{f'; repeated: {repeated[:5]}' if repeated else ''}")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels must be a one-dimensional integer tensor, got {labels.dtype} {list(labels.shape)}")
    if len(labels) == 0:
        raise DataError("the image set is empty")
    labels = labels.detach().cpu().to(torch.int64).contiguous()
    bad = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise DataError(
            f"{len(bad)} labels are outside 0..{len(classes) - 1} ({len(classes)} classes); "
            f"first: label {int(labels[first])} in row {first}"
        )
    return labels
