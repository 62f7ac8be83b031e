"""What a configuration says about data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from expunge.data.decode import MAX_PIXELS
from expunge.data.encoded import Decoding
from expunge.errors import did_you_mean
from expunge.part import Frozen

NAMES = ("digits", "canvas", "captions", "cifar10", "cifar100", "svhn", "folder", "parquet", "hub")
#: Surrogates that are computed, not read.
DRAWN = ("shapes", "noise")
SURROGATE_NAMES = (*DRAWN, *NAMES)


class DataSpec(Frozen):
    """A data set by name, and how to read it.

    Args:
        name: ``digits`` (bundled), ``canvas`` (drawn, with captions), ``cifar10``, ``cifar100``, ``svhn`` (downloaded,
            or ``path``), ``folder``, ``parquet``, ``hub`` or ``captions`` (images with texts; all four need ``path``).
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
        caption_column: Column of the texts (``captions`` from Parquet files).
        test_path: ``captions``: test images, as class folders, captioned images or CelebA's images.
        identities: ``captions``: CelebA's file of names, of the images in ``test_path``.
        names: ``captions``: the classes, as names that captions may mention; a list, or a file with one per line. For
            CelebA, the people whose images are taken.
        templates: ``captions``: prompts with ``{}`` for the name.
        axis: ``canvas``: the label axis that gives the classes; the main one by default. ``captions``: what the axis of
            ``names`` is called, such as ``style``, which a judge may know; ``name`` by default.
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
    caption_column: str | None = None
    test_path: str | None = None
    identities: str | None = None
    names: str | tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    axis: str | None = None

    @model_validator(mode="after")
    def _of_captions(self) -> DataSpec:
        own = ("caption_column", "test_path", "identities", "names", "templates")
        lost = [k for k in own if getattr(self, k) is not None]
        if lost and self.name != "captions":
            raise ValueError(f"{lost} would have no effect for {self.name!r}; they belong to 'captions'")
        if self.axis is not None and self.name not in ("captions", "canvas"):
            raise ValueError(f"'axis' would have no effect for {self.name!r}; it belongs to 'canvas' and 'captions'")
        if self.identities is not None and self.test_path is None:
            raise ValueError("'identities' names the images in 'test_path', which is missing")
        return self

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in NAMES:
            raise ValueError(f"no data set is called {name!r}{did_you_mean(name, NAMES)}")
        return name

    def decoding(self) -> Decoding:
        """The part of the settings that concerns decoding."""
        return Decoding(self.channels, self.resize, self.max_pixels, self.on_bad, self.max_bad)


