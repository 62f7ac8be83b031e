"""Forget-Me-Not (FMN): attention re-steering, and what its textual inversion needs.

Zhang et al., "Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models", 2023 (SHI-Labs/Forget-Me-Not).
Images of the concept are noised, the U-Net runs with a prompt that names it, and the attention probabilities of the
concept's tokens, in all cross-attention layers, heads and pixels, are made small. There is no term that keeps anything:
watch :func:`drift` and stop early.

Also here: the version of the SRS-ME repository (``train-scripts/FMN.py``), :func:`srsme_losses`, which uses logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from expunge.diffusion.attention_maps import AttentionMap
from expunge.diffusion.process import Eps
from expunge.errors import ConfigError, DataError, RequestError

Reduction = Literal["norm", "mean_square"]

_NO_MAPS = "no attention maps were collected: run the U-Net inside cross_attention_maps first"


def token_positions(
    prompt_ids: Sequence[int], concept_ids: Sequence[int], end_of_text: int | None = None, *, published: bool = False
) -> Tensor:
    """Which tokens of a prompt stand for the concept, bool ``[T]``; none if it does not occur.

    Args:
        prompt_ids: All ids of the prompt, padding included.
        concept_ids: Ids of the concept's name without special tokens; every occurrence counts.
        end_of_text: Also mark the first token with this id (the option ``use_pooler``).
        published: Mark every token with this id, as the public code does. On SD 1.x, which pads with it, these are all
            padding tokens as well.

    Raises:
        RequestError: The concept has no tokens.
    """
    ids, concept = [int(i) for i in prompt_ids], [int(i) for i in concept_ids]
    if not concept:
        raise RequestError("the concept has no tokens")
    marked = torch.zeros(len(ids), dtype=torch.bool)
    for start in range(len(ids) - len(concept) + 1):
        if ids[start : start + len(concept)] == concept:
            marked[start : start + len(concept)] = True
    if end_of_text is not None:
        ends = [i for i, value in enumerate(ids) if value == end_of_text]
        marked[ends if published else ends[:1]] = True
    return marked


def squared_norms(probs: Sequence[Tensor], positions: Tensor, *, published: bool = False) -> Tensor:
    """Sum of the squared probabilities at the concept's tokens over all layers, heads and pixels, per sample, ``[B]``.

    Args:
        probs: One ``[B * heads, P, T]`` per layer, all heads of the first sample first.
        positions: Bool ``[B, T]``.
        published: Row ``r`` uses the positions of sample ``r mod B``, as the public code's tiling does. The same for
            batches of one and for equal positions.

    Raises:
        RequestError: A sample has no selected token.
        DataError: There are no maps, a layer's rows are not a multiple of the batch, or its tokens are not the
            positions'.
    """
    if not probs:
        raise DataError(_NO_MAPS)
    if not bool(positions.any(1).all()):
        sample = int((~positions.any(1)).nonzero()[0])
        raise RequestError(f"the concept does not occur in the prompt of sample {sample}: no attention to re-steer")
    positions = positions.to(probs[0].device)
    batch = len(positions)
    columns = positions.any(0)
    total = torch.zeros(batch, device=positions.device)
    for j, layer in enumerate(probs):
        if layer.shape[0] % batch or layer.shape[2] != positions.shape[1]:
            raise DataError(f"layer {j} has probabilities {list(layer.shape)} for positions {list(positions.shape)}")
        heads = layer.shape[0] // batch
        chosen = positions.repeat(heads, 1) if published else positions.repeat_interleave(heads, 0)
        wide = layer[:, :, columns].to(torch.promote_types(layer.dtype, torch.float32))
        rows = (wide.square() * chosen[:, None, columns]).sum((1, 2))
        total = total + rows.view(batch, heads).sum(1)
    return total


def losses(
    probs: Sequence[Tensor], positions: Tensor, *, reduction: Reduction = "norm", published: bool = False
) -> Tensor:
    """Loss of every sample, ``[B]``: the Frobenius norm of its selected probabilities, or their mean square.

    See :func:`squared_norms` for the arguments and errors.
    """
    squares = squared_norms(probs, positions, published=published)
    if reduction == "norm":
        return squares.sqrt()
    rows = sum(p.shape[0] // len(positions) * p.shape[1] for p in probs)
    return squares / (rows * positions.sum(1))


def joint_loss(probs: Sequence[Tensor], positions: Tensor, *, published: bool = False) -> Tensor:
    """The public code's loss of a batch, 0-d: one Frobenius norm over all samples, neither squared nor averaged.

    For a batch of one it is :func:`losses`. See :func:`squared_norms` for the arguments and errors.
    """
    return squared_norms(probs, positions, published=published).sum().sqrt()


def srsme_losses(maps: Sequence[AttentionMap], anchor_states: Tensor) -> Tensor:
    """The version of the SRS-ME repository, ``[B]``: logits under the concept's prompt equal those under the anchor's.

    Sum over layers of the mean square of ``q (k(concept) - k(anchor))^T / sqrt(d)``: before the softmax, all tokens,
    with the queries of the forward pass under the concept's prompt.

    Args:
        maps: Of one forward pass under the concept's prompt.
        anchor_states: Of the anchor prompt, ``[1, T, D]`` or ``[B, T, D]``.

    Raises:
        DataError: There are no maps.
    """
    if not maps:
        raise DataError(_NO_MAPS)
    total = torch.zeros(())
    for m in maps:
        batch = m.query.shape[0] // m.heads
        anchor = m.keys(anchor_states.expand(batch, -1, -1))
        logits = [torch.bmm(m.query, k.transpose(1, 2)) * m.scale for k in (m.key, anchor)]
        squares = (logits[0] - logits[1]).square().mean((1, 2))
        total = total.to(squares) + squares.view(batch, m.heads).mean(1)
    return total


def drift(student: Eps, teacher: Eps, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """How far the predictions for prompts without the concept have moved, ``[B]``: mean squares, for a stop rule.

    Args:
        student: The model being trained.
        teacher: The untouched one.
        x_t: ``[B, C, H, W]``.
        t: int64 ``[B]``.
        states: Of generic prompts, ``[B, T, D]``.
    """
    with torch.no_grad():
        return (student(x_t, t, states) - teacher(x_t, t, states)).square().mean((1, 2, 3))


def pulled(rows: Tensor, lr: float, norm: float = 0.4) -> Tensor:
    """Rows of the token table with their norms ``n`` pulled to ``n + min(1, 100 lr) (norm - n)``, after every step.

    Args:
        rows: The rows that textual inversion trains, ``[n, D]``.
        lr: Learning rate of the step.
        norm: Where norms are pulled to.

    Raises:
        DataError: A row is zero and has no direction.
    """
    norms = rows.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise DataError("a row of the token table is zero; its norm cannot be set")
    return rows / norms * (norms + min(1.0, 100 * lr) * (norm - norms))


def initial_rows(text: str, lookup: Callable[[str], Tensor], key: int) -> Tensor:
    """First values of the new tokens' rows, ``[n, D]``.

    Args:
        text: ``"elon|musk|<rand-1>|<rand-1>"``: a word per new token, or ``<rand-s>`` for normal numbers of standard
            deviation ``s``.
        lookup: The row ``[D]`` of a word.
        key: Of the draws.

    Raises:
        ConfigError: A piece is empty, or no word gives the rows' length.
    """
    pieces = text.split("|")
    drawn = {i: float(m[1]) for i, p in enumerate(pieces) if (m := re.fullmatch(r"<rand-([0-9.eE+-]+)>", p))}
    words = {i: lookup(p) for i, p in enumerate(pieces) if p and i not in drawn}
    if len(drawn) + len(words) != len(pieces) or not words:
        raise ConfigError(f"expected words and <rand-s> separated by '|', with at least one word, got {text!r}")
    like = next(iter(words.values()))
    generator = torch.Generator().manual_seed(key & (2**63 - 1))
    rows = []
    for i in range(len(pieces)):
        noise = torch.randn(like.shape, generator=generator)  # drawn for words too: a row does not depend on the others
        rows.append(words[i] if i in words else (drawn[i] * noise).to(like))
    return torch.stack(rows)
