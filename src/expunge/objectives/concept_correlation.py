"""The concept-correlation loss: what a prompt adds to the noise prediction becomes unlike what it added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from expunge.context import Context
from expunge.diffusion import correlation as cor
from expunge.diffusion.sample import guided
from expunge.diffusion.shift import Attached, Shift
from expunge.diffusion.teacher import Teacher
from expunge.errors import ConfigError, RequestError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.concept_shift import CODE, COMMIT, PAPER, attached_to
from expunge.tasks.base import Batch
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

#: Names of what is logged: the loss, and what it is with the original weights.
CORRELATION, ENERGY = "correlation", "energy"
#: Share of the empty prompt's states that a shift may see where its prediction counts as unchanged.
_UNSEEN = 0.01
#: Latents that are generated together, so that each is a function of its block alone.
_BLOCK = 8


@part(
    "concept_correlation",
    Info(
        "What a prompt adds to the predicted noise becomes uncorrelated with what it added in the original model.",
        paper=PAPER,
        upstream=CODE,
        commit=COMMIT,
        needs=("diffusion", "text"),
        deviations=(
            "the teacher is the same U-Net without the change, its predictions in one pass; a shift that protects the "
            "empty prompt needs one graded pass (the code: four passes, two of them graded, and two models)",
            "any batch size; the loss is a mean per sample",
            "the stop rule counts from the first step on, and the step that crosses it makes no update; the code tests "
            "from the twelfth step on and keeps that update: `published_stop`",
        ),
    ),
)
class ConceptCorrelation(Objective):
    """``mean_i L_cor(x_i) + lambda_l1 (1/M) sum_l ||dW_l||_1``, ``L_cor = mean(r_u * r_o)``.

    ``r = eps(x_t, concept) - eps(x_t, '')`` of the unlearned and the original model, over all entries. Source: SRS-ME,
    section 4.1. ``L_cor`` has no lower bound, so training stops on its running mean ``m_n = momentum m_(n-1) + (1 -
    momentum) L_n``, ``m_0 = L_0``, at the first ``m_n < threshold``.

    Args:
        schedule: Steps of the role ``forget`` (images of the concept) or ``concept`` (images that the original model
            draws for the concept, made when first needed).
        prompts: What the samples show, in turn; by default the prompts of the request.
        against: The prompt without the concept: the empty one, or a phrase (``a picture of a painting``).
        lambda_l1: Weight of the l1 norm of the change.
        threshold: ``tau``; null: the whole schedule runs.
        momentum: Of the running mean.
        statistic: What stops: the loss itself, or its ``ratio`` to that before any change (1 at first, 0 when
            uncorrelated), which does not depend on the model.
        published_stop: Stop as the public code does.
        drawn: Number of images that are drawn for the role ``concept``; its samples take turns with them.
        sampling_steps: Of these images.
        guidance: Of these images.
    """

    schedule: Schedule = Single(role="forget", batch_size=1)
    prompts: tuple[str, ...] = ()
    against: str = ""
    lambda_l1: float = Field(default=1e-6, ge=0)
    threshold: float | None = 1e-4
    momentum: float = Field(default=0.9, ge=0, lt=1)
    statistic: Literal["correlation", "ratio"] = "correlation"
    published_stop: bool = False
    drawn: int = Field(default=64, ge=1)
    sampling_steps: int = Field(default=50, ge=1)
    guidance: float = 7.5

    @model_validator(mode="after")
    def _roles(self) -> ConceptCorrelation:
        if self.schedule.roles() not in (("forget",), ("concept",)):
            read = ", ".join(self.schedule.roles())
            raise ValueError(
                f"the schedule '{self.schedule.kind}' must read one role, forget or concept; it reads {read}"
            )
        return self

    @property
    def rule(self) -> cor.MomentumStop | None:
        """The stop rule."""
        if self.threshold is None:
            return None
        return cor.MomentumStop(self.threshold, self.momentum, published=self.published_stop)

    def statistics(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """What the rule looks at, step by step, from logged numbers."""
        by = [1.0 if self.statistic == "correlation" else row[ENERGY] for row in history]
        return [row[CORRELATION] / b for row, b in zip(history, by, strict=True)]

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """Stop where the running mean crosses the threshold."""
        return super().stop(history) or self.crossed(history)

    def crossed(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Why the rule ends training after these steps, or ``None``."""
        rule = self.rule
        if rule is None or rule.index(series := self.statistics(history)) is None:
            return None
        return (
            f"the running mean of the {self.statistic}, {rule.statistics(series)[-1]:.3g}, is below {self.threshold:g}"
        )

    def graded(self, ctx: Context, numbers: dict[str, float]) -> bool:
        """The step that crosses the threshold makes no update, unless as published."""
        return not self.holds(ctx.history, numbers)

    def holds(self, history: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> bool:
        """Whether the step after ``history`` makes no update, because it crosses the threshold.

        Raises:
            RequestError: It is the first step.
        """
        if self.published_stop or self.crossed([*history, now]) is None:
            return False
        if not history:
            raise RequestError(
                f"the correlation is {now[CORRELATION]:.3g} before any change, already below the threshold "
                f"{self.threshold:g}: give a smaller one, or set statistic = 'ratio'"
            )
        return True

    def bind(self, ctx: Context) -> LossFn:
        """Encode the prompts and return the loss function.

        Raises:
            CapabilityError: The task has no U-Net with text.
        """
        task = text_task(ctx.task, "the concept-correlation loss")
        with torch.no_grad():
            states = task.conditions(self.prompts or task.concept_prompts(ctx.split))
            null = task.conditions([self.against]) if self.against else task.text.empty(1)
        shifts = attached_to(task.unet)
        passes = _Instead(task) if shifts is None else _Beside(task, shifts, task.text.unpack(null)[0])
        images = _Drawn(self, ctx, passes.original, states)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            ((role, batch),) = batches.items()
            _check_trained(ctx, task.unet)
            shown = batch.ids.to(states.device)
            if role == "concept":
                shown = shown % images.count
                batch = replace(batch, inputs=images(shown))
            x, t, _ = task.drawn(batch)
            found = passes(x, t, states[shown % len(states)], null.expand(len(x), -1, -1))
            terms = {CORRELATION: Term(found.losses, role), ENERGY: Term(found.energy, role, 0.0)}
            if self.lambda_l1:
                terms["l1"] = Term(passes.l1(), None, self.lambda_l1)
            return terms

        return loss


class _Passes:
    """Forward passes of the model as it is and as it was."""

    def __init__(self, task: TextToImageTask) -> None:
        self._task = task

    def eps(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predicted noise of the model as it is, in full precision whatever the layers compute in."""
        found: Tensor = self._task.eps(x, t, states)
        return found if found.element_size() >= 4 else found.float()


class _Beside(_Passes):
    """With a shift beside the weights: the original is the same U-Net with the shift off."""

    def __init__(self, task: TextToImageTask, shifts: Attached, null: Tensor) -> None:
        super().__init__(task)
        self.shifts = shifts
        self.protects = all(_unseen(s, null) for s in shifts.shifts.values())

    @torch.no_grad()
    def original(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predicted noise of the original model."""
        with self.shifts.off():
            return self.eps(x, t, states)

    def __call__(self, x: Tensor, t: Tensor, c: Tensor, null: Tensor) -> cor.Correlation:
        """The loss; a shift that the empty prompt does not see is graded on the concept alone."""
        way = cor.shifted if self.protects else cor.unconfined
        return way(self.eps, self.shifts.off(), x, t, c, null)

    def l1(self) -> Tensor:
        """l1 norm of the change, mean over matrices."""
        with torch.autocast(self._task.device.type, enabled=False):
            return torch.stack([s.l1() for s in self.shifts.shifts.values()]).sum()


def _unseen(shift: Shift, states: Tensor) -> bool:
    """Whether a shift hardly acts on states: within what half precision or an approximate protection lets through."""
    seen = shift.coordinates(states).norm(dim=-1)
    return bool((seen <= _UNSEEN * shift.beta * states.float().norm(dim=-1)).all())


class _First(Teacher):
    """The original model, and what became of its tensors since."""

    def changes(self) -> list[Tensor]:
        """``theta - theta_0`` of every trained tensor; after the first prediction."""
        return [self._unet.get_parameter(n) - b for n, b in self._base.items()]


class _Instead(_Passes):
    """With the model's own weights trained: the original has their first values."""

    def __init__(self, task: TextToImageTask) -> None:
        super().__init__(task)
        self.first = _First(task.unet, self.eps)
        self.original: Callable[[Tensor, Tensor, Tensor], Tensor] = self.first

    def __call__(self, x: Tensor, t: Tensor, c: Tensor, null: Tensor) -> cor.Correlation:
        """The loss; both predictions of the changed model are graded."""
        teacher = cor.teach(self.first, nullcontext(), x, t, c, null)
        blank, named = self.eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, c])).chunk(2)
        return cor.correlation(named, blank, teacher)

    def l1(self) -> Tensor:
        """l1 norm of the change, mean over tensors."""
        with torch.autocast(self._task.device.type, enabled=False):
            return cor.l1(self.first.changes())


