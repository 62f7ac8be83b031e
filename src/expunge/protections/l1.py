"""The l1 penalty on the weights themselves (l1-sparse unlearning)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from expunge.context import Context
from expunge.objectives.base import Term
from expunge.part import part
from expunge.protections.base import Penalty, Protection
from expunge.registry import Info
from expunge.spaces.base import OpenSpace


def l1_weight(weight: float, epoch: int, epochs: int, no_l1_epochs: int) -> float:
    """``weight * (1 - e / (E - E0))`` while ``e < E - E0``, then 0.

    >>> [round(l1_weight(1.0, e, 3, 1), 2) for e in range(3)]
    [1.0, 0.5, 0.0]
    """
    span = epochs - no_l1_epochs
    return weight * (1 - epoch / span) if epoch < span else 0.0


@part(
    "l1",
    Info(
        "A decaying l1 penalty on all trained weights.",
        paper="Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv 2304.04934",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
    ),
)
class L1(Protection):
    """``alpha_e * sum |theta|`` over every trained parameter, biases and normalisation included.

    Args:
        weight: ``alpha`` at epoch 0; 1e-6 to 1e-4 for networks of ten million weights.
        no_l1_epochs: Last epochs without the penalty.
    """

    weight: float = Field(default=1e-4, gt=0)
    no_l1_epochs: int = Field(default=0, ge=0)

    def bind(self, ctx: Context, space: OpenSpace) -> Penalty:
        """Return the penalty."""
        parameters = list(space.parameters.values())

        def penalty() -> dict[str, Term]:
            factor = l1_weight(self.weight, ctx.epoch, ctx.epochs, self.no_l1_epochs)
            if factor == 0.0:
                return {}
            total: Tensor = sum((p.abs().sum() for p in parameters[1:]), start=parameters[0].abs().sum())
            return {"l1": Term(total, None, factor)}

        return penalty
