"""A U-Net of 56 thousand random weights and a linear noise predictor, for the concept erasers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


def tiny_unet(seed: int = 0) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()


def eps_of(unet: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def eps(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        sample: Tensor = unet(x, t, states).sample
        return sample

    return eps


class LinearEps(nn.Module):
    """Noise that depends on the latents, the time and the states, the latter two together."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        shift = states.mean(1) @ self.gain.T
        return 0.5 * x + shift[:, :, None, None] * (1 + t[:, None, None, None] / 1000)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
