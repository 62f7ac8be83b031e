"""From a :class:`DataSpec` to :class:`Splits`."""

from __future__ import annotations

import math
from pathlib import Path

from expunge import files
from expunge.data.augment import AUGMENT, Augment
from expunge.data.base import ImageSet, Splits
from expunge.data.captions import CaptionedImages
from expunge.data.encoded import EncodedImages
from expunge.data.spec import DataSpec
from expunge.data.splitting import balanced_prefix, stratified
from expunge.errors import ConfigError, DataError

IN_MEMORY_BYTES = 2 << 30
_DOWNLOADED = ("cifar10", "cifar100", "svhn")


def load_data(spec: DataSpec) -> Splits:
    """Load a data set.

    Order of the steps: read, limit, decode, then split off the validation part.

    Raises:
        ConfigError: A setting is missing or does not apply.
        DataError: The data are missing, unreadable or inconsistent.
    """
    train, test, source = read_parts(spec)
    if spec.axis is not None:
        assert isinstance(train, CaptionedImages)
        assert isinstance(test, CaptionedImages)
        train, test = train.along(spec.axis), test.along(spec.axis)
    train = _finished(train, spec, spec.limit)
    test = _finished(test, spec, spec.test_limit)
    val = None
    if spec.val_fraction:
        rest, held = stratified(train.labels, spec.val_fraction, spec.seed, "validation split")
        train, val = train.subset(rest), train.subset(held)
        source += f"; {spec.val_fraction:g} of each class held out for validation, seed {spec.seed}"
    return Splits(spec.name, train, test, val, source, AUGMENT.get(spec.name, Augment()))


def read_parts(spec: DataSpec) -> tuple[ImageSet, ImageSet, str]:
    """Train and test images as they are stored (encoded ones undecoded), and where they come from.

    Raises:
        ConfigError: A setting is missing or does not apply.
        DataError: The data are missing or inconsistent.
    """
    _check(spec)
    return _parts(spec)


def _check(spec: DataSpec) -> None:
    if spec.name in ("folder", "parquet", "hub", "captions") and not spec.path:
        raise ConfigError(f"data '{spec.name}' needs 'path'")
    if spec.name == "digits" and spec.path:
        raise ConfigError("data 'digits' comes with scikit-learn and takes no 'path'")
    if spec.name == "canvas" and spec.path:
        raise ConfigError("data 'canvas' is drawn and takes no 'path'")
    stored = spec.name in ("digits", "canvas", "cifar100", "svhn") or (spec.name == "cifar10" and not spec.path)
    if stored:
        ignored = [k for k in ("resize", "on_bad", "in_memory") if getattr(spec, k) != DataSpec.model_fields[k].default]
        ignored += ["channels"] if "channels" in spec.model_fields_set else []
        if ignored:
            raise ConfigError(f"data '{spec.name}' is not decoded from files, so {ignored} would have no effect")
    if spec.name in ("folder", "parquet") or (spec.name == "cifar10" and spec.path):
        folder = Path(str(spec.path)).expanduser()
        if not folder.is_dir():
            raise DataError(f"data '{spec.name}': no folder at {folder}; set 'path' to where the data are")


def _parts(spec: DataSpec) -> tuple[ImageSet, ImageSet, str]:
    if spec.name == "digits":
        from expunge.data.digits import load_digits_splits

        digits = load_digits_splits(spec.seed)
        return digits.train, digits.test, digits.source
    if spec.name == "canvas":
        from expunge.data.canvas import load_canvas

        sizes = {k: v for k, v in (("n_train", spec.limit), ("n_test", spec.test_limit)) if v is not None}
        return load_canvas(**sizes, seed=spec.seed)
    if spec.name in _DOWNLOADED and not (spec.name == "cifar10" and spec.path):
        from expunge.data.torchvision_sets import load_torchvision

        root = Path(spec.path).expanduser() if spec.path else files.cache_dir() / "torchvision"
        return *load_torchvision(spec.name, root), f"{spec.name} through torchvision"
    if spec.name == "captions":
        from expunge.data.captioned_sets import load_pairs

        return load_pairs(spec)
    columns = {"image_column": spec.image_column, "label_column": spec.label_column}
    path = Path(str(spec.path)).expanduser()
    if spec.name == "hub":
        from expunge.data.hub import load_hub

        return *load_hub(str(spec.path), spec.decoding(), **columns), f"Hugging Face data set {spec.path}"
    if spec.name == "folder":
        from expunge.data.folders import load_folder

        parts = load_folder(path, spec.decoding(), test_fraction=spec.test_fraction, seed=spec.seed)
        return *parts, f"class folders in {path.name}"
    from expunge.data.parquet import load_parquet

    return *load_parquet(path, spec.decoding(), **columns), f"Parquet files in {path.name}"


def _finished(images: ImageSet, spec: DataSpec, limit: int | None) -> ImageSet:
    if isinstance(images, CaptionedImages):
        base = _finished(images.base, spec, None)
        return images if base is images.base else CaptionedImages(base, images.captions, images.axes)
    if limit is not None:
        images = images.subset(balanced_prefix(images.labels, limit))
    if not isinstance(images, EncodedImages):
        return images
    small = len(images) * math.prod(images.shape) <= IN_MEMORY_BYTES
    if spec.in_memory if spec.in_memory is not None else small:
        return images.cached() if spec.cache else images.in_memory()
    return images.scan() if spec.on_bad == "skip" else images
