"""Objectives: what makes the model forget, as named loss terms per step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from expunge.context import Context
from expunge.part import Part
from expunge.registry import Kind
from expunge.schedule import Schedule
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
    """Makes the loss of a step from its batches. Settings are fields; running state lives in the context."""

    kind_of_part: ClassVar[Kind] = "objective"
    schedule: Schedule

    @abstractmethod
    def bind(self, ctx: Context) -> LossFn:
        """Prepare (teachers, statistics) and return the function that turns batches into terms."""

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """Return a reason to stop after the last step in ``history``, or ``None``.

        Only numbers logged by the steps themselves are seen, so a resumed run stops at the same step.
        """
        return None
