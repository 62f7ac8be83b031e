"""SRS-ME's space: the shift of one concept, beside weights that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.context import Context
from expunge.diffusion.correlation import GradientSum
from expunge.diffusion.merge import merge
from expunge.diffusion.nullspace import (
    TOLERANCE,
    Basis,
    capacity,
    component,
    erasable,
    null_space,
    published_elimination,
    rows,
)
from expunge.diffusion.selection import key_value
from expunge.diffusion.shift import Attached, Form, Shift, invariance
from expunge.errors import RequestError
from expunge.part import part
from expunge.patch.changes import Change, accumulate_dtype
from expunge.registry import Info
from expunge.spaces.base import OpenSpace, Space
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

PAPER = "Zhao et al., SRS-ME (Separable Multi-Concept Erasure), arXiv 2402.05947"
CODE = "Dlut-lab-zmn/SRS-ME"
COMMIT = "8596d7d"
#: Where a run's facts stand in a patch's findings.
FINDINGS = "concept_shift"
#: Share of a concept's energy below which its erasure is likely to fail.
_LITTLE = 1e-3

_WHO = "the space 'concept_shift'"
_CONCEPT = "concept"
_attached: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()


def attached_to(unet: nn.Module) -> Attached | None:
    """The shift that an open space runs beside this U-Net, if there is one."""
    return _attached.get(unet)


@contextmanager
def unshifted(unet: nn.Module) -> Iterator[None]:
    """Within it the U-Net runs without a shift; the same as ever where none is attached."""
    shift = attached_to(unet)
    if shift is None:
        yield
    else:
        with shift.off():
            yield


class _Beside(Attached):
    """A shift that acts on this very U-Net: a deep copy, taken as a teacher, carries the hooks but not the shift."""

    def __init__(self, unet: nn.Module, shifts: Mapping[str, Shift]) -> None:
        self._own = {id(m) for m in unet.modules()}
        super().__init__(unet, shifts)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        beside = super()._hook(name)

        def on_own(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return beside(module, inputs, output) if id(module) in self._own else None

        return on_own


@contextmanager
def beside(unet: nn.Module, shifts: Mapping[str, Shift]) -> Iterator[None]:
    """Run shifts beside a U-Net for the time of a training run.

    Raises:
        RequestError: Another run does so.
        CapabilityError: Adapters hide the U-Net's projections.
    """
    if attached_to(unet) is not None:
        raise RequestError("a shift runs beside this U-Net already; one run at a time")
    at_work = _attached[unet] = _Beside(unet, shifts)
    try:
        yield
    finally:
        at_work.close()
        _attached.pop(unet, None)


class OpenShift(OpenSpace):
    """The coefficients of one concept.

    Attributes:
        shift: The shift; its coefficients are what the optimiser moves, called ``omega.<tensor>``.
        base: The key and value matrices themselves: they never move.
    """

    def __init__(
        self,
        ctx: Context,
        shift: Shift,
        looked: Mapping[str, Mapping[str, Tensor]],
        settings: ConceptShift,
    ) -> None:
        self._ctx, self._settings, self.shift, self._looked = ctx, settings, shift, looked
        self._unet: nn.Module = text_task(ctx.task, _WHO).unet
        self._prefix = prefix_of(ctx.model, self._unet)
        self._sums = GradientSum()
        self.parameters = {f"omega.{self._prefix}{n}": p for n, p in shift.omega.items()}
        self.base = {self._prefix + n: p.detach() for n, p in key_value(self._unet).items()}
        self._at_work = ExitStack()

    def attach(self) -> OpenShift:
        """Run the shift beside the U-Net until :meth:`close`."""
        self._at_work.enter_context(beside(self._unet, {_CONCEPT: self.shift}))
        return self

    def before_step(self) -> None:
        """As published, every gradient is the sum of all so far."""
        if self._settings.accumulate:
            self._sums.add(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """Sums of gradients."""
        return dict(self._sums.sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the sums back."""
        self._sums.sums = {n: t.to(self.parameters[n]) for n, t in state.items()}

    def changes(self) -> dict[str, Change]:
        """Changes of keys and values; what they do to protected prompts goes into the findings."""
        changes = {self._prefix + n: c for n, c in self.shift.changes(self._settings.form).items()}
        if changes:
            base = {n: self.base[n].to(accumulate_dtype(self.base[n].dtype)) for n in changes}
            merged = merge(base, {0: {n: c.dense() for n, c in changes.items()}}, [0])
            facts = self._ctx.findings.setdefault(FINDINGS, {})
            for key, states in self._looked.items():
                if not states:
                    continue
                found = invariance(base, merged, states)
                prompt, worst = max(found.items(), key=lambda item: item[1].relative)
                facts[key] = {"relative": worst.relative, "prompt": prompt, "tensor": worst.tensor}
        return changes

    def close(self) -> None:
        """Take the shift off the U-Net."""
        self._at_work.close()


