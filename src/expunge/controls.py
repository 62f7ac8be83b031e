"""Models to measure, and the controls that a recipe asks for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.errors import ExpungeError
from expunge.patch import Patch
from expunge.recipe import Recipe
from expunge.report.model import Role
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.base import Task

CONTROL_NOTES = {
    "lr = 0": "the same loop without taking a step",
    "random mask": "the same run with a random mask of the same size",
}


@dataclass(frozen=True)
class Candidate:
    """One model to measure, as a patch on the base.

    Args:
        name: Shown name.
        patch: ``None`` is the base itself.
        role: ``after``, ``control``, ``baseline`` or ``reference``.
        seconds: Wall-clock time of the run, if known.
        note: What the reader has to know.
        history: Step rows of the run.
    """

    name: str
    patch: Patch | None
    role: Role = "after"
    seconds: float | None = None
    note: str = ""
    history: Sequence[Mapping[str, Any]] = field(default=(), repr=False)


def control_recipes(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """``lr = 0`` for loops, a random mask of the same size for masked recipes, and what an edit names itself.

    With frozen normalisation nothing accumulates at rate 0, so one epoch tells the same as all.
    """
    found = []
    if recipe.edit is not None:
        found += [(name, recipe.replace(edit=edit)) for name, edit in recipe.edit.controls().items()]
    if recipe.objective is not None:
        short = {"epochs": 1} if recipe.optim.norm == "frozen" else {}
        found.append(("lr = 0", recipe.replace(optim={"lr": 0.0, **short})))
    if isinstance(recipe.space, SaliencyMask) and recipe.space.select == "top" and recipe.space.keep < 1:
        space = recipe.space.model_copy(update={"select": "random", "file": None})
        found.append(("random mask", recipe.replace(space=space)))
    return found


def controls(
    task: Task, request: ForgetRequest, recipe: Recipe, *, seed: int = 0, progress: bool = False
) -> list[Candidate]:
    """Run the controls that apply to a recipe.

    See :func:`control_recipes`; ``lr = 0`` shows what the loop does by itself (normalisation statistics).
    A control that fails is reported as such, never left out silently.
    """
    found = []
    for name, control in control_recipes(recipe):
        note = CONTROL_NOTES.get(name, "the same edit, changed in this one respect")
        if name == "random mask" and isinstance(control.space, SaliencyMask):
            note += f" ({100 * control.space.keep:g} % of the weights)"
        variant = control.replace(name=f"{recipe.name}, {name}")
        start = time.perf_counter()
        try:
            patch = unlearn(task, request, variant, seed=seed, allow_no_effect=True, progress=progress)
        except ExpungeError as error:
            found.append(Candidate(name, None, "control", note=f"not run: {error}"))
            continue
        found.append(Candidate(name, patch, "control", time.perf_counter() - start, note))
    return found
