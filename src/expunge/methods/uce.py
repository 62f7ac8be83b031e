"""Unified Concept Editing: new keys and values of cross-attention in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.context import Context
from expunge.diffusion import uce as pure
from expunge.diffusion.captions import MODERATION, expanded, replaced_caption
from expunge.edits.base import Edit
from expunge.errors import ConfigError, RequestError
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
    "Map what the concept's prompts say to what guide prompts say, in the keys and values of cross-attention.",
    paper=PAPER,
    upstream=CODE,
    needs=("diffusion", "text"),
    deviations=(
        "solved in float64 by Cholesky factorisation; the code inverts in float32",
        "other classes and the empty prompt are preserved unless a list is given; the script then preserves nothing",
        "the change is stored by its factors, of at most as many columns as states are edited",
    ),
    aliases=("unified_concept_editing",),
)


@part("uce", INFO)
class UCE(Edit):
    """``min s_e sum |W' c - W g|^2 + s_p sum |W' p - W p|^2 + lambda |W' - W|^2`` for every key and value map ``W``.

    Args:
        concepts: What goes, in words; by default the names of the request. Several are edited at once.
        guides: What each becomes; one for all, or as many as there are concepts.
        texts: ``names``: concepts and guides are edited as they stand. ``prompts``: every prompt that the task has for
            a class, guided by the same prompt with the guide in place of the class' name.
        preserve: Prompts whose outputs stay. By default the names (or the prompts) of the task's other classes, and the
            empty prompt.
        expand: Add five templates to every concept and guide, those for ``art`` or for an ``object``.
        moderate: Also edit the eleven unwanted concepts of the 2023 script, towards the first guide.
        rows: States that a prompt contributes: ``last`` = of its last token; ``span`` = from there to the end (with all
            states of preserved prompts); ``all``.
        technique: ``replace``, or ``tensor``: the guide's outputs less their part along the concept's own.
        erase_scale: ``s_e``.
        preserve_scale: ``s_p``; null: one over the number of preserved prompts, at least a tenth (2023 script).
        lamb: ``lambda``.
    """

    full_precision: ClassVar[bool] = False
    concepts: tuple[str, ...] = ()
    guides: tuple[str, ...] = Field(default=("",), min_length=1)
    texts: Literal["names", "prompts"] = "names"
    preserve: tuple[str, ...] | None = None
    expand: Literal["art", "object"] | None = None
    moderate: bool = False
    rows: pure.Rows = "last"
    technique: pure.Technique = "replace"
    erase_scale: float = Field(default=1.0, gt=0)
    preserve_scale: float | None = Field(default=1.0, ge=0)
    lamb: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> UCE:
        if self.concepts and len(self.guides) > 1:
            _check_guides(self.guides, self.concepts)
        if self.texts == "prompts" and self.expand is not None:
            raise ValueError("'expand' adds templates to names; with texts 'prompts' the task's own are taken")
        return self

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """The changes of the maps, and what they reach as findings.

        Raises:
            CapabilityError: The task has no text, or the request names no concept.
            ConfigError: The space has no key or value of cross-attention, or restricts single weights.
        """
        task = text_task(ctx.task, "uce")
        maps = cross_maps(space)
        pairs = self._pairs(task, ctx)
        kept = self._preserved(task, ctx)
        prompts = prompt_states(task, [*(p for pair in pairs for p in pair), *kept])
        states = [pure.pair(prompts[c], prompts[g], self.rows) for c, g in pairs]
        scale = pure.default_preserve_scale(max(1, len(kept))) if self.preserve_scale is None else self.preserve_scale
        solved = pure.edit(
            maps,
            states,
            pure.preserved([prompts[p] for p in kept], self.rows) if kept else None,
            erase_scale=self.erase_scale,
            preserve_scale=scale,
            lamb=self.lamb,
            technique=self.technique,
        )
        ctx.findings["uce"] = {
            "edits": [{"concept": c, "guide": g} for c, g in pairs],
            "preserved": kept,
            "maps": len(maps),
            "rank": solved.rank,
            "condition": solved.condition,
            **_reached(maps, solved.changes, states, [prompts[p] for p in kept]),
        }
        return solved.changes

    def _pairs(self, task: TextToImageTask, ctx: Context) -> list[tuple[str, str]]:
        concepts = concept_names(task, ctx, self.concepts)
        guides = list(self.guides) * (len(concepts) if len(self.guides) == 1 else 1)
        _check_guides(guides, concepts)
        pairs = list(zip(concepts, guides, strict=True))
        if self.texts == "prompts":
            prompts = task.prompts()
            pairs = [(p, _guided(p, c, g)) for c, g in pairs for p in prompts[_class_of(task, c)]]
        if self.moderate:
            pairs += [(c, self.guides[0]) for c in MODERATION]
        if self.expand is None:
            return pairs
        kind = self.expand
        return [
            pair for c, g in pairs for pair in zip(expanded(c, kind), expanded(g, kind) if g else [""] * 6, strict=True)
        ]

    def _preserved(self, task: TextToImageTask, ctx: Context) -> list[str]:
        if self.preserve is not None:
            return list(dict.fromkeys(self.preserve))
        names = [plain(n, lower=False) for n in task.classes]
        gone = {*concept_names(task, ctx, self.concepts), *(names[c] for c in ctx.split.removed)}
        kept = [c for c, n in enumerate(names) if n not in gone]
        if self.texts == "names":
            return [*(names[c] for c in kept), ""]
        prompts = task.prompts()
        return [*(p for c in kept for p in prompts[c]), ""]


def _check_guides(guides: Sequence[str], concepts: Sequence[str]) -> None:
    if len(guides) != len(concepts):
        raise ConfigError(f"{len(guides)} guides for {len(concepts)} concepts; give one, or one for each")


def _class_of(task: TextToImageTask, name: str) -> int:
    names = [plain(n) for n in task.classes]
    if plain(name) not in names:
        raise RequestError(f"'{name}' is no class of this task, so it has no prompts; take texts 'names'")
    return names.index(plain(name))


def _guided(prompt: str, concept: str, guide: str) -> str:
    """The prompt with the guide in place of the concept; without either if the guide is empty."""
    return " ".join(replaced_caption(prompt, concept, guide).split())


def _reached(
    maps: Mapping[str, Tensor],
    changes: Mapping[str, Change],
    pairs: Sequence[pure.Pair],
    kept: Sequence[pure.Prompt],
) -> dict[str, Any]:
    """Largest share, over the maps, of the way to the guides that is left, and of the preserved outputs that moved."""
    edit, guide = (torch.cat([getattr(p, side).double() for p in pairs]) for side in ("edit", "guide"))
    last = torch.stack([p.states[p.last].double() for p in kept]) if kept else edit[:0]
    left, moved = 0.0, 0.0
    for name, old in maps.items():
        before = old.double().cpu()
        after = pure.applied(old.double().cpu(), changes.get(name))
        way = ((guide - edit) @ before.T).norm()
        if way > 0:
            left = max(left, float((guide @ before.T - edit @ after.T).norm() / way))
        if len(last):
            moved = max(moved, float((last @ (after - before).T).norm() / (last @ before.T).norm()))
    return {"left_to_guides": left, "moved_of_preserved": moved}


@method("uce", INFO)
def uce(
    *,
    concepts: tuple[str, ...] = (),
    guides: tuple[str, ...] = ("",),
    texts: Literal["names", "prompts"] = "names",
    preserve: tuple[str, ...] | None = None,
    expand: Literal["art", "object"] | None = None,
    moderate: bool = False,
    rows: Literal["last", "span", "all"] | None = None,
    technique: Literal["replace", "tensor"] = "replace",
    erase_scale: Annotated[float, Field(gt=0)] = 1.0,
    preserve_scale: Annotated[float, Field(ge=0)] | None = None,
    lamb: Annotated[float, Field(gt=0)] = 0.5,
    profile: Literal["diffusers-2025", "paper"] = "diffusers-2025",
    optim: Optim = OPTIM,
) -> Recipe:
    """``W' = (lambda W + s_e sum W g c^T + s_p sum W p p^T)(lambda I + s_e sum c c^T + s_p sum p p^T)^-1``.

    Source: Gandikota et al., equation 7; code ``trainscripts/uce_sd_erase.py``, and ``train-scripts/train_erase.py`` of
    2023. All concepts of a request are edited at once; one after the other is another problem.

    Deviates:
        See the card. ``diffusers-2025``: one state per prompt, ``s_p`` 1. ``paper`` (2023 script): states from the last
        token to the end, ``s_p`` one over the number of preserved prompts, at least 0.1.

    Args:
        concepts: What goes, in words; by default the names of the request.
        guides: What each becomes; one for all, or as many as there are concepts (``art`` for styles).
        texts: ``names``, or ``prompts``: every prompt that the task has for a class, guided by the same prompt with the
            guide in place of the class' name. Erases more thoroughly where prompts follow templates.
        preserve: Prompts whose outputs stay; by default the task's other classes, and the empty prompt.
        expand: Add five templates to every concept and guide, those for ``art`` or for an ``object``.
        moderate: Also edit eleven unwanted concepts (hate, violence, nudity ...).
        rows: States that a prompt contributes: ``last``, ``span`` or ``all``; by default as the profile has it, ``all``
            for ``prompts``.
        technique: ``replace``, or ``tensor``: the guide's outputs less their part along the concept's own.
        erase_scale: ``s_e``.
        preserve_scale: ``s_p``; by default as the profile has it.
        lamb: ``lambda``, how much the maps resist.
        profile: Which generation of the code the defaults follow.
        optim: Not used: there is no loop.
    """
    current = profile == "diffusers-2025"
    edit = UCE(
        concepts=concepts,
        guides=guides,
        texts=texts,
        preserve=preserve,
        expand=expand,
        moderate=moderate,
        rows=rows or ("all" if texts == "prompts" else "last" if current else "span"),
        technique=technique,
        erase_scale=erase_scale,
        preserve_scale=1.0 if preserve_scale is None and current else preserve_scale,
        lamb=lamb,
    )
    return Recipe(name="uce", edit=edit, space=UNetSet(parameters="kv"), optim=optim)
