"""SRS-ME: erase a concept in directions that protected prompts do not see; every concept is a patch of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.diffusion.nullspace import TOLERANCE
from expunge.method import method
from expunge.methods._common import Profile
from expunge.objectives.concept_correlation import ConceptCorrelation
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired
from expunge.spaces.concept_shift import CODE, COMMIT, PAPER, ConceptShift

#: As in the public README; the defaults of its code make the method do next to nothing.
OPTIM = Optim(name="adam", lr=0.1, weight_decay=0.0, epochs=1000, max_steps=1000)


@method(
    "srs_me",
    Info(
        "Erase a concept by changes of keys and values that protected prompts do not see: separable and recoverable.",
        paper=PAPER,
        upstream=CODE,
        commit=COMMIT,
        needs=("diffusion", "text"),
        deviations=(
            "an orthonormal basis of the null space from a float64 SVD, gradients cleared at every step",
            "the stop rule counts from the first step, and the step that crosses it makes no update",
            "one U-Net: the teacher is the same one with the shift off, and only the concept's own pass is graded",
            "samples are shuffled, and seen again if there are fewer than steps",
            "`profile = 'as_published'` restores the basis, the summed gradients, the stop rule and one pass in order",
        ),
        aliases=("sepme", "separable_multi_concept_erasure"),
    ),
)
def srs_me(
    *,
    images: Literal["forget", "concept"] = "forget",
    protect: tuple[str, ...] = (),
    watermarks: tuple[str, ...] = (),
    protect_others: bool = True,
    others_tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None,
    prompts: tuple[str, ...] = (),
    against: str = "",
    beta: Annotated[float, Field(gt=0)] = 1e-4,
    lambda_l1: Annotated[float, Field(ge=0)] = 1e-6,
    threshold: float | None = 1e-4,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    statistic: Literal["correlation", "ratio"] = "correlation",
    tolerance: Annotated[float, Field(gt=0, lt=1)] = TOLERANCE,
    directions: Literal["all", "concept"] = "all",
    profile: Profile = "as_intended",
    batch_size: Annotated[int, Field(ge=1)] = 1,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min_Omega mean(r_u * r_o) + lambda_l1 mean_l ||dW_l||_1`` with ``dW_l = beta Omega_l S``, ``E S^T = 0``.

    ``r = eps(x_t, concept) - eps(x_t, '')`` of the unlearned and the original model, ``E`` the token states of the
    protected prompts. Source: SRS-ME, sections 4.1 and 4.2. Several concepts at once:
    :func:`expunge.diffusion.concepts.erase_concepts`.

    Deviates:
        See the card. ``as_published`` follows the code at the recorded commit, with the settings of its README.

    Args:
        images: What is noised: the ``forget`` images, or images that the original model draws for the ``concept``.
        protect: Prompts that stay exactly as they are, beside the empty one.
        watermarks: Further such prompts.
        protect_others: Protect the task's other classes too, by their first prompts.
        others_tolerance: Spare the other classes only to this fraction of the largest singular value of their states;
            everything else stays exact. 0.01 fits where exact protection of all classes does not.
        prompts: What the samples show, in turn; by default the prompts of the request.
        against: The prompt without the concept; protect it, or a step costs twice as much.
        beta: Factor of the coefficients.
        lambda_l1: Weight of the l1 norm of the change.
        threshold: Stop when the running mean of the loss is below; null: never.
        momentum: Of the running mean.
        statistic: Stop on the ``correlation`` itself, or on its ``ratio`` to that of the original model.
        tolerance: Of the null space; above 1e-6 more prompts fit, and leak.
        directions: ``all`` that are left, or those that the ``concept`` sees: a smaller patch, less change elsewhere.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    objective = ConceptCorrelation(
        schedule=Paired(streams=(images,), batch_size=batch_size, shuffle=not published),
        prompts=prompts,
        against=against,
        lambda_l1=lambda_l1,
        threshold=threshold,
        momentum=momentum,
        statistic=statistic,
        published_stop=published,
    )
    space = ConceptShift(
        protect=protect,
        watermarks=watermarks,
        protect_others=protect_others,
        others_tolerance=others_tolerance,
        beta=beta,
        tolerance=tolerance,
        directions=directions,
        basis="elimination" if published else "orthonormal",
        accumulate=published,
    )
    optim = optim.model_copy(update={"epochs": 1}) if published and optim.epochs == OPTIM.epochs else optim
    return Recipe(name="srs_me", objective=objective, space=space, optim=optim)
