"""The frame that the four SalUn_DeepDive methods share."""

from __future__ import annotations

from expunge.methods._common import DEEPDIVE_CODE, DEEPDIVE_COMMIT, SALUN_PAPER, Profile, as_trained
from expunge.objectives.base import Objective
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import Space
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask


def info(summary: str, needs: tuple[str, ...], *deviations: str) -> Info:
    """The card of a DeepDive method."""
    return Info(
        summary,
        paper=SALUN_PAPER + "; SalUn_DeepDive, 2024",
        upstream=DEEPDIVE_CODE,
        commit=DEEPDIVE_COMMIT,
        needs=needs,
        deviations=(
            *deviations,
            "the gradient that the mask pass leaves behind is not added to the first step: `profile`",
            "normalisation statistics are frozen: `profile`",
        ),
    )


def recipe(
    name: str,
    objective: Objective,
    *,
    use_mask: bool,
    mask_thr: float,
    profile: Profile,
    batch_size: int,
    optim: Optim,
) -> Recipe:
    """A DeepDive recipe: the objective, masked or not."""
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
