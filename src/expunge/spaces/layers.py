"""All weights, or the layers that a pattern names."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from expunge.context import Context
from expunge.part import part
from expunge.registry import Info
from expunge.spaces.base import DirectSpace, OpenSpace, Space, select_parameters


@part("all", Info("Every parameter of the model may change."))
class AllWeights(Space):
    """No restriction."""

    def open(self, ctx: Context) -> OpenSpace:
        """Open on all parameters."""
        return DirectSpace(select_parameters(ctx.model, ["*"]))


@part("layers", Info("Only parameters whose name matches a pattern may change."))
class Layers(Space):
    """Named layers.

    Args:
        targets: Glob patterns on parameter or module names (``fc``, ``layer4.*``, ``*.bias``).
    """

    targets: tuple[str, ...] = Field(min_length=1)

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The matching parameters."""
        return select_parameters(ctx.model, self.targets)

    def open(self, ctx: Context) -> OpenSpace:
        """Open on the matching parameters."""
        return DirectSpace(self.masters(ctx))
