"""What tasks on diffusion models share: denoising losses with counted draws."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from expunge.diffusion.process import Process, draw_noise, draw_times
from expunge.tasks.base import Batch, Task


class DiffusionTask(Task):
    """A model that predicts noise.

    Subclasses load samples ``x_0`` (pixels in [-1, 1] or latents) as ``batch.inputs`` with class numbers as targets.

    Attributes:
        unet: The network that predicts noise; a part of ``model``.
        process: Noise levels.
    """

    classifies = False
    counts_draws = True
    unet: nn.Module
    process: Process

    @abstractmethod
    def eps(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Predicted noise ``[B, C, H, W]`` for times ``t`` int64 ``[B]`` and a condition of this family."""

    @abstractmethod
    def condition(self, batch: Batch, targets: Tensor | None = None) -> Any:
        """The condition of samples: their own, or that of other classes where ``targets`` differ."""

    @abstractmethod
    def unconditional(self, batch: Batch) -> Any:
        """The condition that says nothing: the null class, the empty prompt."""

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, noise)`` of samples: a function of ``batch.key`` and the sample ids."""
        x0 = batch.inputs
        t = draw_times(batch.key, batch.ids, self.process.steps).to(x0.device)
        noise = draw_noise(batch.key, batch.ids, x0.shape[1:], x0.dtype).to(x0.device)
        return self.process.noised(x0, noise, t), t, noise

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted noise per sample ``[B]`` (mean over channels and pixels)."""
        x_t, t, noise = self.drawn(batch)
        found = self.eps(x_t, t, self.condition(batch, targets))
        return (found - noise).square().flatten(1).mean(1)

    def predict(self, batch: Batch) -> Tensor:
        """Predicted noise at the drawn times."""
        x_t, t, _ = self.drawn(batch)
        return self.eps(x_t, t, self.condition(batch))

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.unet.parameters() if p.is_floating_point()), torch.float32)
