"""Debiasing by Unified Concept Editing: prompts that leave an attribute open draw its values in wanted shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.context import Context
from expunge.diffusion import uce as pure
from expunge.diffusion.asks import Ask, repeated
from expunge.edits.base import Edit
from expunge.errors import CapabilityError, NoEffectError
from expunge.method import method
from expunge.methods._concepts import concept_names
from expunge.methods._uce import CODE, PAPER, cross_maps, prompt_states
from expunge.part import part
from expunge.patch.changes import Change
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import OpenSpace
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.concepts import plain
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

#: There is no loop; these settings are not used.
OPTIM = Optim()

INFO = Info(
    "Edit keys and values of cross-attention until a prompt draws every value of an attribute in wanted shares.",
    paper=PAPER,
    upstream=CODE,
    needs=("diffusion", "text"),
    deviations=(
        "images are named by the task's judge; the code asks a two-tower model",
        "the same noise in every round, so that rounds differ by the edit alone",
        "the size of a step is used; the script accepts one and ignores it: `profile`",
    ),
)


@part("uce_debias", INFO)
class UCEDebias(Edit):
    """Rounds of measuring shares of attributes and editing the original maps with guides ``c + sum_k gap_k a_k``.

    Args:
        attributes: Values of the attribute, classes of one axis of the task's judge.
        concepts: What is debiased, in words; by default the names of the request.
        desired: Wanted shares of the attributes, the same for every concept; by default equal ones.
        prompt: What is drawn, with ``{}`` where the concept goes.
        images: Images per concept and round.
        preserve: Prompts whose outputs stay; the empty prompt by default.
        step_size: Factor of every round's addition.
        tolerance: Stop when every share is that close.
        max_rounds: Most rounds of editing.
        edit_scale: Weight of the concepts.
        preserve_scale: Weight of the preserved prompts.
        lamb: How much the maps resist.
    """

    attributes: tuple[str, ...] = Field(default=("male", "female"), min_length=2)
    concepts: tuple[str, ...] = ()
    desired: tuple[float, ...] = ()
    prompt: str = "{}"
    images: int = Field(default=10, ge=1)
    preserve: tuple[str, ...] = ("",)
    step_size: float = Field(default=0.1, gt=0)
    tolerance: float = Field(default=0.05, gt=0)
    max_rounds: int = Field(default=30, ge=1)
    edit_scale: float = Field(default=1.0, gt=0)
    preserve_scale: float = Field(default=1.0, ge=0)
    lamb: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> UCEDebias:
        if self.desired and len(self.desired) != len(self.attributes):
            raise ValueError(f"{len(self.desired)} wanted shares for {len(self.attributes)} attributes")
        if self.desired and (min(self.desired) < 0 or abs(sum(self.desired) - 1) > 1e-6):
            raise ValueError(f"wanted shares are not negative and add up to 1, not {list(self.desired)}")
        if self.prompt.count("{}") != 1:
            raise ValueError(f"'prompt' holds {{}} once, where the concept goes, not {self.prompt!r}")
        return self

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """The changes after the last round; what was measured in every round as findings.

        Raises:
            CapabilityError: The task has no text or no judge, or the judge does not know the attributes.
            NoEffectError: The shares are already as wanted.
        """
        task = text_task(ctx.task, "uce_debias")
        axis, columns = self._axis(task)
        maps, names = cross_maps(space), concept_names(task, ctx, self.concepts)
        states = prompt_states(task, [*names, *self.attributes, *self.preserve])
        concepts, attributes = (_last([states[t] for t in texts]) for texts in (names, self.attributes))
        asks = [
            ask
            for case, name in enumerate(names)
            for ask in repeated([Ask(self.prompt.format(name), ctx.key("debias") % 2**31, case)], self.images)
        ]
        shares = self.desired or (1 / len(self.attributes),) * len(self.attributes)
        desired = torch.tensor([shares] * len(names), dtype=torch.float64)

        def measure(changes: Mapping[str, Change]) -> Tensor:
            with _changed(space, changes):
                seen = task.judge(task.sample(asks))[axis].cpu()  # type: ignore[misc]
            chosen = seen[:, columns].argmax(1).reshape(len(names), self.images)
            return torch.nn.functional.one_hot(chosen, len(columns)).double().mean(1)

        found = pure.debias(
            maps,
            concepts,
            attributes,
            desired,
            measure,
            pure.preserved([states[p] for p in self.preserve]) if self.preserve else None,
            step_size=self.step_size,
            tolerance=self.tolerance,
            max_rounds=self.max_rounds,
            edit_scale=self.edit_scale,
            preserve_scale=self.preserve_scale,
            lamb=self.lamb,
        )
        ctx.findings["uce_debias"] = {
            "concepts": names,
            "attributes": list(self.attributes),
            "shares": [(desired - gap).tolist() for gap in found.gaps],
            "converged": found.converged,
        }
        if found.solved is None:
            raise NoEffectError(f"uce_debias has nothing to do: all shares are within {self.tolerance:g} of the wanted")
        if not found.converged:
            ctx.note(f"shares are not within {self.tolerance:g} of the wanted ones after {self.max_rounds} rounds")
        return found.solved.changes

    def _axis(self, task: TextToImageTask) -> tuple[str, list[int]]:
        """The judge's axis that has the attributes, and their numbers on it."""
        if task.judge is None:
            raise CapabilityError("uce_debias needs a judge that names what images show; this task has none")
        wanted = [plain(a) for a in self.attributes]
        for axis, classes in task.judge.classes.items():
            names = [plain(c) for c in classes]
            if set(wanted) <= set(names):
                return axis, [names.index(a) for a in wanted]
        known = "; ".join(f"{axis}: {', '.join(c)}" for axis, c in task.judge.classes.items())
        raise CapabilityError(f"the judge does not know all of {', '.join(self.attributes)} on one axis ({known})")


