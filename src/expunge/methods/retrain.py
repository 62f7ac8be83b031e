"""Retrain from scratch on the retain set: the reference that unlearning is measured against."""

from __future__ import annotations

from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, make_objective
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights

#: Defaults of this method.
OPTIM = Optim(
    lr=0.1,
    epochs=182,
    lr_schedule="multistep",
    milestones=(91, 136),
    norm="train",
    augment=True,
)


@method(
    "retrain",
    Info(
        "Train a fresh network on the retain set only: exact forgetting, at full cost.",
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("retain",),
        deviations=("the step-wise schedule of the code is used; the papers say cosine",),
        aliases=("oracle",),
    ),
)
def retrain(
    *,
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean loss(retain)`` from a fresh initialisation.

    Source: Unlearn-Saliency, training defaults (182 epochs, SGD 0.1 / 0.9 / 5e-4, rate times 0.1 at 91 and 136).

    Args:
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = make_objective("fine_tune", None, batch_size)
    return Recipe(name="retrain", objective=objective, space=AllWeights(), optim=optim, from_scratch=True)
