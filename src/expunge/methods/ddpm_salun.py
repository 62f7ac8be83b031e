"""SalUn for class-conditional diffusion models: its mask, and its loss in the corrected and in the published form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge import rng
from expunge.context import Context
from expunge.digest import combine, state_digests, tensor_digest
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, SALUN_PAPER, Profile
from expunge.objectives.base import Objective
from expunge.objectives.cross_entropy import NegGradPlus, RandomLabel
from expunge.objectives.denoising import PublishedDenoising, class_conditional
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.saliency import Mask, make_mask, saliency_scores
from expunge.schedule import Paired
from expunge.spaces.base import OpenSpace, select_parameters
from expunge.spaces.saliency import MaskedSpace, SaliencyMask
from expunge.tasks.base import Batch
from expunge.tasks.ddpm import DdpmTask

#: The published settings: Adam, 1,000 steps of 128 samples, gradients of norm 1 at most.
OPTIM = Optim(name="adam", lr=1e-4, weight_decay=0.0, epochs=25, max_steps=1000, grad_clip=1.0, augment=True)
#: ``w = 2`` of the published code.
PUBLISHED_GUIDANCE = 3.0


class ClippedFirst(MaskedSpace):
    """Clips the gradient of all weights before it is masked, as published: the masked step is then shorter."""

    def __init__(self, parameters: dict[str, nn.Parameter], mask: Mask, clip: float) -> None:
        super().__init__(parameters, mask)
        self._clip = clip
        self.full_norm = float("nan")

    def before_step(self) -> None:
        """Clip, then mask."""
        self.full_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self._clip))
        super().before_step()


@part(
    "denoising_mask",
    Info(
        "Only the weights that a diffusion model's loss on the forget set depends on most may change.",
        paper=SALUN_PAPER,
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget", "class_condition"),
        deviations=(
            "conditional predictions instead of guided ones: `guidance`",
            "several draws of times and noise: `passes`",
            "gradients are not clipped per batch (`clip_scores`), and the step is clipped after masking (`clip`)",
        ),
    ),
)
class DenoisingMask(SaliencyMask):
    """``m = 1[S >= gamma]`` with ``S = |grad mean (eps_g(x_t, c) - noise)^2|`` over the forget set.

    Args:
        keep: Fraction of weights that may change.
        targets: Glob patterns on parameter names that take part in the ranking.
        scope: Rank globally or within each parameter.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        reduction: See :func:`expunge.saliency.saliency_scores`.
        rounding: See :func:`expunge.saliency.count_ones`.
        freeze: See :class:`~expunge.spaces.saliency.SaliencyMask`.
        residual: Not for diffusion models.
        batch_size: Samples per backward pass.
        file: Use this saved mask instead of computing one.
        guidance: Of the scored predictions; 1 is none, 3 as published.
        passes: Draws of a time and noise for each sample.
        clip_scores: Largest norm of a batch's gradient (of sums over pixels) before it is added; 1 as published.
        clip: Largest norm of a step's gradient before masking; 1 as published.
    """

    residual: Literal[False] = False
    batch_size: int = Field(default=128, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    passes: int = Field(default=4, ge=1)
    clip_scores: float | None = Field(default=None, gt=0)
    clip: float | None = Field(default=None, gt=0)

    def open(self, ctx: Context) -> OpenSpace:
        """Compute (or load) the mask and open on the selected parameters."""
        task = class_conditional(ctx, self.part_name)
        parameters = select_parameters(ctx.model, self.targets)
        base = combine(state_digests(parameters))
        forget = tensor_digest(ctx.split["forget"])
        if self.file is None:
            scores = self.scores(task.guided(self.guidance), self._batches(ctx), parameters)
            made = make_mask(
                scores, self.keep, scope=self.scope, select=self.select, rule=self.rounding, key=ctx.key("mask")
            )
            mask = replace(made, base=base, forget=forget)
        else:
            mask = Mask.load(self.file, parameters)
            mask.check(base, forget, self.file)
        if self.clip is not None:
            return ClippedFirst(parameters, mask, self.clip)
        return MaskedSpace(parameters, mask, self.freeze)

    def _batches(self, ctx: Context) -> Iterator[Batch]:
        for number in range(self.passes):
            for batch in ctx.batches("forget", self.batch_size):
                yield replace(batch, key=rng.key(batch.key, "mask pass", number))

    def scores(
        self, task: DdpmTask, batches: Iterator[Batch], parameters: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Absolute values of the gradient accumulated over batches, by parameter."""
        if self.clip_scores is None:
            return saliency_scores(task, batches, parameters, self.reduction)[0]
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for batch in batches:
            _, found = saliency_scores(task, [batch], parameters, "batch_mean_sum")
            pixels = batch.inputs[0].numel()
            norm = pixels * torch.nn.utils.get_total_norm(list(found.values()))
            factor = pixels * min(1.0, self.clip_scores / (float(norm) + 1e-6))
            for name, gradient in found.items():
                total[name].add_(gradient, alpha=factor)
        return {n: g.abs() for n, g in total.items()}


