"""DeepDive `rl_split`: forget pass with random labels, then retain pass."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._deepdive import info, recipe
from expunge.objectives.cross_entropy import RandomLabel
from expunge.recipe import Optim, Recipe
from expunge.schedule import Sequential

#: Defaults of this method.
OPTIM = Optim(lr=0.1, momentum=0.0, weight_decay=0.0, epochs=10)


@method(
    "deepdive_rl_split",
    info(
        "A pass over the forget set with random labels, then one over the retain set.",
        ("forget", "retain"),
        "wrong labels exclude the true one: `profile`",
    ),
)
def deepdive_rl_split(
    *,
    use_mask: bool = True,
    mask_thr: Annotated[float, Field(gt=0, le=1)] = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean loss(forget, random y)``, then ``min mean loss(retain, y)``, both in stored order, every epoch.

    Source: SalUn_DeepDive, ``methods.py: rand_label_split``.

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
    objective = RandomLabel(
        schedule=Sequential(batch_size=batch_size, shuffle=False), exclude_true=profile == "as_intended"
    )
    return recipe(
        "deepdive_rl_split",
        objective,
        use_mask=use_mask,
        mask_thr=mask_thr,
        profile=profile,
        batch_size=batch_size,
        optim=optim,
    )
