"""From the model and data that a configuration names to a task."""

from __future__ import annotations

import torch

from expunge.config.tasks import (
    AnyTaskConfig,
    ClipTaskConfig,
    DdpmTaskConfig,
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
    from expunge.diffusion.asks import read_prompts
    from expunge.files import cache_dir
    from expunge.models.pipelines import load_pipeline
    from expunge.tasks.judging import judged_classes, make_judge, make_tools
    from expunge.tasks.text_to_image import TextToImageTask

    axes = None
    if config.classes is not None:
        name = config.axis or "concept"
        axes = {name: Axis(torch.arange(len(config.classes)), config.classes, config.templates)}
    data = None if config.data is None else load_data(config.data)
    found = axes if data is None else data.train.axes if isinstance(data.train, CaptionedImages) else {}
    known = {name: axis.classes for name, axis in (found or {}).items()}
    judged_classes(config.judge, known, "task.judge")  # refused before the pipeline is loaded
    asks = None if config.prompts is None else read_prompts(config.prompts).drawn(config.images_per_prompt)
    task = TextToImageTask(
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
        asks=asks,
        images_per_prompt=config.images_per_prompt or 1,
        judge=make_judge(config.judge, config.figures, known, "task.judge"),
        tools=make_tools(config.figures),
        gradient_checkpointing=config.gradient_checkpointing,
    )
    task.check_judge()
    return task
