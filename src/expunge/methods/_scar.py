"""What SCAR and its self-forget form share: statistics, the original model's outputs, and means over part of a step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expunge.context import Context
from expunge.errors import ArtifactError, CapabilityError
from expunge.features.distance import Metric
from expunge.features.keep import Keep
from expunge.features.statistics import ClassStatistics
from expunge.methods._common import Profile
from expunge.methods._teacher import frozen_copy
from expunge.recipe import Optim
from expunge.restore import evaluating
from expunge.schedule import Schedule
from expunge.tasks.base import Batch

#: Defaults of both methods.
OPTIM = Optim(name="adam", lr=5e-4, weight_decay=0.0, epochs=30)


def statistics_for(ctx: Context, file: str | None, metric: Metric) -> ClassStatistics:
    """Statistics of the classes that stay: from a file, else by one pass over the retain set, which a note tells of.

    Raises:
        ArtifactError: The file is of another model, or taken after another power.
        CapabilityError: No file, and no retain set.
        DataError: A class with too few samples, or without statistics.
    """
    if file is not None:
        found = ClassStatistics.load(file)
        found.check_model(ctx.model, file)
        wanted = {"delta": metric.delta, "eps": metric.tukey_eps, "rule": metric.tukey or found.rule}
        for key, value in wanted.items():
            if getattr(found, key) != value:
                raise ArtifactError(f"{file}: taken with {key} = {getattr(found, key)}, but {value} is wanted")
        return found.select([c for c in range(n_classes(ctx)) if c not in ctx.split.removed])
    if "retain" not in ctx.split.roles():
        raise CapabilityError("there are no retain samples, so 'statistics' must name a file of class statistics")
    found = ClassStatistics.fit(
        ctx.task,
        ctx.split,
        "retain",
        pass_size(ctx),
        delta=metric.delta,
        rule=metric.tukey,
        eps=metric.tukey_eps,
    )
    ctx.note("class statistics were taken from the retain set before the run; a file of them makes it unnecessary")
    if found.rule == "signed_power" and metric.tukey is None:
        ctx.note("the model has negative features: the power is taken of their magnitude ('signed_power')")
    return found


def n_classes(ctx: Context) -> int:
    """Outputs of the classifier."""
    return int(ctx.task.n_classes)  # type: ignore[attr-defined]


def pass_size(ctx: Context) -> int:
    """Samples at a time in a pass without gradients."""
    return int(getattr(ctx.task, "eval_batch_size", 512))


def represent(ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features and logits in full precision, also under autocast."""
    z, logits = ctx.task.represent(batch)  # type: ignore[attr-defined]
    return (z.float(), logits.float()) if z.element_size() < 4 else (z, logits)


class Teacher:
    """The original model's logits on surrogates.

    They are taken once, without augmentation. When the run augments surrogates the logits of a batch come from a copy
    of the original model instead.

    Args:
        ctx: Bound before the first step, so that its model is the original one.
    """

    def __init__(self, ctx: Context) -> None:
        augmented = isinstance(ctx.augment, tuple) and "surrogate" in ctx.augment
        self.original = frozen_copy(ctx.task) if augmented else None
        with evaluating(ctx.model):
            found = [ctx.task.predict(b) for b in ctx.batches("surrogate", pass_size(ctx))]
        self.ids, order = torch.sort(ctx.split["surrogate"])
        self.logits = torch.cat(found)[order.to(found[0].device)]
        self.labels = self.logits.argmax(1).cpu()

    @property
    def live(self) -> bool:
        """Whether logits depend on the augmentation."""
        return self.original is not None

    def at(self, ids: Tensor) -> Tensor:
        """Rows of ``logits`` and ``labels`` for surrogate ids."""
        return torch.searchsorted(self.ids, ids.cpu())

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits ``[B, C]``."""
        if self.original is not None:
            return self.original.predict(batch)
        return self.logits[self.at(batch.ids).to(self.logits.device)]


class StepMean:
    """Factor that turns the loop's mean over a whole step into one over the surrogates that count.

    A step may be cut into pieces, or shared by processes; how many of *all* its surrogates count follows from the
    schedule. With augmented surrogates that is not known beforehand, and each piece has its own mean.

    Args:
        ctx: The run.
        schedule: Its schedule.
        teacher: Whose labels decide.
        labels: Pseudo-labels that count, bool ``[C]``.
    """

    def __init__(self, ctx: Context, schedule: Schedule, teacher: Teacher, counting: Tensor) -> None:
        self.ctx, self.schedule, self.teacher = ctx, schedule, teacher
        self.counting = counting.cpu()
        self.epoch, self.steps = -1, [torch.empty(0, dtype=torch.int64)]
        self.starts = [0]

    def __call__(self, rows: Tensor) -> float:
        """The factor for a piece whose rows ``[B]`` count; 0 if none of the step does."""
        if self.teacher.live:
            total, count = len(rows), int(rows.sum())
        else:
            ids = self.ctx.split["surrogate"][self._positions()]
            total, count = len(ids), int(self.counting[self.teacher.labels[self.teacher.at(ids)]].sum())
        return total / count if count else 0.0

    def _positions(self) -> Tensor:
        ctx = self.ctx
        if self.epoch != ctx.epoch:
            while len(self.starts) <= ctx.epoch:
                self.starts.append(self.starts[-1] + len(self._epoch(len(self.starts) - 1)))
            self.epoch, self.steps = ctx.epoch, self._epoch(ctx.epoch)
        return self.steps[ctx.step - self.starts[ctx.epoch]]

    def _epoch(self, epoch: int) -> list[Tensor]:
        sizes = {r: len(self.ctx.split[r]) for r in self.schedule.roles()}
        return [s["surrogate"] for s in self.schedule.steps(sizes, epoch, self.ctx.seed)]


def make_metric(profile: Profile, delta: float, gamma1: float, gamma2: float, passes: int) -> Metric:
    """The distance of a profile."""
    if profile == "as_intended":
        return Metric(delta=delta, gamma1=gamma1, gamma2=gamma2, passes=passes)
    return Metric(
        delta=delta,
        tukey="power",
        gamma1=gamma1,
        gamma2=gamma2,
        passes=passes,
        offdiag_mean="nonzero",
        inverse="pinv",
        column_map="compact",
    )


def make_keep(profile: Profile, temperature: float, rule: Literal["teacher_only", "ignored"] = "teacher_only") -> Keep:
    """The keep term of a profile; ``rule`` is the published one."""
    if profile == "as_intended":
        return Keep(temperature=temperature)
    return Keep(
        temperature=temperature,
        rule=rule,
        removed_logit="batch_min",
        row_filter="first_removed",
        logit_offset=1e-4,
    )


def as_run(optim: Optim, profile: Profile) -> Optim:
    """As published, normalisation statistics move and surrogates are augmented (in the code for class requests)."""
    if profile == "as_intended":
        return optim
    return optim.model_copy(update={"norm": "train", "augment": optim.augment or ("surrogate",)})
