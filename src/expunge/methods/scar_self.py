"""SCAR without forget images: surrogates that the model takes for the removed class stand in for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.context import Context
from expunge.errors import RequestError
from expunge.features.distance import ClassDistance, Metric
from expunge.features.keep import Keep
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
    represent,
    statistics_for,
)
from expunge.methods._scar_tables import SCAR_CODE, SCAR_COMMIT, SCAR_PAPER
from expunge.objectives.base import LossFn, Objective, Term
from expunge.objectives.stopping import TARGET, StopBelow
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Batch

PSEUDO, LABELS = "scar_self.pseudo_forget", "scar_self.pseudo_labels"
#: Name of the measured accuracy in the log, as a fraction.
PSEUDO_ACCURACY = "pseudo_forget_accuracy"
BELOW = 0.01

_INFO = Info(
    "Forget a class without its images: surrogates that the model takes for it are moved to other classes.",
    paper=SCAR_PAPER,
    upstream=SCAR_CODE,
    commit=SCAR_COMMIT,
    needs=("surrogate", "features"),
    deviations=(
        "the run stops on surrogates once taken for the class, so that no forget image is opened (`oracle_stop`)",
        "a batch without such surrogates trains on its keep term; the code throws the step away",
        "the temperature counts; the code ignores it here",
        "features of one forward pass serve both terms; normalisation statistics are frozen, no augmentation",
        "off-diagonal means count zeros too, so every metric is positive definite; Cholesky factors, no pseudo-inverse",
        "targets are chosen by class number, not by column position",
        "a removed class's teacher logit becomes its row's smallest, not the batch's; every removed class filters rows",
        "where a feature is exactly 0 the slope of the power is taken as 0 instead of infinite",
        "`profile = 'as_published'` restores all of these but the slope at 0",
    ),
    aliases=("scar_self_forget",),
)


@part("scar_self", _INFO)
class ScarSelf(Objective):
    """The loss of SCAR on surrogates alone; those with a removed class as teacher prediction take the forget part.

    Source: SCAR (self-forget form), arXiv 2404.12922, and its code. Targets are chosen anew at every step, as in the
    code, since augmentation may change the surrogates. Class requests only.

    Deviates:
        See the card.

    Args:
        schedule: Steps that hold a ``surrogate`` batch.
        until: Stop on the *true* forget accuracy, which opens the forget set. By default the run stops when fewer than
            1 % of the pseudo-forget surrogates are still taken for a removed class.
        check_every: Steps between measurements of the default rule; epoch ends are always measured.
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the keep term.
        metric: Settings of the distance.
        keep: Settings of the keep term.
        empty: A step without pseudo-forget surrogates: ``keep_term_only``, or ``skip_step`` as published.
        joint: Take features from the forward pass of the whole batch. ``False``, as published, forwards the
            pseudo-forget images a second time on their own, which normalisation statistics notice.
        statistics: File of class statistics. Without it they are taken from the retain set before the run.
    """

    schedule: Schedule = Single(role="surrogate", batch_size=1024)
    check_every: int | None = Field(default=10, ge=1)
    lambda_1: float = Field(default=1.0, ge=0)
    lambda_2: float = Field(default=5.0, ge=0)
    metric: Metric = Metric(passes=1)
    keep: Keep = Keep()
    empty: Literal["keep_term_only", "skip_step"] = "keep_term_only"
    joint: bool = True
    statistics: str | None = None

    @model_validator(mode="after")
    def _roles(self) -> ScarSelf:
        if set(self.schedule.roles()) != {"surrogate"}:
            raise ValueError(f"the schedule '{self.schedule.kind}' must read the role surrogate alone")
        return self

    def prepare(self, ctx: Context) -> None:
        """Fix the target of the stop rule.

        Raises:
            RequestError: The request names samples, not a class.
        """
        if not ctx.split.removed:
            raise RequestError("scar_self forgets whole classes; for requests that name samples use scar")
        (self.until or StopBelow(target=BELOW)).prepare(ctx)

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """Share of the pseudo-forget surrogates that keep their label; with ``until`` the true forget accuracy."""
        if self.until is not None:
            return self.until.measure(ctx, end_of_epoch)
        if not StopBelow(target=BELOW, every=self.check_every).due(ctx, end_of_epoch):
            return {}
        own = ctx.split.with_indices(surrogate=ctx.state[PSEUDO])
        logits, _ = ctx.task.logits("surrogate", own)  # type: ignore[attr-defined]
        share = (logits.argmax(1) == ctx.state[LABELS]).double().mean()
        return {PSEUDO_ACCURACY: float(share), TARGET: float(ctx.state[TARGET])}

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """A reason to stop, or ``None``."""
        if self.until is not None:
            return self.until.reason(history)
        row = history[-1]
        if PSEUDO_ACCURACY not in row or not row[PSEUDO_ACCURACY] < row[TARGET]:
            return None
        return f"{100 * row[PSEUDO_ACCURACY]:.2f} % of the pseudo-forget surrogates keep their label"

    def bind(self, ctx: Context) -> LossFn:
        """Take statistics and teacher outputs, find the pseudo-forget surrogates, and return the loss function.

        Raises:
            RequestError: No surrogate is taken for a removed class.
        """
        removed = ctx.split.removed
        distance = ClassDistance(statistics_for(ctx, self.statistics, self.metric), self.metric)
        teacher = Teacher(ctx)
        staying = self.keep.counts(torch.eye(n_classes(ctx)), removed)
        pseudo = ~staying[teacher.labels]
        names = [f"'{ctx.task.classes[c]}'" for c in removed]
        if not bool(pseudo.any()):
            raise RequestError(
                f"the model takes none of the {len(pseudo)} surrogates for {' or '.join(names)}: there is nothing to "
                "learn forgetting from. Give other or more surrogates, or use scar"
            )
        for c, name in zip(removed, names, strict=True):
            if not bool((teacher.labels == c).any()):
                ctx.note(f"the model takes no surrogate for {name}, so nothing makes it forget this class")
        ctx.state[PSEUDO], ctx.state[LABELS] = teacher.ids[pseudo], teacher.labels[pseudo]
        keep_share = StepMean(ctx, self.schedule, teacher, staying)
        forget_share = StepMean(ctx, self.schedule, teacher, ~staying)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            batch = batches["surrogate"]
            original = teacher(batch)
            rows = ~self.keep.counts(original, removed)
            z, student = represent(ctx, batch)
            z = self.features(ctx, batch, rows, z)
            factors = {"forget": forget_share(rows), "keep": keep_share(~rows)}
            skip = self.empty == "skip_step" and not factors["forget"]
            with torch.autocast(ctx.task.device.type, enabled=False):
                targets = distance.assign(z.detach(), original.argmax(1)[rows], removed)
                d2 = distance.distance2(z, targets)
                values = {
                    "forget": torch.zeros(len(batch)).to(d2).masked_scatter(rows, d2),
                    "keep": self.keep(student, original, removed).values,
                }
            weights = {"forget": self.lambda_1, "keep": self.lambda_2}
            return {
                k: Term(factors[k] * values[k], "surrogate", 0.0 if skip or not factors[k] else weights[k])
                for k in ("forget", "keep")
            }

        return loss

    def features(self, ctx: Context, batch: Batch, rows: Tensor, z: Tensor) -> Tensor:
        """Features of the pseudo-forget rows."""
        if self.joint or (self.empty != "skip_step" and not bool(rows.any())):
            return z[rows]
        own = rows.cpu()
        part = Batch(batch.inputs[rows], batch.targets[rows], batch.ids[own], batch.role, batch.is_forget[own])
        return represent(ctx, part)[0]


@method("scar_self", _INFO)
def scar_self(
    *,
    lambda_1: Annotated[float, Field(ge=0)] = 1.0,
    lambda_2: Annotated[float, Field(ge=0)] = 5.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    delta: Annotated[float, Field(gt=0)] = 0.5,
    gamma1: Annotated[float, Field(ge=0)] = 3.0,
    gamma2: Annotated[float, Field(ge=0)] = 3.0,
    batch_size: Annotated[int, Field(ge=1)] = 1024,
    statistics: str | None = None,
    check_every: Annotated[int, Field(ge=1)] = 10,
    oracle_stop: bool = False,
    profile: Profile = "as_intended",
    optim: Optim = OPTIM,
) -> Recipe:
    """``lambda_1 mean d2(z, Q) + lambda_2 mean KL(teacher || student)`` on surrogates; see :class:`ScarSelf`.

    Source: SCAR (self-forget form), arXiv 2404.12922, and its code.

    Deviates:
        See the card. ``as_published`` follows the code at the recorded commit.

    Args:
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the keep term.
        temperature: Temperature of the keep term (as published: ignored).
        delta: Exponent of the Tukey power of the features.
        gamma1: Shrinkage of the covariances on the diagonal.
        gamma2: Shrinkage elsewhere.
        batch_size: Surrogates per step.
        statistics: File of class statistics; with it the retain set is never opened.
        check_every: Steps between measurements of the stop rule (as published: every step).
        oracle_stop: Stop on the true forget accuracy, which opens the forget set (as published: always).
        profile: ``as_intended`` or ``as_published``.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    every = 1 if published else check_every
    objective = ScarSelf(
        schedule=Single(role="surrogate", batch_size=batch_size),
        until=StopBelow(target=BELOW, every=every) if published or oracle_stop else None,
        check_every=every,
        lambda_1=lambda_1,
        lambda_2=lambda_2,
        metric=make_metric(profile, delta, gamma1, gamma2, passes=1),
        keep=make_keep(profile, temperature, rule="ignored"),
        empty="skip_step" if published else "keep_term_only",
        joint=not published,
        statistics=statistics,
    )
    return Recipe(name="scar_self", objective=objective, space=AllWeights(), optim=as_run(optim, profile))