def _last(prompts: Sequence[pure.Prompt]) -> Tensor:
    return torch.stack([p.states[p.last] for p in prompts])


@contextmanager
def _changed(space: OpenSpace, changes: Mapping[str, Change]) -> Iterator[None]:
    """The space's parameters with changes for a while."""
    before = {n: space.parameters[n].data for n in changes}
    try:
        for name, change in changes.items():
            space.parameters[name].data = pure.applied(before[name], change)
        yield
    finally:
        for name, data in before.items():
            space.parameters[name].data = data


@method("uce_debias", INFO)
def uce_debias(
    *,
    attributes: tuple[str, ...] = ("male", "female"),
    concepts: tuple[str, ...] = (),
    desired: tuple[float, ...] = (),
    prompt: str = "{}",
    images: Annotated[int, Field(ge=1)] = 10,
    preserve: tuple[str, ...] = ("",),
    step_size: Annotated[float, Field(gt=0)] = 0.1,
    tolerance: Annotated[float, Field(gt=0)] = 0.05,
    max_rounds: Annotated[int, Field(ge=1)] = 30,
    lamb: Annotated[float, Field(gt=0)] = 0.5,
    profile: Literal["as_intended", "as_published"] = "as_intended",
    optim: Optim = OPTIM,
) -> Recipe:
    """``W' c = W (c + sum_k s_k a_k)`` where ``s_k`` adds up, over the rounds, wanted less measured shares.

    Source: Gandikota et al., debiasing; code ``trainscripts/uce_sd_debias.py``. Every round solves from the original
    maps again.

    Deviates:
        See the card. ``as_published``: steps of size 1 whatever ``step_size`` says.

    Args:
        attributes: Values of the attribute, classes of one axis of the task's judge.
        concepts: What is debiased, in words (``doctor``); by default the names of the request.
        desired: Wanted shares of the attributes; by default equal ones.
        prompt: What is drawn to measure them, with ``{}`` where the concept goes.
        images: Images per concept and round.
        preserve: Prompts whose outputs stay; the empty prompt by default.
        step_size: Factor of every round's addition.
        tolerance: Stop when every share is that close.
        max_rounds: Most rounds of editing.
        lamb: How much the maps resist.
        profile: ``as_intended`` or ``as_published``.
        optim: Not used: there is no loop.
    """
    edit = UCEDebias(
        attributes=attributes,
        concepts=concepts,
        desired=desired,
        prompt=prompt,
        images=images,
        preserve=preserve,
        step_size=1.0 if profile == "as_published" else step_size,
        tolerance=tolerance,
        max_rounds=max_rounds,
        lamb=lamb,
    )
    return Recipe(name="uce_debias", edit=edit, space=UNetSet(parameters="kv"), optim=optim)
