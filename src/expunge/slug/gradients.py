"""Gradients of the forget and the retain loss of a two-tower model, at its present weights.

SLUG (Cai et al., ICML 2025, arXiv 2407.11867), section 3. The model is in eval mode, no parameter collects a gradient
and all flags are left as found. Each pass over the data is streamed; beside the embeddings of a contrastive batch,
memory holds the sum and the gradient of the batch at hand, of the wanted tensors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from expunge.errors import DataError, InvariantError
from expunge.models.towers import Tower, Towers
from expunge.slug.differentiate import Loader, Pairs, Run, differentiable, mean, rebatched
from expunge.slug.losses import contrastive_losses, forget_losses, one_text_error, refuse_one_text, same_text, unit
from expunge.slug.scores import Consumer, Norms, candidate_names

#: ``samples``: every pair counts the same. ``batches``: every batch does, as published.
Weighting = Literal["samples", "batches"]
Facts = dict[str, Any]

__all__ = ["Gradients", "Loader", "Pairs", "assert_ascent", "forget_gradient", "retain_gradient", "slug_gradients"]

#: Rows of the matrix of cosines that are handled at once.
_ROWS = 1024


@dataclass
class Gradients:
    """Both gradients by parameter name, and facts about how they came about (JSON data)."""

    forget: dict[str, Tensor]
    retain: dict[str, Tensor]
    facts: Facts = field(default_factory=dict)


def slug_gradients(
    towers: Towers,
    forget: Loader,
    retain: Loader,
    tower: Tower | None = None,
    *,
    names: Iterable[str] | None = None,
    norms: Norms = "exclude",
    consumer: Consumer | None = None,
    batch_size: int | None = None,
    chunk: int | None = None,
) -> Gradients:
    """Both gradients, for the tensors that an edit may choose from.

    Args:
        towers: The model.
        forget: Pairs to forget.
        retain: Pairs to keep, with their true captions.
        tower: The tower to edit, ``None``: both, at the cost of one pass.
        names: Tensors; by default :func:`expunge.slug.scores.candidate_names` with ``norms`` and ``consumer``.
        norms: See there.
        consumer: See there.
        batch_size: See :func:`retain_gradient`.
        chunk: See :func:`retain_gradient`.
    """
    wanted = candidate_names(towers, tower, norms=norms, consumer=consumer) if names is None else list(names)
    f, about_f = forget_gradient(towers, forget, tower, names=wanted)
    r, about_r = retain_gradient(towers, retain, tower, names=wanted, batch_size=batch_size, chunk=chunk)
    return Gradients(f, r, {"forget": about_f, "retain": about_r})


def forget_gradient(
    towers: Towers,
    pairs: Loader,
    tower: Tower | None = None,
    *,
    names: Iterable[str] | None = None,
    weighting: Weighting = "samples",
    collapse: bool = True,
) -> tuple[dict[str, Tensor], Facts]:
    """Gradient of ``L_f = mean_i (1 - v_i . t_i)``. Adding it forgets.

    Only the wanted tower is differentiated; the other one's embeddings are constants. Where a batch repeats the very
    first text, the text tower runs once for all such batches: ``sum_i (1 - v_i . t) = n - t . sum_i v_i``, exactly.

    Args:
        towers: The model.
        pairs: Pairs to forget.
        tower: Tower to differentiate, ``None``: both.
        names: Tensors; by default all of the tower. A tensor that the loss does not depend on has gradient 0.
        weighting: Of the mean.
        collapse: Use the identity above.

    Returns:
        Gradients by name, and the number of pairs and batches, the loss, the losses of batches, and how many batches
        shared the text.

    Raises:
        DataError: There is no pair.
        DivergedError: A gradient is not finite.
    """
    with differentiable(towers, tower, names) as run:
        total, count, weight, losses = run.zeros(), 0, 0.0, []
        prompt, shared, sum_v, shared_n, shared_w = None, None, None, 0, 0.0
        for batch in pairs():
            share = 1.0 if weighting == "samples" else 1.0 / len(batch)
            count, weight = count + len(batch), weight + share * len(batch)
            prompt = batch.tokens[:1] if prompt is None else prompt
            if collapse and same_text(batch.tokens, prompt):
                shared = run.text(prompt) if shared is None else shared
                v = run.image(batch.pixels)
                values = forget_losses(v, shared.detach())
                if "vision" in run.sides:
                    run.add(total, values.sum(), share)
                piece = share * unit(v.detach()).sum(0, keepdim=True)
                sum_v = piece if sum_v is None else sum_v + piece
                shared_n, shared_w = shared_n + 1, shared_w + share * len(batch)
            else:
                values = forget_losses(run.image(batch.pixels), run.text(batch.tokens))
                run.add(total, values.sum(), share)
            losses.append((float(values.detach().double().mean()), len(batch)))
        if shared is not None and sum_v is not None and "language" in run.sides:
            run.add(total, shared_w - (unit(shared) * sum_v).sum())
        facts = _facts(losses, count, weighting, "forget")
        return mean(total, weight, "forget"), {**facts, "one_text_batches": shared_n}


def retain_gradient(
    towers: Towers,
    pairs: Loader,
    tower: Tower | None = None,
    *,
    names: Iterable[str] | None = None,
    batch_size: int | None = None,
    chunk: int | None = None,
    weighting: Weighting = "samples",
) -> tuple[dict[str, Tensor], Facts]:
    """Gradient of the symmetric InfoNCE ``L_r`` of the retain pairs.

    Args:
        towers: The model.
        pairs: Pairs to keep, with their true captions.
        tower: Tower to differentiate, ``None``: both.
        names: Tensors, as in :func:`forget_gradient`.
        batch_size: Pairs that are told apart; part of the loss's definition. ``None``: the whole split as one batch,
            by gradient caching (Gao et al. 2021, arXiv 2101.06983): embed all without gradient, differentiate the loss
            by the embeddings, then send that through the towers chunk by chunk. A number: the mean over consecutive
            batches.
        chunk: Pairs that are in memory at once when the split is one batch; by default as they are loaded. Changes
            nothing but memory.
        weighting: Of the mean over batches.

    Returns:
        Gradients by name, and facts as in :func:`forget_gradient`.

    Raises:
        DataError: Fewer than two pairs, or all texts of a batch are the same.
        DivergedError: A gradient is not finite.
    """
    with differentiable(towers, tower, names) as run:
        if batch_size is None:
            total, facts = _whole(run, pairs, chunk)
            return mean(total, 1.0, "retain"), facts
        total, count, weight, losses = run.zeros(), 0, 0.0, []
        for batch in rebatched(pairs(), batch_size):
            refuse_one_text(batch.tokens, "retain set")
            share = 1.0 if weighting == "samples" else 1.0 / len(batch)
            values = contrastive_losses(run.image(batch.pixels), run.text(batch.tokens), run.scale())
            run.add(total, values.sum(), share)
            count, weight = count + len(batch), weight + share * len(batch)
            losses.append((float(values.detach().double().mean()), len(batch)))
        facts = {**_facts(losses, count, weighting, "retain"), "batch_size": batch_size}
        return mean(total, weight, "retain"), facts


def assert_ascent(towers: Towers, forget: Loader, delta: Mapping[str, Tensor]) -> float:
    """Make sure that a change raises the forget loss in first order.

    Args:
        towers: The model without the change.
        forget: Pairs to forget, all or some.
        delta: Change by parameter name.

    Returns:
        The slope ``sum <grad L_f, delta>``, positive.

    Raises:
        InvariantError: It is not; the likely cause is a sign.
    """
    gradient, _ = forget_gradient(towers, forget, names=list(delta))
    slope = sum(float((gradient[n].double() * d.double()).sum()) for n, d in delta.items())
    if not slope > 0:
        raise InvariantError(
            f"the change of {', '.join(delta)} would bring the forget pairs closer together (slope {slope:.3g} of the "
            "forget loss): it has the wrong sign, or belongs to other pairs"
        )
    return slope


def _whole(run: Run, pairs: Loader, chunk: int | None) -> tuple[dict[str, Tensor], Facts]:
    """The split as one contrastive batch, by gradient caching."""
    images, texts, first, varied = [], [], None, False
    with torch.no_grad():
        for batch in rebatched(pairs(), chunk):
            first = batch.tokens[:1] if first is None else first
            varied = varied or not same_text(batch.tokens, first)
            images.append(unit(run.towers.image(batch.pixels)))
            texts.append(unit(run.towers.text(batch.tokens)))
        count = sum(map(len, images))
        if count < 2:
            raise DataError(f"a contrastive loss needs at least two retain pairs, got {count}")
        if not varied:
            raise one_text_error(count, "retain set")
        scale = run.towers.scale()
    v, t = torch.cat(images), torch.cat(texts)
    by_v, by_t, by_scale, losses = _by_embeddings(v, t, scale)
    total, start = run.zeros(), 0
    for batch in rebatched(pairs(), chunk):
        here = slice(start, start + len(batch))
        start = here.stop
        if "vision" in run.sides:
            run.add(total, _again(unit(run.image(batch.pixels)), v[here]), outer=by_v[here])
        if "language" in run.sides:
            run.add(total, _again(unit(run.text(batch.tokens)), t[here]), outer=by_t[here])
    if start != count:
        raise DataError(f"the retain set had {count} pairs in the first pass and {start} in the second")
    run.add(total, run.scale(), outer=by_scale)
    return total, {"n": count, "loss": sum(losses) / 2, "batch_size": None, "halves": losses}


def _again(found: Tensor, before: Tensor) -> Tensor:
    if found.shape != before.shape or not torch.allclose(found.detach(), before, atol=1e-2):
        raise DataError("the second pass over the retain set gave other pairs than the first; it must not shuffle")
    return found


def _by_embeddings(v: Tensor, t: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Gradient of the symmetric InfoNCE by unit embeddings ``[N, D]`` and scale, and its two halves.

    Both halves are formed in blocks of rows, so that no ``N x N`` matrix is held.
    """
    leaves = [x.detach().clone().requires_grad_() for x in (v, t, scale)]
    sums, losses = [torch.zeros_like(x) for x in leaves], []
    own = torch.arange(len(v), device=v.device)
    for a, b in ((leaves[0], leaves[1]), (leaves[1], leaves[0])):
        losses.append(0.0)
        for rows in own.split(_ROWS):
            value = functional.cross_entropy(leaves[2] * a[rows] @ b.T, rows, reduction="sum") / len(v)
            losses[-1] += float(value.detach())
            for into, g in zip(sums, torch.autograd.grad(value / 2, leaves), strict=True):
                into += g
    return sums[0], sums[1], sums[2], losses


def _facts(losses: list[tuple[float, int]], count: int, weighting: Weighting, what: str) -> Facts:
    if not count:
        raise DataError(f"the {what} set has no pair")
    weights = [n if weighting == "samples" else 1 for _, n in losses]
    loss = sum(w * x for w, (x, _) in zip(weights, losses, strict=True)) / sum(weights)
    return {"n": count, "loss": loss, "weighting": weighting, "batch_losses": [x for x, _ in losses]}
