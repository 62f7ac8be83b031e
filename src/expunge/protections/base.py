"""Protections: what must not move, as penalty terms added to every step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from expunge.context import Context
from expunge.objectives.base import Term
from expunge.part import Part
from expunge.registry import Kind
from expunge.spaces.base import OpenSpace

Penalty = Callable[[], dict[str, Term]]


class Protection(Part):
    """Settings of a protection; :meth:`bind` measures what it needs on the untouched model."""

    kind_of_part: ClassVar[Kind] = "protection"

    @abstractmethod
    def bind(self, ctx: Context, space: OpenSpace) -> Penalty:
        """Collect statistics on the base model and return the penalty as data-free terms.

        Raises:
            RequestError: What is to be protected does not exist or cannot move in this space.
        """