@method(
    "ddpm_salun",
    Info(
        "SalUn for class-conditional diffusion: another class' noise, on the half of the weights that matter most.",
        paper=SALUN_PAPER,
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget", "retain", "class_condition"),
        deviations=(
            "means over pixels in both terms; the code sums in one of them, so its alpha is that much smaller",
            "another class at random per sample and epoch instead of the next one",
            "targets in eval mode, and classes are dropped from retain samples only",
            "gradients are clipped after masking, and scores are not clipped nor guided",
            "`profile = 'as_published'` restores all of these; for paired times set the task's `antithetic`",
        ),
    ),
)
def ddpm_salun(
    *,
    on: Literal["random_label", "gradient_ascent"] = "random_label",
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5,
    alpha: Annotated[float, Field(ge=0)] | None = None,
    guidance: Annotated[float, Field(ge=0)] | None = None,
    passes: Annotated[int, Field(ge=1)] | None = None,
    select: Literal["top", "bottom", "random"] = "top",
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 128,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean (eps(x_t, c) - sg eps(x_t, c'))^2 + alpha mean (eps(x_r,t, c_r) - noise)^2`` under SalUn's mask.

    Source: SalUn, the equation for generation and its code ``DDPM/runners/diffusion.py``; 1,000 steps of Adam.

    Deviates:
        See the card.

    Args:
        on: ``random_label``, or ``gradient_ascent`` on the noise loss.
        keep: Fraction of weights that may change.
        alpha: Weight of the retain loss: 1, or 0.001 as published, where that loss is a sum over pixels.
        guidance: Of the predictions that are scored for the mask: 1 (none), or 3 as published.
        passes: Draws of time and noise per sample for the mask: 4, or 1 as published.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        mask_file: A saved mask to use instead of computing one.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step and role, and per backward pass of the mask.
        optim: Optimiser and loop settings; ``grad_clip`` acts before masking as published.
    """
    published = profile == "as_published"
    schedule = Paired(batch_size=batch_size)
    weight = alpha if alpha is not None else 1e-3 if published else 1.0
    objective: Objective
    if published:
        objective = PublishedDenoising(schedule=schedule, forget=on, alpha=weight)
    elif on == "random_label":
        objective = RandomLabel(schedule=schedule, alpha=weight)
    else:
        objective = NegGradPlus(schedule=schedule, alpha=weight)
    space = DenoisingMask(
        keep=keep,
        select=select,
        reduction="batch_mean_sum" if published else "sample_mean",
        rounding=profile,
        batch_size=batch_size,
        file=mask_file,
        guidance=guidance if guidance is not None else PUBLISHED_GUIDANCE if published else 1.0,
        passes=passes or (1 if published else 4),
        clip_scores=1.0 if published else None,
        clip=optim.grad_clip if published else None,
    )
    if published:
        optim = optim.model_copy(update={"grad_clip": None})
    return Recipe(name="ddpm_salun", objective=objective, space=space, optim=optim)