def _check_trained(ctx: Context, unet: nn.Module) -> None:
    own = {id(p) for p in unet.parameters()}
    for name, parameter in ctx.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise ConfigError(
                f"the space trains '{name}', but the objective 'concept_correlation' encodes its prompts once; choose "
                "a space within the U-Net"
            )


class _Drawn:
    """Latents that the original model draws for the concept, block by block when first needed."""

    def __init__(
        self,
        settings: ConceptCorrelation,
        ctx: Context,
        original: Callable[[Tensor, Tensor, Tensor], Tensor],
        states: Tensor,
    ) -> None:
        self._settings, self._ctx, self._original, self._states = settings, ctx, original, states
        self._ids = ctx.split["concept"][: settings.drawn] if "concept" in ctx.split else torch.empty(0)
        self._blocks: dict[int, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._ids)

    def __call__(self, numbers: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` of images, by their numbers below :attr:`count`."""
        rows = [self._block(n // _BLOCK)[n % _BLOCK] for n in numbers.tolist()]
        return torch.stack(rows).to(self._states.device)

    def _block(self, block: int) -> Tensor:
        if block not in self._blocks:
            ctx, own = self._ctx, self._settings
            task = text_task(ctx.task, "drawing images of the concept")
            ids = self._ids[block * _BLOCK : (block + 1) * _BLOCK]
            which = torch.arange(block * _BLOCK, block * _BLOCK + len(ids)) % len(self._states)
            drawn = guided(
                self._original,
                task.scheduler,
                task.load("concept", ids, ctx.split).inputs,
                self._states[which.to(self._states.device)],
                task.text.empty(len(ids)),
                steps=own.sampling_steps,
                guidance=own.guidance,
                keys=[ctx.key("images of the concept", int(i)) for i in ids],
            )
            self._blocks[block] = drawn.cpu()
        return self._blocks[block]
