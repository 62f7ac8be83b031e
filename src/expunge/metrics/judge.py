"""Judges: models that say what a generated image shows, and whose features compare sets of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.diffusion.asks import Ask
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.metrics.outputs import ClassifierOutputs
from expunge.models.class_judge import ClassJudge
from expunge.models.normalize import Normalize
from expunge.restore import evaluating


class Judge(Protocol):
    """Names what images ``[N, 3, H, W]`` in [0, 1] show, like :class:`~expunge.models.class_judge.ClassJudge`."""

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Names of the classes by axis."""

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Logits ``[N, C]`` by axis."""

    def features(self, images: Tensor) -> Tensor:
        """Features ``[N, D]`` for distances between sets of images.

        Raises:
            CapabilityError: There are none.
        """


@dataclass(frozen=True, eq=False)
class HeadsJudge:
    """A network that returns one table of logits per axis, and has ``features``.

    Args:
        model: Maps images in [0, 1] to a named tuple of logits; ``model.features`` maps them to features.
        classes: Names of the classes by axis, the field names of the tuple.
    """

    model: nn.Module
    classes: Mapping[str, Sequence[str]]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by axis."""
        with evaluating(self.model):
            said = self.model(self._there(images))
        return {axis: getattr(said, axis) for axis in self.classes}

    def features(self, images: Tensor) -> Tensor:
        """Features of the shared trunk."""
        trunk: Any = self.model.features
        with evaluating(self.model):
            found: Tensor = trunk(self._there(images))
        return found

    def _there(self, images: Tensor) -> Tensor:
        return images.to(next(self.model.parameters()).device)


