"""Boundary shrink: give every forget sample to the class on the other side of its nearest decision boundary."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from expunge.context import Context
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, Profile, as_trained
from expunge.methods._teacher import frozen_copy
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.base import Batch, Task

#: Within the range searched by SalUn (1e-6 to 1e-4).
OPTIM = Optim(lr=1e-5, epochs=10, augment=True)

INFO = Info(
    "Train the forget samples towards the class that a small adversarial step leads to.",
    paper="Chen et al., Boundary Unlearning, CVPR 2023, arXiv 2303.11570",
    upstream=SALUN_CODE,
    commit=SALUN_COMMIT,
    needs=("forget", "logits"),
    deviations=(
        "the new label is never the true one, as in the paper; the code may keep it: `exclude_true`, `profile`",
        "normalisation statistics are frozen: `profile`",
    ),
    aliases=("bs",),
)


def neighbour_inputs(task: Task, batch: Batch, step: float, eight_bit: bool) -> Tensor:
    """One signed gradient step up the loss, ``clip(x + step * sign(grad_x loss), 0, 1)``, ``[B, ...]``.

    With ``eight_bit`` the result is rounded to multiples of 1/255 (half to even). A gradient of 0 moves nothing.
    """
    x = batch.inputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(task.loss(replace(batch, inputs=x)).sum(), x)
    moved = (x.detach() + step * slope.sign()).clamp(0, 1)
    return (moved * 255).round() / 255 if eight_bit else moved


@torch.no_grad()
def neighbour_labels(task: Task, batch: Batch, inputs: Tensor, exclude_true: bool) -> Tensor:
    """The class that the task's model predicts for ``inputs``, int64 ``[B]``; never the true one if so asked."""
    logits = task.predict(replace(batch, inputs=inputs))
    if exclude_true:
        logits = logits.scatter(1, batch.targets[:, None], float("-inf"))
    return logits.argmax(1)


@part("boundary_shrink", INFO)
class BoundaryShrink(Objective):
    """``mean loss(x, argmax h(x_adv))`` over the forget set; ``h`` is the original model, frozen.

    Args:
        schedule: Passes over the forget set.
        step: Size of the adversarial step in pixel values [0, 1].
        eight_bit: Round the perturbed images to 8 bits, as the code does.
        exclude_true: The label differs from the true one even where the step does not cross a boundary.
    """

    schedule: Schedule = Single(role="forget")
    step: float = Field(default=0.1, gt=0, le=1)
    eight_bit: bool = True
    exclude_true: bool = True

    def bind(self, ctx: Context) -> LossFn:
        """Copy the original model and return the loss function."""
        task = ctx.task
        frozen = frozen_copy(task)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            batch = batches["forget"]
            inputs = neighbour_inputs(frozen, batch, self.step, self.eight_bit)
            labels = neighbour_labels(frozen, batch, inputs, self.exclude_true)
            return {"forget": Term(task.loss(batch, labels), "forget")}

        return loss


@method("boundary_shrink", INFO)
def boundary_shrink(
    *,
    step: Annotated[float, Field(gt=0, le=1)] = 0.1,
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean CE(f(x), argmax h(x + step * sign(grad_x CE(h(x), y))))`` over the forget set only.

    Source: Boundary Unlearning; code ``Classification/unlearn/boundary_sh.py``.

    Deviates:
        The code takes the prediction on the perturbed image even where it is the true label, which then pulls the
        sample back; the paper wants the nearest wrong class. Its normalisation statistics move.
        ``profile = "as_published"`` restores both.

    Args:
        step: Size of the adversarial step in pixel values.
        mask_file: A saved saliency mask; only its weights may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = BoundaryShrink(
        schedule=Single(role="forget", batch_size=batch_size), step=step, exclude_true=profile == "as_intended"
    )
    space = AllWeights() if mask_file is None else SaliencyMask(file=mask_file)
    return Recipe(name="boundary_shrink", objective=objective, space=space, optim=as_trained(optim, profile))
