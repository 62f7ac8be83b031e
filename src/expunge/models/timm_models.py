"""Any timm model by name, with an optional stem for small images."""

from __future__ import annotations

from typing import Any

from torch import nn

from expunge.errors import ArtifactError, CapabilityError, ConfigError, did_you_mean


def timm_names() -> list[str]:
    """Names of all timm architectures, empty when timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()


def is_timm_name(name: str) -> bool:
    """Whether timm knows this name (an architecture, optionally with ``.pretrained_tag``)."""
    try:
        import timm
    except ImportError:
        return False
    return name.startswith("hf-hub:") or timm.is_model(name)


def build_timm(
    name: str,
    *,
    n_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    cifar_stem: bool = False,
    pretrained: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Create a timm model with a head of ``n_classes``.

    Args:
        name: timm name, also ``hf-hub:owner/model``.
        n_classes: Number of logits.
        in_channels: Image channels.
        image_size: Image side for models that need to know it (vision transformers).
        cifar_stem: Replace a ResNet-like stem by a fresh 3x3 convolution of stride 1 without pooling.
        pretrained: Fetch timm's weights; needs a network or timm's own cache.
        dropout: Share of the features that is dropped before the head in training.

    Raises:
        ConfigError: timm is missing, the name is unknown, or the model takes no ``image_size``.
        CapabilityError: The stem cannot be adapted.
        ArtifactError: Pretrained weights could not be had.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"model {name!r} needs timm: pip install 'expunge[vision]'") from error
    if not is_timm_name(name):
        raise ConfigError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    options |= {"drop_rate": dropout} if dropout else {}
    try:
        model = timm.create_model(name, num_classes=n_classes, in_chans=in_channels, pretrained=pretrained, **options)
    except TypeError as error:
        if not options:
            raise
        raise ConfigError(f"timm model {name!r} does not take these options {options}: {error}") from error
    except Exception as error:
        if not pretrained and not name.startswith("hf-hub:"):
            raise
        # Network, missing weights and cache failures arrive as many types.
        raise ArtifactError(
            f"weights of {name!r} could not be fetched ({type(error).__name__}: {str(error)[:200]}); "
            "use pretrained=false with `weights` set to a local safetensors file"
        ) from error
    return with_cifar_stem(model, name) if cifar_stem else model


def with_cifar_stem(model: nn.Module, name: str) -> nn.Module:
    """Replace ``conv1`` by a fresh 3x3, stride 1 convolution and ``maxpool`` by nothing.

    Raises:
        CapabilityError: The model has no such stem.
    """
    first, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(pool, nn.Module):
        raise CapabilityError(
            f"{name!r} has no single convolution 'conv1' followed by 'maxpool', so no ResNet-like stem to replace; "
            "set cifar_stem=false and resize the images, or take resnet18_cifar, resnet20 or vgg16_bn"
        )
    stem = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model
