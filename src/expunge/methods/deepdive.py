"""The four procedures of the DeepDive study of SalUn: random labels and gradient ascent, each in two orders.

Source: ``lorenzoorsingher/SalUn_DeepDive``, 2024. Plain SGD without momentum and decay, so that masking the gradient
alone freezes exactly. ``as_published`` sums batch means for the mask, adds the gradient left by the mask pass to the
first step and lets normalisation statistics move; its random labels may be the true ones.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import DEEPDIVE_CODE, DEEPDIVE_COMMIT, SALUN_PAPER, Profile, as_trained
from expunge.objectives.base import Objective
from expunge.objectives.cross_entropy import GradientAscent, NegGradPlus, RandomLabel
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Sequential, Single
from expunge.spaces.base import Space
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask

Keep = Annotated[float, Field(gt=0, le=1)]
LABELS = Optim(lr=0.1, momentum=0.0, weight_decay=0.0, epochs=10)
ASCENT = LABELS.model_copy(update={"lr": 5e-4})
COSINE = ASCENT.model_copy(update={"lr_schedule": "cosine"})


def _info(summary: str, *needs: str, labels: bool = False) -> Info:
    deviations = (
        "the gradient that the mask pass leaves behind is not added to the first step: `profile`",
        "normalisation statistics are frozen: `profile`",
    )
    return Info(
        summary,
        paper=SALUN_PAPER + "; SalUn_DeepDive, 2024",
        upstream=DEEPDIVE_CODE,
        commit=DEEPDIVE_COMMIT,
        needs=needs,
        deviations=(("wrong labels exclude the true one: `profile`",) if labels else ()) + deviations,
    )


def _recipe(
    name: str, objective: Objective, use_mask: bool, mask_thr: float, profile: Profile, batch_size: int, optim: Optim
) -> Recipe:
    published = profile == "as_published"
    space: Space = AllWeights()
    if use_mask:
        space = SaliencyMask(
            keep=mask_thr,
            reduction="batch_mean_sum" if published else "sample_mean",
            rounding=profile,
            residual=published,
            batch_size=batch_size,
        )
    return Recipe(name=name, objective=objective, space=space, optim=as_trained(optim, profile))


@method(
    "deepdive_rl",
    _info(
        "One shuffled pass over all training samples, the forget ones with random labels.",
        "forget",
        "retain",
        labels=True,
    ),
)
def deepdive_rl(
    *,
    use_mask: bool = True,
    mask_thr: Keep = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = LABELS,
) -> Recipe:
    """``min mean_i loss(x_i, y_i)`` over one shuffled pass, with ``y_i`` random on the forget set (``rand_label``).

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    objective = RandomLabel(schedule=Single(role="mixed", batch_size=batch_size), exclude_true=profile == "as_intended")
    return _recipe("deepdive_rl", objective, use_mask, mask_thr, profile, batch_size, optim)


@method(
    "deepdive_rl_split",
    _info(
        "A pass over the forget set with random labels, then one over the retain set.", "forget", "retain", labels=True
    ),
)
def deepdive_rl_split(
    *,
    use_mask: bool = True,
    mask_thr: Keep = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = LABELS,
) -> Recipe:
    """Forget pass with random labels, then retain pass, in stored order, every epoch (``rand_label_split``).

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    objective = RandomLabel(
        schedule=Sequential(batch_size=batch_size, shuffle=False), exclude_true=profile == "as_intended"
    )
    return _recipe("deepdive_rl_split", objective, use_mask, mask_thr, profile, batch_size, optim)


@method(
    "deepdive_ga",
    _info("One shuffled pass over all training samples, the loss of the forget ones negated.", "forget", "retain"),
)
def deepdive_ga(
    *,
    use_mask: bool = True,
    mask_thr: Keep = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = COSINE,
) -> Recipe:
    """``min mean_i s_i loss_i``, ``s = -1`` on the forget set and 1 elsewhere; cosine rate (``grad_ascent``).

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    objective = NegGradPlus(schedule=Single(role="mixed", batch_size=batch_size))
    return _recipe("deepdive_ga", objective, use_mask, mask_thr, profile, batch_size, optim)


@method("deepdive_ga_small", _info("Gradient ascent on the forget set alone.", "forget"))
def deepdive_ga_small(
    *,
    use_mask: bool = True,
    mask_thr: Keep = 0.5,
    profile: Profile = "as_intended",
    batch_size: int = 32,
    optim: Optim = ASCENT,
) -> Recipe:
    """``min -mean loss(forget)``, in stored order (``grad_ascent_small``).

    Args:
        use_mask: Restrict the change to a saliency mask.
        mask_thr: Fraction of weights that may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step, and per backward pass of the mask.
        optim: Optimiser and loop settings.
    """
    objective = GradientAscent(schedule=Single(role="forget", batch_size=batch_size, shuffle=False))
    return _recipe("deepdive_ga_small", objective, use_mask, mask_thr, profile, batch_size, optim)
