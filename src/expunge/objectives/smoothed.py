"""Cross-entropy against smoothed labels, for training originals and references."""

from __future__ import annotations

from pydantic import Field
from torch.nn import functional

from expunge.context import Context
from expunge.errors import CapabilityError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask


@part(
    "smoothed_fine_tune",
    Info("Minimise the loss on the retain set against smoothed labels.", needs=("retain",)),
)
class SmoothedFineTune(Objective):
    """``mean loss(retain, (1 - s) onehot(y) + s / C)`` (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Args:
        schedule: Which batches.
        label_smoothing: ``s``, the share of every target that is spread evenly over all ``C`` classes.
    """

    schedule: Schedule = Single(role="retain")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function.

        Raises:
            CapabilityError: The task has no classes.
        """
        task, share = ctx.task, self.label_smoothing
        if not isinstance(task, ClassifierTask):
            raise CapabilityError(f"label smoothing spreads a target over classes; the {task.name} task has none")

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                classes = task.n_classes
                hard = functional.one_hot(batch.targets, classes).to(batch.inputs.dtype)
                terms[role] = Term(task.loss(batch, (1 - share) * hard + share / classes), role)
            return terms

        return loss
