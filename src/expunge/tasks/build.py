"""From the model and data that a configuration names to a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expunge.config.tasks import (
    AnyTaskConfig,
    ClipTaskConfig,
    DdpmTaskConfig,
    FurtherFigures,
    JudgeSpec,
    TaskConfig,
    TextToImageTaskConfig,
)
from expunge.data import load_data
from expunge.data.captions import Axis, CaptionedImages
from expunge.data.surrogate import load_surrogate
from expunge.errors import ConfigError
from expunge.models import Normalize, build_model
from expunge.tasks.base import Task
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.images import ImageTask

if TYPE_CHECKING:
    from expunge.metrics.generative import Tools
    from expunge.metrics.judge import Judge


def make_task(config: AnyTaskConfig) -> Task:
    """Build the model and load the data that a configuration names.

    Raises:
        CapabilityError: A library that the family needs is not installed.
        ConfigError: Settings that do not fit together.
        DataError: Data missing or broken.
        ArtifactError: Weights missing, broken or of another model.
    """
    if isinstance(config, ClipTaskConfig):
        return _clip(config)
    if isinstance(config, DdpmTaskConfig):
        return _ddpm(config)
    return _text_to_image(config) if isinstance(config, TextToImageTaskConfig) else _classifier(config)


def _classifier(config: TaskConfig) -> ClassifierTask:
    data = load_data(config.data)
    shape, classes = data.train.shape, len(data.classes)
    if tuple(config.model.input_shape) != tuple(shape):
        given = list(config.model.input_shape)
        raise ConfigError(f"task.model.input_shape is {given} but '{config.data.name}' has images {list(shape)}")
    if config.model.n_classes != classes:
        raise ConfigError(f"task.model.n_classes is {config.model.n_classes} but '{config.data.name}' has {classes}")
    norm = config.normalize
    normalize = (
        None if norm is None else Normalize.named(norm) if isinstance(norm, str) else Normalize(norm.mean, norm.std)
    )
    surrogate = load_surrogate(config.surrogate, shape).images if config.surrogate is not None else None
    return ClassifierTask(build_model(config.model), data, normalize, surrogate, config.eval_batch_size, config.head)


def _clip(config: ClipTaskConfig) -> ImageTask:
    from expunge.models.clip import load_clip
    from expunge.tasks.clip import ClipTask

    return ClipTask(
        load_clip(config.model),
        load_data(config.data),
        axis=config.axis,
        templates=config.templates,
        forget_loss=config.forget_loss,
        others={name: spec.load() for name, spec in config.others.items()},
        eval_batch_size=config.eval_batch_size,
    )


def _ddpm(config: DdpmTaskConfig) -> Task:
    from expunge.models.ddpm import build_ddpm
    from expunge.tasks.ddpm import DdpmTask

    model, scheduler = build_ddpm(config.model)
    return DdpmTask(
        model,
        scheduler,
        load_data(config.data),
        sampling=config.sampling,
        condition_drop=config.condition_drop,
        antithetic=config.antithetic,
        eval_batch_size=config.eval_batch_size,
    )


def _text_to_image(config: TextToImageTaskConfig) -> Task:
    from expunge.diffusion.asks import prompts_from_csv
    from expunge.files import cache_dir
    from expunge.models.pipelines import load_pipeline
    from expunge.tasks.text_to_image import TextToImageTask

    axes = None
    if config.classes is not None:
        name = config.axis or "concept"
        axes = {name: Axis(torch.arange(len(config.classes)), config.classes, config.templates)}
    data = None if config.data is None else load_data(config.data)
    known = axes if data is None else data.train.axes if isinstance(data.train, CaptionedImages) else {}
    return TextToImageTask(
        load_pipeline(config.model),
        data,
        axis=config.axis,
        axes=axes,
        steps=config.steps,
        guidance=config.guidance,
        side=config.side,
        virtual=config.virtual,
        seed=config.seed,
        sample_batch=config.sample_batch,
        cache=cache_dir() / "latents",
        asks=None if config.prompts is None else prompts_from_csv(config.prompts),
        images_per_prompt=config.images_per_prompt,
        judge=_judge(config.judge, known or {}),
        tools=_tools(config.figures),
    )


def _judge(given: str | Mapping[str, JudgeSpec] | None, axes: Mapping[str, Axis]) -> Judge | None:
    if given is None:
        return None
    if not isinstance(given, str):
        return _judges(given, axes)
    from expunge.data.canvas_draw import SHAPES, STYLES
    from expunge.metrics.judge import HeadsJudge
    from expunge.models.canvas_judge import load_judge

    return HeadsJudge(load_judge(), {"object": list(SHAPES), "style": list(STYLES)})


def _judges(specs: Mapping[str, JudgeSpec], axes: Mapping[str, Axis]) -> Judge:
    from expunge.metrics.judge import JointJudge, resized
    from expunge.models.class_judge import ClassJudge

    judges = []
    for axis, spec in specs.items():
        if axis not in axes:
            raise ConfigError(f"task.judge names the axis {axis!r}; there are: {', '.join(axes)}")
        known = axes[axis].classes
        if spec.model.n_classes != len(known):
            raise ConfigError(f"task.judge.{axis} has {spec.model.n_classes} classes, the axis {len(known)}")
        size, scale = spec.size or spec.model.input_shape[1], Normalize.named(spec.normalize)
        model = build_model(spec.model).eval().requires_grad_(False)
        channels = spec.model.input_shape[0]
        judges.append(
            ClassJudge(model, known, channels, lambda x, s=size, n=scale: n(resized(x, s)), axis)  # type: ignore[misc]
        )
    return JointJudge(tuple(judges))


def _tools(figures: FurtherFigures) -> Tools:
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
