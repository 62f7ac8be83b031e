"""Forget-Me-Not: make the attention to the concept's tokens small."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.diffusion import forget_me_not as pure
from expunge.diffusion.attention_maps import AttentionMap, cross_attention_maps
from expunge.diffusion.process import draw_noise, draw_times
from expunge.errors import ConfigError, RequestError
from expunge.method import method
from expunge.methods._concepts import concept_names, encoded, name_ids, of_nothing, text_task, with_recipe
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import Paired, Schedule
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.base import Batch
from expunge.tasks.concepts import plain

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

_PAPER = "Zhang et al., Forget-Me-Not, CVPR Workshops 2024, arXiv 2303.17591"
_CODE = "SHI-Labs/Forget-Me-Not"
_DRIFT = "forget_me_not.generic"
_GENERIC = 8

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
            "the concept's own words are suppressed; tokens found by textual inversion are not offered",
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
    """

    schedule: Schedule = Paired(streams=("forget",), batch_size=1)
    concepts: tuple[str, ...] = ()
    prompt: str = "{}"
    end_of_text: Literal["none", "first", "all"] = "first"
    reduction: Literal["norm", "mean_square", "logits"] = "norm"
    max_drift: float | None = Field(default=None, gt=0)
    drift_every: int = Field(default=5, ge=1)

    @field_validator("prompt")
    @classmethod
    def _names(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"'prompt' holds {{}} once, where the name goes, not {value!r}")
        return value

    def bind(self, ctx: Context) -> LossFn:
        """Find the tokens and return the loss function.

        Raises:
            CapabilityError: The task has no text, the request names no concept, or the U-Net's attention
                probabilities cannot be had.
            RequestError: A name is cut off by the length of prompts.
        """
        task = text_task(ctx.task, "forget_me_not")
        names = concept_names(task, ctx, self.concepts)
        prompts = [self.prompt.format(n) for n in names]
        positions = [self._positions(task, n, p) for n, p in zip(names, prompts, strict=True)]
        numbers = {c: i for i, c in enumerate(ctx.split.removed)} if not self.concepts else {}
        if self.max_drift is not None:
            ctx.state[_DRIFT] = _generic(ctx)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                if role not in ("forget", "concept"):
                    raise ConfigError(
                        f"forget_me_not trains on the roles 'forget' and 'concept'; its schedule reads '{role}'"
                    )
                which = [
                    numbers.get(c, i % len(names))
                    for c, i in zip(batch.targets.tolist(), batch.ids.tolist(), strict=True)
                ]
                if role == "concept":
                    batch = replace(batch, inputs=torch.zeros_like(batch.inputs))
                x_t, t, _ = task.drawn(batch)
                with cross_attention_maps(task.unet) as maps:
                    task.eps(x_t, t, encoded(task, [prompts[i] for i in which]))
                terms[role] = Term(self._values(task, maps, torch.stack([positions[i] for i in which])), role)
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

    def _positions(self, task: TextToImageTask, name: str, prompt: str) -> Tensor:
        end = None if self.end_of_text == "none" else int(task.parts.tokenizer.eos_token_id)
        ids, own = task.text.token_ids([prompt])[0].tolist(), name_ids(task, name)
        if not bool(pure.token_positions(ids, own).any()):
            raise RequestError(f"the tokens of '{name}' do not occur in the prompt '{prompt}' as the model reads it")
        return pure.token_positions(ids, own, end, published=self.end_of_text == "all")


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
            "the concept's own words are suppressed; the code first learns new tokens by textual inversion",
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
    profile: Literal["as_intended", "as_published", "srs-me"] = "as_intended",
    batch_size: int = 1,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min |A_c|_F``: the attention probabilities of the concept's tokens, in every layer, head and pixel.

    Source: Zhang et al., attention re-steering. Nothing keeps the rest of the model: few steps, or ``max_drift``.

    Deviates:
        See the card. ``as_published`` counts every end-of-text token, which on Stable Diffusion 1.x are all padding
        tokens too. ``srs-me`` is the baseline of the SRS-ME repository: logits of all tokens, Adam 1e-5, 20 steps,
        cross-attention.

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
        profile: ``as_intended``, ``as_published`` or ``srs-me``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    ends: Literal["first", "all"] = "all" if profile == "as_published" else "first"
    theirs = profile == "srs-me"
    objective = ForgetMeNot(
        schedule=Paired(streams=("forget",) if images else ("concept",), batch_size=batch_size),
        concepts=concepts,
        prompt=prompt,
        end_of_text=ends if use_pooler else "none",
        reduction=reduction or ("logits" if theirs else "norm"),
        max_drift=max_drift,
    )
    space = UNetSet(parameters=parameters or ("x" if theirs else "full-weight"))
    other = {"name": "adam", "lr": 1e-5, "weight_decay": 0.0, "grad_clip": None, "max_steps": 20} if theirs else {}
    trained = with_recipe(optim, OPTIM, **other)
    return Recipe(name="forget_me_not", objective=objective, space=space, optim=trained)
