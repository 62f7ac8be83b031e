"""SalUn-soft: no mask; a proximal step pulls the smallest changes back to the original weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.context import Context
from expunge.part import part
from expunge.registry import Info
from expunge.spaces.base import DirectSpace, OpenSpace, Space, select_parameters


def soft_threshold(delta: Tensor, k: int) -> Tensor:
    """``sign(d) * max(|d| - gamma, 0)`` with ``gamma`` the k-th smallest ``|d|`` (1-based; k = 0: unchanged).

    >>> [round(x, 4) + 0.0 for x in soft_threshold(torch.tensor([0.3, -0.1, 0.05, -0.4]), 2).tolist()]
    [0.2, 0.0, 0.0, -0.3]
    """
    if k <= 0:
        return delta
    flat = delta.abs().reshape(-1).cpu().numpy()
    gamma = float(np.partition(flat, k - 1)[k - 1])
    return delta.sign() * (delta.abs() - gamma).clamp_min(0)


class _Proximal(DirectSpace):
    def __init__(self, ctx: Context, parameters: dict[str, nn.Parameter], keep: float, settings: Proximal) -> None:
        super().__init__(parameters)
        self._ctx, self._settings = ctx, settings
        self._anchor = self._flat() if settings.anchor == "epoch" else self._flat_of(self.base)
        self._anchor_epoch = 0

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])

    def _flat_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[n].reshape(-1) for n in self.parameters])

    def state(self) -> dict[str, Tensor]:
        if self._settings.anchor == "original":
            return {}
        return {"anchor": self._anchor, "anchor_epoch": torch.tensor(self._anchor_epoch)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._anchor = state["anchor"].to(self._anchor)
            self._anchor_epoch = int(state["anchor_epoch"])

    def before_step(self) -> None:
        if self._settings.anchor == "epoch" and self._ctx.epoch != self._anchor_epoch:
            self._anchor, self._anchor_epoch = self._flat(), self._ctx.epoch

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        ctx = self._ctx
        now = self._flat()
        length = self._settings.steps_per_epoch or ctx.steps_per_epoch
        total = ctx.epochs * length
        inner = ctx.position if ctx.roles == ("retain",) else 0
        left = max(0, total - (ctx.epoch * length + inner + 1))
        k = int(self._settings.keep * (left / total * now.numel()))
        if k == 0:
            return
        shrunk = soft_threshold(now - self._anchor, k)
        new = torch.where(shrunk == 0, self._anchor, self._anchor + shrunk)
        sizes = [p.numel() for p in self.parameters.values()]
        for parameter, value in zip(self.parameters.values(), torch.split(new, sizes), strict=True):
            parameter.copy_(value.reshape(parameter.shape))


@part(
    "proximal",
    Info(
        "After every step, soft-threshold the change so that a falling share of weights returns to the original.",
        paper="Fan et al., SalUn, ICLR 2024, arXiv 2310.12508 (SalUn-soft)",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
        deviations=("the anchor is the original model throughout (the code re-reads it every epoch): `anchor`",),
    ),
)
class Proximal(Space):
    """Proximal step of ``beta * |theta - theta_o|_1`` with ``beta`` set so that k coordinates vanish.

    ``k = int(keep * (T - (e L + i + 1)) / T * N)``: ``T = E L`` steps in all, epoch ``e``, ``i`` the position in
    a retain pass and 0 in other passes, as published.

    Args:
        keep: Share of weights pulled back at the start (rho).
        anchor: ``original`` weights, or the weights at the start of each ``epoch`` as published.
        steps_per_epoch: ``L``; by default the schedule's own number of steps.
        targets: Glob patterns on parameter names.
    """

    keep: float = Field(default=0.5, ge=0, le=1)
    anchor: Literal["original", "epoch"] = "original"
    steps_per_epoch: int | None = Field(default=None, ge=1)
    targets: tuple[str, ...] = ("*",)

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The selected parameters."""
        return select_parameters(ctx.model, self.targets)

    def open(self, ctx: Context) -> OpenSpace:
        """Open on the selected parameters."""
        return _Proximal(ctx, self.masters(ctx), self.keep, self)
