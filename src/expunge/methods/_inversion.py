"""Stage 1 of Forget-Me-Not on a task: its images, its draws, what was learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.context import Context
from expunge.diffusion import inversion as pure
from expunge.diffusion.ablation import denoising_losses
from expunge.diffusion.forget_me_not import initial_rows
from expunge.diffusion.generate import progress_bar
from expunge.digest import tensor_digest
from expunge.errors import RequestError
from expunge.schedule import Paired
from expunge.tasks.base import TRAIN_ROLES
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

_ROWS, _LOSSES = "inversion.rows", "inversion.losses"
#: Where what was learned stands in a patch's findings.
FINDINGS = "inversion"


def inverted(
    ctx: Context, settings: pure.Inversion, names: Sequence[str], owner: Callable[[Tensor, Tensor], list[int]]
) -> tuple[pure.Prompt, Tensor]:
    """New tokens of every concept, learned once and kept in the run's state; how it went is left in the findings.

    Args:
        ctx: With images of what is forgotten.
        settings: Of the inversion.
        names: Of the concepts.
        owner: Class numbers and ids of images ``[B]`` to the numbers of their concepts.

    Returns:
        The prompt, and what the U-Net receives of it for each concept, ``[N, T, D]``.

    Raises:
        RequestError: A concept has no images, or the prompt is too long.
        CapabilityError: The pipeline's text encoders cannot take the new tokens.
        ConfigError: A word to start from is no single token.
        DivergedError: A loss is not finite.
    """
    task = text_task(ctx.task, "textual inversion")
    prompt = pure.prompt_of(task.text, settings.template, settings.tokens)
    starts = [pure.first_rows(task.text, name, settings) for name in names]
    ids = ctx.split["forget"]
    numbers = torch.tensor(owner(task.images_of("forget").labels[ids], ids), dtype=torch.int64)
    own = [ids[numbers == i] for i in range(len(names))]
    for name, samples in zip(names, own, strict=True):
        if not len(samples):
            raise RequestError(f"textual inversion learns from images, and '{name}' has none")
    width = range(len(task.text.encoders))
    if _LOSSES not in ctx.state:
        learned = []
        shown = ctx.progress and sys.stderr.isatty()
        total = settings.steps * len(names)
        with _still(ctx.model), progress_bar(total, shown, what="textual inversion") as advance:
            for i, samples in enumerate(own):
                first = [
                    initial_rows(starts[i], lambda word, t=t: t.weight[int(word)], ctx.key("inversion start", i, e))  # type: ignore[misc]
                    for e, t in enumerate(pure.tables(task.text))
                ]
                losses = _losses(ctx, task, settings, prompt, samples, i)
                learned.append(pure.learn(losses, first, settings, advance))
        for e in width:
            ctx.state[f"{_ROWS}.{e}"] = torch.stack([rows[e] for rows, _ in learned])
        ctx.state[_LOSSES] = torch.stack([history for _, history in learned])
    rows = [ctx.state[f"{_ROWS}.{e}"].to(task.device) for e in width]
    with torch.no_grad():
        found = torch.cat([pure.conditions(task.text, prompt, [r[i] for r in rows]) for i in range(len(names))])
    ctx.findings[FINDINGS] = {
        **settings.model_dump(mode="json"),
        "concepts": [
            _facts(task, name, len(own[i]), ctx.state[_LOSSES][i], [r[i] for r in rows]) for i, name in enumerate(names)
        ],
    }
    return prompt, found


def _losses(
    ctx: Context, task: TextToImageTask, settings: pure.Inversion, prompt: pure.Prompt, samples: Tensor, number: int
) -> Callable[[int, list[Tensor]], Tensor]:
    """The denoising loss of a step: images in shuffled passes, times and noise by counter."""
    schedule = Paired(streams=("forget",), batch_size=settings.batch_size)
    key = ctx.key("inversion order", number)
    per_pass = -(-len(samples) // min(settings.batch_size, len(samples)))
    chosen = TRAIN_ROLES if ctx.augment is True else ctx.augment or ()
    known: dict[int, list[dict[str, Tensor]]] = {}

    def losses(step: int, rows: list[Tensor]) -> Tensor:
        lap = step // per_pass
        if lap not in known:
            known.clear()
            known[lap] = schedule.steps({"forget": len(samples)}, lap, key)
        ids = samples[known[lap][step % per_pass]["forget"]]
        augment = ctx.key("inversion augment", lap) if "forget" in chosen else None
        batch = task.load("forget", ids, ctx.split, augment=augment)
        x_t, t, noise = task.drawn(replace(batch, key=ctx.key("inversion draws", number, step)))
        own = [r.to(task.device) for r in rows]
        states = pure.conditions(task.text, prompt, own).expand(len(ids), -1, -1)
        return denoising_losses(task.eps, x_t, t, states, noise)

    return losses


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient for any weight; flags and modes are put back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def _facts(task: TextToImageTask, name: str, samples: int, losses: Tensor, rows: Sequence[Tensor]) -> dict[str, Any]:
    """How it went: mean losses of the first and of the last tenth, and where the vectors came to lie."""
    tenth = max(1, len(losses) // 10)
    table = pure.tables(task.text)[0].weight.float()
    near = functional.normalize(rows[0], dim=1) @ functional.normalize(table, dim=1).T
    words = task.parts.tokenizer.convert_ids_to_tokens(near.argmax(1).tolist())
    return {
        "name": name,
        "images": samples,
        "first_loss": float(losses[:tenth].mean()),
        "last_loss": float(losses[-tenth:].mean()),
        "norms": [[float(n) for n in r.norm(dim=1)] for r in rows],
        "nearest": [str(w) for w in words],
        "digests": [tensor_digest(r) for r in rows],
    }
