"""Networks that compare images, with ImageNet weights that the user gives: LPIPS, VGG-19, Inception.

The weights are downloads, which nothing here makes. Without a file each loader says so, and the figure is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import ArtifactError, CapabilityError
from expunge.files import read_safetensors
from expunge.metrics.judge import resized
from expunge.metrics.similarity import Maps, Perceptual
from expunge.models.normalize import Normalize

#: Places of the first five convolutions in torchvision's VGG-19.
_VGG = (0, 2, 5, 7, 10)
#: Slices of LPIPS' AlexNet and the convolutions in them.
_ALEX = ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10))


def load_lpips(weights: Path | None) -> Perceptual:
    """LPIPS version 0.1 with AlexNet.

    Args:
        weights: ImageNet weights of torchvision's AlexNet as safetensors: a download, which nothing here makes.

    Raises:
        CapabilityError: No weights, or the package ``lpips`` is missing.
        ArtifactError: The file does not fit.
    """
    if weights is None:
        raise CapabilityError(
            "LPIPS needs the ImageNet weights of AlexNet, a download; give them as a safetensors file"
        )
    import warnings

    try:
        from lpips import LPIPS
    except ImportError:
        raise CapabilityError("LPIPS needs the package lpips: pip install lpips") from None
    stored = _convolutions(weights, [place for _, place in _ALEX])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an old way
        network: Any = LPIPS(net="alex", pnet_rand=True, verbose=False)
    for number, place in _ALEX:
        layer = network.net.get_submodule(f"slice{number}.{place}")
        for name, values in zip(("weight", "bias"), stored[place], strict=True):
            own = getattr(layer, name)
            if own.shape != values.shape:
                raise ArtifactError(
                    f"{weights}: features.{place}.{name} is {list(values.shape)}, not {list(own.shape)}"
                )
            own.data = values.to(own.dtype)
    network.eval().requires_grad_(False)
    return lambda a, b: network(2 * a - 1, 2 * b - 1).flatten()


def load_vgg19(weights: Path | None) -> Maps:
    """Outputs of the first five convolutions of torchvision's VGG-19, before their activations.

    Args:
        weights: Its ImageNet weights as safetensors. They are a download, which nothing here makes.

    Raises:
        CapabilityError: No weights.
        ArtifactError: The file does not fit.
    """
    if weights is None:
        raise CapabilityError(
            "the style loss needs the ImageNet weights of VGG-19, a download; give them as safetensors"
        )
    layers, normalize = _convolutions(weights, _VGG), Normalize.named("imagenet")
    widths = [tuple(layers[i][0].shape) for i in _VGG]
    if widths != [(o, i, 3, 3) for i, o in zip((3, 64, 64, 128, 128), (64, 64, 128, 128, 256), strict=True)]:
        raise ArtifactError(f"{weights}: these are not the convolutions of VGG-19: {widths}")

    def maps(images: Tensor) -> list[Tensor]:
        x, found = normalize(images), []
        for number, place in enumerate(_VGG):
            if number:
                x = functional.relu(x)
            if number in (2, 4):
                x = functional.max_pool2d(x, 2)
            weight, bias = (t.to(x) for t in layers[place])
            x = functional.conv2d(x, weight, bias, padding=1)
            found.append(x)
        return found

    return maps


def inception(weights: Path | None) -> Callable[[Tensor], Tensor]:
    """Features by the Inception v3 of torchvision (average after Mixed_7c, 2048 wide), as UnlearnCanvas computes FID.

    Not the network of the original FID, whose values differ. Images in [0, 1] are resized to 299.

    Args:
        weights: Its ImageNet weights as safetensors. They are a download, which nothing here makes.

    Raises:
        CapabilityError: No weights, or torchvision is missing.
        ArtifactError: The file does not fit.
    """
    if weights is None:
        raise CapabilityError("Inception needs its ImageNet weights, a download; give them as a safetensors file")
    try:
        from torchvision.models import inception_v3
    except ImportError:
        raise CapabilityError('Inception needs torchvision: pip install "expunge[vision]"') from None
    from expunge.models.normalize import Normalize
    from expunge.models.weights import load_weights

    model = inception_v3(weights=None, init_weights=False, aux_logits=True)
    load_weights(model, weights)
    model.fc = nn.Identity()
    model.eval().requires_grad_(False)
    normalize = Normalize.named("imagenet")

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(normalize(resized(images, 299)))
        return found

    return features


def _convolutions(weights: Path, places: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight and bias of some convolutions of a torchvision network, by their place in ``features``."""
    names = [(f"features.{i}.weight", f"features.{i}.bias") for i in places]
    stored, _ = read_safetensors(weights, names=[n for pair in names for n in pair])
    return {i: (stored[w], stored[b]) for i, (w, b) in zip(places, names, strict=True)}
