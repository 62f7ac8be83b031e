"""All weights, with a moving average of them as the result: how diffusion models are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.context import Context
from expunge.part import part
from expunge.patch.changes import Change, accumulate_dtype, smallest
from expunge.registry import Info
from expunge.spaces.base import DirectSpace, OpenSpace, Space, select_parameters

_STEPS, _MEAN = "average.steps", "average."


class AveragedSpace(DirectSpace):
    """The optimiser moves the weights; :meth:`changes` are those of their moving average."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        super().__init__(parameters)
        self._decay, self._steps = decay, 0
        self.average = {n: b.to(accumulate_dtype(b.dtype), copy=True) for n, b in self.base.items()}

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the average towards the weights; early steps count more, so that the start is soon forgotten."""
        del optimizer
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.to(self.average[name].dtype), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The average and the number of steps."""
        return {_STEPS: torch.tensor(self._steps), **{_MEAN + n: t for n, t in self.average.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore both."""
        self._steps = int(state[_STEPS])
        for name, mean in self.average.items():
            mean.copy_(state[_MEAN + name])

    def changes(self) -> dict[str, Change]:
        """``average - base`` per parameter, in the smallest form."""
        found = {}
        for name, mean in self.average.items():
            change = smallest(mean - self.base[name].to(mean.dtype))
            if change is not None:
                found[name] = change
        return found


@part(
    "averaged",
    Info(
        "Every parameter may change; the result is an exponential moving average of the weights.",
        paper="Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv 2006.11239, appendix B",
    ),
)
class AveragedWeights(Space):
    """``a <- d_k a + (1 - d_k) theta`` after step ``k``, ``d_k = min(decay, (1 + k) / (10 + k))``, ``k`` from 0.

    Args:
        targets: Glob patterns on parameter or module names.
        decay: Largest ``d_k``: 0.9999 for hundreds of thousands of steps, 0.995 for hundreds.
    """

    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
    decay: float = Field(default=0.9999, ge=0, lt=1)

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The selected parameters."""
        return select_parameters(ctx.model, self.targets)

    def open(self, ctx: Context) -> OpenSpace:
        """Open on the parameters, the average starting at their present values."""
        return AveragedSpace(self.masters(ctx), self.decay)
