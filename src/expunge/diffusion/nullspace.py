"""Null spaces of text states: directions in which K and V can move without any protected prompt noticing.

With ``E`` the stacked states of the protected prompts (all token rows, padding included) a shift whose rows lie in
``{s : E s = 0}`` leaves their keys and values as they were (SRS-ME, arXiv 2402.05947, section 4.2).

Pass the states as the U-Net receives them: states rounded to bfloat16 span another space than those in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import DataError, RequestError

#: Singular values up to this fraction of the largest one count as zero.
TOLERANCE = 1e-6
#: Rounding of float32 states: protection that leaks less than this cannot be told from an exact one.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Capacity:
    """How much room protected prompts leave, known before any training.

    Args:
        rank: Dimension that the prompts' states span.
        left: Directions left for a shift.
        dim: Width of the states.
        prompts: Number of prompts.
        kept: Smallest singular value counted, relative to the largest.
        dropped: Largest singular value counted as zero, relative to the largest.
    """

    rank: int
    left: int
    dim: int
    prompts: int
    kept: float
    dropped: float

    @property
    def exact(self) -> bool:
        """Whether what is counted as zero is rounding of float32 states; otherwise the protection leaks."""
        return self.dropped <= _ROUNDING

    def __str__(self) -> str:
        left = f"{self.left} direction{'' if self.left == 1 else 's'} left"
        prompts = f"{self.prompts} protected prompt{'' if self.prompts == 1 else 's'}"
        leak = "" if self.exact else f"; not exact: protected states leak up to {self.dropped:.1e} of the largest"
        return f"{left}: {prompts} span {self.rank} of {self.dim} dimensions{leak}"


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis of the null space.

    Args:
        vectors: ``S`` ``[n, d]``, float64, orthonormal rows.
        capacity: How it came about.
        residual: ``max |E S^T|`` over the protected states.
    """

    vectors: Tensor
    capacity: Capacity
    residual: float

    @property
    def projector(self) -> Tensor:
        """``S^T S`` ``[d, d]``; does not depend on the choice of the basis."""
        return self.vectors.T @ self.vectors


def rows(states: Tensor) -> Tensor:
    """The different rows of states as a float64 matrix.

    A causal encoder gives the same bits for shared leading tokens (the first token of every prompt at least), so
    duplicates are found by comparing bits, before any arithmetic.

    Args:
        states: ``[P, T, d]``.

    Returns:
        ``[r, d]`` with ``r <= P T``, in the order of first appearance.

    Raises:
        DataError: Wrong shape, no prompt, or a state that is not finite.
    """
    if states.ndim != 3 or not states.numel():
        raise DataError(f"text states must be [prompts, tokens, width], not empty; got {list(states.shape)}")
    flat = states.detach().reshape(-1, states.shape[-1])
    bad = ~torch.isfinite(flat).all(1)
    if bad.any():
        prompt, token = divmod(int(bad.nonzero()[0]), states.shape[1])
        raise DataError(f"the state of prompt {prompt}, token {token} is not finite")
    flat = flat.double()
    _, group = torch.unique(flat, dim=0, return_inverse=True)
    number = torch.arange(len(flat), device=flat.device)
    first = torch.full((int(group.max()) + 1,), len(flat), device=flat.device).scatter_reduce(0, group, number, "amin")
    return flat[first.sort().values]


def predicted_rank(token_ids: Tensor) -> int:
    """Upper bound of the rank for a causal encoder, from token ids alone; reached by ordinary prompts.

    Every state is a function of the tokens up to it, so there are as many rows as different beginnings.

    Args:
        token_ids: int ``[P, T]``, padding included.

    >>> predicted_rank(torch.tensor([[1, 2, 2], [1, 3, 2]]))
    5
    """
    return len({tuple(ids[: i + 1]) for ids in token_ids.tolist() for i in range(len(ids))})


def capacity(states: Tensor, *, tolerance: float = TOLERANCE) -> Capacity:
    """Count the directions that protecting these prompts leaves.

    Args:
        states: ``[P, T, d]``, one entry per prompt, the empty prompt among them.
        tolerance: See :func:`null_space`.

    Raises:
        DataError: The states are unusable.
    """
    return _capacity(torch.linalg.svdvals(rows(states)), states, tolerance)


def null_space(states: Tensor, *, prompts: Sequence[str] | None = None, tolerance: float = TOLERANCE) -> Basis:
    """An orthonormal basis of the directions that no protected prompt sees.

    Right singular vectors of the different rows beyond their rank, in float64. With the default tolerance it is exact
    up to the rounding of the states; a tolerance of 1e-3 protects tens of prompts more, at a leakage of
    ``||e dW^T||_F <= capacity.dropped * sigma_1 * ||dW||_2``, and ``capacity.exact`` says so.

    Args:
        states: ``[P, T, d]``: the empty prompt, the watermarks and every other concept.
        prompts: Their names, for errors.
        tolerance: Singular values up to this fraction of the largest one count as zero. Close to the capacity of a
            large encoder true directions fall below 1e-6 (``capacity.exact`` turns false): give 1e-8 there.

    Raises:
        DataError: The states are unusable.
        RequestError: No direction is left; the error says how many of the prompts fit.

    Deviates: the public code runs a symbolic elimination with 24-bit numbers and exact-zero pivots
        (:func:`published_elimination`): minutes instead of a second, residuals of 1e-6, a basis with a condition
        number up to 10^4, rounding noise counted as rank, and an empty file when nothing is left.
    """
    matrix = rows(states)
    _, values, vh = torch.linalg.svd(matrix, full_matrices=True)
    room = _capacity(values, states, tolerance)
    if room.left < 1:
        fits = _fitting(states, tolerance)
        named = f" (up to {prompts[fits - 1]!r})" if prompts is not None and fits else ""
        raise RequestError(
            f"protecting {room.prompts} prompts leaves no direction of {room.dim} to change; the first {fits}{named} "
            "fit. Protect fewer prompts, or give a larger tolerance for an approximate protection"
        )
    vectors = vh[room.rank :].contiguous()
    return Basis(vectors, room, float((matrix @ vectors.T).abs().max()))


