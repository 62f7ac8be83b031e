"""Concept shifts: changes of K and V whose rows lie in the null space of the protected prompts.

``dW_l = beta * Omega_l S`` for every key and value matrix ``l`` of cross-attention (SRS-ME, arXiv 2402.05947, section
4.2). While it is trained or switched, a shift runs beside its layer, ``K = W e + Omega (beta S e)``: no second weight
exists, and the same U-Net with its shifts off is the frozen teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from expunge.diffusion.correlation import l1
from expunge.diffusion.selection import Matrix, key_value, key_value_modules, matrices
from expunge.errors import RequestError, did_you_mean
from expunge.patch.changes import Change, Dense, LowRank
from expunge.patch.low_rank import compress

#: Coordinates of a token below this fraction of its norm are rounding of a float64 null space: exactly zero.
_ZERO = 1e-11
Form = Literal["smallest", "dense", "factors"]


@torch.no_grad()
def in_form(factors: LowRank, form: Form) -> Change:
    """A change ``Omega (beta S)`` as a patch stores it; see :meth:`Shift.change`."""
    if form == "factors":
        return factors
    delta = (factors.up.double() @ factors.down.double()).float()
    if form == "dense":
        return Dense(delta)
    return min((c for c in (factors, compress(delta)) if c is not None), key=lambda c: c.nbytes)


class Shift:
    """The shift of one concept: coefficients over a basis of directions that protected prompts do not see.

    Args:
        vectors: ``S`` ``[n, d]``, float64: :attr:`Basis.vectors <expunge.diffusion.nullspace.Basis>`, or a
            :func:`~expunge.diffusion.nullspace.component` of it.
        targets: Shapes of the matrices, by parameter name.
        beta: Factor of the coefficients (1e-4 in the paper, for its basis and rate).
        device: Of the coefficients; that of ``vectors`` by default.

    Attributes:
        omega: ``Omega_l`` ``[rows, n]`` in float32, zero at first, by parameter name: what an optimiser moves.
    """

    def __init__(
        self,
        vectors: Tensor,
        targets: Mapping[str, Matrix],
        *,
        beta: float,
        device: torch.device | str | None = None,
    ) -> None:
        if vectors.ndim != 2 or not len(vectors):
            raise RequestError(f"a shift needs a basis [n, d] with n > 0, got {list(vectors.shape)}")
        for name, matrix in targets.items():
            if matrix.columns != vectors.shape[1]:
                raise RequestError(
                    f"'{name}' reads states of width {matrix.columns}, the basis has width {vectors.shape[1]}"
                )
        self.beta = beta
        self.vectors = vectors.detach().double().to(device or vectors.device)
        self._scaled = self.vectors * beta
        self._scaled32 = self._scaled.float()
        self.omega = {
            n: nn.Parameter(torch.zeros(m.rows, len(vectors), device=self.vectors.device)) for n, m in targets.items()
        }

    @classmethod
    def on(cls, unet: nn.Module, vectors: Tensor, *, beta: float) -> Shift:
        """A zero shift of all key and value matrices of a U-Net, on its device."""
        weights = key_value(unet)
        return cls(vectors, matrices(weights), beta=beta, device=next(iter(weights.values())).device)

    def coordinates(self, states: Tensor) -> Tensor:
        """``beta S e`` of every token: ``[..., d] -> [..., n]``, float32.

        Computed in float64 and then rounded. Tokens of protected prompts get exact zeros, so that their keys and values
        keep all bits, in any precision.
        """
        wide = states.double()
        found = wide @ self._scaled.T
        least = _ZERO * abs(self.beta) * wide.norm(dim=-1, keepdim=True)
        return torch.where(found.norm(dim=-1, keepdim=True) <= least, 0.0, found).float()

    def delta(self, name: str) -> Tensor:
        """``dW = Omega (beta S)`` of a matrix, float32, differentiable; ``beta S`` is rounded before the product."""
        return self.omega[name] @ self._scaled32

    def deltas(self) -> dict[str, Tensor]:
        """``dW`` of every matrix as float64, without gradients: what merging sums."""
        return {n: o.detach().double() @ self._scaled for n, o in self.omega.items()}

    def l1(self) -> Tensor:
        """``(1/M) sum_l ||dW_l||_1`` over the ``M`` matrices, 0-d, differentiable."""
        return l1(self.delta(n) for n in self.omega)

    @torch.no_grad()
    def change(self, name: str, form: Form = "smallest") -> Change:
        """The change of a matrix for a patch.

        ``Omega`` is shared by no two matrices but ``S`` is by all, and a patch stores every change by itself: factors
        cost ``4 n (rows + d)`` bytes, the full matrix ``4 rows d``. The full one is smaller from
        ``n >= rows d / (rows + d)`` on (226, 349, 480 directions for the widths of Stable Diffusion 1.x).

        Args:
            name: Parameter name.
            form: ``factors`` (``Omega`` and ``beta S``), ``dense``, or the smallest of these and of the factors of the
                numerical rank of ``dW``.
        """
        omega = self.omega[name].detach()
        shape = (omega.shape[0], self.vectors.shape[1])
        return in_form(LowRank(omega.cpu(), self._scaled32.cpu(), shape), form)

    def changes(self, form: Form = "smallest") -> dict[str, Change]:
        """Changes of all matrices that are not zero."""
        return {n: self.change(n, form) for n, o in self.omega.items() if o.detach().any()}


@dataclass(frozen=True)
class Storage:
    """Bytes of a shift in a patch, float32.

    Args:
        dense: Full matrices.
        factors: Coefficients, and the basis beside each of them.
        shared: Coefficients, and the basis once (a file of shifts, not a patch).
        smallest: The smaller of the first two for each matrix.
    """

    dense: int
    factors: int
    shared: int
    smallest: int


def storage(targets: Mapping[str, Matrix], n: int) -> Storage:
    """Sizes of a shift over ``n`` directions, before any training."""
    dense = [4 * m.numel for m in targets.values()]
    factors = [4 * n * (m.rows + m.columns) for m in targets.values()]
    columns = next(iter(targets.values())).columns
    shared = 4 * n * (sum(m.rows for m in targets.values()) + columns)
    return Storage(sum(dense), sum(factors), shared, sum(map(min, dense, factors)))


class Attached:
    """Shifts at work on a U-Net; see :func:`attach`. All are on at first."""

    def __init__(self, unet: nn.Module, shifts: Mapping[str, Shift]) -> None:
        self.shifts = dict(shifts)
        self._active = frozenset(self.shifts)
        self._seen: tuple[Tensor, int, dict[str, Tensor]] | None = None
        modules = {f"{n}.weight": m for n, m in key_value_modules(unet).items()}
        for concept, shift in self.shifts.items():
            for name in shift.omega:
                if name not in modules:
                    raise RequestError(f"the shift of '{concept}' changes '{name}', which this U-Net lacks")
        self._handles: list[RemovableHandle] = [
            m.register_forward_hook(self._hook(n))
            for n, m in modules.items()
            if any(n in s.omega for s in self.shifts.values())
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def beside(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            found = self._coordinates(inputs[0])
            for concept in sorted(self._active):
                omega = self.shifts[concept].omega.get(name)
                if omega is not None:
                    output = (output + functional.linear(found[concept], omega)).to(output.dtype)
            return output

        return beside

    def _coordinates(self, states: Tensor) -> dict[str, Tensor]:
        """Coordinates of the active shifts; all layers of a pass receive the same states, so once per pass."""
        keep = not states.requires_grad and not torch.is_inference_mode_enabled() and not states.is_inference()
        found: dict[str, Tensor] = {}
        if keep and self._seen is not None and self._seen[0] is states and self._seen[1] == states._version:
            found = self._seen[2]
        for concept in self._active - found.keys():
            found[concept] = self.shifts[concept].coordinates(states)
        self._seen = (states, states._version, found) if keep else None
        return found

    @contextmanager
    def only(self, *concepts: str) -> Iterator[None]:
        """Within it just these shifts are on; with none, the U-Net is the original one.

        Raises:
            RequestError: There is no such shift.
        """
        for concept in concepts:
            if concept not in self.shifts:
                raise RequestError(f"no shift of {concept!r} is attached{did_you_mean(concept, self.shifts)}")
        before, self._active = self._active, frozenset(concepts)
        try:
            yield
        finally:
            self._active = before

    def off(self) -> AbstractContextManager[None]:
        """Within it the U-Net is the original one: the teacher."""
        return self.only()

    def close(self) -> None:
        """Take the hooks off the U-Net."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], None


