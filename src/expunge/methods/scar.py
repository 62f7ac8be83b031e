"""SCAR: move forget features to the nearest other class while outputs on surrogate images stay as they were."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.context import Context
from expunge.errors import ConfigError
from expunge.features.distance import ClassDistance, Metric
from expunge.features.keep import Keep, balanced_weights, resample
from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._scar import (
    OPTIM,
    StepMean,
    Teacher,
    as_run,
    make_keep,
    make_metric,
    n_classes,
    pass_size,
    represent,
    statistics_for,
)
from expunge.methods._scar_tables import SCAR_CODE, SCAR_COMMIT, SCAR_PAPER, StopsWhenForgotten
from expunge.objectives.base import LossFn, Term
from expunge.objectives.stopping import StopBelow, accuracy, class_accuracy, outputs
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import FORWARD_ONLY, Nested, Schedule
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Batch

TARGETS, GATES = "scar.targets", "scar.class_accuracy"

_INFO = Info(
    "Move forget features to the nearest other class; keep outputs on surrogate images. No retain images in a step.",
    paper=SCAR_PAPER,
    upstream=SCAR_CODE,
    commit=SCAR_COMMIT,
    needs=("forget", "surrogate", "features"),
    deviations=(
        "target classes are chosen before the first step in eval mode, and by class number, not by column position",
        "off-diagonal means count zeros too, so every metric is positive definite; Cholesky factors, no pseudo-inverse",
        "the temperature divides teacher and student and the loss is multiplied by its square",
        "a removed class's teacher logit becomes its row's smallest, not the batch's; every removed class filters rows",
        "surrogates of a sample request are drawn evenly by systematic resampling, once, not anew at every epoch",
        "normalisation statistics are frozen and surrogates are not augmented",
        "forget accuracy is measured every ten steps and may stop the run at once; the code does so from epoch 2 on",
        "passes over the surrogates follow each other; nothing is forwarded and thrown away",
        "where a feature is exactly 0 the slope of the power is taken as 0 instead of infinite",
        "`profile = 'as_published'` restores all of these but the drawing of surrogates and the slope at 0",
    ),
)


@part("scar", _INFO)
class Scar(StopsWhenForgotten):
    """``lambda_1 mean_j w_j d2(z_j, Q_j) + lambda_2 mean KL(teacher || student)`` on forget and surrogate batches.

    Source: SCAR, arXiv 2404.12922, and its code. ``d2`` is :class:`~expunge.features.distance.ClassDistance` to the
    nearest other class ``Q_j``, chosen once; the second term is :class:`~expunge.features.keep.Keep`. A class request
    (CR) erases its classes from the teacher. In a sample request (HR) the weight ``w_j`` is the accuracy of the
    sample's class on the forget set if that is at least ``gate``, else 0.

    Deviates:
        See the card.

    Args:
        schedule: Steps that hold a ``forget`` and a ``surrogate`` batch.
        until: Stop rule; by default forget accuracy below 0.01 (CR), or below the original model's accuracy on unseen
            data minus 0.015 (HR).
        check_every: Steps between measurements of the forget accuracy, which the default rule and the gates use; epoch
            ends are always measured.
        after_epochs: Whole epochs before the default rule may stop a run.
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the keep term.
        metric: Settings of the distance.
        keep: Settings of the keep term.
        assignment: ``upfront_eval``: targets are chosen before the first step. ``first_visit_train``: by the current
            model, in train mode, when a sample is first met.
        gate: Accuracy below which a class is left alone (HR).
        balanced: Draw surrogates so that their pseudo-classes are even (HR).
        joint: One forward pass for both batches of a step; with frozen normalisation the result is the same.
        statistics: File of class statistics. Without it they are taken from the retain set before the run.
    """

    schedule: Schedule = Nested(batch_size=1024)
    check_every: int | None = Field(default=10, ge=1)
    after_epochs: int = Field(default=0, ge=0)
    lambda_1: float = Field(default=1.0, ge=0)
    lambda_2: float = Field(default=5.0, ge=0)
    metric: Metric = Metric()
    keep: Keep = Keep()
    assignment: Literal["upfront_eval", "first_visit_train"] = "upfront_eval"
    gate: float = Field(default=0.8, ge=0, le=1)
    balanced: bool = True
    joint: bool = False
    statistics: str | None = None

    @model_validator(mode="after")
    def _roles(self) -> Scar:
        if set(self.schedule.roles()) != {"forget", "surrogate"}:
            raise ValueError(f"the schedule '{self.schedule.kind}' must read the roles forget and surrogate")
        return self

    def rule(self, removes_classes: bool) -> StopBelow:
        """The stop rule of a class request or a sample request."""
        if self.until is not None:
            return self.until
        aim = {"target": 0.01} if removes_classes else {"below_test": 0.015}
        return StopBelow(**aim, every=self.check_every, after_epochs=self.after_epochs)

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """Forget accuracy, and with it the gates of a sample request."""
        rule = self.rule(bool(ctx.split.removed))
        if not rule.due(ctx, end_of_epoch) or (FORWARD_ONLY in ctx.roles and not end_of_epoch):
            return {}
        logits, labels = outputs(ctx, "forget")
        if not ctx.split.removed:
            ctx.state[GATES] = class_accuracy(logits, labels, n_classes(ctx))
        return rule.logged(ctx, float(accuracy(logits, labels)))

    def bind(self, ctx: Context) -> LossFn:
        """Take statistics and teacher outputs, choose the targets, and return the loss function."""
        removed = ctx.split.removed
        distance = ClassDistance(statistics_for(ctx, self.statistics, self.metric), self.metric)
        teacher = Teacher(ctx)
        if self.balanced and not removed:
            drawn = resample(balanced_weights(teacher.labels, n_classes(ctx)), ctx.key("surrogates"))
            ctx.split = ctx.split.with_indices(surrogate=teacher.ids[drawn])
        staying = self.keep.counts(torch.eye(n_classes(ctx)), removed)
        share = StepMean(ctx, self.schedule, teacher, staying)
        ctx.state[TARGETS] = torch.full((int(ctx.split["forget"].max()) + 1,), -1)
        if self.assignment == "upfront_eval":
            with evaluating(ctx.model):
                for batch in ctx.batches("forget", pass_size(ctx)):
                    self.targets(ctx, distance, batch, represent(ctx, batch)[0])
            distance.keep_only(ctx.state[TARGETS])

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            seen = self.forward(ctx, batches)
            terms = {}
            with torch.autocast(ctx.task.device.type, enabled=False):
                if "forget" in batches:
                    batch, z = batches["forget"], seen["forget"][0]
                    d2 = distance.distance2(z, self.targets(ctx, distance, batch, z))
                    terms["forget"] = Term(self.weights(ctx, batch).to(d2) * d2, "forget", self.lambda_1)
                if "surrogate" in batches:
                    batch = batches["surrogate"]
                    kept = self.keep(seen["surrogate"][1], teacher(batch), removed)
                    factor = share(kept.rows)
                    terms["keep"] = Term(factor * kept.values, "surrogate", self.lambda_2 if factor else 0.0)
            return terms

        return loss

    def targets(self, ctx: Context, distance: ClassDistance, batch: Batch, z: Tensor) -> Tensor:
        """Frozen target classes of a forget batch, int64 ``[B]``; chosen now where there are none yet."""
        known = ctx.state[TARGETS]
        ids = batch.ids.cpu()
        new = known[ids] < 0
        if bool(new.any()):
            at = new.to(z.device)
            known[ids[new]] = distance.assign(z.detach()[at], batch.targets[at], ctx.split.removed)
        return known[ids]

    def weights(self, ctx: Context, batch: Batch) -> Tensor:
        """Gate of each forget sample, float64 ``[B]``: 1 in a class request and before the first measurement."""
        if ctx.split.removed or GATES not in ctx.state:
            return torch.ones(len(batch), dtype=torch.float64)
        a = ctx.state[GATES][batch.targets.cpu()]
        return torch.where(a >= self.gate, a, 0)

    def forward(self, ctx: Context, batches: dict[str, Batch]) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and logits of each role."""
        if not self.joint or len(batches) < 2:
            return {role: represent(ctx, batch) for role, batch in batches.items()}
        a, b = batches["forget"], batches["surrogate"]
        if a.inputs.shape[1:] != b.inputs.shape[1:]:
            raise ConfigError(
                f"forget inputs are {list(a.inputs.shape[1:])} and surrogates {list(b.inputs.shape[1:])}: give them "
                "one size, or set joint = false"
            )
        both = Batch(
            torch.cat([a.inputs, b.inputs]),
            torch.cat([a.targets, b.targets]),
            torch.cat([a.ids, b.ids]),
            "mixed",
            torch.cat([a.is_forget, b.is_forget]),
        )
        z, logits = represent(ctx, both)
        cut = [len(a), len(b)]
        return dict(zip(("forget", "surrogate"), zip(z.split(cut), logits.split(cut), strict=True), strict=True))


