"""Random labels as in SCAR's tables."""

from __future__ import annotations

from typing import Literal

from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._scar_tables import BASELINE, SCAR_CODE, SCAR_COMMIT, SCAR_PAPER, StopsWhenForgotten, as_run
from expunge.objectives.cross_entropy import RandomLabel
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.layers import AllWeights


@part(
    "scar_random_labels",
    Info(
        "Train the forget samples towards labels drawn anew at every step until the stop rule ends it.",
        paper=SCAR_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget",),
    ),
)
class ScarRandomLabels(StopsWhenForgotten, RandomLabel):
    """``mean loss(forget, y')`` with ``y'`` uniform over the classes that stay, drawn anew at every step.

    Args:
        exclude_true: ``y'`` is never the true label, also when samples and not classes are removed.
    """

    schedule: Schedule = Single(role="forget", batch_size=1024)
    exclude_removed: bool = True
    redraw: Literal["epoch", "step", "never"] = "step"


@method(
    "scar_random_labels",
    Info(
        "Train the forget samples towards labels drawn anew at every step (baseline of SCAR's tables).",
        paper=SCAR_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget",),
        deviations=(
            "a drawn label is never the true one; the code draws from all classes when samples are removed: `profile`",
            "normalisation statistics are frozen; the code updates them: `profile`",
            "a drawn label depends on (seed, step, sample), not on the batch order",
        ),
    ),
)
def scar_random_labels(
    *,
    profile: Profile = "as_intended",
    batch_size: int = 1024,
    optim: Optim = BASELINE,
) -> Recipe:
    """``min mean loss(forget, y')`` with ``y'`` uniform over the remaining classes, drawn anew at every step.

    After each epoch it stops if the forget samples are forgotten: below 1 % accuracy on them for a class request, 1.5
    points below the original model's accuracy on unseen data for a request of samples.

    Source: SCAR's code, class ``RandomLabels``.

    Deviates:
        ``y'`` is never the true label, also when samples rather than classes are removed, and normalisation layers keep
        their statistics; ``profile = "as_published"`` restores the code's behaviour in both.

    Args:
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = ScarRandomLabels(
        schedule=Single(role="forget", batch_size=batch_size), exclude_true=profile == "as_intended"
    )
    return Recipe(name="scar_random_labels", objective=objective, space=AllWeights(), optim=as_run(optim, profile))
