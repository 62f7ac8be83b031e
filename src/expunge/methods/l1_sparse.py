"""Sparsity-aware fine-tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, make_objective
from expunge.protections.l1 import L1
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights

#: Defaults of this method.
OPTIM = Optim(lr=0.01, epochs=10, augment=True)


@method(
    "l1_sparse",
    Info(
        "Fine-tune on the retain set under a decaying l1 penalty on the weights.",
        paper="Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv 2304.04934",
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("retain",),
        deviations=(
            "the default weight is the published tables' 1e-4; the code's own default of 0.2 destroys a network",
            "normalisation statistics are frozen by default: `optim.norm`",
        ),
        aliases=("ft_prune", "ft_l1"),
    ),
)
def l1_sparse(
    *,
    weight: Annotated[float, Field(gt=0)] = 1e-4,
    no_l1_epochs: Annotated[int, Field(ge=0)] = 0,
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean loss(retain) + a_e |theta|_1``, ``a_e = weight (1 - e / (E - E0))`` while ``e < E - E0``, then 0.

    Source: Jia et al., equation 2; code ``Classification/unlearn/FT.py`` (learning rate and weight as in the published
    follow-up scripts).

    Args:
        weight: Penalty at epoch 0.
        no_l1_epochs: ``E0``, last epochs without the penalty.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    return Recipe(
        name="l1_sparse",
        objective=make_objective("fine_tune", None, batch_size),
        space=AllWeights(),
        protections=(L1(weight=weight, no_l1_epochs=no_l1_epochs),),
        optim=optim,
    )
