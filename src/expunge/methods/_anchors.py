"""Anchors of Ablating Concepts that the original model draws: captions, images, and none like a given one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from expunge.context import Context
from expunge.data.captions import mentions
from expunge.data.decode import decode_image
from expunge.diffusion.anchor_captions import ANCHORS, anchor_captions
from expunge.diffusion.generate import progress_bar
from expunge.diffusion.latents import decode, lent
from expunge.diffusion.process import draw_noise
from expunge.diffusion.sample import guided
from expunge.digest import json_digest
from expunge.errors import ConfigError, DataError, RequestError
from expunge.methods._concepts import encoded, of_nothing
from expunge.restore import evaluating
from expunge.tasks.concepts import plain
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.methods._ablation import AblatingConcepts

_LATENTS, _NUMBERS = "ablating_concepts.anchors", "ablating_concepts.numbers"
#: Where the anchors are described in a patch's findings.
FINDINGS = "anchors"


@dataclass(frozen=True, eq=False)
class Anchors:
    """Drawn anchors.

    Args:
        latents: ``[M, C, h, w]`` on the CPU.
        captions: What each was drawn for.
        names: What the anchor is called in each caption.
    """

    latents: Tensor
    captions: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


def sources(own: AblatingConcepts, ctx: Context) -> list[tuple[str, str]]:
    """Captions of anchors to draw, with what the anchor is called in each.

    Raises:
        ConfigError: Captions of objects without ``anchor``, or no such list or file.
        DataError: A caption does not name the anchor whose place the concept's name takes, or a file is broken.
        RequestError: No class is left that could be the anchor.
    """
    by_name = own.form == "object"
    if own.captions:
        listed = isinstance(own.captions, str)
        anchor = own.anchor or (own.captions if listed and own.captions in ANCHORS else "")
        if by_name and not anchor:
            raise ConfigError("captions of objects need 'anchor': what the concept's name takes the place of")
        if isinstance(own.captions, str):
            texts = anchor_captions(own.captions, anchor if by_name else "")
        else:
            texts = list(own.captions)
            wrong = [c for c in texts if by_name and not mentions(c, anchor)]
            if wrong:
                raise DataError(f"the caption {wrong[0]!r} does not name the anchor {anchor!r}")
        return [(c, str(anchor)) for c in texts]
    task = text_task(ctx.task, "ablating_concepts")
    gone = {*ctx.split.removed, *(i for i, n in enumerate(task.classes) if plain(n) == plain(ctx.split.concept))}
    found = [
        (prompt, plain(task.classes[c], lower=False))
        for c, prompts in enumerate(task.prompts())
        for prompt in prompts
        if c not in gone and own.anchor in ("", task.classes[c], plain(task.classes[c], lower=False))
    ]
    if not found:
        what = f"is called '{own.anchor}'" if own.anchor else "stays"
        raise RequestError(f"no class of this task {what}; give 'captions' of the anchor")
    return found


@torch.no_grad()
def anchors(own: AblatingConcepts, ctx: Context, names: Sequence[str]) -> Anchors:
    """Anchors, drawn by the weights at hand the first time and then kept in the run's state.

    Args:
        own: Which captions, how many images, how they are drawn.
        ctx: Of the run.
        names: What goes; the negative prompt where unwanted content is to be kept out.

    Raises:
        RequestError: All anchors are too similar to the image that shall not come back.
        Others: See :func:`sources`.
    """
    known = sources(own, ctx)
    task = text_task(ctx.task, "ablating_concepts")
    negative = "; ".join(names) if own.form == "content" else ""
    steps = own.anchor_steps or task.steps
    if _LATENTS not in ctx.state:
        ids = torch.arange(own.anchor_images)
        null = encoded(task, [negative]) if negative else of_nothing(task)
        parts = []
        shown = ctx.progress and sys.stderr.isatty()
        with evaluating(ctx.model), progress_bar(len(ids), shown, what="anchors") as advance:
            for chunk in torch.split(ids, task.sample_batch):
                found = guided(
                    task.eps,
                    task.scheduler,
                    draw_noise(ctx.key("anchors"), chunk, task.latent_shape).to(task.device),
                    encoded(task, [known[i % len(known)][0] for i in chunk.tolist()]),
                    null.expand(len(chunk), -1, -1),
                    steps=steps,
                    guidance=own.anchor_guidance,
                    keys=[ctx.key("anchor", i) for i in chunk.tolist()],
                )
                parts.append(found.cpu())
                advance(len(chunk))
        latents = torch.cat(parts)
        kept = _unlike(own, ctx, latents) if own.exclude_similar_to else torch.ones(len(ids), dtype=torch.bool)
        ctx.state[_LATENTS], ctx.state[_NUMBERS] = latents[kept], ids[kept]
    latents, numbers = ctx.state[_LATENTS], ctx.state[_NUMBERS].tolist()
    ctx.findings[FINDINGS] = {
        "drawn": own.anchor_images,
        "left_out": own.anchor_images - len(numbers),
        "captions": len(known),
        "captions_digest": json_digest([c for c, _ in known]),
        "source": own.captions if isinstance(own.captions, str) else "",
        "steps": steps,
        "guidance": own.anchor_guidance,
        "negative": negative,
        "sampler": type(task.parts.scheduler).__name__,
    }
    captions, called = zip(*(known[i % len(known)] for i in numbers), strict=True)
    return Anchors(latents, captions, called)


def _unlike(own: AblatingConcepts, ctx: Context, latents: Tensor) -> Tensor:
    """Which anchors are less similar to the given image than the threshold, bool ``[N]``."""
    from expunge.models.clip import load_clip

    assert own.similarity is not None
    task = text_task(ctx.task, "ablating_concepts")
    towers = load_clip(own.similarity)
    towers.model.to(task.device)
    file = Path(own.exclude_similar_to)
    given = torch.from_numpy(decode_image(file.read_bytes(), where=str(file))).float() / 255

    def features(x: Tensor) -> Tensor:
        return functional.normalize(towers.image(towers.preprocess(x.to(task.device))).float(), dim=-1)

    goal = features(given[None])
    found = []
    with lent(task.parts.vae, task.device) as vae:
        for chunk in torch.split(latents, task.sample_batch):
            found.append((features(decode(vae, chunk.to(task.device)).float()) @ goal[0]).cpu())
    cosines = torch.cat(found)
    kept = cosines < own.threshold
    if not bool(kept.any()):
        raise RequestError(
            f"all {len(latents)} anchors are as similar to {file.name} as {own.threshold:g} or more (the least: "
            f"{float(cosines.min()):.2f}); raise 'threshold' or give other 'captions'"
        )
    return kept
