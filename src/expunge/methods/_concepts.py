"""What the concept erasers share: prompts and their states, and settings of published recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from expunge.context import Context
from expunge.errors import CapabilityError
from expunge.recipe import Optim
from expunge.tasks.base import Batch
from expunge.tasks.concepts import plain

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import CaptionedBatch, TextToImageTask


def encoded(task: TextToImageTask, prompts: Sequence[str]) -> Tensor:
    """What the U-Net receives of prompts, ``[B, T, D]``; text encoders are not trained through it."""
    with torch.no_grad():
        return task.conditions(prompts)


def trains_text(task: TextToImageTask) -> bool:
    """Whether this run changes a text encoder: then prompts are encoded with gradients, and anew at every step."""
    return any(p.requires_grad for _, encoder in task.text.encoders for p in encoder.parameters())


def of_nothing(task: TextToImageTask) -> Tensor:
    """The same of the empty prompt, ``[1, T, D]``."""
    with torch.no_grad():
        return task.text.empty(1)


def captions_of(batch: Batch, given: Sequence[str] = ()) -> list[str]:
    """The prompts of samples: ``given`` ones in turn, by sample id, else their captions."""
    if given:
        return [given[i % len(given)] for i in batch.ids.tolist()]
    return list(cast("CaptionedBatch", batch).captions)


def concept_names(task: TextToImageTask, ctx: Context, given: Sequence[str] = ()) -> list[str]:
    """What goes, in words: ``given`` names, else the request's own words or the names of the removed classes.

    Raises:
        CapabilityError: The request names samples, and no name was given.
    """
    if given:
        return list(given)
    if ctx.split.concept:
        return [ctx.split.concept]
    if ctx.split.removed:
        return [plain(task.classes[c], lower=False) for c in ctx.split.removed]
    raise CapabilityError(
        "the request names samples and no concept, so there is no name to erase; ask for a class or a concept, or give "
        "the method the name"
    )


def with_recipe(optim: Optim, default: Optim, **published: Any) -> Optim:
    """Optimiser settings of a published recipe, wherever the caller left a method's defaults.

    ``max_steps`` rules the length of a run: ``epochs`` is raised so that it is reached.

    Args:
        optim: What the caller gave.
        default: The method's defaults.
        published: Fields of the recipe.
    """
    changes = {k: v for k, v in published.items() if getattr(optim, k) == getattr(default, k)}
    steps = changes.get("max_steps", optim.max_steps)
    if steps is not None and optim.epochs == default.epochs:
        changes["epochs"] = steps
    return optim.model_copy(update=changes)


def name_ids(task: TextToImageTask, name: str) -> list[int]:
    """Token ids of a name without special tokens."""
    found: list[int] = task.parts.tokenizer(name, add_special_tokens=False)["input_ids"]
    return found
