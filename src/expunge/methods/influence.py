"""Influence unlearning: one Newton-like step that undoes the forget samples' share in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from expunge.context import Context
from expunge.edits.base import Edit
from expunge.edits.gradients import (
    Tensors,
    add,
    batch_gradient,
    changes_within,
    flatten,
    gram_product,
    sample_gradients,
    unflatten,
)
from expunge.errors import DivergedError
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, Profile
from expunge.part import part
from expunge.patch.changes import Change
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.base import OpenSpace
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.base import Batch

#: There is no loop; these settings are not used.
OPTIM = Optim()

INFO = Info(
    "One step along the inverse curvature that takes the forget samples' influence out of the weights.",
    paper="Izzo et al., AISTATS 2021; Singh & Alistarh, WoodFisher, NeurIPS 2020, arXiv 2004.14340",
    upstream=SALUN_CODE,
    commit=SALUN_COMMIT,
    needs=("forget", "retain"),
    deviations=(
        "the inverse is the true one; the published WoodFisher-style recursion is not WoodFisher: `profile`",
        "solved by conjugate gradients, so no per-sample gradient is stored",
    ),
    aliases=("iu", "wfisher"),
)
#: Iterations after which the solver gives up.
ITERATIONS = 1000


def influence_vector(ctx: Context, parameters: Tensors, batch_size: int) -> Tensors:
    """``v = n_f/n (mean grad over D_f - mean grad over D_r)``, by parameter; exactly 0 for identical sets."""
    means = {}
    for role in ("forget", "retain"):
        total: Tensors = {}
        for batch in ctx.batches(role, batch_size):
            add(total, batch_gradient(ctx.task, batch, parameters))
        means[role] = {n: t / len(ctx.split[role]) for n, t in total.items()}
    share = len(ctx.split["forget"]) / (len(ctx.split["forget"]) + len(ctx.split["retain"]))
    return {n: share * (g - means["retain"][n]) for n, g in means["forget"].items()}


def published_recursion(v: Tensor, gradients: Iterable[Tensor], damping: float) -> Tensor:
    """The update of the published code, flat ``[N]``; not an inverse, since ``o`` keeps the first gradient's direction.

    ``o = g_1``; for each later ``g``: ``t = o.g``, ``k <- k - (k.g)/(A + t) o``, ``o <- o - t/(A + t) o``.

    >>> g = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> [round(x, 4) for x in published_recursion(torch.tensor([1.0, 2.0]), g, 1000.0).tolist()]
    [0.997, 2.0]
    """
    k, o = v.clone(), None
    for g in gradients:
        if o is None:
            o = g.clone()
            continue
        along = o @ g
        k -= (k @ g) / (damping + along) * o
        o -= along / (damping + along) * o
    return k


def conjugate_gradients(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Solve ``F k = v`` for a symmetric ``F >= I`` given by its products, flat ``[N]``.

    Raises:
        DivergedError: No solution after many iterations: the curvature is too ill-conditioned.
    """
    limit = (1e-14 if v.dtype == torch.float64 else 1e-6) * v.norm()
    k, residual, best = torch.zeros_like(v), v.clone(), v.clone()
    squared = residual @ residual
    for _ in range(ITERATIONS):
        if squared.sqrt() <= limit:
            return k
        moved = product(best)
        length = squared / (best @ moved)
        k += length * best
        residual -= length * moved
        previous, squared = squared, residual @ residual
        best = residual + squared / previous * best
    raise DivergedError(
        f"the influence step was not solved after {ITERATIONS} iterations (residual {float(squared) ** 0.5:.1e}); use "
        "a larger 'damping' or fewer 'samples'"
    )


@part("influence", INFO)
class Influence(Edit):
    """``theta <- theta + alpha F^-1 v`` with ``F = I + (1/A) sum_r g_r g_r^T`` over single retain samples.

    Args:
        alpha: Step size; tuned per setting in the literature, 1 to 20.
        damping: ``A``.
        samples: Retain samples in ``F``, the first in stored order.
        inverse: ``as_intended``, the true inverse, or ``as_published``, the recursion of :func:`published_recursion`.
        batch_size: Samples per backward pass.
    """

    alpha: float = Field(default=10.0, gt=0)
    damping: float = Field(default=1000.0, gt=0)
    samples: int = Field(default=1002, ge=1)
    inverse: Profile = "as_intended"
    batch_size: int = Field(default=256, ge=1)

    def direction(self, ctx: Context, space: OpenSpace) -> tuple[Tensors, Tensors]:
        """``v`` and ``k``, by parameter; both before masking."""
        parameters: Tensors = {n: p.detach() for n, p in space.parameters.items()}
        v = influence_vector(ctx, parameters, self.batch_size)
        if self.inverse == "as_published":
            k = published_recursion(flatten(v), self._rows(ctx, parameters), self.damping)
        else:
            k = conjugate_gradients(lambda x: self._curvature(ctx, parameters, x), flatten(v))
        return v, unflatten(k, parameters)

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """The step, as changes."""
        _, k = self.direction(ctx, space)
        return changes_within(space, {n: self.alpha * t for n, t in k.items()}, "influence")

    def _retain(self, ctx: Context) -> Iterator[Batch]:
        for ids in torch.split(ctx.split["retain"][: self.samples], self.batch_size):
            yield ctx.task.load("retain", ids, ctx.split)

    def _rows(self, ctx: Context, parameters: Tensors) -> Iterator[Tensor]:
        for batch in self._retain(ctx):
            for _, chunk in sample_gradients(ctx, batch, parameters):
                yield from torch.cat([g.flatten(1) for g in chunk.values()], dim=1)

    def _curvature(self, ctx: Context, parameters: Tensors, x: Tensor) -> Tensor:
        total: Tensors = {}
        vector = unflatten(x, parameters)
        for batch in self._retain(ctx):
            add(total, gram_product(ctx.task, batch, parameters, vector))
        return x + flatten(total) / self.damping


@method("influence", INFO)
def influence(
    *,
    alpha: Annotated[float, Field(gt=0)] = 10.0,
    damping: Annotated[float, Field(gt=0)] = 1000.0,
    samples: Annotated[int, Field(ge=1)] = 1002,
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``theta <- theta + alpha m * F^-1 v`` with ``v = (1/n) sum_f grad - n_f/(n n_r) sum_r grad`` and a mask ``m``.

    Source: SalUn's baseline, code ``Classification/unlearn/Wfisher.py``. The identity that ``F`` starts from and
    ``A = 1000`` are the code's conventions.

    Deviates:
        ``profile = "as_published"`` computes what the code does in the style of WoodFisher: its auxiliary vector stays
        a multiple of the first gradient, so the result is no inverse. The default solves for the true one.

    Args:
        alpha: Step size.
        damping: ``A``.
        samples: Retain samples in the curvature.
        mask_file: A saved saliency mask; only its weights may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per backward pass.
        optim: Not used: there is no loop.
    """
    edit = Influence(alpha=alpha, damping=damping, samples=samples, inverse=profile, batch_size=batch_size)
    space = AllWeights() if mask_file is None else SaliencyMask(file=mask_file)
    return Recipe(name="influence", edit=edit, space=space, optim=optim)
