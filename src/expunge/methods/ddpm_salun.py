"""SalUn for class-conditional diffusion models, in the corrected and in the published form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.errors import ConfigError
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, SALUN_PAPER, Profile
from expunge.objectives.base import Objective
from expunge.objectives.conditioning import DenoisingEsd
from expunge.objectives.cross_entropy import NegGradPlus, RandomLabel
from expunge.objectives.denoising import PublishedDenoising
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired
from expunge.spaces.denoising_mask import DenoisingMask

#: The published settings: Adam, 1,000 steps of 128 samples, gradients of norm 1 at most.
OPTIM = Optim(name="adam", lr=1e-4, weight_decay=0.0, epochs=25, max_steps=1000, grad_clip=1.0, augment=True)
#: ``w = 2`` of the published code.
PUBLISHED_GUIDANCE = 3.0


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
    on: Literal["random_label", "gradient_ascent", "esd"] = "random_label",
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
        See the card. The published code advertises ESD and does not have it: there is no ``as_published`` of it.

    Args:
        on: ``random_label``, ``gradient_ascent`` on the noise loss, or ``esd``: the prediction guided away from the
            class.
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
    if published and on == "esd":
        raise ConfigError("the published code has no ESD for class-conditional models; take profile 'as_intended'")
    if published:
        objective = PublishedDenoising(schedule=schedule, forget=on, alpha=weight)  # type: ignore[arg-type]
    elif on == "esd":
        objective = DenoisingEsd(schedule=schedule, alpha=weight)
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
