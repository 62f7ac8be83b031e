"""Forget-Me-Not: make the attention to the concept's tokens small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.diffusion import forget_me_not as pure
from expunge.diffusion.attention_maps import AttentionMap, cross_attention_maps
from expunge.diffusion.captions import one_place
from expunge.diffusion.inversion import Inversion
from expunge.diffusion.process import draw_noise, draw_times
from expunge.errors import ConfigError, RequestError
from expunge.method import method
from expunge.methods._concepts import concept_names, encoded, name_ids, of_nothing, with_recipe
from expunge.methods._inversion import inverted
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import Paired, Schedule
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.base import Batch
from expunge.tasks.concepts import plain
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

_PAPER = "Zhang et al., Forget-Me-Not, CVPR Workshops 2024, arXiv 2303.17591"
_CODE = "SHI-Labs/Forget-Me-Not"
_DRIFT = "forget_me_not.generic"
_GENERIC = 8


class _Asked(NamedTuple):
    """Prompts of the concepts: their states, by numbers of concepts, and which tokens count, bool ``[N, T]``."""

    states: Callable[[list[int]], Tensor]
    positions: Tensor


#: Defaults of this method: those of the public code.
OPTIM = Optim(name="adamw", lr=2e-6, weight_decay=1e-2, grad_clip=1.0, epochs=35, max_steps=35)


@part(
    "forget_me_not",
    Info(
        "Make the cross-attention probabilities of the concept's tokens small.",
        paper=_PAPER,
        upstream=_CODE,
        needs=("diffusion", "text"),
        deviations=(
            "the concept's own words are suppressed by default; the code first learns new tokens: `inversion`",
            "only the first end-of-text token counts; the code takes all, padding included: `end_of_text`",
            "a batch has the mean of its samples' norms; the code takes one norm of the batch, and batches of one",
            "training can stop when predictions for other prompts have moved too far: `max_drift`",
        ),
    ),
)
class ForgetMeNot(Objective):
    """``|A|_F`` per sample: softmax probabilities of the concept's tokens in all layers, heads and pixels.

    There is no term that keeps anything; see ``max_drift``.

    Args:
        schedule: Over ``forget`` (images of the concept), or ``concept``: empty latents instead of images.
        concepts: Names of the concept instead of the request's; of several the samples take turns.
        prompt: The prompt, with ``{}`` where the name goes.
        end_of_text: Tokens suppressed beside the concept's: the ``first`` end-of-text token, ``none``, or ``all`` of
            them as published (on Stable Diffusion 1.x these are all padding tokens).
        reduction: ``norm``, or ``mean_square`` of the same probabilities; ``logits``: the version of SRS-ME, mean
            squared differences of all logits to those of the prompt without the name.
        max_drift: Stop when the mean squared change of the predictions for other prompts exceeds this.
        drift_every: Steps between two measurements of it.
        inversion: Learn new tokens from the images first, and suppress those in their prompt instead of the name.
        words: With ``inversion``: suppress the name in ``prompt`` as well, as a term of its own.
    """

    schedule: Schedule = Paired(streams=("forget",), batch_size=1)
    concepts: tuple[str, ...] = ()
    prompt: str = "{}"
    end_of_text: Literal["none", "first", "all"] = "first"
    reduction: Literal["norm", "mean_square", "logits"] = "norm"
    max_drift: float | None = Field(default=None, gt=0)
    drift_every: int = Field(default=5, ge=1)
    inversion: Inversion | None = None
    words: bool = False

    @field_validator("prompt")
    @classmethod
    def _names(cls, value: str) -> str:
        return one_place(value, "prompt", "the name goes")

    @model_validator(mode="after")
    def _fit(self) -> ForgetMeNot:
        if self.inversion is None:
            if self.words:
                raise ValueError("'words' goes with 'inversion'; without it the concept's words are what is suppressed")
            return self
        if self.schedule.roles() != ("forget",):
            raise ValueError(
                "textual inversion learns from images of the concept, and this schedule reads "
                f"{', '.join(self.schedule.roles())}: use images, or leave 'inversion' out"
            )
        if self.reduction == "logits":
            raise ValueError("the version of SRS-ME, reduction 'logits', has no textual inversion")
        if self.prompt != "{}" and not self.words:
            raise ValueError("with 'inversion' the prompt is 'inversion.template'; 'prompt' is for 'words'")
        return self

    @property
    def full_precision(self) -> bool:
        """For textual inversion, whose gradients are not scaled, and to measure small drifts."""
        return super().full_precision or self.inversion is not None or self.max_drift is not None

    def bind(self, ctx: Context) -> LossFn:
        """Find the tokens, or learn them, and return the loss function.

        Raises:
            CapabilityError: The task has no text, the request names no concept, or the U-Net's attention
                probabilities cannot be had.
            RequestError: A name is cut off by the length of prompts, or a concept to invert has no images.
        """
        task = text_task(ctx.task, "forget_me_not")
        names = concept_names(task, ctx, self.concepts)
        numbers = {c: i for i, c in enumerate(ctx.split.removed)} if not self.concepts else {}

        def owner(targets: Tensor, ids: Tensor) -> list[int]:
            return [numbers.get(c, i % len(names)) for c, i in zip(targets.tolist(), ids.tolist(), strict=True)]

        asked: list[_Asked] = []
        if self.inversion is None or self.words:
            asked.append(self._named(task, names))
        if self.inversion is not None:
            asked.insert(0, self._inverted(ctx, self.inversion, names, owner))
        if self.max_drift is not None:
            ctx.state[_DRIFT] = _generic(ctx)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                if role not in ("forget", "concept"):
                    raise ConfigError(
                        f"forget_me_not trains on the roles 'forget' and 'concept'; its schedule reads '{role}'"
                    )
                which = owner(batch.targets, batch.ids)
                if role == "concept":
                    batch = replace(batch, inputs=torch.zeros_like(batch.inputs))
                x_t, t, _ = task.drawn(batch)
                for name, one in zip((role, "words")[: len(asked)], asked, strict=True):
                    with cross_attention_maps(task.unet) as maps:
                        task.eps(x_t, t, one.states(which))
                    terms[name] = Term(self._values(task, maps, one.positions[which]), role)
            return terms

        return loss

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """How far the predictions for other prompts have moved."""
        found = super().measure(ctx, end_of_epoch)
        if self.max_drift is not None and (ctx.step + 1) % self.drift_every == 0:
            before = ctx.state[_DRIFT]
            found["drift"] = float((_generic(ctx) - before.to(ctx.task.device)).square().mean())
        return found

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """A reason to stop: the drift, or what every objective knows."""
        moved = history[-1].get("drift") if history else None
        if self.max_drift is not None and moved is not None and moved > self.max_drift:
            return f"predictions for other prompts have moved by {moved:.3g} > {self.max_drift:g} (mean square)"
        return super().stop(history)

    def _values(self, task: TextToImageTask, maps: list[AttentionMap], positions: Tensor) -> Tensor:
        if self.reduction == "logits":
            with torch.no_grad():
                anchor = task.states([" ".join(self.prompt.format("").split())])
            return pure.srsme_losses(maps, anchor)
        published = self.end_of_text == "all"
        return pure.losses([m.probs for m in maps], positions, reduction=self.reduction, published=published)

    def _named(self, task: TextToImageTask, names: list[str]) -> _Asked:
        """The concepts' own names."""
        prompts = [self.prompt.format(n) for n in names]
        positions = [self._positions(task, n, p) for n, p in zip(names, prompts, strict=True)]
        return _Asked(lambda which: encoded(task, [prompts[i] for i in which]), torch.stack(positions))

    def _inverted(
        self, ctx: Context, settings: Inversion, names: list[str], owner: Callable[[Tensor, Tensor], list[int]]
    ) -> _Asked:
        """Tokens learned from the concepts' images."""
        prompt, states = inverted(ctx, settings, names, owner)
        end = self._end(text_task(ctx.task, "forget_me_not"))
        positions = prompt.positions(end, published=self.end_of_text == "all")
        return _Asked(lambda which: states[which], positions.expand(len(names), -1))

    def _end(self, task: TextToImageTask) -> int | None:
        return None if self.end_of_text == "none" else int(task.parts.tokenizer.eos_token_id)

    def _positions(self, task: TextToImageTask, name: str, prompt: str) -> Tensor:
        ids, own = task.text.token_ids([prompt])[0].tolist(), name_ids(task, name)
        if not bool(pure.token_positions(ids, own).any()):
            raise RequestError(f"the tokens of '{name}' do not occur in the prompt '{prompt}' as the model reads it")
        return pure.token_positions(ids, own, self._end(task), published=self.end_of_text == "all")


