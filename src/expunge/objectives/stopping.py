"""Stop as soon as the forget samples are forgotten."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.context import Context
from expunge.errors import CapabilityError
from expunge.part import Frozen

#: Name of the measured accuracy in the log, as a fraction.
ACCURACY = "forget_accuracy"
TARGET = "stop_target"


class StopBelow(Frozen):
    """Stop once the accuracy on the forget samples is strictly below a target.

    The accuracy is measured in eval mode over the whole forget set after a step, at stated intervals.

    Args:
        target: Accuracy in [0, 1].
        below_test: Instead of ``target``: this much below the original model's accuracy on data it has not seen
            (validation samples if there are any, else test samples, which a remark then says).
        every: Steps between measurements; ``None`` measures at every epoch's end only.
        after_epochs: Whole epochs before the rule may stop a run.
    """

    target: float | None = Field(default=None, ge=-1, le=1)
    below_test: float | None = Field(default=None, ge=0, le=1)
    every: int | None = Field(default=None, ge=1)
    after_epochs: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one(self) -> StopBelow:
        if (self.target is None) == (self.below_test is None):
            raise ValueError("give exactly one of 'target' and 'below_test'")
        return self

    def prepare(self, ctx: Context) -> None:
        """Fix the target, with the original model."""
        if self.target is not None:
            ctx.state[TARGET] = torch.tensor(self.target, dtype=torch.float64)
            return
        assert self.below_test is not None
        role = next((r for r in ("val", "test") if r in ctx.split.roles()), None)
        if role is None:
            raise CapabilityError("the stop rule 'below_test' needs validation or test samples; give a 'target'")
        if role == "test":
            ctx.note("the stop rule used test labels of the original model; give validation samples to avoid it")
        logits, labels = outputs(ctx, role)
        stays = ~torch.isin(labels, torch.tensor(ctx.split.removed, dtype=labels.dtype))
        ctx.state[TARGET] = accuracy(logits[stays], labels[stays]) - self.below_test

    def due(self, ctx: Context, end_of_epoch: bool) -> bool:
        """Whether the step just taken is to be measured."""
        return end_of_epoch or (self.every is not None and (ctx.step + 1) % self.every == 0)

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """Accuracy and target, if due."""
        if not self.due(ctx, end_of_epoch):
            return {}
        return self.logged(ctx, float(accuracy(*outputs(ctx, "forget"))))

    def logged(self, ctx: Context, measured: float) -> dict[str, float]:
        """The rows of the log for a measured accuracy."""
        return {ACCURACY: measured, TARGET: float(ctx.state[TARGET])}

    def reason(self, history: list[dict[str, Any]]) -> str | None:
        """Why to stop after the last step, or ``None``."""
        row = history[-1]
        if TARGET not in row or row["epoch"] < self.after_epochs or not row[ACCURACY] < row[TARGET]:
            return None
        return f"forget accuracy {100 * row[ACCURACY]:.2f} % is below {100 * row[TARGET]:.2f} %"


def outputs(ctx: Context, role: str) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and labels ``[N]`` of a role, in eval mode, without gradients."""
    found: tuple[Tensor, Tensor] = ctx.task.logits(role, ctx.split)  # type: ignore[attr-defined]
    return found


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct samples, float64, 0-d."""
    return (logits.argmax(1) == labels).double().mean()


def class_accuracy(logits: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Accuracy of each class, float64 ``[C]``; NaN where a class has no sample."""
    hits = torch.bincount(labels, (logits.argmax(1) == labels).double(), minlength=n_classes)
    return hits / torch.bincount(labels, minlength=n_classes)
