"""From a :class:`ModelSpec` to a network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import nn

from expunge import rng
from expunge.errors import CapabilityError, ConfigError, did_you_mean
from expunge.models.allcnn import AllCNN
from expunge.models.cifar_resnet import CifarResNet
from expunge.models.resnet import SmallImageResNet18
from expunge.models.small import MLP, SmallCNN
from expunge.models.timm_models import build_timm, is_timm_name, timm_names
from expunge.models.vgg import VGG16BN
from expunge.models.weights import load_weights
from expunge.part import Frozen

log = logging.getLogger(__name__)

_BUILDERS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "resnet20": lambda n, shape: CifarResNet(20, n, shape[0]),
    "resnet56": lambda n, shape: CifarResNet(56, n, shape[0]),
    "resnet18_cifar": lambda n, shape: SmallImageResNet18(n, shape[0]),
    "vgg16_bn": lambda n, shape: VGG16BN(n, shape[0]),
    "vgg16_bn_lth": lambda n, shape: VGG16BN(n, shape[0], single_layer=True),
    "allcnn": lambda n, shape: AllCNN(n, shape[0], min(shape[1:])),
    "small_cnn": lambda n, shape: SmallCNN(n, shape[0]),
    "mlp": lambda n, shape: MLP(shape, n),
}

#: Names of the networks defined here.
MODEL_NAMES = tuple(_BUILDERS)


class ModelSpec(Frozen):
    """A network by name.

    A name defined here wins over timm's; ``timm:<name>`` always means timm.

    Args:
        name: One of :data:`MODEL_NAMES`, ``timm:<name>`` or a timm name.
        n_classes: Number of logits.
        input_shape: Channels, height, width of the images.
        weights: A safetensors file, loaded strictly.
        allow_nonfinite: Accept NaN and infinite weights in that file.
        cifar_stem: timm ResNets only: 3x3 stride-1 stem without pooling.
        pretrained: timm only: fetch timm's weights.
        dropout: timm only: share of the features that is dropped before the head in training.
        image_size: timm models that need to know the image side.
        seed: Seed of the initial weights.
    """

    name: str
    n_classes: int = Field(default=10, ge=1)
    input_shape: tuple[int, int, int] = (3, 32, 32)
    weights: str | None = None
    allow_nonfinite: bool = False
    cifar_stem: bool = False
    pretrained: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    image_size: int | None = Field(default=None, ge=1)
    seed: int = 0


def build_model(spec: ModelSpec) -> nn.Module:
    """Build a network, with weights from a file if the spec names one.

    Initial weights are a function of the spec alone; the global generators are left as they were. What was normalised
    while loading a file is logged; :func:`expunge.models.weights.load_weights` returns it.

    Raises:
        ConfigError: Unknown name, or an option that does not apply to this model.
        CapabilityError: The stem or input size cannot be adapted.
        ArtifactError: The weights file is broken or belongs to another model.
    """
    if min(spec.input_shape) < 1:
        raise ConfigError(f"input_shape must be positive, got {spec.input_shape}")
    if spec.weights and spec.pretrained:
        raise ConfigError("give either 'weights' (a file) or 'pretrained' (timm's weights), not both")
    with rng.preserved():
        rng.seed_everything(spec.seed)
        model = _bare(spec)
    if spec.weights:
        report = load_weights(model, spec.weights, allow_nonfinite=spec.allow_nonfinite)
        for note in report.notes:
            log.warning("%s", note)
    return model


def _bare(spec: ModelSpec) -> nn.Module:
    if spec.name in _BUILDERS:
        _refuse_timm_options(spec)
        if spec.name.startswith("vgg16") and min(spec.input_shape[1:]) < 32:
            raise CapabilityError(
                f"{spec.name} halves the image five times and needs 32 pixels, not {spec.input_shape}"
            )
        return _BUILDERS[spec.name](spec.n_classes, spec.input_shape)
    name = spec.name.removeprefix("timm:")
    if name != spec.name or is_timm_name(name):
        return build_timm(
            name,
            n_classes=spec.n_classes,
            in_channels=spec.input_shape[0],
            image_size=spec.image_size,
            cifar_stem=spec.cifar_stem,
            pretrained=spec.pretrained,
            dropout=spec.dropout,
        )
    known = did_you_mean(spec.name, MODEL_NAMES)
    if "did you mean" not in known and "did you mean" in (close := did_you_mean(spec.name, timm_names())):
        known = close
    raise ConfigError(f"no model is called {spec.name!r}{known}")


def _refuse_timm_options(spec: ModelSpec) -> None:
    options: dict[str, Any] = {k: getattr(spec, k) for k in ("cifar_stem", "pretrained", "dropout", "image_size")}
    given = [k for k, v in options.items() if v]
    if given:
        raise ConfigError(f"{given} apply to timm models only, not to {spec.name!r}; write 'timm:<name>' for those")
