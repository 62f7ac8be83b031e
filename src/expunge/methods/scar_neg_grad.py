"""Negative gradient as in SCAR's tables."""

from __future__ import annotations

from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._scar_tables import BASELINE, SCAR_CODE, SCAR_COMMIT, SCAR_PAPER, StopsWhenForgotten, as_run
from expunge.objectives.cross_entropy import GradientAscent
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.layers import AllWeights


@part(
    "scar_neg_grad",
    Info(
        "Raise the loss on the forget set until the stop rule ends it.",
        paper=SCAR_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget",),
    ),
)
class ScarNegGrad(StopsWhenForgotten, GradientAscent):
    """``-mean loss(forget)``, stopped after the epoch in which the forget samples count as forgotten."""

    schedule: Schedule = Single(role="forget", batch_size=1024)


@method(
    "scar_neg_grad",
    Info(
        "Raise the loss on the forget set until the stop rule ends it (baseline of SCAR's tables).",
        paper=SCAR_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget",),
        deviations=("normalisation statistics are frozen; the code updates them: `profile`",),
    ),
)
def scar_neg_grad(
    *,
    profile: Profile = "as_intended",
    batch_size: int = 1024,
    optim: Optim = BASELINE,
) -> Recipe:
    """``min -mean loss(forget)``, unbounded: after each epoch it stops if the forget samples are forgotten.

    That is: below 1 % accuracy on them for a class request, 1.5 points below the original model's accuracy on unseen
    data for a request of samples.

    Source: SCAR's code, class ``NegativeGradient``.

    Deviates:
        Normalisation layers keep their statistics; the code updates them on forget batches
        (``profile = "as_published"``).

    Args:
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = ScarNegGrad(schedule=Single(role="forget", batch_size=batch_size))
    return Recipe(name="scar_neg_grad", objective=objective, space=AllWeights(), optim=as_run(optim, profile))
