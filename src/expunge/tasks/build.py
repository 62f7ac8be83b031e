"""From the model and data that a configuration names to a task."""

from __future__ import annotations

from expunge.config.models import AnyTaskConfig, ClipTaskConfig, TaskConfig
from expunge.data import load_data
from expunge.data.surrogate import load_surrogate
from expunge.errors import ConfigError
from expunge.models import Normalize, build_model
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.images import ImageTask


def make_task(config: AnyTaskConfig) -> ImageTask:
    """Build the model and load the data that a configuration names.

    Raises:
        CapabilityError: A library that the family needs is not installed.
        ConfigError: Settings that do not fit together.
        DataError: Data missing or broken.
        ArtifactError: Weights missing, broken or of another model.
    """
    return _clip(config) if isinstance(config, ClipTaskConfig) else _classifier(config)


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
