"""Random labels on the forget set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.method import method
from expunge.methods._common import GENTLE, SALUN_CODE, SALUN_COMMIT, Mixing, Profile, as_trained, make_objective
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.layers import AllWeights


@method(
    "random_label",
    Info(
        "Train the forget samples towards random wrong labels, the retain samples towards their own.",
        paper="Golatkar et al., CVPR 2020, arXiv 1911.04933",
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget",),
        deviations=(
            "wrong labels exclude the true one; the code draws from all classes: `profile`",
            "normalisation statistics are frozen, and the learning rate is 5e-4 instead of 0.013: `profile`, `optim`",
            "labels are redrawn per epoch and sample, not per batch",
            "forget and retain samples are shuffled together, not in two passes: `profile`, `mixing`",
        ),
        aliases=("rl",),
    ),
)
def random_label(
    *,
    mixing: Mixing | None = None,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = GENTLE,
) -> Recipe:
    """``min mean loss(forget, y') + alpha * mean loss(retain, y)`` with ``y' != y``.

    Source: SalUn, equation for classifiers; code ``Classification/unlearn/RL.py``.

    Deviates:
        The code has no ``alpha`` (the retain set weighs 1 per step), draws ``y'`` from all classes and updates
        normalisation statistics; ``profile = "as_published"`` restores the last two.

    Args:
        mixing: ``mixed`` (both sets shuffled together, the code's way for CIFAR-100 and TinyImageNet; the default),
            ``sequential`` (its way for CIFAR-10 and SVHN; the default of ``as_published``), ``paired`` (the paper's
            sum, one step) or ``forget_only``.
        alpha: Weight of the retain loss.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step and role.
        optim: Optimiser and loop settings.
    """
    exclude = profile == "as_intended"
    objective = make_objective("random_label", mixing, batch_size, exclude_true=exclude, alpha=alpha)
    return Recipe(name="random_label", objective=objective, space=AllWeights(), optim=as_trained(optim, profile))
