"""DeepDive `ga`: one shuffled pass, the loss of forget samples negated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._deepdive import info, recipe
from expunge.objectives.cross_entropy import NegGradPlus
from expunge.recipe import Optim, Recipe
from expunge.schedule import Single

#: Defaults of this method.
OPTIM = Optim(lr=5e-4, momentum=0.0, weight_decay=0.0, epochs=10, lr_schedule="cosine")


@method(
    "deepdive_ga",
    info(
        "One shuffled pass over all training samples, the loss of the forget ones negated.",
        ("forget", "retain"),
    ),
)
def deepdive_ga(
    *,
    use_mask: bool = True,
    mask_thr: Annotated[float, Field(gt=0, le=1)] = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean_i s_i loss_i`` with ``s = -1`` on the forget set and 1 elsewhere; cosine rate over the epochs.

    Source: SalUn_DeepDive, ``methods.py: grad_ascent``.

    Deviates:
        ``as_published`` sums batch means for the mask, adds the gradient left by the mask pass to the first step and
        lets normalisation statistics move.

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings; without momentum and decay a masked gradient alone freezes exactly.
    """
    objective = NegGradPlus(schedule=Single(role="mixed", batch_size=batch_size))
    return recipe(
        "deepdive_ga",
        objective,
        use_mask=use_mask,
        mask_thr=mask_thr,
        profile=profile,
        batch_size=batch_size,
        optim=optim,
    )
