"""SalUn: an unlearning objective restricted to the weights that the forget loss depends on most."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.errors import ConfigError
from expunge.method import method
from expunge.methods._common import (
    GENTLE,
    SALUN_CODE,
    SALUN_COMMIT,
    SALUN_PAPER,
    Mixing,
    Profile,
    Pseudo,
    as_trained,
    make_objective,
)
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import Space
from expunge.spaces.proximal import Proximal
from expunge.spaces.saliency import SaliencyMask


@method(
    "salun",
    Info(
        "Random labels (or another objective) on the half of the weights with the largest forget-loss gradient.",
        paper=SALUN_PAPER,
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget",),
        deviations=(
            "mask scores weigh every sample equally and use no augmentation",
            "wrong labels exclude the true one; forget and retain samples are shuffled together, not in two passes",
            "normalisation statistics are frozen, and the learning rate is 5e-4 instead of 0.013",
            "the anchor of the soft variant is the original model throughout",
            "`profile = 'as_published'` restores all of these but the mask's augmentation",
        ),
        aliases=("saliency_unlearning",),
    ),
)
def salun(
    *,
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5,
    soft: bool = False,
    on: str = "random_label",
    targets: tuple[str, ...] = ("*",),
    mixing: Mixing | None = None,
    pseudo: Pseudo | None = None,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    select: Literal["top", "bottom", "random"] = "top",
    scope: Literal["global", "layer"] = "global",
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = GENTLE,
) -> Recipe:
    """``theta_u = m * (theta_o + delta) + (1 - m) * theta_o`` with ``m = 1[|grad loss(D_f)| >= gamma]``.

    Source: SalUn, equations 3 to 5; ``delta`` minimises the objective ``on``. The soft variant drops the mask and takes
    a proximal step of ``beta |theta - theta_o|_1`` after every optimiser step.

    Deviates:
        See the card. ``as_published`` follows the code at the recorded commit: labels from all classes, sums of batch
        means, truncated mask size, normalisation statistics that move, anchor of the soft variant re-read every epoch.

    Args:
        keep: Fraction of weights that may change; for ``soft`` the share pulled back to the original at the start.
        soft: Proximal step instead of the mask.
        on: Objective: ``random_label``, ``gradient_ascent``, ``neg_grad_plus``, ``fine_tune`` or any other; for
            diffusion models also ``esd``. Those have methods with settings of their own, ``ddpm_salun`` and
            ``t2i_salun``.
        targets: Patterns on the parameters that are ranked and trained; ``*`` is all, of a text-to-image pipeline the
            U-Net.
        mixing: How forget and retain batches interleave; by default as the objective has it (random labels: ``mixed``,
            ``sequential`` as published).
        pseudo: Diffusion models: what forget captions are to mean, see the objective ``pseudo_label``.
        alpha: Weight of the retain loss.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        scope: Rank all weights together or each tensor on its own.
        mask_file: A saved mask to use instead of computing one.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step and role, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    space: Space
    if soft:
        if targets != ("*",):
            raise ConfigError("'targets' would have no effect with 'soft', whose space is the whole model")
        space = Proximal(keep=keep, anchor="epoch" if published else "original")
    else:
        space = SaliencyMask(
            keep=keep,
            targets=targets,
            select=select,
            scope=scope,
            reduction="batch_mean_sum" if published else "sample_mean",
            rounding=profile,
            batch_size=batch_size,
            file=mask_file,
        )
    return Recipe(
        name="salun_soft" if soft else "salun",
        objective=make_objective(on, mixing, batch_size, exclude_true=not published, alpha=alpha, pseudo=pseudo),
        space=space,
        optim=as_trained(optim, profile),
    )
