"""Selective synaptic dampening: shrink the weights that matter much more to the forget set than to all data."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from expunge.context import Context
from expunge.edits.base import Edit
from expunge.edits.gradients import Tensors, add, batch_gradient, changes_within, sample_squares
from expunge.errors import NoEffectError
from expunge.method import method
from expunge.methods._common import Profile
from expunge.part import part
from expunge.patch.changes import Change, accumulate_dtype
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import OpenSpace
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask

#: There is no loop; these settings are not used.
OPTIM = Optim()

INFO = Info(
    "Shrink the weights that matter much more to the forget set than to the whole training set.",
    paper="Foster et al., Selective Synaptic Dampening, AAAI 2024, arXiv 2308.07707",
    upstream="if-loops/selective-synaptic-dampening",
    needs=("forget", "retain"),
    deviations=(
        "gradients are squared per sample; the code squares the gradient of a batch's mean: `profile`",
        "forget and retain batches are not mixed when batch means are squared",
        "images are not augmented while importances are measured",
        "no golden numbers: written from the paper",
    ),
    aliases=("selective_synaptic_dampening",),
)


@part("ssd", INFO)
class SSD(Edit):
    """``theta_i <- min(lambda F_i / F_f,i, 1) theta_i`` where ``F_f,i > alpha F_i``.

    ``F`` and ``F_f`` are diagonal empirical Fisher informations, mean squared gradients of the training loss, over the
    whole training set (forget set included) and over the forget set. Hence ``F_f,i / F_i`` never exceeds the number of
    training samples per forget sample, and a larger ``alpha`` selects nothing.

    Args:
        alpha: Selection threshold.
        dampening: ``lambda``.
        squares: ``sample``, or ``batch`` (gradient of the batch mean squared, as published).
        batch_size: Samples per pass; with ``squares = batch`` it changes the result.
    """

    alpha: float = Field(default=10.0, gt=0)
    dampening: float = Field(default=1.0, ge=0)
    squares: Literal["sample", "batch"] = "sample"
    batch_size: int = Field(default=64, ge=1)

    def importances(self, ctx: Context, parameters: Tensors) -> tuple[Tensors, Tensors]:
        """``F`` over forget and retain set together, and ``F_f``, by parameter."""
        forget, n_forget = self._squares(ctx, "forget", parameters)
        retain, n_retain = self._squares(ctx, "retain", parameters)
        whole = {n: (t + retain[n]) / (n_forget + n_retain) for n, t in forget.items()}
        return whole, {n: t / n_forget for n, t in forget.items()}

    def _squares(self, ctx: Context, role: str, parameters: Tensors) -> tuple[Tensors, int]:
        total: Tensors = {}
        for batch in ctx.batches(role, self.batch_size):
            if self.squares == "sample":
                add(total, sample_squares(ctx, batch, parameters))
            else:
                mean = batch_gradient(ctx.task, batch, parameters, mean=True)
                add(total, {n: g.square() for n, g in mean.items()})
        return total, self._count(len(ctx.split[role]))

    def _count(self, samples: int) -> int:
        return samples if self.squares == "sample" else -(-samples // self.batch_size)

    def factors(self, whole: Tensors, forget: Tensors) -> Tensors:
        """What every weight is multiplied by, by parameter; 1 where a weight is not selected."""
        found = {}
        for name, f in forget.items():
            selected = f > self.alpha * whole[name]
            ratio = self.dampening * whole[name] / torch.where(selected, f, torch.ones_like(f))
            found[name] = torch.where(selected, ratio.clamp(max=1), torch.ones_like(f))
        return found

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """The dampened weights, as changes.

        Raises:
            NoEffectError: No weight is dampened; the message gives the largest ``F_f / F``.
        """
        counts = [self._count(len(ctx.split[r])) for r in ("forget", "retain")]
        largest = sum(counts) / counts[0]
        if self.alpha >= largest:
            raise NoEffectError(
                f"ssd selects weights with F_f > {self.alpha:g} F, but F_f is a part of F: with "
                f"{len(ctx.split['forget'])} samples to forget and {len(ctx.split['retain'])} to retain it is at most "
                f"{largest:g} F; choose a smaller 'alpha'"
            )
        parameters = {n: p.detach() for n, p in space.parameters.items()}
        whole, forget = self.importances(ctx, parameters)
        factors = self.factors(whole, forget)
        if all(bool((f == 1).all()) for f in factors.values()):
            ratios = [(forget[n] / whole[n])[whole[n] > 0] for n in forget]
            found = max((float(r.max()) for r in ratios if len(r)), default=0.0)
            raise NoEffectError(f"ssd dampens no weight: F_f is at most {found:.3g} F, and 'alpha' is {self.alpha:g}")
        weights = {n: p.to(accumulate_dtype(p.dtype)) for n, p in parameters.items()}
        return changes_within(space, {n: w * factors[n] - w for n, w in weights.items()}, "ssd")


@method("ssd", INFO)
def ssd(
    *,
    alpha: Annotated[float, Field(gt=0)] = 10.0,
    dampening: Annotated[float, Field(ge=0)] = 1.0,
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 64,
    optim: Optim = OPTIM,
) -> Recipe:
    """``theta_i <- min(lambda F_i / F_f,i, 1) theta_i`` where ``F_f,i > alpha F_i``.

    Source: Foster et al. ``alpha = 10`` and ``lambda = 1`` are the paper's; they suit requests of
    well under a tenth of the data, since ``F_f,i`` cannot exceed ``n / n_f`` times ``F_i``.

    Deviates:
        The definition squares the gradient of every sample, as here; the published code squares that of a batch's mean
        (``profile = "as_published"``). Forget and retain batches are not mixed here.

    Args:
        alpha: Selection threshold.
        dampening: ``lambda``.
        mask_file: A saved saliency mask; only its weights may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per pass.
        optim: Not used: there is no loop.
    """
    squares: Literal["sample", "batch"] = "batch" if profile == "as_published" else "sample"
    edit = SSD(alpha=alpha, dampening=dampening, squares=squares, batch_size=batch_size)
    space = AllWeights() if mask_file is None else SaliencyMask(file=mask_file)
    return Recipe(name="ssd", edit=edit, space=space, optim=optim)
