"""Bad Teacher: imitate an untrained network on the forget set and the original model on the rest."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from expunge import rng
from expunge.context import Context
from expunge.method import method
from expunge.methods._teacher import advice, frozen_copy, kl_divergence
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Batch, Task

_PAPER = "Chundawat et al., Can Bad Teaching Induce Forgetting?, AAAI 2023, arXiv 2205.08096"

#: Defaults of this method.
OPTIM = Optim(name="adam", lr=1e-4, weight_decay=0.0, epochs=5)


def untrained(ctx: Context) -> Task:
    """The incompetent teacher: the same network with fresh weights, a function of the run's seed.

    Raises:
        ConfigError: A layer cannot be re-initialised.
    """
    from expunge.run import reinitialise  # the loop is built on recipes, and recipes on parts like this one

    teacher = frozen_copy(ctx.task)
    with rng.preserved():
        reinitialise(teacher.model, ctx.key("incompetent teacher"))
    return teacher


@part(
    "bad_teacher",
    Info(
        "Imitate an untrained network on the forget samples and the original model on the others.",
        paper=_PAPER,
        needs=("forget", "retain", "logits"),
    ),
)
class BadTeacher(Objective):
    """``mean KL(softmax(t(x) / T) || softmax(s(x) / T))``, ``t`` untrained on forget samples and original on the rest.

    Divergences are in nats per sample, without a factor of ``T^2``. Both teachers stay in eval mode.

    Args:
        schedule: ``single`` over ``mixed``, or any with forget and retain batches.
        temperature: ``T``.
    """

    schedule: Schedule = Single(role="mixed")
    temperature: float = Field(default=1.0, gt=0)

    def bind(self, ctx: Context) -> LossFn:
        """Make both teachers and return the loss function."""
        task, competent, incompetent = ctx.task, frozen_copy(ctx.task), untrained(ctx)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                student = task.predict(batch)
                forget = batch.is_forget.to(student.device)[:, None]
                if bool(forget.all()):
                    guide = advice(incompetent, batch)
                elif not bool(forget.any()):
                    guide = advice(competent, batch)
                else:
                    guide = torch.where(forget, advice(incompetent, batch), advice(competent, batch))
                terms[role] = Term(kl_divergence(guide, student, self.temperature), role)
            return terms

        return loss


@method(
    "bad_teacher",
    Info(
        "Imitate an untrained network on the forget samples and the original model on the others.",
        paper=_PAPER,
        needs=("forget", "retain", "logits"),
        deviations=(
            "the whole retain set takes part; the authors draw a third of it",
            "the divergence is summed over classes and averaged over samples, as in the paper's equation",
            "normalisation statistics are frozen by default: `optim.norm`",
        ),
        aliases=("badt", "blindspot"),
    ),
)
def bad_teacher(
    *,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean [l KL(untrained(x) || student(x)) + (1 - l) KL(original(x) || student(x))]``, ``l = 1`` on forget.

    Forget and retain samples are shuffled together.

    Source: Chundawat et al. 2023, equation of the unlearning objective; Adam at 1e-4 and ``T = 1`` as there.

    Deviates:
        All retain samples are used, and normalisation layers keep their statistics (``optim.norm = "train"``).

    Args:
        temperature: Softens the outputs of teachers and student.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = BadTeacher(schedule=Single(role="mixed", batch_size=batch_size), temperature=temperature)
    return Recipe(name="bad_teacher", objective=objective, space=AllWeights(), optim=optim)
