"""Counter-based randomness: every draw is a pure function of (seed, purpose, counters).

Labels, batch orders and augmentations therefore depend neither on batch order nor on what ran before, and a resumed
run draws exactly what the uninterrupted one would have drawn. The mixer is SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, element-wise on uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(seed: int, purpose: str, *counters: int) -> int:
    """Fold a seed, a purpose and counters into one 64-bit key.

    >>> key(0, "order", 1) == key(0, "order", 1), key(0, "order", 1) == key(0, "order", 2)
    (True, False)
    """
    state = np.asarray(zlib.crc32(purpose.encode()), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in (seed, *counters):
            state = mix((state + _GOLDEN) ^ np.asarray(value & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64))
    return int(state)


def uniform_bits(seed_key: int, ids: torch.Tensor, stream: int = 0) -> np.ndarray:
    """Return one uint64 per id, independent across ids and streams."""
    with np.errstate(over="ignore"):
        base = np.uint64(seed_key) + _GOLDEN * np.uint64(stream + 1)
        return mix(mix(ids.detach().cpu().numpy().astype(np.uint64) + base) + _GOLDEN)


def randint(seed_key: int, ids: torch.Tensor, high: int, stream: int = 0) -> torch.Tensor:
    """Integers uniform on ``0..high-1``, one per id, int64 of the same shape as ``ids``."""
    return torch.from_numpy((uniform_bits(seed_key, ids, stream) >> np.uint64(11)).astype(np.int64) % high)


def permutation(seed_key: int, n: int) -> torch.Tensor:
    """A random permutation of ``0..n-1`` from its own generator."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed_key & (2**63 - 1))).permutation(n))


def random_states() -> tuple[Any, ...]:
    """States of Python's, NumPy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put the generators back into the states of :func:`random_states`."""
    python, numpy_state, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved() -> Iterator[None]:
    """Put Python's, NumPy's and torch's global generators back as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def seed_everything(seed: int) -> None:
    """Seed the global generators (dropout and other draws inside a model use them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
