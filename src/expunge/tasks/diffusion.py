"""What tasks on diffusion models share: denoising losses with counted draws."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from expunge.diffusion.process import Process, draw_noise, draw_times
from expunge.errors import RequestError
from expunge.restore import evaluating
from expunge.tasks.base import Batch, Task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask


class DiffusionTask(Task):
    """A model that predicts noise.

    Subclasses load samples ``x_0`` (pixels in [-1, 1] or latents) as ``batch.inputs`` with class numbers as targets.

    The loss of a sample is ``mean (eps(x_t, t, c) - noise)^2`` over channels and pixels. Where targets name another
    class, the prediction for the sample's own condition ``c`` is drawn to the one for the other, ``c'``:
    ``mean (eps(x_t, t, c) - sg eps(x_t, t, c'))^2`` (SalUn, arXiv 2310.12508, the equation for generation), at the same
    ``x_t``. That target is the model's own as it stands, in eval mode.

    Attributes:
        unet: The network that predicts noise; a part of ``model``.
        process: Noise levels.
    """

    classifies = False
    counts_draws = True
    unet: nn.Module
    process: Process
    _guidance = 1.0

    @abstractmethod
    def eps(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Predicted noise ``[B, C, H, W]`` for times ``t`` int64 ``[B]`` and a condition of this family."""

    @abstractmethod
    def condition(self, batch: Batch, targets: Tensor | None = None) -> Any:
        """The condition of samples: their own, or that of other classes where ``targets`` differ."""

    @abstractmethod
    def unconditional(self, n: int) -> Any:
        """The condition that says nothing, ``n`` times: the null class, the empty prompt."""

    def guided(self, guidance: float) -> Self:
        """The same task whose loss and predictions use guided noise, see :meth:`guided_eps`."""
        other = copy.copy(self)
        other._guidance = guidance
        return other

    def guided_eps(self, x_t: Tensor, t: Tensor, condition: Any, guidance: float) -> Tensor:
        """``eps_null + guidance (eps_given - eps_null)``, from one pass over both; 1 is no guidance."""
        if guidance == 1:
            return self.eps(x_t, t, condition)
        both = torch.cat([condition, self.unconditional(len(condition)).to(condition)])
        given, without = self.eps(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return without + guidance * (given - without)

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, noise)`` of samples: a function of ``batch.key`` and the sample ids."""
        x0 = batch.inputs
        t = draw_times(batch.key, batch.ids, self.process.steps).to(x0.device)
        noise = draw_noise(batch.key, batch.ids, x0.shape[1:], x0.dtype).to(x0.device)
        return self.process.noised(x0, noise, t), t, noise

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Per-sample loss ``[B]``; see the class.

        Raises:
            RequestError: Targets are probabilities, not class numbers.
        """
        x_t, t, goal = self.drawn(batch)
        if targets is not None:
            goal = self._mislabelled(batch, targets, x_t, t, goal)
        found = self.guided_eps(x_t, t, self._own_condition(batch), self._guidance)
        return (found - goal).square().flatten(1).mean(1)

    def predict(self, batch: Batch) -> Tensor:
        """Predicted noise at the drawn times."""
        x_t, t, _ = self.drawn(batch)
        return self.guided_eps(x_t, t, self.condition(batch), self._guidance)

    def _own_condition(self, batch: Batch) -> Any:
        """What samples are conditioned on in the loss."""
        return self.condition(batch)

    def _mislabelled(self, batch: Batch, targets: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``noise``, with the prediction for the other class where targets name one."""
        if targets.ndim != 1:
            raise RequestError(f"the {self.name} task takes class numbers as targets, not probabilities")
        rows = (targets != batch.targets).nonzero().flatten()
        if not len(rows):
            return noise
        with evaluating(self.model):
            condition = self.condition(batch, targets)[rows]
            other = self.guided_eps(x_t[rows], t[rows], condition, self._guidance)
        return noise.index_copy(0, rows, other.to(noise.dtype))

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.unet.parameters() if p.is_floating_point()), torch.float32)


def text_task(task: Task, who: str) -> TextToImageTask:
    """The task as one that turns prompts into images.

    Raises:
        CapabilityError: It is another one.
    """
    task.require(frozenset({"diffusion", "text"}), who)
    return cast("TextToImageTask", task)
