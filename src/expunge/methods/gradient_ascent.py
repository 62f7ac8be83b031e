"""Gradient ascent on the forget set."""

from __future__ import annotations

from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, make_objective
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights

#: Defaults of this method.
OPTIM = Optim(lr=1e-4, epochs=5, augment=True)


@method(
    "gradient_ascent",
    Info(
        "Raise the loss on the forget set; unbounded, so few steps at a small rate.",
        paper="Thudi et al., Unrolling SGD, EuroS&P 2022, arXiv 2109.13398",
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget",),
        deviations=("normalisation statistics are frozen by default: `optim.norm`",),
        aliases=("ga", "neg_grad"),
    ),
)
def gradient_ascent(
    *,
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min -mean loss(forget)``.

    Source: SalUn, section 5 (5 epochs, learning rate 1e-5 to 1e-3).

    Deviates:
        Normalisation layers keep their statistics; the code updates them on forget batches alone, which by
        itself wrecks a class (``optim.norm = "train"``).

    Args:
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    objective = make_objective("gradient_ascent", None, batch_size)
    return Recipe(name="gradient_ascent", objective=objective, space=AllWeights(), optim=optim)
