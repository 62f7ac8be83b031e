"""Unified Concept Editing (UCE): new key and value maps of cross-attention in closed form.

Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, equation (7). For every map ``W`` (out x in)
with edited states ``c_i``, wanted outputs ``v_i`` (``W g_i`` for a guide ``g_i``) and preserved states ``p_j``, the new
map minimises ::

    s_e sum_i |W' c_i - v_i|^2 + s_p sum_j |W' p_j - W p_j|^2 + lambda |W' - W|_F^2

and is ``W + D`` with ``D = s_e sum_i (v_i - W c_i) c_i^T A^-1``, where ``A = lambda I + s_e sum_i c_i c_i^T + s_p sum_j
p_j p_j^T`` is the same for all maps that read the same states. So the rank of ``D`` is at most the number of edited
states, a pair with ``v_i = W c_i`` changes nothing at all, and one factorisation serves every layer.

All edits are simultaneous. Editing one after the other is another problem with another solution.

Deviates: The public code inverts ``A`` in float32, which loses about ``1e-7`` times its condition number. Here
    everything is solved in float64 by Cholesky factorisation and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from expunge.errors import ConfigError, DataError, RequestError
from expunge.patch.changes import Change, Dense, LowRank, accumulate_dtype

Rows = Literal["last", "span", "all"]
Technique = Literal["replace", "tensor"]

#: States widened to float64 at a time: the 2023 script preserves 1734 prompts of 77 states each.
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Prompt:
    """Encoder states of one prompt.

    Args:
        states: ``[T, D]``.
        last: Index of its last token that is not special; 0 (the first, special one) for the empty prompt.
    """

    states: Tensor
    last: int

    @classmethod
    def masked(cls, states: Tensor, mask: Tensor) -> Prompt:
        """From a mask of the tokenizer, ``[T]``: the last token is at ``mask.sum() - 2``."""
        return cls(states, int(mask.sum()) - 2)

    def __post_init__(self) -> None:
        if self.states.ndim != 2 or not 0 <= self.last < len(self.states):
            raise DataError(
                f"a prompt needs states [T, D] and a last token among them: {list(self.states.shape)}, {self.last}"
            )


@dataclass(frozen=True, eq=False)
class Pair:
    """States to edit and the states whose outputs they get, row by row, both ``[n, D]``."""

    edit: Tensor
    guide: Tensor

    def __post_init__(self) -> None:
        if self.edit.ndim != 2 or self.edit.shape != self.guide.shape:
            raise DataError(
                f"edited states {list(self.edit.shape)} and guides {list(self.guide.shape)} must both be [n, D]"
            )


def pair(edit: Prompt, guide: Prompt, rows: Rows = "last") -> Pair:
    """The states that a pair of prompts contributes.

    Args:
        edit: The prompt to edit.
        guide: The prompt that replaces it.
        rows: ``last`` = one state, of the last token (current script); ``span`` = from the last token to the end, as
            many of both (2023 script); ``all`` = every position.
    """
    if rows == "last":
        return Pair(edit.states[edit.last][None], guide.states[guide.last][None])
    if rows == "all":
        return Pair(edit.states, guide.states)
    count = len(edit.states) - max(edit.last, guide.last)
    return Pair(edit.states[edit.last : edit.last + count], guide.states[guide.last : guide.last + count])


def preserved(prompts: Sequence[Prompt], rows: Rows = "last") -> Tensor:
    """States of the prompts to preserve, ``[n, D]``: their last tokens', or all of theirs (``span`` and ``all``).

    Raises:
        DataError: There are no prompts; pass ``None`` to :func:`edit` instead.
    """
    if not prompts:
        raise DataError("no prompts to preserve; leave them out instead")
    return torch.cat([p.states[p.last][None] if rows == "last" else p.states for p in prompts])


@dataclass(frozen=True, eq=False)
class Solved:
    """An edit of all maps that read the same states.

    Args:
        changes: One change per map, by its name; ``LowRank`` where that takes fewer bytes.
        condition: Condition number of ``A``.
        rank: Number of edited states, the largest rank that a change can have.
    """

    changes: dict[str, Change]
    condition: float
    rank: int


def edit(
    weights: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    preserve: Tensor | None = None,
    *,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
    technique: Technique = "replace",
) -> Solved:
    """Edit all maps at once.

    Args:
        weights: Maps ``[out, D]`` by name.
        pairs: What to edit, and into what.
        preserve: States whose outputs stay, ``[m, D]``.
        erase_scale: ``s_e``.
        preserve_scale: ``s_p``.
        lamb: ``lambda``, how much the maps resist.
        technique: ``replace`` = the guide's outputs; ``tensor`` = the guide's outputs without their part along the
            edited states' own, norm and inner product over the whole block of a pair (2023 script).

    Returns:
        The changes; a map whose change would be zero everywhere is left out.

    Raises:
        ConfigError: ``lamb`` is not positive, or a scale is negative.
        DataError: No pair was given, states do not fit a map, or a number is not finite.
    """
    if not pairs:
        raise DataError("nothing to edit: no pairs were given")
    _check(lamb, erase_scale, preserve_scale)
    edits = torch.cat([_wide(p.edit) for p in pairs])
    down, condition = _project(edits, preserve, erase_scale, preserve_scale, lamb)
    changes = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] != edits.shape[1]:
            raise DataError(f"{name} has shape {list(weight.shape)}; the states have {edits.shape[1]} features")
        wide = _wide(weight)
        residuals = torch.cat([_residuals(wide, p, technique, name) for p in pairs])
        change = _change(residuals.T * erase_scale, down, weight)
        if change is not None:
            changes[name] = change
    return Solved(changes, condition, len(edits))


def applied(weight: Tensor, change: Change | None) -> Tensor:
    """The new map: the sum in float64, rounded once to the map's dtype."""
    if change is None:
        return weight.detach().clone()
    if isinstance(change, LowRank):
        delta = (change.up.double() @ change.down.double()).reshape(change.shape)
    else:
        delta = change.dense().double()
    return (weight.detach().double() + delta.to(weight.device)).to(weight.dtype)


