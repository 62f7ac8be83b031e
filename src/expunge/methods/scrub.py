"""SCRUB: obey the teacher on the retain set, disobey it on the forget set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch.nn import functional

from expunge.context import Context
from expunge.method import method
from expunge.methods._teacher import advice, frozen_copy, kl_divergence
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Sequential
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Batch

_PAPER = "Kurmanji et al., SCRUB, NeurIPS 2023, arXiv 2302.09880"

#: Defaults of this method.
OPTIM = Optim(
    lr=5e-4,
    momentum=0.9,
    weight_decay=5e-4,
    epochs=10,
    lr_schedule="multistep",
    milestones=(3, 5, 9),
    gamma=0.1,
    grad_clip=1.0,
)


@part(
    "scrub",
    Info(
        "Move away from the original model's outputs on the forget set, stay with them and the labels on the rest.",
        paper=_PAPER,
        needs=("forget", "retain", "logits"),
    ),
)
class Scrub(Objective):
    """``mean_retain [alpha d(x) + gamma CE(x, y)] - mean_forget d(x)``, forget and retain batches taking turns.

    ``d(x) = T^2 KL(softmax(teacher(x) / T) || softmax(student(x) / T))`` in nats, the teacher being the original model
    in eval mode. At the very start student and teacher agree, ``d`` is at its minimum and the forget pass has no
    gradient but for dropout, augmentation or moving normalisation statistics; it bites from the second pass on.

    Args:
        schedule: ``sequential``, whose ``forget_epochs`` limits the ascent to the first epochs (``msteps``).
        alpha: Weight of the divergence on the retain set.
        gamma: Weight of the cross-entropy on the retain set.
        temperature: ``T``.
    """

    schedule: Schedule = Sequential(batch_size=128, forget_epochs=3)
    alpha: float = Field(default=0.001, ge=0)
    gamma: float = Field(default=0.99, ge=0)
    temperature: float = Field(default=4.0, gt=0)

    def bind(self, ctx: Context) -> LossFn:
        """Copy the teacher and return the loss function."""
        task, teacher = ctx.task, frozen_copy(ctx.task)

        weights = {"forget": -1.0, "retain": self.alpha}

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                weight, student = weights[role], task.predict(batch)
                distance = kl_divergence(advice(teacher, batch), student, self.temperature)
                terms[f"{role}_teacher"] = Term(self.temperature**2 * distance, role, weight)
                if role == "retain":
                    labels = functional.cross_entropy(student, batch.targets, reduction="none")
                    terms["retain_labels"] = Term(labels, role, self.gamma)
            return terms

        return loss


@method(
    "scrub",
    Info(
        "Move away from the original model's outputs on the forget set, stay with them and the labels on the rest.",
        paper=_PAPER,
        needs=("forget", "retain", "logits"),
        deviations=(
            "normalisation statistics are frozen by default, so the very first forget pass has next to no gradient and "
            "`msteps` is 3 where the authors take 2: `optim.norm`",
            "forget and retain batches have one size: `batch_size`",
            "gradients are clipped to norm 1, for the ascent is unbounded: `optim.grad_clip`; no averaging of weights",
            "the last step counts; the variant that picks a checkpoint by forget error (SCRUB+R) is not part of this",
        ),
    ),
)
def scrub(
    *,
    msteps: Annotated[int, Field(ge=1)] = 3,
    alpha: Annotated[float, Field(ge=0)] = 0.001,
    gamma: Annotated[float, Field(ge=0)] = 0.99,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    batch_size: int = 128,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min_w mean_retain [alpha d(x; w) + gamma CE(x, y; w)] - mean_forget d(x; w)``.

    ``d`` is the divergence of the student's softened outputs from the original model's. The first ``msteps`` epochs
    are a pass of ascent over the forget set followed by a pass of descent over the retain set; the rest descend only.

    Source: Kurmanji et al. 2023, equation 3 and algorithm 1; the temperature and the default weights as in the authors'
    scripts for small data sets.

    Deviates:
        Normalisation layers keep their statistics. Student and teacher then agree on the first forget pass, whose
        gradient is zero but for dropout and augmentation, so one more such pass is the default.

    Args:
        msteps: Epochs with a forget pass.
        alpha: Weight of the divergence on the retain set.
        gamma: Weight of the cross-entropy on the retain set.
        temperature: Softens both outputs; the divergence is multiplied by its square.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = Scrub(
        schedule=Sequential(batch_size=batch_size, forget_epochs=msteps),
        alpha=alpha,
        gamma=gamma,
        temperature=temperature,
    )
    return Recipe(name="scrub", objective=objective, space=AllWeights(), optim=optim)