def prefix_of(model: nn.Module, unet: nn.Module) -> str:
    """What comes before the U-Net's tensor names in the whole model: ``unet.``, or nothing."""
    return next(f"{n}." if n else "" for n, m in model.named_modules() if m is unet)


@torch.no_grad()
def states_of(task: TextToImageTask, prompts: Sequence[str]) -> Tensor:
    """States ``[P, T, D]`` of prompts as the U-Net receives them, in the precision of the pipeline's text encoder."""
    return task.states(list(prompts)).detach().clone()


@part(
    "concept_shift",
    Info(
        "Only keys and values may change, and only in directions that protected prompts do not see.",
        paper=PAPER,
        upstream=CODE,
        commit=COMMIT,
        needs=("diffusion", "text"),
        deviations=(
            "the basis is orthonormal, from a float64 SVD with a tolerance; the code eliminates symbolically with "
            "24-bit numbers: `basis = 'elimination'`",
            "too many protected prompts are an error that says how many fit; the code writes an empty file",
            "gradients are cleared at every step; the code sums them over all steps: `accumulate`",
            "nothing is cut to a common number of directions",
        ),
    ),
)
class ConceptShift(Space):
    """``dW_l = beta Omega_l S`` for every key and value matrix ``l`` of cross-attention, with ``E S^T = 0``.

    ``E`` holds the states of all tokens of the protected prompts. The empty prompt, without which guidance would
    change, is always one of them. ``Omega`` starts at zero and is what the optimiser moves; the model's own weights
    stay as they are. Source: SRS-ME, section 4.2. How many directions are left is noted before the first step.

    Exact are the literal prompts only: protect every wording, and the negative prompt, that is in use.

    Args:
        protect: Prompts that stay as they are.
        watermarks: Further such prompts, whose images prove the model's origin.
        protect_others: Protect the task's other classes too, by their prompts.
        beta: Factor of the coefficients (1e-4 in the paper, with a learning rate of 0.1).
        others_tolerance: Protect the other classes only so far: a shift keeps to directions in which their states are
            below this fraction of the largest. All others stay exact. 0.01 fits where exact protection does not.
        tolerance: Singular values up to this fraction of the largest count as zero. 1e-6 is exact; with 1e-3 tens of
            prompts more fit, at a leak that is reported. Close to the capacity take 1e-8.
        directions: ``all`` that are left, or only those that the ``concept``'s own prompts see: the same effect on the
            concept, a smaller one on all other prompts, and a patch of lower rank.
        basis: ``orthonormal``, or that of the public code (slow; for comparison).
        accumulate: Every step follows the sum of all gradients so far, as published.
        form: How the patch stores a matrix: the ``smallest`` way, ``dense``, or ``factors``.
    """

    protect: tuple[str, ...] = ()
    watermarks: tuple[str, ...] = ()
    protect_others: bool = True
    others_tolerance: float | None = Field(default=None, gt=0, lt=1)
    beta: float = Field(default=1e-4, gt=0)
    tolerance: float = Field(default=TOLERANCE, gt=0, lt=1)
    directions: Literal["all", "concept"] = "all"
    basis: Literal["orthonormal", "elimination"] = "orthonormal"
    accumulate: bool = False
    form: Form = "smallest"

    def protected(self, ctx: Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts that are protected exactly (the empty one first), and those within ``others_tolerance``; each once.

        Raises:
            RequestError: The concept itself is to be protected.
        """
        task = text_task(ctx.task, _WHO)
        own = task.concept_prompts(ctx.split)
        given = ["", *self.protect, *self.watermarks]
        both = [p for p in given if p in own]
        if both:
            raise RequestError(f"'{both[0]}' is to be forgotten and to be protected; take it out of 'protect'")
        others: list[str] = []
        if self.protect_others:
            staying = (c for c in range(len(task.classes)) if c not in ctx.split.removed)
            others = [p for p in map(task.prompt_of, staying) if p not in own and p not in given]
        if self.others_tolerance is None:
            return tuple(dict.fromkeys([*given, *others])), ()
        return tuple(dict.fromkeys(given)), tuple(dict.fromkeys(others))

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """None: the model's own parameters never move."""
        del ctx
        return {}

    def open(self, ctx: Context) -> OpenSpace:
        """:meth:`plan`, and run the shift beside the U-Net."""
        return self.plan(ctx).attach()

    def plan(self, ctx: Context) -> OpenShift:
        """Find the directions, report how many are left, and make a zero shift.

        Raises:
            CapabilityError: The task has no U-Net with text, or adapters hide its projections.
            RequestError: The protected prompts leave no direction, or none that the concept sees.
        """
        task = text_task(ctx.task, _WHO)
        exact, others = self.protected(ctx)
        own = tuple(task.concept_prompts(ctx.split))
        states = {p: states_of(task, [p])[0] for p in (*exact, *others, *own)}
        stacked, concept = (torch.stack([states[p] for p in prompts]) for prompts in (exact, own))
        found = self._basis(stacked, exact)
        ctx.note(str(found.capacity))
        facts = ctx.findings[FINDINGS] = {
            "directions": found.capacity.left,
            "rank": found.capacity.rank,
            "width": found.capacity.dim,
            "exact": found.capacity.exact and self.basis == "orthonormal",
            "leak": found.capacity.dropped,
            "residual": found.residual,
            "protected": list(exact),
            "concept": list(own),
        }
        if others:
            facts["others"] = list(others)
            found = self._spare(ctx, found, torch.stack([states[p] for p in others]))
        vectors = found.vectors
        if self.basis == "orthonormal":
            share = facts["erasable"] = erasable(concept, found)
            if share < _LITTLE:
                ctx.note(
                    f"only {100 * share:.2g} % of the concept's energy lies in directions that protected prompts "
                    "leave; its erasure may fail. Does a protected prompt begin with the concept's own words?"
                )
        if self.directions == "concept":
            vectors = component(vectors, concept)
            ctx.note(f"of these the concept sees {len(vectors)}; the shift is confined to them")
        facts["used"] = len(vectors)
        looked = {
            "moves_protected": {p: states[p] for p in exact},
            "moves_others": {p: states[p] for p in others},
            "moves_concept": {p: states[p] for p in own},
        }
        return OpenShift(ctx, Shift.on(task.unet, vectors, beta=self.beta), looked, self)

    def _spare(self, ctx: Context, found: Basis, others: Tensor) -> Basis:
        """Without the directions in which the other classes are large."""
        assert self.others_tolerance is not None
        flat = rows(others)
        _, values, vh = torch.linalg.svd(flat @ found.vectors.T, full_matrices=True)
        top = torch.linalg.matrix_norm(flat, 2)
        rank = int((values > self.others_tolerance * top).sum())
        left = len(found.vectors) - rank
        leak = float(values[rank] / top) if rank < len(values) else 0.0
        if not left:
            raise RequestError(
                f"{found.capacity}; sparing {len(others)} other prompts to {self.others_tolerance:g} leaves none of "
                "them. Give a larger 'others_tolerance', or protect fewer prompts"
            )
        ctx.note(
            f"sparing {len(others)} other prompts leaves {left} of these; they leak up to {leak:.1e} of the largest"
        )
        ctx.findings[FINDINGS] |= {"spared_directions": left, "others_leak": leak}
        return Basis(vh[rank:] @ found.vectors, found.capacity, found.residual)

    def _basis(self, states: Tensor, prompts: tuple[str, ...]) -> Basis:
        if self.basis == "orthonormal":
            return null_space(states, prompts=prompts, tolerance=self.tolerance)
        room, vectors = capacity(states, tolerance=self.tolerance), published_elimination(states).to(states.device)
        if not len(vectors):
            raise RequestError(f"the public elimination finds no direction; {room}. Protect fewer prompts")
        return Basis(vectors, room, float((rows(states) @ vectors.T).abs().max()))
