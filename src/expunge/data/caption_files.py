"""Images with captions from files: curated tars, webdataset shards, folders, Parquet. Decoded when asked for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from expunge.data.captions import Axis, CaptionedImages, name_pattern
from expunge.data.curate.sources import find_shards
from expunge.data.curate.tables import METADATA, Columns
from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.data.folders import SUFFIXES
from expunge.errors import ConfigError, DataError

OTHER = "other"
_SHOWN = 5


def load_captioned(
    path: str | Path | Sequence[str | Path],
    *,
    axis_names: Sequence[str] | None = None,
    axis: str = "name",
    templates: Sequence[str] = ("a photo of {}",),
    class_names: Mapping[str, str] | None = None,
    resize: int | None = None,
    channels: int = 3,
    on_bad: str = "raise",
    max_bad: float = 0.01,
    max_pixels: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    limit: int | None = None,
) -> CaptionedImages:
    """Load captioned images.

    Args:
        path: A curated or other webdataset tar, a folder of tars, a Parquet file or a folder of them, a folder with
            images and text files or metadata, or a tree of class folders without captions; braces and ``*`` work, and
            so do several.
        axis_names: Classes of the label axis: an image has the first of these names that its caption mentions, else the
            last class ``other``. For class folders the folders are the classes, and this must be None.
        axis: What the label axis is called.
        templates: Prompts of the axis; class folders take their captions from them, in turn.
        class_names: For class folders, names to show instead of the folders' (underscores become blanks without it).
        resize: Side in pixels; needed unless all images are of one size.
        channels: 3 or 1.
        on_bad: ``raise``, or ``skip`` to find unreadable images now and mark them.
        max_bad: Largest share that ``skip`` tolerates.
        max_pixels: Larger images are not decoded.
        image_column: Column of tables.
        caption_column: Column of tables.
        limit: The first so many; of class folders, so many of each class.

    Returns:
        The images in stored order, with one axis.

    Raises:
        ConfigError: A setting is missing or would have no effect.
        DataError: Broken shards, pairs without image or caption; the message names shard and key.

    Example:
        >>> load_captioned("curated/elon-musk", axis_names=["Elon Musk"], resize=224)  # doctest: +SKIP
    """
    decoding = make_decoding(resize, channels, on_bad, max_bad, max_pixels)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    tree = class_tree(path)
    if tree is not None:
        unused = [n for n, v in (("image_column", image_column), ("caption_column", caption_column)) if v is not None]
        if axis_names is not None or unused:
            raise ConfigError(f"{tree} has class folders, so {', '.join(unused) or 'axis_names'} would have no effect")
        return load_class_tree(tree, decoding, axis=axis, templates=templates, class_names=class_names, limit=limit)
    if axis_names is None or class_names is not None:
        raise ConfigError(f"{path} has captions: give axis_names (what they may mention) and no class_names")
    paths = [path] if isinstance(path, str | Path) else list(path)
    pairs = [p for shard in find_shards(paths, Columns(image_column, caption_column)) for p in shard.pairs()][:limit]
    broken = [f"{p.where}: {p.defect}" for p in pairs if p.defect]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(pairs)} pairs are incomplete: {'; '.join(broken[:_SHOWN])}"
            f"{' ...' if len(broken) > _SHOWN else ''}; `expunge data curate` writes a set without them"
        )
    captions = [p.caption or "" for p in pairs]
    labelled = axis_of_names(captions, axis_names, templates)
    sources = [Source(p.where, p.data) for p in pairs]
    images = EncodedImages(sources, labelled.labels, labelled.classes, decoding)
    return CaptionedImages(images.scan() if on_bad == "skip" else images, captions, {axis: labelled})


def load_class_tree(
    root: str | Path,
    decoding: Decoding,
    *,
    axis: str = "name",
    templates: Sequence[str] = ("a photo of {}",),
    class_names: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> CaptionedImages:
    """Load ``root/<class>/*`` with captions made from the templates, which take turns within a class.

    Raises:
        ConfigError: ``class_names`` lacks a folder.
        DataError: A class is empty, a file is no image, or two classes have one name.
    """
    folder = Path(root)
    places = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    missing = [p.name for p in places if class_names is not None and p.name not in class_names]
    if missing:
        raise ConfigError(f"class_names has no name for {len(missing)} folders of {folder}, first {missing[0]!r}")
    names = [p.name.replace("_", " ") if class_names is None else class_names[p.name] for p in places]
    sources, labels, captions = [], [], []
    for label, place in enumerate(places):
        files = sorted(p for p in place.iterdir() if not p.name.startswith("."))
        strange = [p for p in files if p.suffix.lower() not in SUFFIXES or not p.is_file()]
        if strange or not files:
            raise DataError(f"{strange[0]} is not an image file" if strange else f"class folder {place} is empty")
        for number, file in enumerate(files[:limit]):
            sources.append(Source.file(file))
            labels.append(label)
            captions.append(templates[number % len(templates)].format(names[label]))
    labelled = Axis(torch.tensor(labels, dtype=torch.int64), tuple(names), tuple(templates))
    images = EncodedImages(sources, labelled.labels, names, decoding)
    return CaptionedImages(images.scan() if decoding.on_bad == "skip" else images, captions, {axis: labelled})


def class_tree(path: str | Path | Sequence[str | Path]) -> Path | None:
    """The folder if ``path`` is one of class folders with images and without any captions, else None."""
    if not isinstance(path, str | Path) or not Path(path).expanduser().is_dir():
        return None
    folder = Path(path).expanduser()
    here = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    if any(p.suffix.lower() in (".tar", ".parquet", ".txt", *SUFFIXES) or p.name in METADATA for p in here):
        return None
    inside = [p for p in folder.glob("*/*") if not p.name.startswith(".")]
    images = any(p.suffix.lower() in SUFFIXES for p in inside)
    return folder if images and not any(p.suffix.lower() == ".txt" for p in inside) else None


