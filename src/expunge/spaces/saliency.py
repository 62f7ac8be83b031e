"""SalUn's space: only the weights that the forget loss depends on most may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.context import Context
from expunge.digest import combine, state_digests, tensor_digest
from expunge.part import part
from expunge.registry import Info
from expunge.saliency import Mask, Select, make_mask, saliency_scores
from expunge.spaces.base import DirectSpace, OpenSpace, Space, editable

Freeze = Literal["weights", "arithmetic", "gradient"]


class MaskedSpace(DirectSpace):
    """Weights restricted to a mask by projection: gradients before the step, weights and momentum after it."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        mask: Mask,
        freeze: Freeze = "weights",
        residual: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(parameters)
        self.selection = mask
        self._freeze = freeze
        self._residual = dict(residual or {})
        self._masks = {n: mask.bits[n].to(p.device) for n, p in parameters.items()}
        self._partial = [n for n, m in self._masks.items() if not bool(m.all())]

    def mask(self, name: str) -> Tensor | None:
        """The mask of a parameter; the published ways of freezing promise nothing, so there everything may change."""
        return self._masks[name] if self._freeze == "weights" else None

    def before_step(self) -> None:
        """Zero the gradient outside the mask, so that clipping and momentum see the masked gradient only."""
        for name, extra in self._residual.items():
            grad = self.parameters[name].grad
            if grad is not None:
                grad += extra
        self._residual = {}
        for name in self._partial:
            grad = self.parameters[name].grad
            if grad is not None:
                grad.masked_fill_(~self._masks[name], 0)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put weights outside the mask back to the base bits and clear their optimiser state."""
        if self._freeze == "gradient":
            return
        for name in self._partial:
            parameter, mask = self.parameters[name], self._masks[name]
            if self._freeze == "weights":
                torch.where(mask, parameter, self.base[name], out=parameter)
            else:
                parameter.copy_(parameter * mask + self.base[name] * ~mask)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~mask, 0)


@part(
    "saliency_mask",
    Info(
        "Only the fraction of weights with the largest forget-loss gradient may change.",
        paper="Fan et al., SalUn, ICLR 2024, arXiv 2310.12508",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
        needs=("forget",),
        deviations=(
            "scores weigh every sample equally (the code sums batch means): `reduction`",
            "exactly k ones, the lowest index wins ties (the code's sort is unstable)",
            "weights outside the mask are restored after every step, momentum and decay included: `freeze`",
        ),
    ),
)
class SaliencyMask(Space):
    """``m = 1[S >= gamma]``, ``S = |grad loss(D_f)|`` at the base weights, ranked over all weights together.

    Args:
        keep: Fraction of weights that may change (the mask ratio r).
        targets: Glob patterns on parameter names that take part in the ranking; others do not change. ``*`` stands for
            the network that predicts: of a text-to-image pipeline the U-Net, not the text encoders.
        scope: Rank globally or within each parameter.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        reduction: See :func:`expunge.saliency.saliency_scores`.
        rounding: See :func:`expunge.saliency.count_ones`.
        freeze: ``weights`` (bit-exact); ``arithmetic`` as in commit a6e89fd, ``theta m + theta_o (1 - m)``, which loses
            the sign of -0.0 and turns infinity into NaN; ``gradient`` as before it (weights drift by decay).
        residual: Add the last mask batch's gradient to the first step, as DeepDive does.
        batch_size: Samples per backward pass.
        file: Use this saved mask instead of computing one.
    """

    keep: float = Field(default=0.5, gt=0, le=1)
    targets: tuple[str, ...] = ("*",)
    scope: Literal["global", "layer"] = "global"
    select: Select = "top"
    reduction: Literal["sample_mean", "batch_mean_sum"] = "sample_mean"
    rounding: Literal["as_intended", "as_published"] = "as_intended"
    freeze: Freeze = "weights"
    residual: bool = False
    batch_size: int = Field(default=256, ge=1)
    file: str | None = None

    def selected(self, ctx: Context) -> dict[str, nn.Parameter]:
        """Parameters that are ranked."""
        return editable(ctx, self.targets)

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The ranked parameters; where scores are computed, in float32, the network that predicts as a whole."""
        found = self.selected(ctx)
        if self.file is None or self.residual:
            network = {id(p) for p in getattr(ctx.task, "unet", ctx.model).parameters()}
            found = {n: p for n, p in ctx.model.named_parameters() if id(p) in network} | found
        return found

    def open(self, ctx: Context) -> OpenSpace:
        """Compute (or load) the mask and open on the selected parameters."""
        parameters = self.selected(ctx)
        base = combine(state_digests(parameters))
        forget = tensor_digest(ctx.split["forget"])
        last: dict[str, Tensor] = {}
        if self.file is None or self.residual:
            scores, last = saliency_scores(ctx.task, ctx.batches("forget", self.batch_size), parameters, self.reduction)
        if self.file is not None:
            mask = Mask.load(self.file, parameters)
            mask.check(base, forget, self.file)
        else:
            made = make_mask(
                scores, self.keep, scope=self.scope, select=self.select, rule=self.rounding, key=ctx.key("mask")
            )
            mask = replace(made, base=base, forget=forget)
        # The published code minimises -CE while scoring, so the left-over gradient has the opposite sign.
        residual = {n: -g for n, g in last.items()} if self.residual else None
        return MaskedSpace(parameters, mask, self.freeze, residual)
