"""Gradient ascent, then fine-tuning: a pass up on the forget set and a pass down on the retain set per epoch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.objectives.cross_entropy import NegGradPlus
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Sequential
from expunge.spaces.layers import AllWeights

#: The published comparison: AdamW, 10 epochs, a rate of 1e-7 that falls as a cosine.
OPTIM = Optim(name="adamw", betas=(0.9, 0.98), lr=1e-7, epochs=10, lr_schedule="cosine", weight_decay=0.1)


@method(
    "gaft",
    Info(
        "Per epoch a gradient ascent pass over the forget set, then a fine-tuning pass over the retain set.",
        paper="Cai et al., SLUG, ICML 2025, arXiv 2407.11867 (the two-stage baseline GAFT)",
        upstream="CSIPlab/SLUG",
        commit="59629a2",
        needs=("forget", "retain"),
        deviations=(
            "the learning rate falls by epochs; the code indexes its schedule by retain steps, so that the rate jumps "
            "between the two passes",
            "weight decay acts on every trained tensor, and the logit scale is not clamped",
        ),
        aliases=("gradient_ascent_fine_tune",),
    ),
)
def gaft(
    *,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    batch_size: int = 32,
    optim: Optim = OPTIM,
) -> Recipe:
    """``max mean loss(forget)``, then ``min alpha * mean loss(retain)``, in turns.

    Source: SLUG, the two-stage comparison method. Its code's SalUn is this objective under a mask of the top half of
    the weights: ``{method: salun, on: neg_grad_plus, mixing: sequential}``.

    Deviates:
        See the card.

    Args:
        alpha: Weight of the retain loss.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = NegGradPlus(schedule=Sequential(batch_size=batch_size), alpha=alpha)
    return Recipe(name="gaft", objective=objective, space=AllWeights(), optim=optim)
