"""Streams of pairs, and sums of gradients over them for chosen tensors of a two-tower model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.errors import DataError, DivergedError, RequestError, did_you_mean
from expunge.models.towers import Tokens, Tower, Towers


@dataclass(frozen=True)
class Pairs:
    """Images with their texts.

    Args:
        pixels: Preprocessed images ``[B, 3, S, S]``.
        tokens: ``B`` texts.
    """

    pixels: Tensor
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.pixels)


#: One fresh pass over a split, always in the same order.
Loader = Callable[[], Iterator[Pairs]]


def rebatched(batches: Iterable[Pairs], size: int | None) -> Iterator[Pairs]:
    """The same pairs in the same order, ``size`` at a time; ``None``: as they come.

    Texts padded to different lengths are padded with 0 behind their end, which a causal tower does not see.
    """
    if size is None:
        yield from batches
        return
    held: list[Pairs] = []
    for batch in batches:
        held.append(batch)
        while sum(map(len, held)) >= size:
            joined = held[0] if len(held) == 1 else _joined(held)
            yield Pairs(joined.pixels[:size], joined.tokens[:size])
            held = [Pairs(joined.pixels[size:], joined.tokens[size:])] if len(joined) > size else []
    if held:
        yield _joined(held)


def _joined(held: list[Pairs]) -> Pairs:
    length = max(p.tokens.ids.shape[1] for p in held)

    def padded(rows: Tensor) -> Tensor:
        return nn.functional.pad(rows, (0, length - rows.shape[1]))

    ids = torch.cat([padded(p.tokens.ids) for p in held])
    masks = [p.tokens.mask for p in held]
    whole = [m for m in masks if m is not None]
    if whole and len(whole) != len(masks):
        raise DataError("some batches of texts have a mask and others have none")
    mask = torch.cat([padded(m) for m in whole]) if whole else None
    return Pairs(torch.cat([p.pixels for p in held]), Tokens(ids, mask))


class Run:
    """Forward passes with gradients where they are wanted, and sums of gradients.

    Attributes:
        towers: The model.
        parameters: What is differentiated, by name.
        sides: Where these lie: towers, and ``None`` for what both share.
    """

    def __init__(self, towers: Towers, chosen: Mapping[str, nn.Parameter]) -> None:
        self.towers, self.parameters = towers, dict(chosen)
        self.sides = {towers.place(n).tower for n in chosen}

    def image(self, pixels: Tensor) -> Tensor:
        """Embeddings of images, differentiable if the vision tower is wanted."""
        with torch.set_grad_enabled("vision" in self.sides):
            return self.towers.image(pixels)

    def text(self, tokens: Tokens) -> Tensor:
        """Embeddings of texts, differentiable if the language tower is wanted."""
        with torch.set_grad_enabled("language" in self.sides):
            return self.towers.text(tokens)

    def scale(self) -> Tensor:
        """Factor of the cosines, differentiable if it is wanted."""
        with torch.set_grad_enabled(None in self.sides):
            return self.towers.scale()

    def zeros(self) -> dict[str, Tensor]:
        """An empty sum."""
        return {n: torch.zeros_like(p) for n, p in self.parameters.items()}

    def gradient(self, value: Tensor, outer: Tensor | None = None) -> dict[str, Tensor]:
        """Gradient of ``value`` (contracted with ``outer``) by those tensors that it depends on."""
        if not value.requires_grad:
            return {}
        found = torch.autograd.grad(value, list(self.parameters.values()), outer, allow_unused=True)
        return {n: g for n, g in zip(self.parameters, found, strict=True) if g is not None}

    def add(self, total: dict[str, Tensor], value: Tensor, factor: float = 1.0, outer: Tensor | None = None) -> None:
        """Add ``factor`` times that gradient to a sum."""
        for name, g in self.gradient(value, outer).items():
            total[name].add_(g, alpha=factor)


def mean(total: dict[str, Tensor], weight: float, what: str) -> dict[str, Tensor]:
    """A sum divided by ``weight``, in place.

    Raises:
        DivergedError: It is not finite.
    """
    for name, g in total.items():
        g /= weight
        if not bool(torch.isfinite(g).all()):
            raise DivergedError(f"the {what} gradient of '{name}' holds NaN or infinite values")
    return total


@contextmanager
def differentiable(towers: Towers, tower: Tower | None = None, names: Iterable[str] | None = None) -> Iterator[Run]:
    """Eval mode, and flags on for the wanted parameters only, so that no graph reaches below the shallowest of them.

    Args:
        towers: The model; modes and flags are put back on leaving.
        tower: Tower to differentiate, ``None``: both and what they share.
        names: Only these parameters.

    Raises:
        RequestError: There is no such parameter, or it is in the other tower.
    """
    known = dict(towers.model.named_parameters())
    chosen = _chosen(towers, known, tower, names)
    modes = {m: m.training for m in towers.model.modules()}
    flags = [(p, p.requires_grad) for p in known.values()]
    inside = {id(p) for p in chosen.values()}
    try:
        towers.model.eval()
        for p, _ in flags:
            p.requires_grad_(id(p) in inside)
        with torch.enable_grad():
            yield Run(towers, chosen)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def _chosen(
    towers: Towers, known: Mapping[str, nn.Parameter], tower: Tower | None, names: Iterable[str] | None
) -> dict[str, nn.Parameter]:
    wanted = list(towers.parameters(tower) if names is None else names)
    if not wanted:
        raise RequestError("no parameter to differentiate: the list of names is empty")
    for name in wanted:
        if name not in known:
            raise RequestError(f"the model has no parameter '{name}'{did_you_mean(name, known)}")
        if tower is not None and towers.place(name).tower != tower:
            raise RequestError(f"'{name}' is not in the {tower} tower")
    return {n: known[n] for n in dict.fromkeys(wanted)}