@dataclass(frozen=True)
class JointJudge:
    """One judge per axis; the features are those of the first (UnlearnCanvas: a style and an object classifier).

    Raises:
        ConfigError: No judge, or two of one axis.
    """

    judges: tuple[Judge, ...]

    def __post_init__(self) -> None:
        axes = [axis for judge in self.judges for axis in judge.classes]
        if not axes or len(set(axes)) != len(axes):
            raise ConfigError(f"judges of different axes expected, got {axes}")

    @property
    def classes(self) -> dict[str, Sequence[str]]:
        """All axes."""
        return {axis: names for judge in self.judges for axis, names in judge.classes.items()}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by axis."""
        return {axis: logits for judge in self.judges for axis, logits in judge(images).items()}

    def features(self, images: Tensor) -> Tensor:
        """Features of the first judge."""
        return self.judges[0].features(images)


def canvas_judge() -> HeadsJudge:
    """The judge of drawn figures that comes with the package: axes ``object`` and ``style``."""
    from expunge.data.canvas_draw import SHAPES, STYLES
    from expunge.models.canvas_judge import load_judge

    return HeadsJudge(load_judge(), {"object": tuple(SHAPES), "style": tuple(STYLES)})


def timm_judge(
    architecture: str,
    weights: Path,
    names: Sequence[str],
    *,
    axis: str,
    size: int = 224,
    normalize: str = "half",
) -> ClassJudge:
    """A timm model with a checkpoint, as UnlearnCanvas uses (``vit_large_patch16_224``, 51 styles or 20 objects).

    Args:
        architecture: timm name.
        weights: Safetensors file of the whole model.
        names: Names of its classes in the order of its logits.
        axis: The axis it judges.
        size: Side that images are resized to, without a crop.
        normalize: Name in :data:`~expunge.models.normalize.MEAN_STD`.

    Raises:
        ConfigError: timm is missing or does not know the name.
        ArtifactError: The file does not fit.
    """
    from expunge.models.timm_models import build_timm
    from expunge.models.weights import load_weights

    model = build_timm(architecture, n_classes=len(names))
    load_weights(model, weights)
    scale = Normalize.named(normalize)
    model.eval().requires_grad_(False)
    return ClassJudge(model, names, normalize=lambda x: scale(resized(x, size)), axis=axis)


@dataclass(frozen=True)
class FeaturesOf:
    """A judge that compares sets of images by the features of another network.

    Args:
        judge: Names what images show; None names nothing.
        extract: Features ``[N, D]`` of images in [0, 1].
        name: What to cite for the network.
    """

    judge: Judge | None
    extract: Callable[[Tensor], Tensor]
    name: str

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Those of the judge."""
        return {} if self.judge is None else self.judge.classes

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Logits of the judge."""
        return {} if self.judge is None else self.judge(images)

    def features(self, images: Tensor) -> Tensor:
        """Features of the other network."""
        return self.extract(images)


def cited(judge: Judge) -> str:
    """What to state about a judge: class and digest of its model, or of all of them."""
    if isinstance(judge, FeaturesOf):
        return ", ".join(filter(None, (cited(judge.judge) if judge.judge else "", f"features: {judge.name}")))
    parts = judge.judges if isinstance(judge, JointJudge) else (judge,)
    models = [getattr(part, "model", None) for part in parts]
    return ", ".join(
        f"{type(m).__name__} {model_digest(m)[:12]}{_among(part)}" if isinstance(m, nn.Module) else type(part).__name__
        for m, part in zip(models, parts, strict=True)
    )


def _among(part: Judge) -> str:
    several = isinstance(part, ClassJudge) and part.outputs is not None
    return " (top 1 among all its outputs)" if several else ""


@dataclass(frozen=True, eq=False)
class GeneratedObserved:
    """Generated images and what a judge says about them; all rows belong together.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        asks: What was asked for.
        judged: Logits ``[N, C]`` float32 by axis; without a judge empty. Columns beyond the classes are the best of the
            judge's further outputs.
        features: ``[N, D]`` of the judge; None without.
        classes: Names of the classes by axis.
        judge: Name of the judge; empty without one.

    Raises:
        DataError: Numbers of rows that differ, a label that is no class, or values that are not finite.
    """

    images: Tensor
    asks: tuple[Ask, ...]
    judged: Mapping[str, np.ndarray]
    features: np.ndarray | None
    classes: Mapping[str, Sequence[str]]
    judge: str = ""

    def __post_init__(self) -> None:
        n = len(self.asks)
        tables = {**self.judged} | ({} if self.features is None else {"features": self.features})
        for name, rows in (("images", len(self.images)), *((k, len(t)) for k, t in tables.items())):
            if rows != n:
                raise DataError(f"generated images: {rows} rows of {name} for {n} asks")
        for name, table in tables.items():
            if not np.isfinite(table).all():
                raise DataError(f"generated images: {name} of the judge is not finite")
        for axis, logits in self.judged.items():
            bad = [a for a in self.asks if a.labels.get(axis, 0) >= min(logits.shape[1], len(self.classes[axis]))]
            if bad:
                raise DataError(
                    f"case {bad[0].case} asks for {axis} {bad[0].labels[axis]} of {logits.shape[1]} classes"
                )

    def __len__(self) -> int:
        return len(self.asks)

    def labels(self, axis: str) -> np.ndarray:
        """What was asked for along an axis, int64 ``[N]``; -1 where nothing was.

        Raises:
            DataError: The judge has no such axis.
        """
        if self.judged and axis not in self.judged:
            raise DataError(f"the judge names no {axis!r}, only {', '.join(self.judged)}")
        return np.array([a.labels.get(axis, -1) for a in self.asks], dtype=np.int64)

    def named(self, axis: str, number: int) -> str:
        """Name of a class, or of what is none of them."""
        names = self.classes.get(axis)
        if names is None:
            return f"{axis} {number}"
        return str(names[number]) if number < len(names) else "something else"

    def outputs(self, axis: str, forgotten: Sequence[int]) -> dict[str, ClassifierOutputs]:
        """Classifier outputs by role: ``forget`` are the images asked for a forgotten class, ``test`` the others.

        Rows that ask for nothing along the axis are left out; the ids are row numbers. Without a judge there are none.
        """
        if axis not in self.judged:
            return {}
        labels = self.labels(axis)
        gone = np.isin(labels, list(forgotten))
        found = {}
        for role, rows in (("forget", gone), ("test", ~gone & (labels >= 0))):
            ids = np.flatnonzero(rows)
            if len(ids):
                found[role] = ClassifierOutputs(logits=self.judged[axis][ids], labels=labels[ids], ids=ids)
        return found


def observe_generated(
    judge: Judge | None,
    images: Tensor,
    asks: Sequence[Ask],
    *,
    chunk: int = 128,
    classes: Mapping[str, Sequence[str]] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> GeneratedObserved:
    """Show generated images, uint8 ``[N, 3, H, W]``, to a judge.

    Args:
        judge: Without one the images stay unjudged.
        images: What was drawn.
        asks: What was asked for.
        chunk: Images at a time.
        classes: Names of axes that the judge does not know.
        advance: Called with the number of images after every chunk.

    Raises:
        DataError: Images of another kind, or rows that do not fit.
    """
    if judge is None:
        unit_pixels(images[:1])
        return GeneratedObserved(images, tuple(asks), {}, None, {a: tuple(c) for a, c in (classes or {}).items()})
    unit_pixels(images[:1])
    logits: dict[str, list[Tensor]] = {axis: [] for axis in judge.classes}
    features: list[Tensor] | None = []
    with torch.no_grad():
        for pixels in images.split(chunk):
            part = unit_pixels(pixels)
            for axis, found in judge(part).items():
                logits[axis].append(found.float().cpu())
            try:
                features = None if features is None else [*features, judge.features(part).float().cpu()]
            except CapabilityError:  # a judge may only name; what needs features is then not run, and says so
                features = None
            advance(len(pixels))
    judged = {axis: torch.cat(parts).numpy() for axis, parts in logits.items()}
    names = {axis: tuple(c) for axis, c in {**(classes or {}), **judge.classes}.items()}
    width = None if features is None else torch.cat(features).numpy()
    return GeneratedObserved(images, tuple(asks), judged, width, names, cited(judge))


def unit_pixels(images: Tensor) -> Tensor:
    """uint8 images ``[N, 3, H, W]`` as float32 in [0, 1].

    Raises:
        DataError: Another type or shape, or no images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(f"images: uint8 [N, 3, H, W] expected, got {images.dtype} {list(images.shape)}")
    return images.float() / 255


def resized(images: Tensor, size: int | None) -> Tensor:
    """Images in [0, 1] at another side: bilinear, antialiased, without a crop."""
    if size is None or tuple(images.shape[-2:]) == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
