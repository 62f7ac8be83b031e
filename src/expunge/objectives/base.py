"""Objectives: what makes the model forget, as named loss terms per step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from expunge.context import Context
from expunge.objectives.stopping import StopBelow
from expunge.part import Part
from expunge.registry import Kind
from expunge.schedule import Schedule, Step
from expunge.tasks.base import Batch


class Term(NamedTuple):
    """One loss term.

    Args:
        values: Per-sample losses ``[B]`` of ``role`` (the loop takes the mean over the whole step, however it is cut
            into micro-batches), or a 0-d tensor when ``role`` is ``None`` (a term that reads no data).
        role: Whose samples.
        weight: Factor in the total; 0 means: log only.
    """

    values: Tensor
    role: str | None = None
    weight: float = 1.0


LossFn = Callable[[dict[str, Batch]], dict[str, Term]]


class Objective(Part):
    """Makes the loss of a step from its batches. Settings are fields; running state lives in the context.

    A step in which no term has a weight makes no update.

    Args:
        schedule: How batches interleave.
        until: Stop early, once the forget samples are forgotten; by default the whole schedule runs.
    """

    kind_of_part: ClassVar[Kind] = "objective"
    schedule: Schedule
    until: StopBelow | None = None

    @property
    def full_precision(self) -> bool:
        """Whether it takes figures or gradients outside the steps that need every weight in float32."""
        return self.until is not None

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if k != "until" or v is not None}

    def prepare(self, ctx: Context) -> None:
        """Measure what the stop rule refers to, on the original model."""
        if self.until is not None:
            self.until.prepare(ctx)

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """Numbers measured after a step's update and logged with it; :meth:`stop` sees them."""
        return {} if self.until is None else self.until.measure(ctx, end_of_epoch)

    def steps(self, ctx: Context, epoch: int) -> list[Step]:
        """The steps of an epoch."""
        return self.schedule.steps({r: len(ctx.split[r]) for r in self.schedule.roles()}, epoch, ctx.seed)

    def parts(self, ctx: Context, step: Step) -> list[Step]:
        """Parts of a step that are graded one after the other, so that it takes the memory of the largest."""
        del ctx
        return [step]

    def load(self, ctx: Context, role: str, positions: Tensor) -> Batch:
        """Samples of a step, by their positions in the role's index set."""
        return ctx.load(role, ctx.split[role][positions])

    def graded(self, ctx: Context, numbers: dict[str, float]) -> bool:
        """Called with a step's logged numbers when all its gradients are there; these may be changed.

        Returns:
            Whether the step makes its update.
        """
        del ctx, numbers
        return True

    @abstractmethod
    def bind(self, ctx: Context) -> LossFn:
        """Prepare (teachers, statistics) and return the function that turns batches into terms."""

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """Return a reason to stop after the last step in ``history``, or ``None``.

        Only logged numbers are seen, so a resumed run stops at the same step.
        """
        return None if self.until is None else self.until.reason(history)