class SurrogateSpec(Frozen):
    """Images of another domain by name, and which of them to use.

    Size and channels follow the task. The order of the choices: ``limit``, classes, chunks, then ``quantity``.

    Args:
        name: ``shapes`` (drawn figures, no download), ``noise`` (the control that should fail), ``folder`` (image files
            at any depth, labelled by the folder they lie in), ``parquet``, ``hub``, or any data set of
            :class:`DataSpec`.
        path: As in :class:`DataSpec`.
        part: Which half of a data set; a folder is read whole.
        quantity: How many images; drawn at random where there are more, and fewer are part of more. None takes all
            (``shapes`` and ``noise``: 10,000).
        balanced: The same number of every label that is kept.
        classes: Keep only these labels, by number or name (``shapes``: kinds of figures).
        exclude_classes: Leave these labels out.
        chunks: Shuffle the images, labels unseen, into this many parts; with ``use``.
        use: The first so many chunks, or the numbers of the chunks to take.
        limit: Look at the first so many images only, labels taking turns in stored order.
        index_file: JSON file written by ``expunge data surrogate --write-index``, or a plain list of indices or file
            names; takes the place of all the choices above.
        seed: Seed of the draw (``shapes`` and ``noise``: of the images, too).
        channels: Decode or draw with 3 (RGB) or 1 (grey), then convert to the task's number; None: the task's.
        noise_std: Standard deviation of ``noise`` around 0.5, before clipping to [0, 1].
        on_bad: ``raise``, or ``skip`` to leave unreadable images out.
        max_bad: As in :class:`DataSpec`.
        max_pixels: As in :class:`DataSpec`.
        cache: Keep decoded images in the cache folder.
        image_column: Column of the images (``parquet``, ``hub``).
        label_column: Column of the labels.

    Raises:
        ConfigError: Unknown name, or a setting that would have no effect with the others.
    """

    name: str = "shapes"
    path: str | None = None
    part: Literal["train", "test"] = "train"
    quantity: int | None = Field(default=None, ge=1)
    balanced: bool = False
    classes: tuple[int | str, ...] | None = None
    exclude_classes: tuple[int | str, ...] | None = None
    chunks: int | None = Field(default=None, ge=2)
    use: int | tuple[int, ...] | None = None
    limit: int | None = Field(default=None, ge=1)
    index_file: str | None = None
    seed: int = 0
    channels: Literal[1, 3] | None = None
    noise_std: float = Field(default=0.25, gt=0.0)
    on_bad: Literal["raise", "skip"] = "raise"
    max_bad: float = Field(default=0.01, ge=0.0, lt=1.0)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    cache: bool = True
    image_column: str = "image"
    label_column: str = "label"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SURROGATE_NAMES:
            raise ValueError(f"no surrogate is called {name!r}{did_you_mean(name, SURROGATE_NAMES)}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> SurrogateSpec:
        if self.drawn:
            self._refuse("path", "part", "on_bad", "max_bad", "max_pixels", "cache")
        if self.name == "noise":
            self._refuse("classes", "exclude_classes", "balanced")
        else:
            self._refuse("noise_std")
        if self.name == "folder":
            self._refuse("part")
        if self.name not in ("parquet", "hub") and not (self.name == "cifar10" and self.path):
            self._refuse("image_column", "label_column")
        if self.index_file is not None:
            choices = ("quantity", "balanced", "classes", "exclude_classes", "chunks", "use", "limit")
            self._refuse(*choices, because="'index_file' already names the images")
        if self.classes is not None and self.exclude_classes is not None:
            raise ValueError("give 'classes' or 'exclude_classes', not both")
        if (self.chunks is None) != (self.use is None):
            raise ValueError("'chunks' (how many parts) and 'use' (which of them) belong together; one is missing")
        self.used_chunks()
        return self

    @property
    def drawn(self) -> bool:
        """Whether the images are computed rather than read."""
        return self.name in DRAWN

    def used_chunks(self) -> tuple[int, ...]:
        """Numbers of the chunks to take, sorted; empty without chunks."""
        if self.chunks is None or self.use is None:
            return ()
        wanted = tuple(range(self.use)) if isinstance(self.use, int) else tuple(sorted(self.use))
        if not wanted or len(set(wanted)) < len(wanted) or wanted[0] < 0 or wanted[-1] >= self.chunks:
            raise ValueError(
                f"'use' is a count from 1 to {self.chunks} or different chunk numbers from 0 to {self.chunks - 1}, "
                f"got {self.use!r}"
            )
        return wanted

    def data_spec(self, side: int, channels: Literal[1, 3]) -> DataSpec:
        """The settings that read the source, its images decoded to squares of ``side`` pixels."""
        shared = ("name", "path", "on_bad", "max_bad", "max_pixels", "cache", "image_column", "label_column")
        fields: dict[str, Any] = {k: getattr(self, k) for k in shared}
        if self.name in ("folder", "parquet", "hub") or (self.name == "cifar10" and self.path):
            fields |= {"resize": side, "channels": channels}
        return DataSpec(**fields)

    def _refuse(self, *names: str, because: str = "") -> None:
        given = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
        if given:
            raise ValueError(f"{given} would have no effect: {because or f'it does not apply to {self.name!r}'}")
