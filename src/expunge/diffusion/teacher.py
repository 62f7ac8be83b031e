"""The model as it was, for targets: one U-Net, and beside it the first values of the tensors that are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expunge.diffusion.process import Eps
from expunge.restore import evaluating, snapshot
from expunge.spaces.concept_shift import unshifted


class Teacher:
    """Predictions of the original model while the U-Net is being trained, without a second U-Net.

    The trained tensors' first values stand in for them during a pass. The values are not swapped in the parameters
    themselves: autocast remembers the half-precision copy of a parameter, and would give the student's to the teacher.

    What is trained is known once the run has set the parameters' flags, after objectives are bound. Until the first
    pass all values are kept, then those of trained tensors; they take memory of their own where training has written.

    Args:
        unet: The network, with its original weights.
        eps: Predicts noise with this network, ``(x_t, t, condition)``; usually ``task.eps``.
    """

    def __init__(self, unet: nn.Module, eps: Eps) -> None:
        self._unet, self._call = unet, _Call(unet, eps)
        self._base = {n: snapshot(p) for n, p in unet.named_parameters()}
        self._narrowed = False

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the U-Net's tensors whose first values are kept."""
        return tuple(self._base)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Predicted noise ``[B, C, H, W]`` of the original model, in eval mode and without gradients."""
        self._narrow()
        with evaluating(self._unet), unshifted(self._unet):
            found: Tensor = functional_call(
                self._call, {f"unet.{n}": b for n, b in self._base.items()}, (x_t, t, condition)
            )
        return found

    def _narrow(self) -> None:
        if not self._narrowed:
            trained = {n: p for n, p in self._unet.named_parameters() if p.requires_grad}
            self._base = {n: self._base[n].to(p.device) for n, p in trained.items()}
            self._narrowed = True


class _Call(nn.Module):
    """``eps`` as a module's forward pass, so that tensors of the U-Net below it can be stood in for."""

    def __init__(self, unet: nn.Module, eps: Eps) -> None:
        super().__init__()
        self.unet = unet
        self._eps = eps

    def forward(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        return self._eps(x_t, t, condition)
