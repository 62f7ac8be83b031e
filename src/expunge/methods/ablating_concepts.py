"""Ablating Concepts: the prediction for the concept's prompts becomes that for an anchor's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from expunge.diffusion.ablation import RECIPES
from expunge.method import method
from expunge.methods._ablation import CODE, DEVIATIONS, PAPER, AblatingConcepts
from expunge.methods._concepts import with_recipe
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired
from expunge.spaces.unet_set import UNetSet

#: Defaults of this method: those of objects and styles on two GPUs, ``2e-6`` times a batch of eight.
OPTIM = Optim(name="adamw", lr=1.6e-5, weight_decay=1e-2, grad_clip=1.0, epochs=100, max_steps=100)

#: The baseline of the SRS-ME repository; ``prior`` is the weight of the anchor's caption.
SRS_ME: Mapping[str, Any] = MappingProxyType(
    {"parameters": "x", "lr": 1e-6, "steps": 50, "batch_size": 1, "prior": 10.0, "place": False}
)


@method(
    "ablating_concepts",
    Info(
        "Train the prediction for captions with the concept to be that for the same captions with an anchor.",
        paper=PAPER,
        upstream=CODE,
        needs=("diffusion", "text"),
        deviations=DEVIATIONS,
        aliases=("ca", "ac", "concept_ablation"),
    ),
)
def ablating_concepts(
    *,
    profile: Literal["object", "style", "memorised", "content", "srs-me"] = "object",
    variant: Literal["model", "noise", "srs-me"] | None = None,
    anchors: Literal["images", "generated"] = "images",
    anchor: str = "",
    captions: tuple[str, ...] = (),
    concepts: tuple[str, ...] = (),
    anchor_images: Annotated[int, Field(ge=1)] = 200,
    prior: Annotated[float, Field(ge=0)] | None = None,
    place: bool | None = None,
    teacher: Literal["current", "frozen"] = "current",
    parameters: str | None = None,
    batch_size: int | None = None,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min |eps(x_t, c) - sg eps(x_t, c*)|^2`` on anchor images ``x``: ``c*`` their caption, ``c`` with the concept.

    Source: Kumari et al., equations of the model-based and the noise-based objective, and of the prior term.

    Deviates:
        See the card. Recipes of the public code by ``profile``, whose rate is multiplied by the batch (8 or 4 images
        over two GPUs): ``object`` 1.6e-5, 100 steps, pictures placed at random; ``style`` the same without; both train
        keys and values of cross-attention. ``memorised``: 2e-6, 400 steps, all weights, prior term; ``content``:
        3.2e-5, 400 steps, all attention, prior term. ``srs-me`` is the baseline of the SRS-ME repository: images of the
        concept, both captions towards the original's prediction for the ``anchor``'s (that one ten times), Adam 1e-6,
        50 steps, cross-attention.

    Args:
        profile: Which recipe, and how captions name the concept: ``object`` (in place of the anchor's name), ``style``
            (``..., in the style of T``), ``memorised`` (the concept is the whole caption), ``content`` (``T, ...``);
            or ``srs-me``.
        variant: ``model``: the goal is the prediction for the anchor's caption; ``noise``: the noise itself;
            ``srs-me``: that of its profile.
        anchors: ``images`` that are retained, or ``generated`` by the original model before the first step.
        anchor: What the anchor is called in captions; by default the name of each image's class.
        captions: Captions of generated anchors; by default the prompts of the other classes.
        concepts: Names of the concept instead of the request's; of several the samples take turns.
        anchor_images: Number of generated anchors.
        prior: Weight of the prior term, 0 for none; by default 1 where the recipe has it.
        place: Paste shrunken pictures or zoom in, and say so in captions; by default as the recipe has it.
        teacher: Whose prediction is the goal: the ``current`` weights', or the ``frozen`` original's.
        parameters: What is trained, if not the recipe's set.
        batch_size: Samples per step, by default the recipe's on two GPUs.
        optim: Optimiser and loop settings.
    """
    theirs = profile == "srs-me"
    published = SRS_ME if theirs else RECIPES[profile]
    size = batch_size or (1 if theirs else 2 * published["batch_size"])
    chosen = variant or ("srs-me" if theirs else "model")
    role = "forget" if chosen == "srs-me" else "retain" if anchors == "images" else "concept"
    objective = AblatingConcepts(
        schedule=Paired(streams=(role,), batch_size=size),
        form="object" if profile == "srs-me" else profile,
        variant=chosen,
        anchor=anchor,
        captions=captions,
        concepts=concepts,
        anchor_images=anchor_images,
        prior=float(published["prior"]) if prior is None else prior,
        place=published["place"] if place is None else place,
        teacher=teacher,
    )
    space = UNetSet(parameters=parameters or published["parameters"])
    other = {"name": "adam", "weight_decay": 0.0, "grad_clip": None} if theirs else {}
    rate = published["lr"] * (1 if theirs else size)
    trained = with_recipe(optim, OPTIM, lr=rate, max_steps=published["steps"], **other)
    return Recipe(name="ablating_concepts", objective=objective, space=space, optim=trained)