def axis_of_names(captions: Sequence[str], names: Sequence[str], templates: Sequence[str]) -> Axis:
    """Label captions by the first name they mention; a further last class ``other`` takes the rest.

    Args:
        captions: Texts.
        names: Classes, matched as whole words in any case, blanks and underscores being the same.
        templates: Prompts of the axis.

    Raises:
        ConfigError: No names, or one is empty, repeated or ``other``.
    """
    plain = [" ".join(re.split(r"[\s_]+", name.strip("_ \t\n"))).lower() for name in names]
    repeated = [name for name, p in zip(names, plain, strict=True) if not p or plain.count(p) > 1 or p == OTHER]
    if repeated or not plain:
        raise ConfigError(f"axis_names must be different names other than '{OTHER}'; got {(repeated or ['none'])[0]!r}")
    first = _FirstMention(names)
    labels = torch.tensor([first(text) for text in captions], dtype=torch.int64)
    return Axis(labels, (*names, OTHER), tuple(templates))


class _FirstMention:
    """Number of the name that a caption mentions first, the longest of those that begin there; ``len(names)`` if none.

    Same rule as :func:`expunge.data.captions.mentions`. Names are looked up by their first word, so ten thousand of
    them cost no more than those that can occur.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._patterns: dict[int, re.Pattern[str]] = {}
        self._by_word: dict[str, list[int]] = defaultdict(list)
        self._others: list[int] = []
        for i, name in enumerate(names):
            start = re.search(r"\w+", name.replace("_", " "))
            # Case folding of other letters is not one to one, so those names are always tried.
            (self._by_word[start[0].lower()] if start and name.isascii() else self._others).append(i)

    def __call__(self, caption: str) -> int:
        text = caption.replace("_", " ")
        if text.isascii():
            words = set(re.findall(r"\w+", text.lower()))
            candidates = self._others + [i for word in words for i in self._by_word.get(word, ())]
        else:
            candidates = list(range(len(self._names)))
        found = [(hit.start(), -hit.end(), i) for i in candidates if (hit := self._pattern(i).search(text))]
        return min(found)[2] if found else len(self._names)

    def _pattern(self, i: int) -> re.Pattern[str]:
        if i not in self._patterns:
            self._patterns[i] = name_pattern(self._names[i])
        return self._patterns[i]


def make_decoding(resize: int | None, channels: int, on_bad: str, max_bad: float, max_pixels: int | None) -> Decoding:
    """Decoding rules from plain settings.

    Raises:
        ConfigError: A value that does not exist.
    """
    if on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
    rules = Decoding(channels, resize, on_bad="skip" if on_bad == "skip" else "raise", max_bad=max_bad)
    return rules if max_pixels is None else Decoding(channels, resize, max_pixels, rules.on_bad, max_bad)
