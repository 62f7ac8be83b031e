"""The objective of Ablating Concepts: anchors, captions and losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.diffusion import ablation as pure
from expunge.diffusion.anchor_captions import check_source
from expunge.diffusion.captions import content_caption, place, replaced_caption, style_caption
from expunge.diffusion.latents import decode, encode, lent
from expunge.diffusion.teacher import Teacher
from expunge.errors import ConfigError
from expunge.methods._anchors import Anchors, anchors
from expunge.methods._concepts import captions_of, concept_names, encoded, trains_text
from expunge.models.clip import ClipSpec
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import Paired, Schedule
from expunge.tasks.base import Batch
from expunge.tasks.concepts import plain
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

PAPER = "Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516"
CODE = "nupurkmr9/concept-ablation"
DEVIATIONS = (
    "anchors may be retained images with their own captions; the code always generates them: `anchors`",
    "names are replaced as whole words, and a caption without the anchor's name is an error",
    "losses are means over channels; the diffusers script sums them, which changes the weight of the prior term",
    "both forms of style captions are equally likely; the diffusers script has one of them twice",
    "drawn anchors come from the task's sampler (DDIM) with guidance 6; the code: DPM-Solver++, 25 steps",
    "200 anchors are drawn by default, one per caption of a list; the code draws 1000: `anchor_images`",
    "captions come from lists of this package, files or the data; the code has its own lists or asks a language model",
    "copies among anchors are found by a two-tower model of your choice; the code has SSCD: `exclude_similar_to`",
)


class _Prepared(NamedTuple):
    latents: Tensor
    anchors: list[str]
    targets: list[str]
    mask: Tensor | None


@part(
    "ablating_concepts",
    Info(
        "Train the prediction for captions with the concept to be that for the same captions with an anchor.",
        paper=PAPER,
        upstream=CODE,
        needs=("diffusion", "text"),
        deviations=DEVIATIONS,
    ),
)
class AblatingConcepts(Objective):
    """``|eps(x_t, c) - sg eps(x_t, c*)|^2`` per sample, means over the valid area, and a weighted prior term.

    No gradient flows through keys and values of the first token, which all prompts share.

    Args:
        schedule: Over ``retain`` (anchors are images, ``c*`` their captions) or ``concept`` (anchors are generated);
            over ``forget`` for the variant ``srs-me``.
        form: How a caption names the concept: ``object``, ``style``, ``memorised`` or ``content``.
        variant: Goal: ``model`` = the prediction for the anchor's caption, ``noise`` = the noise itself. ``srs-me``:
            on images of the concept, the original's prediction for the caption with the anchor in the concept's place,
            under both captions; that under the anchor's weighs ``prior``.
        anchor: What the anchor is called in captions; by default the name of each image's class.
        captions: Captions of generated anchors: the name of a list of the package (``painting``, ``cat``, ``dog``,
            ``fish``, ``robot``, ``person``), a text file with one per line, or the captions themselves; by default the
            prompts of the other classes.
        concepts: Names of the concept instead of the request's; of several the samples take turns.
        anchor_images: Number of generated anchors.
        anchor_steps: Steps of the sampler that draws them, by default the task's.
        anchor_guidance: Classifier-free guidance of generated anchors. For the form ``content`` the concept is the
            negative prompt.
        exclude_similar_to: Image file; generated anchors that are too similar to it are left out (memorised images).
        threshold: From which cosine of features on an anchor is left out.
        similarity: The two-tower model of these features.
        prior: Weight of the denoising loss on anchors and their own captions.
        place: Shrink or enlarge pictures at random, and say so in captions.
        teacher: Whose prediction is the goal: the ``current`` weights', or the ``frozen`` original's.
        detach_first: Let no gradient flow through keys and values of the first token.
    """

    schedule: Schedule = Paired(streams=("retain",), batch_size=8)
    form: Literal["object", "style", "memorised", "content"] = "object"
    variant: Literal["model", "noise", "srs-me"] = "model"
    anchor: str = ""
    captions: str | tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    anchor_images: int = Field(default=200, ge=1)
    anchor_steps: int | None = Field(default=None, ge=1)
    anchor_guidance: float = Field(default=6.0, ge=0)
    exclude_similar_to: str = ""
    threshold: float = Field(default=0.5, gt=-1, le=1)
    similarity: ClipSpec | None = None
    prior: float = Field(default=0.0, ge=0)
    place: bool = False
    teacher: Literal["current", "frozen"] = "current"
    detach_first: bool = True

    @model_validator(mode="after")
    def _fit(self) -> AblatingConcepts:
        drawn = "concept" in self.schedule.roles()
        if self.captions and not drawn:
            raise ValueError("'captions' are those of generated anchors; images have captions of their own")
        if isinstance(self.captions, str) and self.captions:
            check_source(self.captions)
        if drawn and self.form == "content" and self.anchor_guidance in (0, 1):
            raise ValueError("without guidance a negative prompt does nothing: give an 'anchor_guidance' above 1")
        if self.exclude_similar_to:
            if not drawn or self.similarity is None:
                raise ValueError("'exclude_similar_to' is for generated anchors and needs 'similarity', a CLIP model")
            if not Path(self.exclude_similar_to).is_file():
                raise ValueError(f"'exclude_similar_to': there is no file {self.exclude_similar_to}")
        return self

    @property
    def full_precision(self) -> bool:
        """To tell similar anchors from others."""
        return super().full_precision or bool(self.exclude_similar_to)

    def bind(self, ctx: Context) -> LossFn:
        """Name the concept and return the loss function.

        Raises:
            CapabilityError: The task has no text, or the request names no concept.
            ConfigError: Settings that do not go together.
        """
        task = text_task(ctx.task, "ablating_concepts")
        names = concept_names(task, ctx, self.concepts)
        if self.variant == "noise" and self.teacher == "frozen":
            raise ConfigError("the noise-based loss has no teacher: leave 'teacher' as 'current'")
        theirs = self.variant == "srs-me"
        if theirs and (not self.anchor or self.place):
            raise ConfigError(
                "variant 'srs-me' needs 'anchor', what takes the concept's place in captions, and no 'place'"
            )
        frozen = Teacher(task.unet, task.eps) if theirs or self.teacher == "frozen" else None
        roles = ("forget",) if theirs else ("retain", "concept")
        drawn = anchors(self, ctx, names) if "concept" in self.schedule.roles() else None

        def current(x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return task.eps(x_t, t, states)
            with evaluating(task.unet):
                return task.eps(x_t, t, states)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                if role not in roles:
                    raise ConfigError(
                        f"ablating_concepts, variant '{self.variant}', trains on {' or '.join(roles)}; its schedule "
                        f"reads '{role}'"
                    )
                if theirs:
                    assert frozen is not None
                    terms[role] = Term(self._toward_anchor(ctx, batch, names, frozen), role)
                    continue
                if ctx.roles and frozen is not None and trains_text(task):
                    raise ConfigError("a frozen teacher keeps no text encoder: choose teacher 'current'")
                ready = self._prepared(ctx, batch, names, drawn)
                batch = replace(batch, inputs=ready.latents)
                x_t, t, noise = task.drawn(batch)
                model = self.variant == "model"
                with pure.first_token_detached(task.unet) if self.detach_first else nullcontext():
                    values = pure.losses(
                        current,
                        x_t,
                        t,
                        task.conditions(ready.targets),
                        anchor_states=encoded(task, ready.anchors) if model else None,
                        noise=None if model else noise,
                        mask=ready.mask,
                        teacher=frozen,
                    )
                    terms[role] = Term(values, role)
                    if self.prior > 0:
                        x_t, t, noise = task.drawn(replace(batch, key=rng.key(batch.key, "prior")))
                        squares = pure.masked_squares(
                            task.eps(x_t, t, task.conditions(ready.anchors)), noise, ready.mask
                        )
                        terms["prior"] = Term(squares, role, self.prior)
            return terms

        return loss

    def _toward_anchor(self, ctx: Context, batch: Batch, names: Sequence[str], frozen: Teacher) -> Tensor:
        """The version of the SRS-ME repository: both captions towards the original's prediction for the anchor's."""
        task = text_task(ctx.task, "ablating_concepts")
        removed = () if self.concepts else ctx.split.removed
        own = dict(zip(removed, names, strict=True)) if removed else {}
        captions = captions_of(batch)
        anchors = [
            replaced_caption(t.replace("_", " "), own.get(c, names[i % len(names)]), self.anchor)
            for t, c, i in zip(captions, batch.targets.tolist(), batch.ids.tolist(), strict=True)
        ]
        x_t, t, _ = task.drawn(batch)
        states, goal = encoded(task, captions), encoded(task, anchors)
        return pure.srsme_losses(task.eps, frozen, x_t, t, states, goal, anchor_weight=self.prior)

    def _prepared(self, ctx: Context, batch: Batch, names: Sequence[str], drawn: Anchors | None = None) -> _Prepared:
        """Latents, captions and masks of a batch: functions of its key and the sample ids."""
        task = text_task(ctx.task, "ablating_concepts")
        if batch.role == "concept":
            drawn = drawn or anchors(self, ctx, names)
            which = (batch.ids % len(drawn)).tolist()
            latents = drawn.latents[which].to(batch.inputs)
            captions, called = [drawn.captions[i] for i in which], [drawn.names[i] for i in which]
        else:
            latents, captions = batch.inputs, captions_of(batch)
            called = [self.anchor or plain(task.classes[c], lower=False) for c in batch.targets.tolist()]
        keys = [rng.key(batch.key, "caption", i) for i in batch.ids.tolist()]
        targets = [
            self._target(c, a, names, i, k)
            for c, a, i, k in zip(captions, called, batch.ids.tolist(), keys, strict=True)
        ]
        _note_cut(ctx, captions, targets)
        if not self.place:
            return _Prepared(latents, captions, targets, None)
        moved, prefixes, mask = _placed(task, latents, keys)
        captions, targets = ([p + c for p, c in zip(prefixes, texts, strict=True)] for texts in (captions, targets))
        return _Prepared(moved.to(latents), captions, targets, mask.to(latents))

    def _target(self, caption: str, anchor: str, names: Sequence[str], index: int, key: int) -> str:
        name = names[index % len(names)]
        if self.form == "object":
            return replaced_caption(caption.replace("_", " "), anchor, name)
        if self.form == "style":
            return style_caption(caption, name, key)
        return name if self.form == "memorised" else content_caption(caption, names, index, key)


def _note_cut(ctx: Context, captions: Sequence[str], targets: Sequence[str]) -> None:
    """Say so where the model reads the same of both captions, because the rest is beyond the length of prompts."""
    text = text_task(ctx.task, "ablating_concepts").text
    pairs = [(c, t) for c, t in zip(captions, targets, strict=True) if c != t]
    if pairs:
        one, other = (text.token_ids(texts) for texts in zip(*pairs, strict=True))
        if bool((one == other).all(1).any()):
            ctx.note("some captions are so long that the concept's name is cut off, and teach nothing")


@torch.no_grad()
def _placed(task: TextToImageTask, latents: Tensor, keys: Sequence[int]) -> tuple[Tensor, list[str], Tensor]:
    """Latents of the pictures after they are shrunk or enlarged, what captions begin with, and the valid cells."""
    with lent(task.parts.vae, task.device) as vae:
        pictures = decode(vae, latents).float().cpu()
        placed = [place(x, k, latents.shape[-1], fill=0.5) for x, k in zip(pictures, keys, strict=True)]
        moved = encode(vae, torch.stack([p.image for p in placed]).to(task.device))
    return moved, [p.prefix for p in placed], torch.stack([p.mask for p in placed])
