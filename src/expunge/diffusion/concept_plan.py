"""What erasing several concepts will be: a request and a recipe for each, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.context import Context
from expunge.digest import named_tensors, state_digests
from expunge.errors import ArtifactError, ConfigError, RequestError
from expunge.patch import Patch
from expunge.patch.apply import applied, check_base
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.restore import evaluating
from expunge.spaces.concept_shift import FINDINGS, ConceptShift
from expunge.tasks.concepts import plain
from expunge.tasks.text_to_image import TextToImageTask

#: Which prompts of the other concepts are protected: every wording, or the first of each concept.
Wordings = Literal["all", "first"]


@dataclass(frozen=True)
class ConceptPlan:
    """How several concepts will be erased.

    Args:
        requests: What is to be erased, by concept, in order.
        recipes: How; their spaces protect the other concepts.
        earlier: Patches of concepts that were erased before.
        prompts: Of all concepts, earlier ones first.
        always: Prompts that every shift protects exactly.
    """

    requests: Mapping[str, ForgetRequest]
    recipes: Mapping[str, Recipe]
    earlier: Mapping[str, Patch]
    prompts: Mapping[str, Sequence[str]]
    always: Sequence[str]


@dataclass(frozen=True)
class Room:
    """What the protected prompts leave a concept.

    Args:
        directions: Number of directions that exact protection leaves.
        used: Number of those that the shift uses.
        width: Of the text states.
        protected: Number of prompts that are protected exactly.
        erasable: Share of the concept's energy that lies in the directions, if known.
        notes: The same in words, and warnings.
    """

    directions: int
    used: int
    width: int
    protected: int
    erasable: float | None
    notes: tuple[str, ...]


def plan_concepts(
    task: TextToImageTask,
    concepts: Sequence[str | ForgetRequest],
    recipe: Recipe,
    *,
    earlier: Mapping[str, Patch] | None = None,
    wordings: Wordings = "all",
) -> ConceptPlan:
    """Requests and recipes of several concepts; see :func:`~expunge.diffusion.concepts.erase_concepts`.

    ``prompts`` of the objective, if there are some, hold ``{}`` for the concept's name (``a {}``); they are then what
    is trained on and what the others protect, in place of all the task's wordings.

    Raises:
        ConfigError: A recipe of another kind, or a model with patches.
        RequestError: A concept is named twice, or does not fit the data.
    """
    space = recipe.space
    if not isinstance(space, ConceptShift):
        raise ConfigError(f"separate patches need the space 'concept_shift', not '{space.part_name}'")
    templates: tuple[str, ...] = getattr(recipe.objective, "prompts", ())
    fixed = [t for t in templates if "{}" not in t]
    if fixed:
        raise ConfigError(
            f"'{fixed[0]}' among the objective's 'prompts' is that of one concept; write {{}} for its name, as in "
            "'a {}'"
        )
    if applied(task.model):
        raise ConfigError("the model carries patches; `revert` them first, for every concept starts at the original")
    before = dict(earlier or {})
    asked = _asked(concepts)
    repeated = [n for n in asked if n in before]
    if repeated:
        raise RequestError(f"there is an earlier patch of '{repeated[0]}' already")
    digests = state_digests(named_tensors(task.model)[0]) if before else {}
    for name, patch in before.items():
        try:
            check_base(digests, patch)
        except ArtifactError as error:
            raise ArtifactError(f"the earlier patch of '{name}': {error}") from None
    requests = {n: ForgetRequest(**p.manifest.request) for n, p in before.items()} | asked
    wordings_of = {n: task.concept_prompts(task.split(r)) for n, r in requests.items()}
    prompts = {n: [t.replace("{}", plain(n, lower=False)) for t in templates] or p for n, p in wordings_of.items()}
    shown = {n: p if wordings == "all" else p[:1] for n, p in prompts.items()}
    recipes = {}
    for name in asked:
        others = [p for n in prompts if n != name for p in shown[n]]
        own = {*prompts[name], *wordings_of[name]}
        protect = tuple(p for p in dict.fromkeys([*space.protect, *others]) if p not in own)
        recipes[name] = recipe.replace(space=space.model_copy(update={"protect": protect}))
        if templates:
            filled = {**recipes[name].describe()["objective"], "prompts": prompts[name]}
            recipes[name] = recipes[name].replace(objective=filled)
    return ConceptPlan(asked, recipes, before, prompts, ["", *space.protect, *space.watermarks])


def _asked(concepts: Sequence[str | ForgetRequest]) -> dict[str, ForgetRequest]:
    found: dict[str, ForgetRequest] = {}
    for concept in concepts:
        request = ForgetRequest.concept(concept) if isinstance(concept, str) else concept
        name = concept if isinstance(concept, str) else request.title
        if name in found:
            raise RequestError(f"the concept '{name}' is named twice")
        found[name] = request
    if not found:
        raise RequestError("no concept is named")
    return found


def rooms(task: TextToImageTask, plan: ConceptPlan) -> dict[str, Room]:
    """How many directions are left for every concept, before the first of them is trained.

    Raises:
        RequestError: None are; the concept is named.
    """
    found = {}
    for name, request in plan.requests.items():
        ctx = Context(task, task.split(request))
        space = plan.recipes[name].space
        assert isinstance(space, ConceptShift)
        with evaluating(task.model):
            try:
                space.plan(ctx)
            except RequestError as error:
                raise RequestError(f"'{name}': {error}") from None
        facts = ctx.findings[FINDINGS]
        found[name] = Room(
            facts["directions"],
            facts["used"],
            facts["width"],
            len(facts["protected"]),
            facts.get("erasable"),
            tuple(ctx.notes),
        )
    return found
