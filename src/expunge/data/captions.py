"""Images with captions: what two-tower models are trained on and made to forget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expunge.data.base import ImageSet, MemoryImages, checked_labels
from expunge.digest import json_digest
from expunge.errors import DataError


@dataclass(frozen=True, eq=False)
class Axis:
    """One way to label the images: objects, styles, names ...

    Args:
        labels: int64 ``[N]``.
        classes: Names.
        templates: Prompts with ``{}`` for the name; zero-shot classifiers average over them.
    """

    labels: Tensor
    classes: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of {}",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checked_labels(self.labels, self.classes))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "templates", tuple(self.templates))
        bad = [t for t in self.templates if t.count("{}") != 1]
        if bad or not self.templates:
            raise DataError(f"a template has exactly one '{{}}', got {bad[0] if bad else 'no template'!r}")


class CaptionedImages(ImageSet):
    """Images, one caption each, and one or several label axes; the first axis gives ``labels`` and ``classes``.

    Args:
        images: The images; their own labels and classes are not used.
        captions: One text per image.
        axes: By name, the first one is the main one.

    Raises:
        DataError: Lengths differ, a caption is empty, or there is no axis.
    """

    def __init__(self, images: ImageSet, captions: Sequence[str], axes: Mapping[str, Axis]) -> None:
        if not axes:
            raise DataError("captioned images need at least one label axis")
        if len(captions) != len(images):
            raise DataError(f"{len(images)} images but {len(captions)} captions")
        empty = [i for i, text in enumerate(captions) if not text.strip()]
        if empty:
            raise DataError(f"{len(empty)} captions are empty, first: {images.describe(empty[0])}")
        for name, axis in axes.items():
            if len(axis.labels) != len(images):
                raise DataError(f"axis '{name}' labels {len(axis.labels)} of {len(images)} images")
        main = next(iter(axes.values()))
        super().__init__(main.labels, main.classes, images.unreadable)
        self.base, self.captions, self.axes = images, tuple(captions), dict(axes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        return self.base.shape

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images, captions and axes."""
        axes = {n: [a.labels.tolist(), a.classes, a.templates] for n, a in self.axes.items()}
        return json_digest(["captioned", self.base.digest, self.captions, axes])

    def images(self, ids: Tensor) -> Tensor:
        """Images of the given ids as float32 ``[B, C, H, W]`` in [0, 1]."""
        return self.base.images(ids)

    def require(self, ids: Tensor) -> None:
        """Make sure that every image of ``ids`` can be read."""
        self.base.require(ids)

    def describe(self, i: int) -> str:
        """Where sample ``i`` comes from."""
        return self.base.describe(i)

    def subset(self, ids: Tensor) -> CaptionedImages:
        """A set with only these rows, renumbered from 0 in the order given."""
        ids = self.checked_ids(ids)
        axes = {n: Axis(a.labels[ids], a.classes, a.templates) for n, a in self.axes.items()}
        return CaptionedImages(self.base.subset(ids), [self.captions[i] for i in ids.tolist()], axes)

    def along(self, axis: str) -> CaptionedImages:
        """The same images with another main axis.

        Raises:
            DataError: There is no such axis.
        """
        if axis not in self.axes:
            raise DataError(f"no label axis is called {axis!r}; there are: {', '.join(self.axes)}")
        return CaptionedImages(self.base, self.captions, {axis: self.axes[axis], **self.axes})

    def mentioning(self, name: str) -> Tensor:
        """Ids of the images whose caption names ``name``; see :func:`mentions`."""
        return torch.tensor([i for i, text in enumerate(self.captions) if mentions(text, name)], dtype=torch.int64)


def captioned(x: Tensor, captions: Sequence[str], axes: Mapping[str, Axis]) -> CaptionedImages:
    """Captioned images from pixels ``[N, C, H, W]``."""
    main = next(iter(axes.values()))
    return CaptionedImages(MemoryImages(x, main.labels, main.classes), captions, axes)


def mentions(caption: str, name: str) -> bool:
    """Whether a caption names ``name``: whole words, any case, underscores and runs of blanks as one blank.

    >>> mentions("A portrait of ELON  musk, smiling", "Elon_Musk"), mentions("a musketeer", "musk")
    (True, False)
    """
    return name_pattern(name).search(caption.replace("_", " ")) is not None


def name_pattern(name: str) -> re.Pattern[str]:
    """The rule of :func:`mentions`, for texts whose underscores are blanks already.

    Raises:
        DataError: The name is empty.
    """
    words = [re.escape(w) for w in re.split(r"[\s_]+", name.strip()) if w]
    if not words:
        raise DataError("the name to look for is empty")
    return re.compile(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", re.IGNORECASE)
