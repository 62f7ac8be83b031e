"""What SLUG takes from a task: concepts with their pairs, and the images and prompts of the search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.data.captions import CaptionedImages
from expunge.errors import CapabilityError, RequestError
from expunge.models.towers import Tokens
from expunge.slug.differentiate import Loader, Pairs
from expunge.slug.probes import Further, SearchSet
from expunge.tasks.clip import ClipTask
from expunge.tasks.concepts import plain


@dataclass(frozen=True, eq=False)
class Target:
    """One concept to forget.

    Args:
        name: In words; empty if the request only lists samples.
        ids: Its training samples, int64 ``[N]``.
        number: Its class on the task's axis; ``None`` if it is none, or several.
    """

    name: str
    ids: Tensor
    number: int | None


def two_towers(ctx: Context, who: str) -> ClipTask:
    """The context's task.

    Raises:
        CapabilityError: It is no two-tower task.
    """
    if not isinstance(ctx.task, ClipTask):
        raise CapabilityError(f"{who} edits two-tower models (CLIP); this is the {ctx.task.name} task")
    return ctx.task


def targets_of(ctx: Context, task: ClipTask, concept: str, *, singly: bool) -> list[Target]:
    """The concepts of a request: one, or one per class.

    Args:
        ctx: With the split of the request.
        task: Its task.
        concept: Name in words, for requests that do not name a class.
        singly: One per class of the request.

    Raises:
        RequestError: ``singly``, but the request does not name several classes.
    """
    removed, forget = ctx.split.removed, ctx.split["forget"]
    if singly:
        if len(removed) < 2:
            raise RequestError("a layer for each concept needs a request that names two or more classes")
        labels = task.data.train.labels[forget]
        return [Target(plain(task.classes[c], lower=False), forget[labels == c], c) for c in removed]
    number = removed[0] if len(removed) == 1 else None
    concept = concept or ctx.split.concept
    name = plain(concept, lower=False) if concept or number is None else plain(task.classes[number], lower=False)
    return [Target(name, forget, number)]


def forget_pairs(ctx: Context, task: ClipTask, target: Target, batch_size: int, text: str) -> Loader:
    """Passes over a concept's pairs, with their captions, or all with the concept's name.

    Args:
        ctx: With the split.
        task: Its task.
        target: The concept.
        batch_size: Pairs at a time.
        text: ``caption`` or ``name``.

    Raises:
        RequestError: ``name``, but there is none.
    """
    split = ctx.split.with_indices(forget=target.ids)
    prompt = one_text(task, target) if text == "name" else None

    def passes() -> Iterator[Pairs]:
        for pairs in task.pairs("forget", split, batch_size):
            yield pairs if prompt is None else Pairs(pairs.pixels, prompt[torch.zeros(len(pairs), dtype=torch.int64)])

    return passes


def retain_pairs(ctx: Context, task: ClipTask, batch_size: int, limit: int | None) -> Loader:
    """Passes over the retain pairs, or over an even draw of at most ``limit`` of them."""
    split = ctx.split.with_indices(retain=drawn(ctx, "retain", ctx.split["retain"], limit))
    return lambda: task.pairs("retain", split, batch_size)


def one_text(task: ClipTask, target: Target) -> Tokens:
    """The concept's name as the only text.

    Raises:
        RequestError: It has no name.
    """
    if not target.name:
        raise RequestError("the request does not name one concept; set 'concept' to its name in words")
    return task.towers.tokenize([target.name]).to(task.device)


def drawn(ctx: Context, purpose: str, ids: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` of the ids, drawn evenly and in stored order."""
    if limit is None or len(ids) <= limit:
        return ids
    order = rng.permutation(ctx.key(f"slug {purpose}"), len(ids))
    return ids[order[:limit].sort().values]


def search_set(
    ctx: Context,
    task: ClipTask,
    targets: list[Target],
    forget_images: int,
    utility_images: int,
    axes: Literal["own", "all"] = "all",
) -> tuple[SearchSet, list[Tensor]]:
    """Training images that the search looks at, and which rows of the forget images belong to which concept.

    Test images stay unseen, so that the report's figures are not those that chose the step. A concept that is no class
    of the axis becomes one class more, with the axis' templates; samples without a name keep their own classes.

    Args:
        ctx: With the split.
        task: Its task.
        targets: The concepts.
        forget_images: At most so many per concept.
        utility_images: At most so many of the retain set.
        axes: Label axes that the utility is averaged over: the task's own, or all.
    """
    prompts = task.prompts()
    templates = len(prompts[0])
    known = {plain(c): i for i, c in enumerate(task.classes)}
    rows, labels, chosen, start = [], [], [], 0
    for target in targets:
        ids = drawn(ctx, "search forget", target.ids, forget_images)
        own = task.data.train.labels[ids]
        if target.number is None and target.name and not ctx.split.removed:
            own = torch.full_like(own, known.get(target.name.lower(), len(prompts)))
        if int(own.max()) == len(prompts):
            prompts = [*prompts, [t.format(target.name) for t in task.axes[task.axis].templates]]
        chosen.append(ids)
        labels.append(own)
        rows.append(torch.arange(start, start + len(ids)))
        start += len(ids)
    utility = drawn(ctx, "search utility", ctx.split["retain"], utility_images)
    device = task.device
    texts = [text for group in prompts for text in group]
    train, further = task.data.train, []
    assert isinstance(train, CaptionedImages)
    for name, axis in train.axes.items() if axes == "all" else ():
        if name != task.axis:
            further.append(Further(axis.labels[utility].to(device), len(axis.classes), len(axis.templates)))
            texts += [text for group in task.prompts(name) for text in group]
    found = SearchSet(
        forget=_pixels(ctx, task, "forget", torch.cat(chosen)),
        forget_labels=torch.cat(labels).to(device),
        utility=_pixels(ctx, task, "retain", utility),
        utility_labels=task.data.train.labels[utility].to(device),
        prompts=task.towers.tokenize(texts).to(device),
        templates=templates,
        further=tuple(further),
    )
    return found, rows


def _pixels(ctx: Context, task: ClipTask, role: str, ids: Tensor) -> Tensor:
    parts = [task.load(role, chunk, ctx.split).inputs for chunk in torch.split(ids, task.eval_batch_size)]
    return torch.cat([task.towers.preprocess(part) for part in parts])
