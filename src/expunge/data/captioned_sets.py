"""Captioned training pairs with zero-shot test images, as a configuration names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from expunge import rng
from expunge.data.caption_files import OTHER, class_tree, load_captioned
from expunge.data.captions import Axis, CaptionedImages
from expunge.data.identity import imagenet_subset, load_celeba, load_imagenet, read_names
from expunge.data.spec import DataSpec
from expunge.errors import ConfigError, DataError
from expunge.part import Frozen


def load_pairs(spec: DataSpec) -> tuple[CaptionedImages, CaptionedImages, str]:
    """Training pairs and test images with one label axis, called ``axis`` or ``name``, and where they come from.

    Classes are the names of the test images: all people of CelebA's identity file, the class folders of ``test_path``,
    or ``names``; and a last one, ``other``, for captions that mention none of them. Without ``test_path`` a part of the
    training pairs is held out.

    Raises:
        ConfigError: Settings that do not fit together.
        DataError: Files missing or broken, or a named class that has no images.
    """
    train, test, source = _pairs(spec)
    return _called(train, spec.axis), _called(test, spec.axis), source


def _called(images: CaptionedImages, axis: str | None) -> CaptionedImages:
    """The images with their one label axis under another name."""
    if axis is None or axis in images.axes:
        return images
    return CaptionedImages(images.base, images.captions, {axis: next(iter(images.axes.values()))})


def _pairs(spec: DataSpec) -> tuple[CaptionedImages, CaptionedImages, str]:
    decoding: dict[str, Any] = {"resize": spec.resize, "on_bad": spec.on_bad, "max_bad": spec.max_bad}
    decoding["max_pixels"] = spec.max_pixels
    path = Path(str(spec.path)).expanduser()
    prompts: dict[str, Any] = {} if spec.templates is None else {"templates": spec.templates}
    columns: dict[str, Any] = {}
    if class_tree(path) is None:
        given = {"image_column": spec.image_column, "caption_column": spec.caption_column}
        columns = {k: v for k, v in given.items() if k in spec.model_fields_set}
    names = _names(spec.names)
    test: CaptionedImages | None = None
    if spec.test_path is not None:
        where = Path(spec.test_path).expanduser()
        if not where.exists():
            raise DataError(f"data 'captions': no test images at {where}")
        if spec.identities is not None:
            test = load_celeba(where, spec.identities, names=names, limit=spec.test_limit, **decoding)
        elif class_tree(where) is not None:
            test = load_captioned(where, limit=spec.test_limit, channels=spec.channels, **prompts, **decoding)
        else:
            if names is None:
                raise ConfigError(
                    "data 'captions': the test images have captions too, so 'names' must say what is named"
                )
            test = load_captioned(where, axis_names=names, limit=spec.test_limit, **prompts, **columns, **decoding)
        names = [c for c in test.classes if c != OTHER]
        prompts = prompts or {"templates": next(iter(test.axes.values())).templates}
    if class_tree(path) is not None:
        train = load_captioned(path, limit=spec.limit, channels=spec.channels, **prompts, **decoding)
    else:
        if names is None:
            raise ConfigError("data 'captions' needs 'names' (what captions may mention), or 'test_path' with classes")
        train = load_captioned(path, axis_names=names, limit=spec.limit, **prompts, **columns, **decoding)
    source = f"captioned images in {path.name}"
    if test is None:
        return *_divided(train, spec), source
    if test.classes != train.classes:
        if OTHER not in train.classes or test.classes != train.classes[:-1]:
            raise DataError("data 'captions': training and test images have different classes")
        axis = next(iter(test.axes.values()))
        templates = train.axes["name"].templates
        test = CaptionedImages(test.base, test.captions, {"name": Axis(axis.labels, tuple(train.classes), templates)})
    return train, test, f"{source}, tested on {Path(str(spec.test_path)).name}"


def _names(given: str | Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    return read_names(given) if isinstance(given, str) else list(given)


def _divided(images: CaptionedImages, spec: DataSpec) -> tuple[CaptionedImages, CaptionedImages]:
    """Hold out the same share of every class, at least one image of each that has two."""
    order = rng.permutation(rng.key(spec.seed, "held-out pairs"), len(images))
    labels = images.labels[order]
    held = []
    for c in labels.unique():
        members = order[labels == c]
        held.append(members[: max(1, round(spec.test_fraction * len(members)))] if len(members) > 1 else members[:0])
    test = torch.cat(held).sort().values
    if not len(test):
        raise DataError("no class of the captioned images has two of them, so none can be held out; give 'test_path'")
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[test] = False
    return images.subset(rest.nonzero().flatten()), images.subset(test)


class ZeroShotSet(Frozen):
    """Further images that a two-tower model is tested on, with classes of their own.

    Args:
        kind: ``imagenet`` (class folders of its validation images), ``celeba`` or ``folder`` (any class folders).
        path: The folder.
        identities: CelebA's file of names.
        names: Of CelebA: take these people only; a list or a file with one per line.
        subset: Of ImageNet: the fixed 5 % of the published protocol.
        templates: Prompts with ``{}``, of class folders.
        resize: Side in pixels; shorter side resized, centre cropped.
        limit: The first so many images of every class.
    """

    kind: Literal["imagenet", "celeba", "folder"]
    path: str
    identities: str | None = None
    names: str | tuple[str, ...] | None = None
    subset: bool = False
    templates: tuple[str, ...] = ("a photo of {}",)
    resize: int = Field(default=224, ge=1, le=4096)
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> ZeroShotSet:
        own = {"identities": "celeba", "names": "celeba", "subset": "imagenet", "templates": "folder"}
        lost = [k for k, kind in own.items() if k in self.model_fields_set and self.kind != kind]
        if lost:
            raise ValueError(f"{lost} would have no effect for {self.kind!r}")
        if self.kind == "celeba" and self.identities is None:
            raise ValueError("'celeba' needs 'identities', the file of names")
        return self

    def load(self) -> CaptionedImages:
        """Read the images.

        Raises:
            DataError: Files missing or broken.
        """
        if self.kind == "celeba":
            names = _names(self.names)
            return load_celeba(
                self.path, str(self.identities), names=names, limit=self.limit, resize=self.resize, on_bad="skip"
            )
        if self.kind == "folder":
            return load_captioned(self.path, templates=self.templates, resize=self.resize, limit=self.limit)
        images = load_imagenet(self.path, resize=self.resize, limit=self.limit)
        return images.subset(imagenet_subset(len(images))) if self.subset else images
