"""Sampling with classifier-free guidance through a diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.diffusion.process import Eps


def fresh(scheduler: Any) -> Any:
    """A scheduler of the same settings without the state of an earlier run."""
    return type(scheduler).from_config(scheduler.config)


@torch.no_grad()
def guided(
    eps: Eps,
    scheduler: Any,
    noise: Tensor,
    condition: Tensor,
    unconditional: Tensor,
    *,
    steps: int,
    guidance: float,
    keys: Sequence[int] | None = None,
) -> Tensor:
    """Draw latents with ``e_u + g (e_c - e_u)``, both in one pass; without guidance (``g = 1``) half a pass.

    Args:
        eps: Predicts noise.
        scheduler: diffusers'; it is not changed.
        noise: Standard normal ``[B, C, h, w]``.
        condition: ``[B, ...]``.
        unconditional: ``[B, ...]``.
        steps: Steps of the scheduler.
        guidance: ``g``.
        keys: One per sample, for schedulers that draw noise in every step; then the draws of a sample are its own.

    Returns:
        Latents ``[B, C, h, w]``.
    """
    own = fresh(scheduler)
    own.set_timesteps(steps)
    options: dict[str, Any] = {}
    if keys is not None and "generator" in inspect.signature(own.step).parameters:
        options["generator"] = [torch.Generator().manual_seed(k % 2**63) for k in keys]
    x = noise * own.init_noise_sigma
    both = torch.cat([unconditional, condition])
    for t in own.timesteps:
        scaled = own.scale_model_input(x, t)
        if guidance == 1:
            found = eps(scaled, t.to(x.device).expand(len(x)), condition)
        else:
            of_both = eps(torch.cat([scaled, scaled]), t.to(x.device).expand(2 * len(x)), both)
            without, with_prompt = of_both.chunk(2)
            found = without + guidance * (with_prompt - without)
        x = own.step(found, t, x, **options).prev_sample
    return x


def stable_diffusion_scheduler() -> Any:
    """The noise levels of Stable Diffusion 1.x, sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
