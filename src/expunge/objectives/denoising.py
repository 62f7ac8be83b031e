"""SalUn's loss for class-conditional diffusion models exactly as its code computes it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.context import Context
from expunge.errors import CapabilityError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.registry import Info
from expunge.schedule import Paired, Schedule
from expunge.tasks.base import Batch
from expunge.tasks.ddpm import DdpmTask


def class_conditional(ctx: Context, who: str) -> DdpmTask:
    """The task of a context as one with a class-conditional model.

    Raises:
        CapabilityError: It is of another family.
    """
    if not isinstance(ctx.task, DdpmTask):
        raise CapabilityError(f"{who} needs a class-conditional diffusion model, not the {ctx.task.name} task")
    return ctx.task


@part(
    "denoising_published",
    Info(
        "SalUn's loss for class-conditional diffusion models as its code computes it.",
        paper="Fan et al., SalUn, ICLR 2024, arXiv 2310.12508",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
        needs=("forget", "class_condition"),
        deviations=("the corrected forms are `random_label` and `neg_grad_plus` with the schedule `paired`",),
    ),
)
class PublishedDenoising(Objective):
    """``forget + alpha * mean over samples of sum over pixels (eps(x_t, c) - noise)^2``.

    ``forget`` is ``mean over all numbers of (eps(x_t, c) - sg eps(x_t, c'))^2`` with ``c' = (c + 1) mod classes`` and
    targets in training mode, or, for ``gradient_ascent``, minus the mean of the summed noise loss. In every prediction,
    the targets' included, classes are dropped independently.

    Args:
        schedule: Batches of both roles in one step.
        forget: ``random_label`` or ``gradient_ascent``.
        alpha: Weight of the retain loss, a sum over pixels: 0.001 for an image of 3,072 numbers weighs as 3.072 would
            with means.
        condition_drop: Share of the classes that are dropped.
    """

    schedule: Schedule = Paired()
    forget: Literal["random_label", "gradient_ascent"] = "random_label"
    alpha: float = Field(default=1e-3, ge=0)
    condition_drop: float = Field(default=0.1, ge=0, lt=1)

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        task = class_conditional(ctx, self.part_name)

        def predicted(batch: Batch, labels: Tensor, branch: str) -> tuple[Tensor, Tensor]:
            x_t, t, noise = task.drawn(batch)
            return task.eps(x_t, t, task.dropped(batch, labels, self.condition_drop, branch)), noise

        def noise_loss(batch: Batch, branch: str) -> Tensor:
            found, noise = predicted(batch, batch.targets, branch)
            return (noise - found).square().flatten(1).sum(1)

        def pseudo_loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                goal, _ = predicted(batch, (batch.targets + 1) % task.null, "pseudo")
            found, _ = predicted(batch, batch.targets, "forget")
            return (goal - found).square().flatten(1).mean(1)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            if "retain" in batches:
                terms["retain"] = Term(noise_loss(batches["retain"], "retain"), "retain", self.alpha)
            if self.forget == "gradient_ascent":
                terms["forget"] = Term(noise_loss(batches["forget"], "forget"), "forget", -1.0)
            else:
                terms["forget"] = Term(pseudo_loss(batches["forget"]), "forget")
            return terms

        return loss
