"""Fine-tuning on the retain set."""

from __future__ import annotations

from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, make_objective
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights

#: Defaults of this method.
OPTIM = Optim(lr=0.01, epochs=10, augment=True)


@method(
    "fine_tune",
    Info(
        "Keep training on the retain set and hope that the rest fades.",
        paper="Warnecke et al., arXiv 2108.11577; Golatkar et al., CVPR 2020, arXiv 1911.04933",
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("retain",),
        deviations=("normalisation statistics are frozen by default: `optim.norm`",),
        aliases=("ft", "finetune"),
    ),
)
def fine_tune(
    *,
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean loss(retain)`` from the original weights.

    Source: SalUn, section 5 (10 epochs, learning rate 1e-3 to 1e-1).

    Deviates:
        Normalisation layers keep their statistics; the code updates them (``optim.norm = "train"``).

    Args:
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    return Recipe(
        name="fine_tune", objective=make_objective("fine_tune", None, batch_size), space=AllWeights(), optim=optim
    )
