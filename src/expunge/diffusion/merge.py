"""Any subset of concept shifts on the untouched base: erase, recover, and what concepts do to one another.

Every merge starts at the base, so recovering a concept is merging without it, bit for bit; adding and subtracting it
again is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from expunge.diffusion.selection import KEY, VALUE
from expunge.diffusion.shift import Invariance, invariance
from expunge.errors import RequestError, did_you_mean

#: A concept's id: its place in the order of summation.
Concept = TypeVar("Concept", int, str)
Weights = Mapping[str, Tensor]


@torch.no_grad()
def merge(
    base: Weights, shifts: Mapping[Concept, Weights], active: Collection[Concept], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """``W = W_0 + sum of the active shifts``: summed in float64 in ascending concept id, rounded once.

    Args:
        base: Original matrices.
        shifts: ``dW`` by concept and name; a shift may leave matrices out.
        active: Concepts to erase, in any order; with none of them the base comes back bit for bit.
        dtype: Of the result; that of each base matrix by default.

    Returns:
        New tensors for all of ``base``. Elements that no active shift changes keep their bits.

    Raises:
        RequestError: An unknown concept, or a shift that does not fit the base.

    Deviates: sums in float32 in the public code (:func:`merge_published`).
    """
    chosen = _chosen(shifts, active)
    for concept in chosen:
        for name, delta in shifts[concept].items():
            if name not in base:
                raise RequestError(f"the shift of {concept!r} changes '{name}', which the base lacks")
            if delta.shape != base[name].shape:
                shapes = f"{list(delta.shape)}, the base {list(base[name].shape)}"
                raise RequestError(f"the shift of {concept!r} has at '{name}' the shape {shapes}")
    merged = {}
    for name, weight in base.items():
        deltas = [shifts[c][name].to(weight.device) for c in chosen if name in shifts[c]]
        kept = weight.to(dtype or weight.dtype, copy=True)
        if deltas:
            total = weight.double()
            for delta in deltas:
                total = total + delta.double()
            still = torch.stack([d == 0 for d in deltas]).all(0)
            kept = torch.where(still, kept, total.to(kept.dtype))
        merged[name] = kept
    return merged


def _chosen(known: Mapping[Concept, Weights], active: Collection[Concept]) -> list[Concept]:
    for concept in active:
        if concept not in known:
            raise RequestError(f"no shift of {concept!r}{did_you_mean(str(concept), map(str, known))}")
    return sorted(set(active))


@torch.no_grad()
def merge_published(base: Weights, models: Mapping[Concept, Weights], active: Collection[Concept]) -> dict[str, Tensor]:
    """Merging as the public three-model script does it, for comparison only.

    Differences of single-concept models are added one after the other in the base's own precision, and the first of all
    models adds those of every cross-attention tensor, the others those of K and V.

    Args:
        base: Original tensors, all of cross-attention at least.
        models: The same tensors of the model of each concept.
        active: Concepts to add.

    Source: Dlut-lab-zmn/SRS-ME, train-scripts/Merge_model.py at 8596d7d.
    """
    chosen, first = _chosen(models, active), min(models)
    merged = {n: t.clone() for n, t in base.items()}
    for concept in chosen:
        for name, tensor in models[concept].items():
            if "attn2" in name if concept == first else (KEY in name or VALUE in name):
                merged[name] = merged[name] + (tensor - base[name])
    return merged


@dataclass(frozen=True)
class Effect:
    """What erasing one concept does to another concept's keys and values.

    Args:
        erased: The concept whose shift acts.
        on: The concept whose prompt is looked at.
        relative: Largest ``||e dW^T|| / ||e W_0^T||`` of a matrix (Frobenius).
        later: ``on`` was added after the shift was made, so that the shift could not protect it.
    """

    erased: str
    on: str
    relative: float
    later: bool

    @property
    def protected(self) -> bool:
        """The effect is rounding of float32 weights at most."""
        return self.relative <= 1e-5

    def __str__(self) -> str:
        if self.protected:
            return f"erasing '{self.erased}' leaves '{self.on}' as it is"
        why = f": '{self.on}' came later and is not protected" if self.later else ": it is not protected"
        return (
            f"erasing '{self.erased}' changes keys and values of '{self.on}' by {100 * self.relative:.2g} %{why}; "
            f"'{self.on}' is recovered exactly only while '{self.erased}' is recovered too"
        )


@torch.no_grad()
def effects(base: Weights, shifts: Mapping[str, Weights], states: Mapping[str, Tensor]) -> list[Effect]:
    """The effect of every shift on every other concept.

    Shifts of earlier concepts are not made anew when a concept is added: they protect those known at their time only,
    while a new shift protects all before it (spec section 2). :func:`reproject` makes up for it.

    Args:
        base: Original matrices.
        shifts: ``dW`` by concept, in the order in which the concepts were added.
        states: ``[T, d]`` (or ``[P, T, d]``) by concept; further prompts (watermarks) may be among them.

    Returns:
        One entry per pair, in the order of ``shifts`` and of ``states``.
    """
    order = {concept: i for i, concept in enumerate(shifts)}
    found = []
    for erased, deltas in shifts.items():
        for on, tokens in states.items():
            if on != erased:
                wide = tokens.double()
                size = max(_share(wide, deltas[n], base[n]) for n in deltas)
                found.append(Effect(erased, on, size, order.get(on, -1) > order[erased]))
    return found


def _share(states: Tensor, delta: Tensor, weight: Tensor) -> float:
    return float((states @ delta.double().T).norm() / (states @ weight.double().T).norm())


@torch.no_grad()
def reproject(deltas: Weights, vectors: Tensor) -> dict[str, Tensor]:
    """Take directions out of a shift, ``dW (I - U^T U)``, so that it protects a concept that came later.

    The prompts that the shift protected stay protected if ``U`` lies in their null space. The erasure gets weaker where
    the two concepts share directions: measure it again.

    Args:
        deltas: ``dW`` by name.
        vectors: ``U`` ``[r, d]``, orthonormal rows: :func:`component(basis.vectors, states)
            <expunge.diffusion.nullspace.component>` with the shift's own basis and the new concept's states.

    Returns:
        float64.
    """
    return {n: d.double() - (d.double() @ vectors.T) @ vectors for n, d in deltas.items()}


def cast_effect(
    base: Weights,
    shifts: Mapping[Concept, Weights],
    active: Collection[Concept],
    protected: Mapping[str, Tensor],
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32, torch.float16, torch.bfloat16),
) -> dict[torch.dtype, Invariance]:
    """What storing merged weights in each precision does to protected prompts.

    The base is rounded to the precision first, as the pipeline holds it; shifts are added in float64 and rounded once.
    Every changed weight is then off by up to half a unit in its last place, whatever the summing: about 1e-8 (float32),
    3e-4 (float16) or 2e-3 (bfloat16) of the keys. A shift that runs beside the layer
    (:func:`expunge.diffusion.shift.attach`) has no such error.

    Args:
        base: Original matrices, as precise as they are known.
        shifts: ``dW`` by concept.
        active: Concepts erased.
        protected: States by prompt.
        dtypes: Precisions.

    Returns:
        The worst prompt of each.
    """
    found = {}
    for dtype in dtypes:
        rounded = {n: w.to(dtype) for n, w in base.items()}
        moved = invariance(rounded, merge(rounded, shifts, active), protected)
        found[dtype] = max(moved.values(), key=lambda i: i.relative)
    return found