@method("scar", _INFO)
def scar(
    *,
    lambda_1: Annotated[float, Field(ge=0)] = 1.0,
    lambda_2: Annotated[float, Field(ge=0)] = 5.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    delta: Annotated[float, Field(gt=0)] = 0.5,
    gamma1: Annotated[float, Field(ge=0)] = 3.0,
    gamma2: Annotated[float, Field(ge=0)] = 3.0,
    n_ret: Annotated[int, Field(ge=0)] = 5,
    batch_size: Annotated[int, Field(ge=1)] = 1024,
    statistics: str | None = None,
    check_every: Annotated[int, Field(ge=1)] = 10,
    gate: Annotated[float, Field(ge=0, le=1)] = 0.8,
    profile: Profile = "as_intended",
    optim: Optim = OPTIM,
) -> Recipe:
    """``lambda_1 mean_j w_j d2(z_j, Q_j) + lambda_2 mean KL(teacher || student)``; see :class:`Scar`.

    Source: SCAR, arXiv 2404.12922, and its code.

    Deviates:
        See the card. ``as_published`` follows the code at the recorded commit.

    Args:
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the keep term.
        temperature: Temperature of the keep term.
        delta: Exponent of the Tukey power of the features.
        gamma1: Shrinkage of the covariances on the diagonal.
        gamma2: Shrinkage elsewhere.
        n_ret: A forget batch gets ``min(n_ret + 1, number of surrogate batches)`` steps.
        batch_size: Samples of each role per step.
        statistics: File of class statistics; with it the retain set is never opened.
        check_every: Steps between measurements of the forget accuracy (as published: every step).
        gate: Accuracy below which a class is left alone, in requests that name samples.
        profile: ``as_intended`` or ``as_published``.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    schedule = Nested(batch_size=batch_size, repeats=n_ret + 1, restart=published, discard=published)
    objective = Scar(
        schedule=schedule,
        check_every=1 if published else check_every,
        after_epochs=2 if published else 0,
        lambda_1=lambda_1,
        lambda_2=lambda_2,
        metric=make_metric(profile, delta, gamma1, gamma2, passes=2),
        keep=make_keep(profile, temperature),
        assignment="first_visit_train" if published else "upfront_eval",
        gate=gate,
        statistics=statistics,
    )
    return Recipe(name="scar", objective=objective, space=AllWeights(), optim=as_run(optim, profile))
