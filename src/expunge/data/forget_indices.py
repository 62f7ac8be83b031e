"""The published index sets for random-sample removal (SCAR): reproducible draws, written as index files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from expunge.errors import ConfigError, did_you_mean
from expunge.files import atomic_write

#: Data sets in the order in which the published script draws from them.
Population = Literal["cifar10", "cifar100", "tinyImagenet"]

_SIZES: dict[Population, int] = {"cifar10": 50_000, "cifar100": 50_000, "tinyImagenet": 100_000}
#: Seeds of the published tables.
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 42)


def published_forget_indices(dataset: Population, seed: int) -> Tensor:
    """Training samples to forget, a tenth of the set, in the order in which the published script draws them.

    All draws come from one legacy NumPy stream: first 2 % of each set, which are unused, then 10 % of each. So the
    indices of one set can only be had by repeating every earlier draw.

    Source: SCAR, ``src/sample_fgt_samples.py``.

    Args:
        dataset: Whose indices.
        seed: Seed of the stream; the tables use :data:`SEEDS`.

    Returns:
        Distinct int64 ids ``[5000]`` (``[10000]`` for TinyImageNet).

    Raises:
        ConfigError: No such data set, or a seed that NumPy does not take.

    Example:
        >>> ids = published_forget_indices("cifar10", 42)
        >>> len(ids), len(ids.unique())
        (5000, 5000)
    """
    if dataset not in _SIZES:
        raise ConfigError(f"no published indices for {dataset!r}{did_you_mean(str(dataset), get_args(Population))}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the seed of the published indices must be in 0..2**32 - 1, got {seed}")
    stream = np.random.RandomState(seed)
    for share in (50, 10):
        for name, size in _SIZES.items():
            drawn = stream.choice(size, size // share, replace=False)
            if share == 10 and name == dataset:
                return torch.from_numpy(drawn.astype(np.int64))
    raise AssertionError("unreachable")


def write_forget_indices(path: str | Path, dataset: Population, seed: int) -> Path:
    """Write the published indices as a JSON list, to be named by ``index_file`` of a request.

    Args:
        path: File to write; it is whole or absent.
        dataset: Whose indices.
        seed: Seed of the stream.

    Returns:
        The path.
    """
    atomic_write(path, json.dumps(published_forget_indices(dataset, seed).tolist()))
    return Path(path)
