"""Boundary expanding: an extra class takes in the forget samples, and is dropped again afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import field_serializer, field_validator
from torch import Tensor, nn
from torch.nn import functional

from expunge.context import Context
from expunge.errors import CapabilityError
from expunge.method import method
from expunge.methods._common import SALUN_CODE, SALUN_COMMIT, Profile, as_trained
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.patch.changes import Change
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.base import OpenSpace, Space
from expunge.spaces.layers import AllWeights
from expunge.spaces.saliency import SaliencyMask
from expunge.tasks.base import Batch

#: Within the range searched by SalUn (1e-6 to 1e-4).
OPTIM = Optim(lr=1e-5, epochs=10, augment=True)
#: Names of the extra output's weights, as parameters of the head while a run lasts.
WEIGHT, BIAS = "extra_weight", "extra_bias"

PAPER = "Chen et al., Boundary Unlearning, CVPR 2023, arXiv 2303.11570"
INFO = Info(
    "Train the forget samples towards an extra class, which is removed afterwards.",
    paper=PAPER,
    upstream=SALUN_CODE,
    commit=SALUN_COMMIT,
    needs=("forget", "features"),
    deviations=(
        "the extra output is dropped after training; the code evaluates with it",
        "the extra output stands beside the head, so masks and layer selections of the original model still fit",
        "normalisation statistics are frozen: `profile`",
    ),
    aliases=("be", "boundary_expanding"),
)


def extra_row(ctx: Context) -> tuple[Tensor, Tensor]:
    """Weight ``[1, D]`` and bias ``[1]`` of a fresh linear output, uniform in ``+-1/sqrt(D)``; a function of the seed.

    Raises:
        CapabilityError: The task has no head.
    """
    with torch.no_grad():
        features = _represent(ctx, ctx.task.load("forget", ctx.split["forget"][:1], ctx.split))[0]
    width = features.shape[1]
    draws = torch.Generator().manual_seed(ctx.key("extra class") % 2**63)
    bound = 1 / math.sqrt(width)
    row = torch.empty(width + 1).uniform_(-bound, bound, generator=draws).to(features)
    return row[None, :width].clone(), row[width:].clone()


def _represent(ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
    ctx.task.require(frozenset({"features"}), "the extra class")
    found: tuple[Tensor, Tensor] = ctx.task.represent(batch)  # type: ignore[attr-defined]
    return found


def _head(ctx: Context) -> tuple[str, nn.Module]:
    name: str | None = getattr(ctx.task, "head", None)
    if name is None:
        raise CapabilityError("the extra class needs a classifier whose head is known; name the module by `head`")
    return name, ctx.model.get_submodule(name)


class WidenedSpace(OpenSpace):
    """Another space plus the weights of one extra output, which never reach the patch."""

    def __init__(self, inner: OpenSpace, name: str, head: nn.Module, row: tuple[Tensor, Tensor]) -> None:
        self._inner, self._head = inner, head
        self._extra = {f"{name}.{key}": nn.Parameter(t) for key, t in zip((WEIGHT, BIAS), row, strict=True)}
        for key, parameter in zip((WEIGHT, BIAS), self._extra.values(), strict=True):
            head.register_parameter(key, parameter)
        self.parameters = {**inner.parameters, **self._extra}
        self.base = inner.base

    def mask(self, name: str) -> Tensor | None:
        """The mask of the space inside; the extra output may change as a whole."""
        return None if name in self._extra else self._inner.mask(name)

    def before_step(self) -> None:
        """Leave it to the space inside."""
        self._inner.before_step()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave it to the space inside."""
        self._inner.after_step(optimizer)

    def state(self) -> dict[str, Tensor]:
        """State of the space inside; the extra output is checkpointed with the parameters."""
        return self._inner.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the space inside."""
        self._inner.load_state(state)

    def changes(self) -> dict[str, Change]:
        """Changes of the model's own tensors: the extra output is left out."""
        return self._inner.changes()

    def close(self) -> None:
        """Take the extra output off the head."""
        for key in (WEIGHT, BIAS):
            self._head._parameters.pop(key, None)
        self._inner.close()


@part(
    "widened_head",
    Info(
        "Another space plus one extra output that is trained along and dropped at the end.",
        paper=PAPER,
        upstream=SALUN_CODE,
        commit=SALUN_COMMIT,
        needs=("forget", "features"),
    ),
)
class WidenedHead(Space):
    """One extra row for the head, for objectives that use it (``boundary_expand``).

    Args:
        inside: Where the model's own weights may change.
    """

    inside: Space = AllWeights()

    @field_validator("inside", mode="before")
    @classmethod
    def _inside(cls, value: Any) -> Any:
        return Space.parse(value)

    @field_serializer("inside")
    def _by_name(self, value: Space) -> dict[str, Any]:
        return value.describe()

    def open(self, ctx: Context) -> OpenSpace:
        """Open the space inside, then put a freshly drawn output beside the head."""
        name, head = _head(ctx)
        row = extra_row(ctx)
        return WidenedSpace(self.inside.open(ctx), name, head, row)


def widened_logits(ctx: Context, batch: Batch) -> Tensor:
    """Logits ``[B, C + 1]``: the model's own and, last, the extra class's.

    Raises:
        CapabilityError: The head has no extra output.
    """
    head = _head(ctx)[1]
    if WEIGHT not in head._parameters:
        raise CapabilityError("the head has no extra output; open the space 'widened_head' first")
    features, logits = _represent(ctx, batch)
    extra = functional.linear(features, head.get_parameter(WEIGHT), head.get_parameter(BIAS))
    return torch.cat([logits, extra], dim=1)


@part("boundary_expand", INFO)
class BoundaryExpand(Objective):
    """``mean CE(cat(f(x), w . features(x) + b), C)`` over the forget set.

    ``w, b`` are trained in the space ``widened_head``. In any other space they keep their initial values, and a remark
    says so.

    Args:
        schedule: Passes over the forget set.
    """

    schedule: Schedule = Single(role="forget")

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        head = _head(ctx)[1]
        fixed: tuple[Tensor, Tensor] | None = None
        if WEIGHT not in head._parameters:
            fixed = extra_row(ctx)
            ctx.note("the extra output keeps its initial weights; the space 'widened_head' trains it too")

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            batch = batches["forget"]
            if fixed is None:
                logits = widened_logits(ctx, batch)
            else:
                features, own = _represent(ctx, batch)
                logits = torch.cat([own, functional.linear(features, *fixed)], dim=1)
            extra = torch.full_like(batch.targets, logits.shape[1] - 1)
            return {"forget": Term(functional.cross_entropy(logits, extra, reduction="none"), "forget")}

        return loss


@method("boundary_expand", INFO)
def boundary_expand(
    *,
    mask_file: str | None = None,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min mean CE(f+(x), C)`` over the forget set, where ``f+`` is the model with one more output.

    Source: Boundary Unlearning; code ``Classification/unlearn/boundary_ex.py``.

    Deviates:
        The code keeps the extra output in the model, so that a forget sample counts as wrong whenever the extra class
        wins. Here it is a training device: the patch fits the original model. A saliency mask made for the original
        outputs fits too. The code's normalisation statistics move (``profile = "as_published"``).

    Args:
        mask_file: A saved saliency mask; only its weights (and the extra output) may change.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    inside = AllWeights() if mask_file is None else SaliencyMask(file=mask_file)
    return Recipe(
        name="boundary_expand",
        objective=BoundaryExpand(schedule=Single(role="forget", batch_size=batch_size)),
        space=WidenedHead(inside=inside),
        optim=as_trained(optim, profile),
    )