@contextmanager
def attach(unet: nn.Module, shifts: Mapping[str, Shift]) -> Iterator[Attached]:
    """Run shifts beside the key and value projections of a U-Net; its own weights stay untouched.

    Args:
        unet: A diffusers U-Net.
        shifts: By concept.

    Raises:
        RequestError: A shift does not belong to this U-Net.
        CapabilityError: The projections are hidden by an adapter or fused.
    """
    attached = Attached(unet, shifts)
    try:
        yield attached
    finally:
        attached.close()


@dataclass(frozen=True)
class Invariance:
    """How far keys and values of a prompt moved, over all matrices.

    Args:
        relative: Largest ``max|K' - K| / max|K|`` of a matrix.
        tensor: The matrix.
        equal: No bit of any key or value changed.
    """

    relative: float
    tensor: str
    equal: bool


@torch.no_grad()
def invariance(
    base: Mapping[str, Tensor], changed: Mapping[str, Tensor], states: Mapping[str, Tensor]
) -> dict[str, Invariance]:
    """Compare keys and values of prompts under two sets of weights, products in float64.

    Args:
        base: Original matrices.
        changed: The same ones with shifts merged, in any precision.
        states: ``[T, d]`` (or ``[P, T, d]``) by prompt.

    Raises:
        RequestError: No matrix is common to both.
    """
    names = [n for n in base if n in changed]
    if not names:
        raise RequestError("the two sets of weights share no tensor; nothing would be compared")
    found = {}
    for prompt, tokens in states.items():
        wide, worst, where, equal = tokens.double(), -1.0, "", True
        for name in names:
            old, new = wide @ base[name].double().T, wide @ changed[name].double().T
            moved = float((new - old).abs().max() / old.abs().max())
            equal = equal and torch.equal(old, new)
            if moved > worst:
                worst, where = moved, name
        found[prompt] = Invariance(worst, where, equal)
    return found
