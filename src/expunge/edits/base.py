"""Edits: one-shot methods that compute the change directly, without a training loop."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from expunge.context import Context
from expunge.part import Part
from expunge.patch.changes import Change
from expunge.registry import Kind
from expunge.spaces.base import OpenSpace


class Edit(Part):
    """Settings of a one-shot edit."""

    kind_of_part: ClassVar[Kind] = "edit"
    #: Whether it runs the model or takes its gradients, for which every weight is held in float32.
    full_precision: ClassVar[bool] = True

    @abstractmethod
    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """Return the changes; the model itself is put back by the caller whatever happens to it here."""

    def controls(self) -> dict[str, Edit]:
        """Variants, by name, that should do worse if the method's choices matter; none by default."""
        return {}
