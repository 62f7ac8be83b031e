"""ESD for classes instead of prompts: the prediction for a class becomes the negatively guided one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from expunge.diffusion import esd
from expunge.method import method
from expunge.methods._common import Mixing, make_schedule
from expunge.objectives.conditioning import DenoisingEsd
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import Space
from expunge.spaces.layers import AllWeights, Layers

#: Defaults of this method.
OPTIM = Optim(name="adam", lr=1e-4, weight_decay=0.0, epochs=25, max_steps=1000, grad_clip=1.0)

INFO = Info(
    "Train the prediction for the forgotten class to be the one guided away from it.",
    paper="Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345",
    upstream="rohitgandikota/erasing",
    needs=("forget", "class_condition"),
    deviations=(
        "classes instead of prompts, the null class instead of the empty prompt",
        "noised forget images instead of partially denoised samples of the model",
        "a noise loss on retain samples beside it: `alpha`, `mixing`",
        "the code has no class-conditional form; the target's formula is held to its golden numbers",
    ),
)


@method("class_esd", INFO)
def class_esd(
    *,
    eta: Annotated[float, Field(ge=0)] = 1.0,
    convention: esd.Convention = "paper",
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    mixing: Mixing = "paired",
    targets: tuple[str, ...] = ("*",),
    batch_size: int = 64,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean (eps(x_t, c) - [eps_null - eta (eps_c - eps_null)])^2 + alpha mean loss(retain)``.

    Source: ESD, equation (7), with the class in the place of the prompt; the bracket is of the original model.

    Deviates:
        See the card.

    Args:
        eta: Strength of the negative guidance; 0 for the unconditional prediction.
        convention: ``paper``, ``current`` (the present scripts, whose ``eta`` is larger by one) or ``alternative``.
        alpha: Weight of the retain loss.
        mixing: ``paired``, ``sequential`` or ``forget_only`` (no retain image is read).
        targets: Glob patterns on the parameters that may change.
        batch_size: Samples per step and role.
        optim: Optimiser and loop settings.
    """
    objective = DenoisingEsd(schedule=make_schedule(mixing, batch_size), eta=eta, convention=convention, alpha=alpha)
    space: Space = AllWeights() if targets == ("*",) else Layers(targets=targets)
    return Recipe(name="class_esd", objective=objective, space=space, optim=optim)
