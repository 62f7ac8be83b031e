"""Ablating Concepts: the prediction for the concept's prompts becomes that for an anchor's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from expunge.diffusion.ablation import RECIPES
from expunge.errors import ConfigError
from expunge.method import method
from expunge.methods._ablation import CODE, DEVIATIONS, PAPER, AblatingConcepts
from expunge.methods._concepts import with_recipe
from expunge.models.clip import ClipSpec
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired
from expunge.spaces.base import Space
from expunge.spaces.layers import Layers
from expunge.spaces.unet_set import UNetSet

#: Defaults of this method: those of objects and styles on two GPUs, ``2e-6`` times a batch of eight.
OPTIM = Optim(name="adamw", lr=1.6e-5, weight_decay=1e-2, grad_clip=1.0, epochs=100, max_steps=100)

#: What is trained: the token tables of the text encoders (an option of the CompVis code).
EMBEDDING = "embedding"
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
    anchors: Literal["images", "generated"] | None = None,
    anchor: str = "",
    captions: str | tuple[str, ...] = (),
    concepts: tuple[str, ...] = (),
    anchor_images: Annotated[int, Field(ge=1)] = 200,
    anchor_steps: Annotated[int, Field(ge=1)] | None = None,
    anchor_guidance: Annotated[float, Field(ge=0)] = 6.0,
    exclude_similar_to: str = "",
    threshold: Annotated[float, Field(gt=-1, le=1)] = 0.5,
    similarity: ClipSpec | None = None,
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
        50 steps, cross-attention. ``parameters: embedding`` has no weight decay, which would change the rows of
        words that no caption uses.

    Args:
        profile: Which recipe, and how captions name the concept: ``object`` (in place of the anchor's name), ``style``
            (``..., in the style of T``), ``memorised`` (the concept is the whole caption), ``content`` (``T, ...``);
            or ``srs-me``.
        variant: ``model``: the goal is the prediction for the anchor's caption; ``noise``: the noise itself;
            ``srs-me``: that of its profile.
        anchors: ``images`` that are retained, or ``generated`` by the original model before the first step, which needs
            no images. By default generated where ``captions`` are given.
        anchor: What the anchor is called in captions; by default the name of each image's class, or of the list.
        captions: Captions of generated anchors: the name of a list of the package (``painting``, ``cat``, ``dog``,
            ``fish``, ``robot``, ``person``; 200 each), a text file with one per line, or the captions themselves. By
            default the prompts of the other classes.
        concepts: Names of the concept instead of the request's; of several the samples take turns.
        anchor_images: Number of generated anchors.
        anchor_steps: Steps of the sampler that draws them, by default the task's.
        anchor_guidance: Guidance with which they are drawn; ``content`` has the concept as negative prompt.
        exclude_similar_to: Memorised images: an image file; generated anchors too similar to it are left out.
        threshold: From which cosine of features on an anchor is left out.
        similarity: The two-tower model of these features.
        prior: Weight of the prior term, 0 for none; by default 1 where the recipe has it.
        place: Paste shrunken pictures or zoom in, and say so in captions; by default as the recipe has it.
        teacher: Whose prediction is the goal: the ``current`` weights', or the ``frozen`` original's.
        parameters: What is trained, if not the recipe's set: a set of the U-Net, or ``embedding``, the token tables of
            the text encoders.
        batch_size: Samples per step, by default the recipe's on two GPUs.
        optim: Optimiser and loop settings.
    """
    theirs = profile == "srs-me"
    published = SRS_ME if theirs else RECIPES[profile]
    size = batch_size or (1 if theirs else 2 * published["batch_size"])
    chosen = variant or ("srs-me" if theirs else "model")
    anchors = anchors or ("generated" if captions else "images")
    role = "forget" if chosen == "srs-me" else "retain" if anchors == "images" else "concept"
    objective = AblatingConcepts(
        schedule=Paired(streams=(role,), batch_size=size),
        form="object" if profile == "srs-me" else profile,
        variant=chosen,
        anchor=anchor,
        captions=captions,
        concepts=concepts,
        anchor_images=anchor_images,
        anchor_steps=anchor_steps,
        anchor_guidance=anchor_guidance,
        exclude_similar_to=exclude_similar_to,
        threshold=threshold,
        similarity=similarity,
        prior=float(published["prior"]) if prior is None else prior,
        place=published["place"] if place is None else place,
        teacher=teacher,
    )
    space: Space = UNetSet(parameters=published["parameters"] if parameters in (None, EMBEDDING) else str(parameters))
    if parameters == EMBEDDING:
        if theirs or teacher == "frozen":
            raise ConfigError("parameters 'embedding' changes the text encoder: no frozen teacher, no profile 'srs-me'")
        space = Layers(targets=("text_encoder*.token_embedding",))
    other: dict[str, Any] = {"name": "adam", "weight_decay": 0.0, "grad_clip": None} if theirs else {}
    if parameters == EMBEDDING:
        other = {"weight_decay": 0.0}
    rate = published["lr"] * (1 if theirs else size)
    trained = with_recipe(optim, OPTIM, lr=rate, max_steps=published["steps"], **other)
    return Recipe(name="ablating_concepts", objective=objective, space=space, optim=trained)
