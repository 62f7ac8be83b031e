"""The layers that a protection names, by the same rules: what is trained is what is protected."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from expunge.context import Context
from expunge.errors import RequestError
from expunge.part import part
from expunge.registry import Info
from expunge.spaces.base import DirectSpace, OpenSpace, Space, select_parameters


@part(
    "matched_layers",
    Info(
        "Only weights of the modules that BARRIER's patterns select may change.",
        paper="Miksa et al., BARRIER, arXiv 2605.15737",
        upstream="OneAndZero24/BARRIER",
        commit="e4f2367",
        deviations=("anchored patterns, leaf Linear and Conv2d layers only, an empty match is an error: `rule`",),
    ),
)
class MatchedLayers(Space):
    """Weights and biases of the modules selected by :func:`expunge.protections.interval.match.find`.

    Args:
        targets: Class names, parts of qualified names, globs or ``re:`` expressions.
        rule: ``as_intended``, or ``as_published`` (substrings only; norm layers and containers are selected too).
    """

    targets: tuple[str, ...] = Field(min_length=1)
    rule: Literal["as_intended", "as_published"] = "as_intended"

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The parameters of the selected modules."""
        from expunge.protections.interval.match import find_in

        layers = find_in(ctx, self.targets, self.rule).layers
        patterns = [f"{name}.*" if name else "*" for name, m in layers.items() if any(True for _ in m.parameters())]
        if not patterns:
            raise RequestError(f"no module with weights matches {list(self.targets)}")
        return select_parameters(ctx.model, patterns)

    def open(self, ctx: Context) -> OpenSpace:
        """Open on the parameters of the selected modules."""
        return DirectSpace(self.masters(ctx))
