"""Attention probabilities of the cross-attention layers of a diffusers U-Net, with gradients.

The default processors compute attention in one fused call that never forms the probabilities. While
:func:`cross_attention_maps` is open, the layers use diffusers' plain processor instead, which does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expunge.errors import CapabilityError


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What one cross-attention layer computed in one forward pass. Rows are ordered by sample, then by head.

    Args:
        name: The layer's name in the U-Net.
        query: ``[B * heads, P, d]``.
        key: ``[B * heads, T, d]``.
        probs: Softmax probabilities, ``[B * heads, P, T]``.
        heads: Number of heads.
        scale: Factor of the logits, ``1 / sqrt(d)``.
        layer: The attention module.
    """

    name: str
    query: Tensor
    key: Tensor
    probs: Tensor
    heads: int
    scale: float
    layer: Any

    def keys(self, states: Tensor) -> Tensor:
        """Keys of other prompt states ``[B, T, D]``, ``[B * heads, T, d]``."""
        keys: Tensor = self.layer.head_to_batch_dim(self.layer.to_k(states))
        return keys


@contextmanager
def cross_attention_maps(unet: nn.Module) -> Iterator[list[AttentionMap]]:
    """Collect the maps of every cross-attention layer, in the order in which the layers run.

    The list grows with each forward pass; clear it between two. The processors are put back at the end, so run the
    backward pass inside as well if activations are recomputed (gradient checkpointing).

    Raises:
        CapabilityError: diffusers is missing, the model has no cross-attention layer named ``attn2``, or one has a
            processor whose probabilities the plain one would not reproduce (adapters, added keys).
    """
    plain, replaceable = _processors()
    layers = {n: m for n, m in unet.named_modules() if n.rpartition(".")[2] == "attn2"}
    if not layers:
        raise CapabilityError(f"{type(unet).__name__} has no cross-attention layer named attn2")
    before: dict[str, Any] = {}
    for name, layer in layers.items():
        before[name] = getattr(layer, "processor", None)
        if type(before[name]) not in replaceable:
            raise CapabilityError(
                f"{name} has the processor {type(before[name]).__name__}; its probabilities cannot be collected. "
                "Remove adapters or call unet.set_default_attn_processor() first"
            )
    maps: list[AttentionMap] = []
    try:
        for name, layer in layers.items():
            layer.set_processor(_Collecting(name, plain, maps))
        yield maps
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


class _Collecting:
    """diffusers' plain processor; keeps what passes through the layer's ``get_attention_scores``."""

    def __init__(self, name: str, plain: Any, maps: list[AttentionMap]) -> None:
        self.name, self.plain, self.maps = name, plain, maps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        scores = attn.get_attention_scores

        def kept(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
            probs: Tensor = scores(query, key, mask)
            self.maps.append(AttentionMap(self.name, query, key, probs, attn.heads, attn.scale, attn))
            return probs

        # Set on the layer and not on its class: the library's own code runs, whatever else it does around the softmax.
        attn.get_attention_scores = kept
        try:
            out: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        finally:
            del attn.get_attention_scores
        return out


def _processors() -> tuple[Any, set[type]]:
    try:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    except ImportError:
        raise CapabilityError('attention maps need diffusers: pip install "expunge[diffusion]"') from None
    return AttnProcessor(), {AttnProcessor, AttnProcessor2_0}


def uniform_norm(rows: int, columns: int, tokens: int) -> float:
    """Frobenius norm of ``columns`` selected columns where every row attends to all tokens alike.

    Args:
        rows: Layers times heads times pixels.
        columns: Selected tokens.
        tokens: All tokens.

    >>> uniform_norm(4, 1, 2)
    1.0
    """
    return math.sqrt(rows * columns) / tokens
