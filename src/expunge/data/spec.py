"""What a configuration says about data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from expunge.data.decode import MAX_PIXELS
from expunge.data.encoded import Decoding
from expunge.errors import did_you_mean
from expunge.part import Frozen

NAMES = ("digits", "cifar10", "cifar100", "svhn", "folder", "parquet", "hub")


class DataSpec(Frozen):
    """A data set by name, and how to read it.

    Args:
        name: ``digits`` (bundled), ``cifar10``, ``cifar100``, ``svhn`` (downloaded, or ``path``), ``folder``,
            ``parquet`` or ``hub`` (all three need ``path``).
        path: Folder, or hub name for ``hub``. For ``cifar10`` a folder with train.parquet and test.parquet; for the
            other downloaded sets the download folder.
        resize: Side in pixels; shorter side resized, centre cropped. None keeps the stored size.
        channels: 3 (RGB) or 1 (grey), for encoded images.
        val_fraction: Class-balanced share of the training rows kept for validation.
        test_fraction: Share held out when a folder has no test part.
        limit: Use only this many training rows, classes taking turns in file order.
        test_limit: The same for the test rows.
        seed: Seed of the splits.
        on_bad: ``raise``, or ``skip`` to leave unreadable images out of the retain side (never the forget side).
        max_bad: Largest share of unreadable images tolerated by ``skip``.
        max_pixels: Largest width x height that is decoded.
        in_memory: Decode once into memory (and cache), or on demand; None: once, if that takes under 2 GiB.
        cache: Keep decoded images in the cache folder.
        image_column: Column of the images (``parquet``, ``hub``).
        label_column: Column of the labels.
    """

    name: str = "digits"
    path: str | None = None
    resize: int | None = Field(default=None, ge=1, le=4096)
    channels: Literal[1, 3] = 3
    val_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    on_bad: Literal["raise", "skip"] = "raise"
    max_bad: float = Field(default=0.01, ge=0.0, lt=1.0)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    in_memory: bool | None = None
    cache: bool = True
    image_column: str = "image"
    label_column: str = "label"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in NAMES:
            raise ValueError(f"no data set is called {name!r}{did_you_mean(name, NAMES)}")
        return name

    def decoding(self) -> Decoding:
        """The part of the settings that concerns decoding."""
        return Decoding(self.channels, self.resize, self.max_pixels, self.on_bad, self.max_bad)
