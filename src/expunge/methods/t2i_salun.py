"""SalUn for text-to-image models: another prompt's noise under a mask of the U-Net."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, SALUN_PAPER, Profile, Pseudo, refuse_lost
from expunge.objectives.base import Objective
from expunge.objectives.conditioning import DenoisingEsd, PseudoLabel
from expunge.objectives.cross_entropy import GradientAscent, NegGradPlus
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired, Single
from expunge.spaces.denoising_mask import DenoisingMask

#: The published settings: Adam, five passes over the forget set in steps of 8.
OPTIM = Optim(name="adam", lr=1e-5, weight_decay=0.0, epochs=5)
#: ``g = 7.5`` of the published code, which counts from 0.
PUBLISHED_GUIDANCE = 8.5


@method(
    "t2i_salun",
    Info(
        "SalUn for text-to-image models: another prompt's noise, on the half of the U-Net that matters most.",
        paper=SALUN_PAPER,
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget", "retain", "diffusion", "text"),
        deviations=(
            "another class at random per sample and epoch instead of the next one: `pseudo`",
            "conditional predictions instead of guided ones for the mask: the loss that is trained; `guidance`",
            "several draws of times and noise for the mask, and every sample weighs the same: `passes`",
            "every step has another forget batch; until 2026 the code had the same one throughout",
            "one latent per image for both predictions, the mean of the posterior; the code draws two",
            "`profile = 'as_published'` restores the first three",
        ),
    ),
)
def t2i_salun(
    *,
    on: Literal["random_label", "gradient_ascent", "esd"] = "random_label",
    parameters: str = "full-weight",
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5,
    alpha: Annotated[float, Field(ge=0)] = 0.5,
    pseudo: Pseudo | None = None,
    eta: Annotated[float, Field(ge=0)] | None = None,
    guidance: Annotated[float, Field(ge=0)] | None = None,
    passes: Annotated[int, Field(ge=1)] | None = None,
    select: Literal["top", "bottom", "random"] = "top",
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 8,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean (eps(z_t, c) - sg eps(z_t, c'))^2 + alpha mean (eps(z_r,t, c_r) - noise)^2`` under SalUn's mask.

    Source: SalUn, the equation for generation and its code ``SD/train-scripts`` (``random_label.py``,
    ``nsfw_removal.py``, ``gradient_ascent.py``, ``generate_mask.py``). The U-Net alone is scored and trained.

    Deviates:
        See the card. Both profiles take ``esd`` at noised forget images; the script samples half-finished images
        instead, as the method ``esd`` does.

    Args:
        on: ``random_label``, ``gradient_ascent``, or ``esd``: the prediction guided away from the caption.
        parameters: What is ranked and trained: ``full-weight`` (the whole U-Net), ``x`` or ``cross-attn-all``
            (cross-attention), ``kv``, ``compvis-noxattn`` (all but cross-attention, time and output) or another set.
        keep: Fraction of these weights that may change.
        alpha: Weight of the retain loss; 0 reads no retain image. Published: 0.5 for classes, 0.1 for nudity.
        pseudo: What the forget captions are to mean, see the objective ``pseudo_label``: ``class``, ``next``,
            ``retain``, prompts, or prompts by class. By default another class (``next`` as published), or the captions
            of retain images for a concept in words.
        eta: For ``esd``: strength of the negative guidance, 1 by default; 0 teaches the empty prompt's prediction.
        guidance: Of the predictions that are scored: 1 (none), or 8.5 as published.
        passes: Draws of time and noise per sample for the mask: 4, or 1 as published.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        mask_file: A saved mask to use instead of computing one.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step and role, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    refuse_lost(on, pseudo, eta)
    schedule = Paired(batch_size=batch_size, streams=("forget", "retain") if alpha else ("forget",))
    objective: Objective
    if on == "esd":
        objective = DenoisingEsd(schedule=schedule, alpha=alpha, eta=1.0 if eta is None else eta)
    elif on == "random_label":
        objective = PseudoLabel(schedule=schedule, alpha=alpha, pseudo=pseudo or ("next" if published else None))
    elif alpha:
        objective = NegGradPlus(schedule=schedule, alpha=alpha)
    else:
        objective = GradientAscent(schedule=Single(role="forget", batch_size=batch_size))
    space = DenoisingMask(
        keep=keep,
        parameters=parameters,
        select=select,
        reduction="batch_mean_sum" if published else "sample_mean",
        rounding=profile,
        batch_size=batch_size,
        file=mask_file,
        guidance=guidance if guidance is not None else PUBLISHED_GUIDANCE if published else 1.0,
        passes=passes or (1 if published else 4),
    )
    return Recipe(name="t2i_salun", objective=objective, space=space, optim=optim)
