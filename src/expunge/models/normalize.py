"""Input normalisation kept outside the network, so that checkpoint keys, masks and patches see the bare model.

Data are in [0, 1]; a task applies :class:`Normalize` to inputs just before the model. Attacks and augmentations thus
work on plain pixels.

Deviates: SalUn and BARRIER put this layer inside the model (buffers ``normalize.mean`` and ``normalize.std``); the
function computed is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import ConfigError, did_you_mean

#: Per-channel mean and standard deviation. The CIFAR and SVHN values are those of the SalUn experiments.
MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0,), (1.0,)),
}


@dataclass(frozen=True)
class Normalize:
    """``(x - mean) / std`` per channel.

    Args:
        mean: One value per channel, or one for all.
        std: The same, positive.

    Raises:
        ConfigError: Lengths differ or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ConfigError(f"normalisation needs as many means as positive stds, got {self.mean} and {self.std}")

    @classmethod
    def named(cls, name: str) -> Normalize:
        """The values in :data:`MEAN_STD`.

        Raises:
            ConfigError: Unknown name.
        """
        if name not in MEAN_STD:
            raise ConfigError(f"no normalisation is called {name!r}{did_you_mean(name, MEAN_STD)}")
        return cls(*MEAN_STD[name])

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]``.

        Raises:
            ConfigError: The number of channels does not match.
        """
        if len(self.mean) not in (1, x.shape[1]):
            raise ConfigError(f"normalisation has {len(self.mean)} channels, the images have {x.shape[1]}")
        if self.mean == (0.0,) and self.std == (1.0,):
            return x
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device)[:, None, None]
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device)[:, None, None]
        return (x - mean) / std
