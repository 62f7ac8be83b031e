"""DeepDive `rl`: one shuffled pass, random labels on the forget samples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._deepdive import info, recipe
from expunge.objectives.cross_entropy import RandomLabel
from expunge.recipe import Optim, Recipe
from expunge.schedule import Single

#: Defaults of this method.
OPTIM = Optim(lr=0.1, momentum=0.0, weight_decay=0.0, epochs=10)


@method(
    "deepdive_rl",
    info(
        "One shuffled pass over all training samples, the forget ones with random labels.",
        ("forget", "retain"),
        "wrong labels exclude the true one: `profile`",
    ),
)
def deepdive_rl(
    *,
    use_mask: bool = True,
    mask_thr: Annotated[float, Field(gt=0, le=1)] = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean_i loss(x_i, y_i)`` over one shuffled pass, with ``y_i`` random on the forget set.

    Source: SalUn_DeepDive, ``methods.py: rand_label``.

    Deviates:
        ``as_published`` sums batch means for the mask, adds the gradient left by the mask pass to the first step and
        lets normalisation statistics move; its random labels may be the true ones.

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings; without momentum and decay a masked gradient alone freezes exactly.
    """
    objective = RandomLabel(schedule=Single(role="mixed", batch_size=batch_size), exclude_true=profile == "as_intended")
    return recipe(
        "deepdive_rl",
        objective,
        use_mask=use_mask,
        mask_thr=mask_thr,
        profile=profile,
        batch_size=batch_size,
        optim=optim,
    )
