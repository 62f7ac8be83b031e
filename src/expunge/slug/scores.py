"""Which layers matter: scores from four numbers per tensor, and the filter of candidates.

SLUG (Cai et al., ICML 2025, arXiv 2407.11867), section 3: importance ``|g_f| / |theta|``, alignment ``cos(g_f, g_r)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.errors import CapabilityError, DivergedError, RequestError, did_you_mean
from expunge.models.towers import Place, Tower, Towers

Norms = Literal["exclude", "include"]

#: Words in the names of tensors that are never edited.
_NEVER = ("bias", "logit_scale", "position", "embedding")
#: Lower bound of each norm in the published cosine.
_PUBLISHED_CLAMP = 1e-6
_PIECE = 1 << 22


@dataclass(frozen=True)
class LayerScore:
    """One parameter tensor in four numbers.

    Args:
        name: Name in the library's own form.
        tower: ``vision`` or ``language``; ``None`` for what both share.
        block: Number of the block, ``None`` outside the stack.
        part: See :class:`expunge.models.towers.Place`.
        weight_norm: ``|theta|``.
        forget_norm: ``|g_f|``.
        retain_norm: ``|g_r|``.
        inner: ``<g_f, g_r>``.
        clamp: Lower bound of each gradient norm in the cosine; 0 as defined, 1e-6 as published.
    """

    name: str
    tower: Tower | None
    block: int | None
    part: str
    weight_norm: float
    forget_norm: float
    retain_norm: float
    inner: float
    clamp: float = 0.0

    @property
    def importance(self) -> float:
        """``|g_f| / |theta|``, per unit of the loss; infinite for a zero tensor with a gradient, else NaN for zeros."""
        if self.weight_norm:
            return self.forget_norm / self.weight_norm
        return math.inf if self.forget_norm else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of both gradients, in [-1, 1]; 0 if one of them vanishes."""
        product = max(self.forget_norm, self.clamp) * max(self.retain_norm, self.clamp)
        return max(-1.0, min(1.0, self.inner / product)) if product else 0.0

    @property
    def alignment(self) -> float:
        """``|cosine|``: what the front keeps small."""
        return abs(self.cosine)

    @property
    def rho(self) -> float:
        """First-order loss of the retain set per unit of forgetting: ``max(0, <g_f, g_r>) / |g_f|^2``."""
        return max(0.0, self.inner) / self.forget_norm**2 if self.forget_norm else 0.0

    @property
    def unit(self) -> float:
        """``|theta| / |g_f|``: ``lambda`` of a relative step of 1."""
        return self.weight_norm / self.forget_norm if self.forget_norm else math.inf

    def row(self) -> dict[str, Any]:
        """All of it as JSON data."""
        derived = {n: getattr(self, n) for n in ("importance", "cosine", "alignment", "rho", "unit")}
        return {**asdict(self), **{n: v if math.isfinite(v) else None for n, v in derived.items()}}


@dataclass(frozen=True)
class Consumer:
    """What a downstream model reads of a tower, so that edits which it cannot notice are left out.

    Args:
        tower: The only tower it runs.
        hidden_state: Which hidden state it reads, counted as transformers does: -1 after the last block, -2 before
            it. ``None``: the embedding.
        final_norm: Whether the normalisation after the stack is applied to that hidden state.
        projection: Whether a projection follows.

    Example:
        >>> Consumer("vision", hidden_state=-2, final_norm=False, projection=False)  # LLaVA 1.5
        Consumer(tower='vision', hidden_state=-2, final_norm=False, projection=False)
    """

    tower: Tower
    hidden_state: int | None = None
    final_norm: bool = True
    projection: bool = True

    def ignores(self, name: str, place: Place, depth: int) -> str:
        """Why a change of the tensor cannot reach the consumer; empty if it can."""
        if place.tower != self.tower:
            return f"the consumer runs the {self.tower} tower only"
        if self.hidden_state is not None and place.block is not None:
            read = self.hidden_state if self.hidden_state >= 0 else depth + 1 + self.hidden_state
            if place.block >= read:
                return f"the consumer reads hidden state {self.hidden_state}, formed before block {place.block}"
        if place.part == "projection" and not self.projection:
            return "the consumer reads the tower before its projection"
        last = place.part == "norm" and place.block is None and "pre" not in name.split(".")[-2]
        if last and not self.final_norm:
            return "the consumer reads the tower before its last normalisation"
        return ""


