"""SLUG: one layer of a two-tower model, one step along the forget gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Profile
from expunge.recipe import Optim, Recipe
from expunge.slug.edit import INFO, SLUG
from expunge.slug.search import Method
from expunge.spaces.layers import AllWeights

#: There is no loop; these settings are not used.
OPTIM = Optim()


@method("slug", INFO)
def slug(
    *,
    towers: Literal["vision", "language", "both"] = "both",
    layers: Literal["front", "all", "deepest", "random"] | tuple[str, ...] = "front",
    group: Literal["tensor", "qkv", "mlp", "qkv+mlp"] = "tensor",
    norms: Literal["include", "exclude"] = "exclude",
    forget_text: Literal["caption", "name"] = "caption",
    concept: str = "",
    retain_batch: Annotated[int, Field(ge=2)] | None = None,
    retain_limit: Annotated[int, Field(ge=2)] | None = None,
    search: Method = "log_bisection",
    budget: Annotated[int, Field(ge=1)] | None = None,
    target: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    top_k: Annotated[int, Field(ge=1)] | None = None,
    utility_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.05,
    utility_axes: Literal["own", "all"] = "all",
    forget_images: Annotated[int, Field(ge=1)] = 200,
    utility_images: Annotated[int, Field(ge=1)] = 500,
    batch_size: Annotated[int, Field(ge=2)] = 64,
    hidden_state: Annotated[int, Field(le=-1)] = -1,
    direction: Literal["ascent", "descent"] = "ascent",
    one_layer_each: bool = False,
    on_infeasible: Literal["error", "best"] = "error",
    profile: Profile = "as_intended",
    memory: Annotated[int, Field(ge=0)] = 1 << 31,
    cache: str | None = None,
    optim: Optim = OPTIM,
) -> Recipe:
    """``theta_l <- theta_l + lambda grad L_f`` for one layer ``l``, with ``L_f = mean (1 - cos)`` of the forget pairs.

    Source: Cai et al., algorithms 1 to 3; code ``src/clip/unlearn_slug.py``. The layer comes from the Pareto front of
    importance ``|g_f| / |theta|`` (large) and alignment ``|cos(g_f, g_r)|`` (small), each tower on its own; the step
    is the smallest that brings the accuracy of what shall be forgotten to ``target``, in units of
    ``alpha = lambda |g_f| / |theta|``. Among several layers the one with the lowest forget accuracy wins, then the
    highest utility, then the smallest step.

    Deviates:
        ``lambda > 0`` raises ``L_f``, and that sign is checked. The public transformers scripts multiply the same
        gradient by a negative number: ``direction = "descent"``. The search minds the utility on retained classes and
        returns a step that was tried, or refuses. ``profile = "as_published"`` accumulates gradients as the scripts do
        (for transformers models never cleared and with every caption replaced by the concept's name), runs ten probes
        by arithmetic bisection on the top-5 accuracy alone, and takes the deepest layer by their rule; ``search``,
        ``utility_drop``, ``norms`` of open_clip models and ``forget_text`` of transformers models are then fixed.

    Args:
        towers: Towers whose layers may be chosen.
        layers: ``front``: search a step for every layer of the fronts; ``all``: for every candidate, on a front or not;
            ``deepest``: for the deepest one of each front;
            ``random``: for one candidate drawn at random (the control); or names of tensors.
        group: What moves together with the picked tensor, by the same ``lambda``: ``tensor`` nothing, ``qkv`` all of q,
            k and v, ``mlp`` both matrices of the MLP, ``qkv+mlp`` either.
        norms: Whether weights of normalisation layers may be chosen.
        forget_text: Texts of the forget pairs: their captions, or the concept's ``name`` for all, which makes changes
            of the language tower low-rank.
        concept: The concept's name in words, for requests that do not name one class.
        retain_batch: Pairs per contrastive batch of the retain loss; null: all of them in one, exactly.
        retain_limit: Use at most so many retain pairs for the gradient.
        search: ``log_bisection``, or the published ``bisection`` or ``uncanvas`` loop.
        budget: Probes per layer, by default 24, 10 or 11.
        target: Forget accuracy to reach.
        top_k: The forget accuracy counts the top ``k`` classes; by default 5 from 50 classes on (as published), else 1.
        utility_drop: Share of the utility (top-1 accuracy on retained images) that may be lost; null: any.
        utility_axes: The utility is the mean over ``all`` label axes of the data, or that of the task's ``own``.
        forget_images: Forget images that the search looks at, per concept, from the training set.
        utility_images: Retained images that the search looks at, from the training set.
        batch_size: Pairs per pass of the gradients. With ``as_published`` it changes the result.
        hidden_state: -1: the embedding counts. -2, -3 ...: another model reads this hidden state of the one tower
            named by ``towers``; layers behind it are left out.
        direction: ``ascent``, or ``descent`` to reproduce the public transformers scripts.
        one_layer_each: Several classes: each with its own gradient, layer and step. If the changes together do not
            meet the criterion, all steps are multiplied by a common factor that is searched for.
        on_infeasible: ``error``, or ``best``: take the best trade-off of forgetting and utility that was tried.
        profile: ``as_intended`` or ``as_published``.
        memory: Bytes that cached states of one tower may take during the search.
        cache: Folder where gradients are kept between runs.
        optim: Not used: there is no loop.
    """
    edit = SLUG(
        towers=towers,
        layers=layers,
        group=group,
        norms=norms,
        forget_text=forget_text,
        concept=concept,
        retain_batch=retain_batch,
        retain_limit=retain_limit,
        search=search,
        budget=budget,
        target=target,
        top_k=top_k,
        utility_drop=utility_drop,
        utility_axes=utility_axes,
        forget_images=forget_images,
        utility_images=utility_images,
        batch_size=batch_size,
        hidden_state=hidden_state,
        direction=direction,
        one_layer_each=one_layer_each,
        on_infeasible=on_infeasible,
        profile=profile,
        memory=memory,
        cache=cache,
    )
    return Recipe(name="slug", edit=edit, space=AllWeights(), optim=optim)