def debias_guides(concepts: Tensor, attributes: Tensor, gaps: Tensor, *, step_size: float = 1.0) -> Tensor:
    """Guides ``c_i + step_size sum_k gap_ik a_k``, ``[E, D]``: the maps are linear, so outputs add up as states do.

    Args:
        concepts: ``[E, D]``.
        attributes: ``[K, D]`` for all concepts, or ``[E, K, D]``.
        gaps: Wanted minus measured ratios, ``[E, K]``, summed over the rounds so far.
        step_size: Factor of every addition. The public script accepts one and uses 1.
    """
    own = _wide(attributes).expand(len(concepts), -1, -1)
    return _wide(concepts) + step_size * torch.einsum("ek,ekd->ed", _wide(gaps), own)


@dataclass(frozen=True, eq=False)
class Debiased:
    """Result of :func:`debias`.

    Args:
        solved: The edit of the last round; ``None`` if the first measurement was already within the tolerance.
        gaps: One ``[E, K]`` per measurement, in order.
        converged: Whether the last measurement was within the tolerance.
    """

    solved: Solved | None
    gaps: list[Tensor] = field(default_factory=list)
    converged: bool = False


def debias(
    weights: Mapping[str, Tensor],
    concepts: Tensor,
    attributes: Tensor,
    desired: Tensor,
    measure: Callable[[Mapping[str, Change]], Tensor],
    preserve: Tensor | None = None,
    *,
    step_size: float = 0.1,
    tolerance: float = 0.05,
    max_rounds: int = 30,
    edit_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lamb: float = 0.5,
) -> Debiased:
    """Edit, measure the ratios of the attributes, and edit again, each time from the original maps.

    Args:
        weights: Maps ``[out, D]`` by name, the original ones.
        concepts: ``[E, D]``, one state per concept (last tokens).
        attributes: ``[K, D]`` or ``[E, K, D]``.
        desired: Wanted ratios, ``[E, K]``.
        measure: Ratios ``[E, K]`` of images made with these changes applied; no changes at first.
        preserve: States whose outputs stay.
        step_size: Factor of every round's addition; 1 is what the public script does.
        tolerance: Stop when every gap is smaller.
        max_rounds: Most rounds of editing.
        edit_scale: Weight of the concepts.
        preserve_scale: Weight of the preserved states.
        lamb: How much the maps resist.

    Raises:
        DataError: A measurement has another shape than the wanted ratios, or is not finite.
    """
    total = torch.zeros(desired.shape, dtype=torch.float64)
    result = Debiased(None)
    for done in range(max_rounds + 1):
        ratios = measure(result.solved.changes if result.solved else {})
        if ratios.shape != desired.shape or not bool(ratios.isfinite().all()):
            raise DataError(f"measured ratios must be finite and {list(desired.shape)}, not {list(ratios.shape)}")
        gap = _wide(desired) - _wide(ratios)
        near = bool((gap.abs() < tolerance).all())
        result = Debiased(result.solved, [*result.gaps, gap], near)
        if near or done == max_rounds:
            break
        total = total + gap
        guides = debias_guides(concepts, attributes, total, step_size=step_size)
        solved = edit(
            weights,
            [Pair(_wide(concepts), guides)],
            preserve,
            erase_scale=edit_scale,
            preserve_scale=preserve_scale,
            lamb=lamb,
        )
        result = Debiased(solved, result.gaps)
    return result