def _capacity(values: Tensor, states: Tensor, tolerance: float) -> Capacity:
    top = float(values[0])
    if top == 0:
        raise DataError("all text states are zero")
    rank, dim = int((values > tolerance * top).sum()), states.shape[-1]
    dropped = float(values[rank]) / top if rank < len(values) else 0.0
    return Capacity(rank, dim - rank, dim, len(states), float(values[rank - 1]) / top, dropped)


def _fitting(states: Tensor, tolerance: float) -> int:
    fits, fails = 0, len(states)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if capacity(states[:middle], tolerance=tolerance).left:
            fits = middle
        else:
            fails = middle
    return fits


def erasable(states: Tensor, basis: Basis) -> float:
    """Share of a concept's energy that shifts can act on: ``||e P||_F^2 / ||e||_F^2``, in [0, 1].

    Close to 0 where the protected prompts contain the concept's own tokens: protecting "Cezanne's painting" pins the
    states that carry "Cezanne", and the erasure will fail.

    Args:
        states: ``[T, d]`` or ``[P, T, d]`` of the concept to erase.
        basis: Null space of the protected prompts.
    """
    wide = states.detach().double()
    return float((wide @ basis.vectors.T).square().sum() / wide.square().sum())


def component(vectors: Tensor, states: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """Orthonormal basis ``[r, d]`` of the part of prompts that lies within a space, float64.

    Two uses. A concept's own component ``r <= T P`` may replace its whole null space: shifts within it act on the
    concept as any shift can, with a smaller effect on all other prompts and a fraction of the coefficients. And the
    component of a concept that came later is what :func:`expunge.diffusion.merge.reproject` takes out of earlier
    shifts.

    Args:
        vectors: Orthonormal rows ``[n, d]``, float64.
        states: ``[T, d]`` or ``[P, T, d]``.
        tolerance: Singular values up to this fraction of the states' own largest one count as zero.

    Raises:
        RequestError: Nothing of the prompts lies in the space: no shift within it can reach them.
    """
    flat = rows(states if states.ndim == 3 else states[None])
    _, values, vh = torch.linalg.svd(flat @ vectors.T, full_matrices=False)
    rank = int((values > tolerance * torch.linalg.matrix_norm(flat, 2)).sum())
    if not rank:
        raise RequestError("the protected prompts contain everything of this concept: no shift can reach it")
    return vh[:rank] @ vectors


def published_elimination(states: Tensor) -> Tensor:
    """The null vectors of the public code, for comparison only: elimination with 24-bit numbers and exact-zero pivots.

    Rows are cleared by cross-multiplication, which cancels duplicates exactly; one vector per column without a pivot,
    scaled to unit length, not orthogonal. Rounding noise counts as rank. The numbers outgrow float32, so every row
    carries its own power of two.

    Args:
        states: ``[P, T, d]``; duplicates stay.

    Returns:
        ``[n, d]`` float64 (of 24-bit arithmetic), with ``n = 0`` over capacity.

    Source: Dlut-lab-zmn/SRS-ME, train-scripts/SRSME_Solution.py at 8596d7d, which calls a symbolic algebra library.
    """
    a = states.detach().float().reshape(-1, states.shape[-1]).cpu().clone()
    exponents = [0] * len(a)
    pivots: list[int] = []
    for column in range(a.shape[1]):
        at = len(pivots)
        if at == len(a):
            break
        best = _largest(a[at:, column], exponents[at:]) + at
        if a[best, column] == 0:
            continue
        a[[at, best]] = a[[best, at]]
        exponents[at], exponents[best] = exponents[best], exponents[at]
        cleared = a[:, column] != 0
        cleared[at] = False
        numbers = cleared.nonzero().flatten().tolist()
        a[cleared] = a[at, column] * a[cleared] - a[cleared, column][:, None] * a[at]
        shifts = torch.frexp(a.abs().amax(1)).exponent
        a = torch.ldexp(a, -shifts[:, None])
        own = exponents[at]
        for row in numbers:
            exponents[row] += own
        exponents = [e + int(s) for e, s in zip(exponents, shifts, strict=True)]
        pivots.append(column)
    free = [c for c in range(a.shape[1]) if c not in pivots]
    out = torch.zeros(len(free), a.shape[1], dtype=torch.float64)
    scale = a[range(len(pivots)), pivots]
    for i, column in enumerate(free):
        out[i, column] = 1
        out[i, pivots] = -(a[: len(pivots), column] / scale).double()
    return out / out.norm(dim=1, keepdim=True)


def _largest(values: Tensor, exponents: list[int]) -> int:
    """Index of the largest ``|value| * 2^exponent``; the first of equal ones."""
    top = max((e for v, e in zip(values.tolist(), exponents, strict=True) if v), default=0)
    below = torch.tensor([max(e - top, -1000) for e in exponents])
    return int((values.abs().double() * torch.exp2(below.double())).argmax())
