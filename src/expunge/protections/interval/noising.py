"""How images are noised before a diffusion model is run for collection."""

from __future__ import annotations

from torch import Tensor


def antithetic_timesteps(draws: Tensor, n: int, total: int) -> Tensor:
    """``n`` timesteps from ``n // 2 + 1`` uniform draws t: all draws, then their mirrors ``total - 1 - t``."""
    return draws.new_tensor([*draws.tolist(), *(total - 1 - draws).tolist()])[:n]


def noised(x: Tensor, noise: Tensor, betas: Tensor, t: Tensor) -> Tensor:
    """``sqrt(a_t) x + sqrt(1 - a_t) noise`` with ``a = cumprod(1 - beta)``.

    Args:
        x: Images after the data transform, ``[B, ...]``.
        noise: Standard normal, same shape.
        betas: Noise schedule, ``[T]``.
        t: Timesteps, ``[B]``.
    """
    a = (1 - betas).cumprod(0)[t].reshape(-1, *[1] * (x.dim() - 1))
    return a.sqrt() * x + (1 - a).sqrt() * noise
