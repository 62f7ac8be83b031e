"""Judges and further figures of drawn images, from what a configuration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.config.tasks import FurtherFigures, JudgeSpec
from expunge.errors import ConfigError
from expunge.models import Normalize, build_model

if TYPE_CHECKING:
    from expunge.metrics.generative import Tools
    from expunge.metrics.judge import Judge
    from expunge.models.class_judge import ClassJudge

#: What a configuration says about the judge.
GivenJudge = str | Mapping[str, JudgeSpec] | None
Classes = Mapping[str, Sequence[str]]


def judged_classes(given: GivenJudge, axes: Classes | None = None, where: str = "judge") -> dict[str, tuple[str, ...]]:
    """Names of the classes that a judge will know, by axis, without building it.

    Args:
        given: The judge of a configuration.
        axes: Names of the classes of a task, which stand in for those that a judge leaves out.
        where: Key of the configuration, for messages.

    Raises:
        ConfigError: Classes that are named nowhere, twice, or as many as the judge does not have.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        from expunge.data.canvas_draw import SHAPES, STYLES

        return {"object": SHAPES, "style": STYLES}
    return {axis: _names(spec, axis, axes or {}, f"{where}.{axis}") for axis, spec in given.items()}


def _names(spec: JudgeSpec, axis: str, axes: Classes, where: str) -> tuple[str, ...]:
    names = spec.classes
    if names is None:
        if axis not in axes:
            known = f"there are: {', '.join(axes)}" if axes else "there are none"
            raise ConfigError(f"{where}: the axis {axis!r} has no classes here ({known}); give '{where}.classes'")
        names = tuple(axes[axis])
    wanted = len(names) if spec.outputs is None else spec.model.n_classes
    if spec.model.n_classes != wanted:
        raise ConfigError(f"{where} has {spec.model.n_classes} classes, the axis {len(names)}")
    if isinstance(spec.outputs, tuple) and len(spec.outputs) != len(names):
        raise ConfigError(f"{where}.outputs names {len(spec.outputs)} outputs for {len(names)} classes")
    return names


def make_judge(
    given: GivenJudge, figures: FurtherFigures, axes: Classes | None = None, where: str = "judge"
) -> Judge | None:
    """The judge that a configuration describes, with the features that it wants; None without any.

    Raises:
        ConfigError: See :func:`judged_classes`.
        ArtifactError: Weights that are missing, broken or of another model.
    """
    from expunge.metrics.backbones import inception
    from expunge.metrics.judge import FeaturesOf, JointJudge, canvas_judge

    classes = judged_classes(given, axes, where)
    judge: Judge | None = None
    if isinstance(given, str):
        judge = canvas_judge()
    elif given is not None:
        judge = JointJudge(tuple(_class_judge(spec, classes[axis], axis) for axis, spec in given.items()))
    if figures.inception is not None:
        from expunge.files import sha256_file

        extract = inception(Path(figures.inception))
        judge = FeaturesOf(judge, extract, f"Inception v3 of torchvision {sha256_file(Path(figures.inception))[:12]}")
    return judge


def _class_judge(spec: JudgeSpec, names: Sequence[str], axis: str) -> ClassJudge:
    from expunge.diffusion.benchmark_names import imagenet_numbers
    from expunge.metrics.judge import resized
    from expunge.models.class_judge import ClassJudge

    size, scale = spec.size or spec.model.input_shape[1], Normalize.named(spec.normalize)
    cut = (size - (spec.crop or size)) // 2
    inside = slice(cut, cut + (spec.crop or size))
    outputs = imagenet_numbers(names) if spec.outputs == "imagenet" else spec.outputs
    model = build_model(spec.model).eval().requires_grad_(False)
    channels = spec.model.input_shape[0]
    return ClassJudge(
        model, names, channels, lambda x: scale(resized(x, size)[..., inside, inside]), axis, outputs=outputs
    )


def make_tools(figures: FurtherFigures) -> Tools:
    """The models of further figures, each or the reason why there is none."""
    from expunge.metrics.backbones import load_lpips, load_vgg19
    from expunge.metrics.detector import load_nudenet
    from expunge.metrics.generative import Tools, tool_or_reason
    from expunge.models.clip import load_clip

    clip, lpips, style = figures.clip, figures.lpips, figures.style
    return Tools(
        clip=None if clip is None else tool_or_reason(lambda: load_clip(clip)),
        clip_name="" if clip is None else clip.name,
        lpips=None if lpips is None else tool_or_reason(lambda: load_lpips(Path(lpips))),
        style=None if style is None else tool_or_reason(lambda: load_vgg19(Path(style))),
        detector=tool_or_reason(load_nudenet) if figures.nudity else None,
        threshold=figures.threshold,
    )
