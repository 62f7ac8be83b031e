"""Two-tower models: images and texts into one space. One interface for transformers and open_clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Tower = Literal["vision", "language"]
TOWERS: tuple[Tower, ...] = ("vision", "language")


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts.

    Args:
        ids: int64 ``[B, T]``.
        mask: int64 ``[B, T]``, 1 where a token counts; ``None``: all do. Padding after the end token changes nothing
            in a causal tower.
    """

    ids: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Tokens:
        return Tokens(self.ids[rows], None if self.mask is None else self.mask[rows])

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(self.ids.to(device), None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class Place:
    """Where a parameter sits.

    Args:
        tower: ``vision``, ``language``, or ``None`` for what both share (the logit scale).
        block: Number of the transformer block, ``None`` outside the stack.
        part: ``q``, ``k``, ``v``, ``qkv``, ``out``, ``fc1``, ``fc2``, ``norm``, ``projection``, ``embedding``,
            ``scale`` or ``other``.
        bias: Whether it is a bias.
    """

    tower: Tower | None
    block: int | None
    part: str
    bias: bool


@dataclass(frozen=True)
class Staged:
    """A tower between two of its blocks: the hidden state, and what the last stage needs beside it (end positions)."""

    hidden: Tensor
    extra: Any = None


class Towers(ABC):
    """A two-tower model as is: its module keeps its own tensor names; this adapter only calls it.

    Attributes:
        model: The module that is edited, in the library's own form.
        library: ``transformers`` or ``open_clip``.
        image_size: Side of the images in pixels.
        mean: Per channel, for images in [0, 1].
        std: Per channel.
    """

    model: nn.Module
    library: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut at the model's context length, padded to the longest text of the call."""

    @abstractmethod
    def image(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[B, D]`` (not normalised) of preprocessed images ``[B, 3, S, S]``."""

    @abstractmethod
    def text(self, tokens: Tokens) -> Tensor:
        """Embeddings ``[B, D]`` (not normalised) of texts."""

    @abstractmethod
    def scale(self) -> Tensor:
        """The factor of cosines in the logits, 0-d: ``exp(logit_scale)``."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where the parameter ``name`` of :attr:`model` sits."""

    @abstractmethod
    def depth(self, tower: Tower) -> int:
        """Number of transformer blocks."""

    @abstractmethod
    def enter(self, tower: Tower, inputs: Tensor | Tokens) -> Staged:
        """The state before block 0."""

    @abstractmethod
    def through(self, tower: Tower, state: Staged, start: int, stop: int | None = None) -> Staged:
        """The state after blocks ``start .. stop - 1`` (``None``: to the last)."""

    @abstractmethod
    def leave(self, tower: Tower, state: Staged) -> Tensor:
        """Embeddings ``[B, D]`` of the state after the last block: norm, pooling, projection."""

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1] ``[B, 3, H, W]`` resized to :attr:`image_size` (bicubic, antialiased) and normalised.

        The shorter side is resized and the centre cropped, as the published preprocessing does.
        """
        size = self.image_size
        if tuple(images.shape[-2:]) != (size, size):
            h, w = images.shape[-2:]
            short = min(h, w)
            target = (max(size, round(h * size / short)), max(size, round(w * size / short)))
            images = nn.functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (target[0] - size) // 2, (target[1] - size) // 2
            images = images[..., top : top + size, left : left + size]
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
        return (images - mean) / std

    def parameters(self, tower: Tower | None = None) -> dict[str, nn.Parameter]:
        """Parameters by name: of one tower, or all."""
        named = dict(self.model.named_parameters())
        return named if tower is None else {n: p for n, p in named.items() if self.place(n).tower == tower}
