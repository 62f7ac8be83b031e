"""NegGrad+: ascend on the forget set while descending on the retain set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Mixing, make_schedule
from expunge.objectives.cross_entropy import NegGradPlus
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights

#: Defaults of this method.
OPTIM = Optim(lr=0.01, epochs=5, augment=True)


@method(
    "neg_grad_plus",
    Info(
        "Ascend on the forget set and descend on the retain set in one step.",
        paper="Kurmanji et al., SCRUB, NeurIPS 2023, arXiv 2302.09880 (baseline NegGrad+)",
        needs=("forget", "retain"),
        deviations=(
            "an epoch is one pass over the forget set; the retain set advances through its own passes",
            "default weights and rate are this package's",
        ),
    ),
)
def neg_grad_plus(
    *,
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.95,
    mixing: Mixing = "paired",
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min beta * mean loss(retain) - (1 - beta) * mean loss(forget)``.

    Args:
        beta: Weight of the retain loss.
        mixing: ``paired`` (one batch of each per step), ``mixed`` (one shuffled pass over both, each sample signed),
            ``sequential`` or ``forget_only``.
        batch_size: Samples per step and role.
        optim: Optimiser and loop settings.
    """
    objective = NegGradPlus(schedule=make_schedule(mixing, batch_size), alpha=beta, beta=1 - beta)
    return Recipe(name="neg_grad_plus", objective=objective, space=AllWeights(), optim=optim)