def filtered(towers: Towers, name: str, norms: Norms = "exclude", consumer: Consumer | None = None) -> str:
    """Why a parameter is no candidate by its name and place; empty if it may be one."""
    word = next((w for w in _NEVER if w in name), None)
    if word is not None:
        return f"'{word}' tensors are never edited"
    place = towers.place(name)
    if place.tower is None:
        return "it belongs to no tower"
    if norms == "exclude" and (place.part == "norm" or "norm" in name):
        return "normalisation weights are excluded; norms='include' keeps them"
    return "" if consumer is None else consumer.ignores(name, place, towers.depth(place.tower))


def candidate_names(
    towers: Towers, tower: Tower | None = None, *, norms: Norms = "exclude", consumer: Consumer | None = None
) -> list[str]:
    """Parameters that pass the filter of names and places, in the model's order: what gradients are needed for."""
    return [n for n in towers.parameters(tower) if not filtered(towers, n, norms, consumer)]


def candidates(
    towers: Towers,
    scores: Sequence[LayerScore],
    *,
    norms: Norms = "exclude",
    consumer: Consumer | None = None,
    only: Iterable[str] = (),
) -> tuple[list[LayerScore], dict[str, str]]:
    """Layers that an edit may choose from, and why the others are out.

    Args:
        towers: The model.
        scores: Of its tensors.
        norms: Whether normalisation weights may be edited. The published transformers scripts drop them, the
            open_clip script keeps them.
        consumer: What reads the edited tower; ``None``: the model itself.
        only: Names asked for explicitly; none: all.

    Returns:
        Candidates in the given order, and the reason by name for every other one.

    Raises:
        RequestError: A name asked for has no score.
        CapabilityError: A name asked for is not a candidate; the message says why.
    """
    wanted, known = list(only), {s.name: s for s in scores}
    for name in wanted:
        if name not in known:
            raise RequestError(f"there is no score of a tensor called {name!r}{did_you_mean(name, known)}")
    kept, out = [], {}
    for score in scores:
        why = filtered(towers, score.name, norms, consumer)
        if not why and score.forget_norm == 0:
            why = "its forget gradient is exactly zero, so it cannot influence the output"
        elif not why and score.weight_norm == 0:
            why = "all its weights are zero, so a relative step has no size"
        if why:
            out[score.name] = why
            if score.name in wanted:
                raise CapabilityError(f"'{score.name}' cannot be edited: {why}")
        elif wanted and score.name not in wanted:
            out[score.name] = "other layers were asked for"
        else:
            kept.append(score)
    return kept, out


def score_layers(
    towers: Towers,
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor],
    *,
    published: bool = False,
) -> list[LayerScore]:
    """Scores of all tensors that have both gradients, in the model's order; sums in float64.

    Args:
        towers: The model, with the weights that the gradients were taken at.
        forget: Forget gradients by name.
        retain: Retain gradients by name.
        published: Reproduce two details of the public code: each norm in the cosine is at least 1e-6, and towers are
            told apart by ``vision`` or ``visual`` in the name, which puts ``visual_projection`` among the language
            tensors of transformers models.

    Raises:
        DivergedError: A number is not finite.
    """
    found = []
    for name, weight in towers.parameters().items():
        if name not in forget or name not in retain:
            continue
        f, r = forget[name], retain[name]
        place = towers.place(name)
        tower = _published_tower(towers, name) if published else place.tower
        numbers = (_dot(weight, weight) ** 0.5, _dot(f, f) ** 0.5, _dot(r, r) ** 0.5, _dot(f, r))
        if not all(map(math.isfinite, numbers)):
            raise DivergedError(f"the weights or gradients of '{name}' hold NaN or infinite values")
        clamp = _PUBLISHED_CLAMP if published else 0.0
        found.append(LayerScore(name, tower, place.block, place.part, *numbers, clamp))
    return found


def step_size(weight: Tensor, gradient: Tensor, alpha: float) -> float:
    """``lambda`` of a relative step: ``alpha |theta| / |g|``.

    Raises:
        CapabilityError: The gradient is zero.
    """
    norm = _dot(gradient, gradient) ** 0.5
    if norm == 0:
        raise CapabilityError("a tensor without a gradient has no step: changing it changes no output")
    return alpha * _dot(weight, weight) ** 0.5 / norm


def _published_tower(towers: Towers, name: str) -> Tower:
    return "vision" if ("vision" if towers.library == "transformers" else "visual") in name else "language"


@torch.no_grad()
def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in float64, in pieces so that no second copy of a large tensor is made."""
    pieces = zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in pieces)