def _generic(ctx: Context) -> Tensor:
    """Predictions of the model as it is for a few prompts without the concept, ``[n, C, H, W]``."""
    task = text_task(ctx.task, "forget_me_not")
    others = [c for c in range(len(task.classes)) if c not in ctx.split.removed]
    names = {plain(n) for n in ([ctx.split.concept] if ctx.split.concept else [])}
    prompts = [task.prompt_of(c) for c in others if plain(task.classes[c]) not in names][:_GENERIC]
    ids, key = torch.arange(len(prompts) + 1), rng.key(ctx.seed, "drift")
    noise = draw_noise(key, ids, task.latent_shape).to(task.device)
    t = draw_times(key, ids, task.process.steps).to(task.device)
    x_t = task.process.noised(torch.zeros_like(noise), noise, t)
    states = torch.cat([encoded(task, prompts), of_nothing(task)]) if prompts else of_nothing(task)
    with evaluating(ctx.model):
        return task.eps(x_t, t, states).float()


@method(
    "forget_me_not",
    Info(
        "Make the cross-attention probabilities of the concept's tokens small, on images of the concept.",
        paper=_PAPER,
        upstream=_CODE,
        needs=("diffusion", "text"),
        deviations=(
            "the concept's own words are suppressed; the code first learns new tokens: `inversion`, or `profile`",
            "textual inversion sees images as they are; the code flips half of them",
            "only the first end-of-text token counts; the code takes all, padding included: `profile`",
            "training can stop when predictions for other prompts have moved too far: `max_drift`",
        ),
        aliases=("fmn",),
    ),
)
def forget_me_not(
    *,
    parameters: str | None = None,
    images: bool = True,
    concepts: tuple[str, ...] = (),
    prompt: str = "{}",
    use_pooler: bool = True,
    reduction: Literal["norm", "mean_square", "logits"] | None = None,
    max_drift: Annotated[float, Field(gt=0)] | None = None,
    inversion: Inversion | bool | None = None,
    words: bool = False,
    profile: Literal["as_intended", "as_published", "unlearn-canvas", "srs-me"] = "as_intended",
    batch_size: int = 1,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min |A_c|_F``: the attention probabilities of the concept's tokens, in every layer, head and pixel.

    Source: Zhang et al., attention re-steering. Nothing keeps the rest of the model: few steps, or ``max_drift``.

    Deviates:
        See the card. The concept's own words are the default because they are what a prompt will hold, need no stage 1
        and work without images. ``as_published`` learns new tokens first (on images) and suppresses those alone, and
        counts every end-of-text token, which on Stable Diffusion 1.x are all padding tokens too. ``unlearn-canvas``:
        both stages as in that benchmark, for objects: inversion at 1e-4, then 2e-5 for 100 steps; for styles add
        ``parameters: cross-attn-all`` and a template. ``srs-me`` is the baseline of the SRS-ME repository: logits of
        all tokens, Adam 1e-5, 20 steps, cross-attention.

    Args:
        parameters: What is trained: ``full-weight`` (the default), ``cross-attn-all`` (the code's
            ``only_optimize_ca``; for styles) or another set of the U-Net.
        images: Noised images of the concept; otherwise noised empty latents (the code's ``no_real_image``).
        concepts: Names of the concept instead of the request's.
        prompt: The prompt, with ``{}`` where the name goes.
        use_pooler: Suppress the end-of-text token as well.
        reduction: ``norm``, or ``mean_square`` of the same probabilities; ``logits``: squared differences to the logits
            of the prompt without the name.
        max_drift: Stop when the mean squared change of the predictions for other prompts exceeds this.
        inversion: Stage 1: learn new tokens from the images, and suppress those. ``true`` for the published settings,
            or single ones of :class:`~expunge.diffusion.inversion.Inversion`: ``tokens``, ``initial``, ``template``,
            ``steps``, ``lr``, ``weight_decay``, ``batch_size``, ``norm``. By default as the profile has it, on images.
        words: After stage 1, suppress the concept's own words as well.
        profile: ``as_intended``, ``as_published``, ``unlearn-canvas`` or ``srs-me``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    ends: Literal["first", "all"] = "all" if profile == "as_published" else "first"
    theirs, canvas = profile == "srs-me", profile == "unlearn-canvas"
    if inversion is None:
        inversion = images and (canvas or profile == "as_published")
    if inversion is True:
        inversion = Inversion(lr=1e-4) if canvas else Inversion()
    objective = ForgetMeNot(
        schedule=Paired(streams=("forget",) if images else ("concept",), batch_size=batch_size),
        concepts=concepts,
        prompt=prompt,
        end_of_text=ends if use_pooler else "none",
        reduction=reduction or ("logits" if theirs else "norm"),
        max_drift=max_drift,
        inversion=inversion or None,
        words=words,
    )
    space = UNetSet(parameters=parameters or ("x" if theirs else "full-weight"))
    other: dict[str, Any] = (
        {"name": "adam", "lr": 1e-5, "weight_decay": 0.0, "grad_clip": None, "max_steps": 20} if theirs else {}
    )
    other |= {"lr": 2e-5, "max_steps": 100} if canvas else {}
    trained = with_recipe(optim, OPTIM, **other)
    return Recipe(name="forget_me_not", objective=objective, space=space, optim=trained)