def default_preserve_scale(count: int) -> float:
    """Weight of preserved prompts in the 2023 script: one over their number, at least a tenth.

    >>> default_preserve_scale(4), default_preserve_scale(1734)
    (0.25, 0.1)
    """
    return max(0.1, 1 / count)


def _wide(tensor: Tensor) -> Tensor:
    """In float64 on the CPU, where accelerators without it give the same numbers."""
    return tensor.detach().to("cpu", torch.float64)


def _check(lamb: float, erase_scale: float, preserve_scale: float) -> None:
    if lamb <= 0:
        raise ConfigError(f"lambda must be positive, not {lamb}: with 0 the map is undetermined outside the states")
    if erase_scale < 0 or preserve_scale < 0:
        raise ConfigError(f"scales must not be negative: erase {erase_scale}, preserve {preserve_scale}")


def _project(
    edits: Tensor, preserve: Tensor | None, erase_scale: float, preserve_scale: float, lamb: float
) -> tuple[Tensor, float]:
    """``C A^-1``, ``[n, D]``, and the condition number of ``A``; both in float64."""
    system = lamb * torch.eye(edits.shape[1], dtype=torch.float64)
    system += erase_scale * edits.T @ edits
    if preserve is not None:
        if preserve.ndim != 2 or preserve.shape[1] != edits.shape[1]:
            raise DataError(f"preserved states have shape {list(preserve.shape)}, not [m, {edits.shape[1]}]")
        for part in preserve.split(_ROWS):
            kept = _wide(part)
            system += preserve_scale * kept.T @ kept
    if not bool(system.isfinite().all()):
        raise DataError("a prompt state is not finite")
    values = torch.linalg.eigvalsh(system)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(edits.T, factor).T, float(values[-1] / values[0])


def _residuals(weight: Tensor, pair: Pair, technique: Technique, name: str) -> Tensor:
    """Wanted minus present outputs of a pair, ``[n, out]``."""
    edit, guide = _wide(pair.edit), _wide(pair.guide)
    if technique == "replace":
        return (guide - edit) @ weight.T
    own, wanted = edit @ weight.T, guide @ weight.T
    norm = own.norm()
    if norm == 0:
        raise RequestError(f"{name} maps the edited states to zero, so that there is no direction to leave out")
    unit = own / norm
    return wanted - (unit * wanted).sum() * unit - own


def _change(up: Tensor, down: Tensor, weight: Tensor) -> Change | None:
    """``up @ down`` in the smaller of the two forms, in the dtype of the weights' sums."""
    if not bool(up.any()):
        return None
    dtype = accumulate_dtype(weight.dtype)
    rows, columns = weight.shape
    if up.shape[1] * (rows + columns) < rows * columns:
        wide, own = (t.to(dtype, copy=True, memory_format=torch.contiguous_format) for t in (up, down))
        return LowRank(wide, own, tuple(weight.shape))  # copies: files refuse tensors that share memory
    return Dense((up @ down).to(dtype))
