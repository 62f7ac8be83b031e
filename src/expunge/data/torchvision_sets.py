"""CIFAR-10, CIFAR-100 and SVHN through torchvision, which downloads them once and checks their published checksums.

torchvision unpickles the CIFAR batches after comparing them with those checksums; no other file is read that way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.data.base import MemoryImages
from expunge.errors import ConfigError, DataError

SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}


def load_torchvision(name: str, root: Path) -> tuple[MemoryImages, MemoryImages]:
    """Load train and test images, downloading them below ``root`` when they are not there.

    Args:
        name: ``cifar10``, ``cifar100`` or ``svhn`` (train and test parts; the extra part of SVHN is not used).
        root: Download folder.

    Returns:
        Train and test images in memory, uint8 ``[N, 3, 32, 32]``.

    Raises:
        ConfigError: torchvision is not installed.
        DataError: The download failed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(f"{name} needs torchvision: pip install 'expunge[vision]'") from error
    make = getattr(datasets, SETS[name])
    try:
        if name == "svhn":
            parts = [make(str(root), split=part, download=True) for part in ("train", "test")]
        else:
            parts = [make(str(root), train=part, download=True) for part in (True, False)]
    except Exception as error:
        # Network, disk and checksum failures arrive as many types.
        raise DataError(
            f"{name} could not be downloaded to {root} ({type(error).__name__}: {str(error)[:200]}); "
            "put the files there yourself, or use `path` with a local copy"
        ) from error
    train, test = (_convert(part) for part in parts)
    return train, test


def _convert(part: Any) -> MemoryImages:
    if hasattr(part, "targets"):  # CIFAR: [N, H, W, C]
        x, labels, classes = np.asarray(part.data).transpose(0, 3, 1, 2), part.targets, list(part.classes)
    else:  # SVHN: [N, C, H, W]
        x, labels, classes = np.asarray(part.data), part.labels, [str(d) for d in range(10)]
    targets = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return MemoryImages(torch.from_numpy(np.ascontiguousarray(x)), targets, classes)
