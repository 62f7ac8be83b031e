"""The two losses of SLUG, per pair: how well a pair matches, and how well it is told from the others.

Embeddings come as the towers give them, ``[B, D]`` and not normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from expunge.errors import DataError
from expunge.models.towers import Tokens


def forget_losses(image: Tensor, text: Tensor) -> Tensor:
    """``1 - cos(v_i, t_i)`` of every pair, ``[B]``: positive pairs only, no scale.

    One text ``[1, D]`` may stand for all.

    >>> forget_losses(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])).tolist()
    [1.0]
    """
    return 1 - (unit(image) * unit(text)).sum(1)


def contrastive_parts(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of every pair within the batch: of its image over the texts, of its text over the images.

    Args:
        image: ``[B, D]``.
        text: ``[B, D]``.
        scale: Factor of the cosines, 0-d.

    Returns:
        Two tensors ``[B]``.
    """
    logits = scale * unit(image) @ unit(text).T
    own = torch.arange(len(image), device=image.device)
    return tuple(functional.cross_entropy(side, own, reduction="none") for side in (logits, logits.T))  # type: ignore[return-value]


def contrastive_losses(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of every pair within the batch, ``[B]``: the mean of :func:`contrastive_parts`."""
    image_to_text, text_to_image = contrastive_parts(image, text, scale)
    return (image_to_text + text_to_image) / 2


def unit(embeddings: Tensor) -> Tensor:
    """Rows divided by their norms."""
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def same_text(tokens: Tokens, other: Tokens | None = None) -> bool:
    """Whether all texts are one and the same: the first one, or the single text of ``other``."""
    first = tokens[:1] if other is None else other
    if first.ids.shape[1:] != tokens.ids.shape[1:] or (first.mask is None) != (tokens.mask is None):
        return False
    equal = bool((tokens.ids == first.ids).all())
    return equal and (tokens.mask is None or first.mask is None or bool((tokens.mask == first.mask).all()))


def refuse_one_text(tokens: Tokens, where: str) -> None:
    """Refuse a contrastive batch in which every image has the same text.

    There the image-to-text half is the constant ``log B`` without a gradient, and the other half pulls all images to
    equal similarity: what the public code computes after it has replaced every caption by the concept's name.

    Raises:
        DataError: It is such a batch.
    """
    if len(tokens) > 1 and same_text(tokens):
        raise one_text_error(len(tokens), where)


def one_text_error(count: int, where: str) -> DataError:
    """The error of :func:`refuse_one_text`."""
    return DataError(
        f"{where}: all {count} texts of a contrastive batch are the same, so its loss does not tell images apart; "
        "give the true captions, a larger batch or another order"
    )
