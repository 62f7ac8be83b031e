"""Fisher forgetting: noise on the weights, most where the retain set depends on them least."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.edits.base import Edit
from expunge.edits.gradients import Tensors, add, batch_gradient, changes_within, sample_squares
from expunge.errors import CapabilityError
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, Profile
from expunge.part import part
from expunge.patch.changes import Change, accumulate_dtype
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import OpenSpace
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.base import Batch

Variant = Literal["scrub", "diagonal"]

#: There is no loop; these settings are not used.
OPTIM = Optim()

INFO = Info(
    "Gaussian noise on the weights, scaled by the inverse of the retain set's Fisher information.",
    paper="Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020, arXiv 1911.04933",
    upstream=SALUN_CODE,
    commit=SALUN_COMMIT,
    needs=("retain", "features"),
    deviations=(
        "gradients are squared per sample; the code squares the gradient of a batch's mean: `profile`",
        "extra noise for the classifier goes to the head; the code looks for tensors of a certain size: `profile`",
        "a class counts as removed when the request names it, not when the number of samples matches",
        "noise depends on the seed and the tensor's name only",
        "works under a mask",
    ),
    aliases=("fisher_new",),
)
#: Constants of the published code.
EPSILON, FLOOR, GAIN = 1e-8, 1e-4, 10.0


@part("fisher_forgetting", INFO)
class FisherForgetting(Edit):
    """``theta <- mean + sigma * N(0, 1)``, with ``F`` the diagonal Fisher information over the retain set.

    ``scrub`` (``fisher_new`` of the code): ``F = (1/n_r) sum_i sum_y p_y(x_i) grad_y^2``,
    ``sigma^2 = alpha min(1/(F + 1e-8), 1e3)`` (1e2 for the head), averaged over the input dimension; ten times as much
    for the head and for vectors; the removed classes' rows of the head get mean 0 and ``sigma^2 = 1e-4`` before that.
    ``diagonal`` (``fisher``): ``F = (1/n_r) sum_i (grad log p(y_i|x_i) + 1e-8)^2``,
    ``sigma = min(sqrt(alpha / F), 1e-3)``, ten times as much for the head.

    Args:
        variant: ``scrub`` or ``diagonal``.
        alpha: Strength of the noise.
        largest: Cap of ``sigma`` in the ``diagonal`` variant, before the factor for the head.
        squares: ``sample``, or ``batch`` (gradient of the batch mean squared, as published; ``scrub`` only).
        head: ``as_intended``: the task's head. ``as_published``: tensors whose first dimension is the number of classes
            (``scrub``), or whose last dimension is 10 (``diagonal``).
        samples: Retain samples to use, drawn by the seed; by default all.
        batch_size: Samples per pass; with ``squares = batch`` it changes the result.
    """

    variant: Variant = "scrub"
    alpha: float = Field(default=1e-6, gt=0)
    largest: float = Field(default=1e-3, gt=0)
    squares: Literal["sample", "batch"] = "sample"
    head: Profile = "as_intended"
    samples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)

    def fisher(self, ctx: Context, parameters: Tensors) -> Tensors:
        """Diagonal Fisher information over the retain set, by parameter."""
        ids = ctx.split["retain"]
        if self.samples is not None and self.samples < len(ids):
            ids = ids[rng.permutation(ctx.key("fisher samples"), len(ids))[: self.samples]]
        total: Tensors = {}
        batches = torch.split(ids, self.batch_size)
        for chunk in batches:
            batch = ctx.task.load("retain", chunk, ctx.split)
            if self.variant == "diagonal":  # the loss is -log p
                add(total, sample_squares(ctx, batch, parameters, shift=-EPSILON))
            else:
                self._scrub(ctx, batch, parameters, total)
        count = len(batches) if self.variant == "scrub" and self.squares == "batch" else len(ids)
        return {n: t / count for n, t in total.items()}

    def _scrub(self, ctx: Context, batch: Batch, parameters: Tensors, total: Tensors) -> None:
        with torch.no_grad():
            p = ctx.task.predict(batch).softmax(1)
        for y in range(p.shape[1]):
            labels = torch.full_like(batch.targets, y)
            if self.squares == "sample":
                add(total, sample_squares(ctx, batch, parameters, labels, weights=p[:, y]))
            else:
                mean = batch_gradient(ctx.task, batch, parameters, labels, mean=True)
                add(total, {n: g.square() * p[:, y].mean() for n, g in mean.items()})

    def noise_scale(self, ctx: Context, parameters: Tensors, fisher: Tensors) -> tuple[Tensors, Tensors]:
        """Mean and variance of the new weights, by parameter; variances may have size 1 in dimension 1."""
        mean, variance = {}, {}
        for name, theta in parameters.items():
            mean[name] = theta.clone()
            classifier = self._is_head(ctx, name, theta)
            if self.variant == "diagonal":
                sigma = (self.alpha / fisher[name]).sqrt().clamp(max=self.largest)
                variance[name] = ((GAIN if classifier else 1.0) * sigma).square()
                continue
            spread = (1 / (fisher[name] + EPSILON)).clamp(max=1e2 if classifier else 1e3) * self.alpha
            if theta.ndim > 1:
                spread = spread.mean(1, keepdim=True).expand_as(theta).clone()
            if classifier and ctx.split.removed:
                rows = list(ctx.split.removed)
                mean[name][rows] = 0
                spread[rows] = FLOOR
            variance[name] = spread * GAIN if classifier or theta.ndim == 1 else spread
        return mean, variance

    def _is_head(self, ctx: Context, name: str, theta: Tensor) -> bool:
        if self.head == "as_published":
            if self.variant == "diagonal":
                return theta.ndim > 0 and theta.shape[-1] == 10
            return theta.ndim > 0 and theta.shape[0] == getattr(ctx.task, "n_classes", None)
        head = getattr(ctx.task, "head", None)
        if head is None:
            raise CapabilityError("fisher_forgetting needs a classifier whose head is known; name the module by `head`")
        return name.rpartition(".")[0] == head

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """New weights, as changes."""
        parameters = {n: p.detach().to(accumulate_dtype(p.dtype)) for n, p in space.parameters.items()}
        mean, variance = self.noise_scale(ctx, parameters, self.fisher(ctx, parameters))
        deltas = {
            n: mean[n] - theta + variance[n].sqrt() * _noise(ctx.key(f"fisher noise {n}"), theta)
            for n, theta in parameters.items()
        }
        return changes_within(space, deltas, "fisher_forgetting")


def _noise(key: int, like: Tensor) -> Tensor:
    draws = torch.Generator().manual_seed(key % 2**63)
    return torch.randn(like.shape, generator=draws, dtype=like.dtype).to(like.device)


@method("fisher_forgetting", INFO)
def fisher_forgetting(
    *,
    variant: Variant = "scrub",
    alpha: Annotated[float, Field(gt=0)] = 1e-6,
    samples: Annotated[int, Field(ge=1)] | None = None,
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = OPTIM,
) -> Recipe:
    """``theta <- mean + sqrt(alpha / F) * N(0, 1)``, capped; ``F``: diagonal Fisher information of the retain set.

    Source: Golatkar et al.; code ``Classification/unlearn/fisher.py`` (``fisher`` is ``diagonal``, ``fisher_new`` is
    ``scrub``). The code's command line gives ``alpha = 0.2``, that is variances of up to 200; the default here is ours.

    Deviates:
        ``profile = "as_published"`` squares the gradient of batch means, which is biased low, and finds the head by
        tensor sizes, which hits other layers too. The published code knows no mask.

    Args:
        variant: ``scrub`` or ``diagonal``.
        alpha: Strength of the noise.
        samples: Retain samples to use; by default all. ``scrub`` takes one backward pass per sample and class.
        mask_file: A saved saliency mask; only its weights may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per pass.
        optim: Not used: there is no loop.
    """
    published = profile == "as_published"
    edit = FisherForgetting(
        variant=variant,
        alpha=alpha,
        squares="batch" if published and variant == "scrub" else "sample",
        head=profile,
        samples=samples,
        batch_size=batch_size,
    )
    space = AllWeights() if mask_file is None else SaliencyMask(file=mask_file)
    return Recipe(name="fisher_forgetting", edit=edit, space=space, optim=optim)
