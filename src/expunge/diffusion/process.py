"""The forward process: noise levels, and draws that depend on nothing but a key and a sample's id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expunge import rng
from expunge.errors import CapabilityError

#: ``(x_t [B, C, H, W], t int64 [B], condition)`` to the predicted noise ``[B, C, H, W]``.
Eps = Callable[[Tensor, Tensor, Any], Tensor]


class Process:
    """Noise levels of a diffusers scheduler that trains its model to predict the noise.

    Args:
        scheduler: Has ``alphas_cumprod`` ``[T]`` and ``config.prediction_type``.

    Raises:
        CapabilityError: The model predicts something else than the noise.
    """

    def __init__(self, scheduler: Any) -> None:
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        if kind != "epsilon":
            raise CapabilityError(f"the scheduler's model predicts '{kind}'; only 'epsilon' is supported")
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.detach().double().cpu()

    @property
    def steps(self) -> int:
        """Number of noise levels ``T``."""
        return len(self.alphas_cumprod)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` for times ``t`` int64 ``[B]``."""
        a = self.alphas_cumprod[t.cpu()].to(x0.device, torch.promote_types(x0.dtype, torch.float32))
        shape = (-1, *[1] * (x0.ndim - 1))
        return (a.sqrt().reshape(shape) * x0 + (1 - a).sqrt().reshape(shape) * noise).to(x0.dtype)


def draw_times(key: int, ids: Tensor, steps: int) -> Tensor:
    """Uniform times ``0 .. steps - 1``, one per id, int64 ``[B]``."""
    return rng.randint(rng.key(key, "times"), ids, steps)


def draw_noise(key: int, ids: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise ``[B, *shape]`` on the CPU; each row is a function of the key and its id alone."""
    rows = []
    for i in ids.tolist():
        generator = torch.Generator().manual_seed(rng.key(key, "noise", int(i)) % 2**63)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows).to(dtype)
