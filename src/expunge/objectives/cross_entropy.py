"""Objectives made of the task's own loss: fine-tune, gradient ascent, NegGrad+, random label."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.errors import RequestError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.registry import Info
from expunge.schedule import Paired, Schedule, Sequential, Single
from expunge.tasks.base import Batch

_SALUN = "OPTML-Group/Unlearn-Saliency"
_COMMIT = "a6e89fd"
_ATTEMPTS = 1000


def remaining_labels(ctx: Context, batch: Batch, key: int, *, exclude_true: bool = True) -> Tensor:
    """Random classes ``[B]``, uniform over those that the request does not remove.

    Raises:
        RequestError: It removes too many.
    """
    task = ctx.task
    wrong = task.wrong_target(batch, key=key, exclude_true=exclude_true)
    if not ctx.split.removed:
        return wrong
    removed = torch.tensor(ctx.split.removed, device=wrong.device)
    for attempt in range(_ATTEMPTS):
        again = torch.isin(wrong, removed)
        if not bool(again.any()):
            return wrong
        other = rng.key(key, "draw again", attempt)
        wrong = torch.where(again, task.wrong_target(batch, key=other, exclude_true=exclude_true), wrong)
    raise RequestError("no class is left to draw random labels from; the request removes too many classes")


@part(
    "fine_tune", Info("Minimise the loss on the retain set only.", upstream=_SALUN, commit=_COMMIT, needs=("retain",))
)
class FineTune(Objective):
    """``mean loss(retain)``: relies on forgetting by neglect."""

    schedule: Schedule = Single(role="retain")

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        task = ctx.task

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            return {role: Term(task.loss(batch), role) for role, batch in batches.items()}

        return loss


@part(
    "gradient_ascent",
    Info("Maximise the loss on the forget set.", upstream=_SALUN, commit=_COMMIT, needs=("forget",), aliases=("ga",)),
)
class GradientAscent(Objective):
    """``-mean loss(forget)``; unbounded, so few steps and a small learning rate."""

    schedule: Schedule = Single(role="forget")

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        task = ctx.task

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            return {"forget": Term(task.loss(batches["forget"]), "forget", -1.0)}

        return loss


@part(
    "neg_grad_plus",
    Info("Ascend on the forget set while descending on the retain set.", needs=("forget", "retain")),
)
class NegGradPlus(Objective):
    """``alpha * mean loss(retain) - beta * mean loss(forget)``.

    With the ``mixed`` schedule both kinds share a batch and each sample counts once, its loss signed (DeepDive's
    ``ga``): ``mean_i s_i loss_i`` with ``s = -1`` on forget samples.
    """

    schedule: Schedule = Paired()
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, gt=0)

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        task = ctx.task

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            if "mixed" in batches:
                batch = batches["mixed"]
                values = task.loss(batch)
                sign = torch.where(batch.is_forget.to(values.device), -self.beta, self.alpha)
                return {"mixed": Term(sign * values, "mixed")}
            weights = {"forget": -self.beta, "retain": self.alpha}
            return {role: Term(task.loss(batch), role, weights[role]) for role, batch in batches.items()}

        return loss


@part(
    "random_label",
    Info(
        "Train the forget samples towards random wrong labels, the retain samples towards their own.",
        paper="Golatkar et al. 2020; as used by SalUn, Fan et al., ICLR 2024, arXiv 2310.12508",
        upstream=_SALUN,
        commit=_COMMIT,
        needs=("forget",),
        deviations=(
            "wrong labels never equal the true one (the code draws from all classes): `exclude_true`",
            "labels depend on (seed, epoch, sample) and not on the batch order",
            "the weight of the retain term is explicit: `alpha`",
        ),
        aliases=("rl",),
    ),
)
class RandomLabel(Objective):
    """``mean loss(forget, y') + alpha * mean loss(retain, y)`` (SalUn, equation for classifiers).

    Args:
        schedule: ``sequential`` (forget pass, then retain pass), ``single`` over ``mixed`` or ``forget``, or
            ``paired``.
        alpha: Weight of the retain loss (of each retain sample in a ``mixed`` batch).
        exclude_true: ``y'`` uniform over the other classes; ``False`` gives the published draw over all classes.
        exclude_removed: ``y'`` is none of the classes that the request removes as a whole (SCAR's tables).
        redraw: New labels every epoch, every step, or the same throughout.
    """

    schedule: Schedule = Sequential()
    alpha: float = Field(default=1.0, ge=0)
    exclude_true: bool = True
    exclude_removed: bool = False
    redraw: Literal["epoch", "step", "never"] = "epoch"

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        defaults = {k: type(self).model_fields[k].default for k in ("until", "exclude_removed")}
        return {k: v for k, v in data.items() if k not in defaults or v or v != defaults[k]}

    def _labels(self, ctx: Context, batch: Batch, key: int) -> Tensor:
        if not self.exclude_removed:
            return ctx.task.wrong_target(batch, key=key, exclude_true=self.exclude_true)
        return remaining_labels(ctx, batch, key, exclude_true=self.exclude_true)

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function.

        Raises:
            RequestError: A text-to-image model shall forget words that are no class, which other classes' names would
                leave in the captions.
        """
        task = ctx.task
        if ctx.split.concept and task.counts_draws:
            raise RequestError(
                f"random labels exchange the names of classes, and '{ctx.split.concept}' is none, so captions would "
                "keep it; say what its captions are to mean instead: `pseudo: retain` (captions of retain images) or "
                "`pseudo: [a prompt]` of t2i_salun, salun and barrier, or the objective 'pseudo_label'"
            )

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            if self.redraw == "step":
                key = ctx.key("wrong target of a step", ctx.step)
            else:
                key = ctx.key("wrong target", ctx.epoch if self.redraw == "epoch" else 0)
            terms = {}
            for role, batch in batches.items():
                targets = batch.targets
                if role != "retain":
                    wrong = self._labels(ctx, batch, key)
                    targets = torch.where(batch.is_forget.to(wrong.device), wrong, targets)
                values = task.loss(batch, targets)
                if role == "mixed" and self.alpha != 1:
                    values = torch.where(batch.is_forget.to(values.device), values, self.alpha * values)
                terms[role] = Term(values, role, self.alpha if role == "retain" else 1.0)
            return terms

        return loss
