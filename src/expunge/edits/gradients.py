"""What one-shot edits are made of: gradients of batches and of single samples, and changes within a space.

Everything here is functional: no parameter collects a gradient and no flag is touched. The model is in eval mode, as
the run leaves it for an edit, so that samples do not influence each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.context import Context
from expunge.errors import CapabilityError, DivergedError
from expunge.patch.changes import Change, accumulate_dtype, smallest
from expunge.spaces.base import OpenSpace
from expunge.tasks.base import Batch, Task

Tensors = dict[str, Tensor]
#: Bytes that the gradients of samples handled at once may take. Larger chunks are no faster; models so large that two
#: samples do not fit are differentiated sample by sample, which is faster than vectorising a few.
CHUNK_BYTES = 1 << 25


class _Losses(nn.Module):
    """The task's per-sample losses as a function of the model's parameters."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch, targets: Tensor) -> Tensor:
        return self._task.loss(batch, targets)


def _losses(
    task: Task, parameters: Mapping[str, Tensor]
) -> tuple[Tensors, Callable[[Mapping[str, Tensor], Batch, Tensor], Tensor]]:
    module = _Losses(task)

    def function(values: Mapping[str, Tensor], batch: Batch, targets: Tensor) -> Tensor:
        found: Tensor = functional_call(module, {f"model.{n}": t for n, t in values.items()}, (batch, targets))
        return found

    return {n: p.detach() for n, p in parameters.items()}, function


@torch.no_grad()
def batch_gradient(
    task: Task, batch: Batch, parameters: Mapping[str, Tensor], targets: Tensor | None = None, *, mean: bool = False
) -> Tensors:
    """Gradient of the summed (or mean) loss of a batch, by parameter."""
    values, losses = _losses(task, parameters)
    wanted = batch.targets if targets is None else targets
    found: Tensors = grad(lambda v: losses(v, batch, wanted).mean() if mean else losses(v, batch, wanted).sum())(values)
    return found


@torch.no_grad()
def sample_gradients(
    ctx: Context, batch: Batch, parameters: Mapping[str, Tensor], targets: Tensor | None = None
) -> Iterator[tuple[slice, Tensors]]:
    """Gradient of every sample's loss, in chunks: positions in the batch and ``[chunk, *shape]`` by parameter.

    Vectorised where the model allows it; a model that cannot be vectorised is differentiated sample by sample, which a
    remark says.

    Raises:
        CapabilityError: The loss of a sample depends on the others in its batch.
    """
    if ctx.task.couples_samples:
        raise CapabilityError(
            f"the loss of the {ctx.task.name} task compares the samples of a batch, so a single one has no gradient of "
            "its own; for ssd choose profile 'as_published', which takes gradients of batches"
        )
    values, losses = _losses(ctx.task, parameters)
    wanted = batch.targets if targets is None else targets

    def one(v: Tensors, x: Any, target: Tensor, i: int = 0) -> Tensor:
        ids, is_forget = batch.ids[i : i + 1], batch.is_forget[i : i + 1]
        single = replace(batch, inputs=x[None], targets=target[None], ids=ids, is_forget=is_forget)
        return losses(v, single, target[None]).sum()

    size = sum(t.numel() * t.element_size() for t in values.values())
    width = max(1, min(len(batch), CHUNK_BYTES // max(1, size)))
    vectorised = width > 1 and not ctx.task.counts_draws  # draws follow ids, which are not vectorised over
    for start in range(0, len(batch), width):
        here = slice(start, min(start + width, len(batch)))
        if vectorised:
            try:
                found = _vectorised(one, values, batch.inputs[here], wanted[here])
            except RuntimeError as error:
                if start or not any(word in str(error).lower() for word in ("vmap", "functorch", "batching rule")):
                    raise
                vectorised = False
                ctx.note(f"per-sample gradients one by one, because this model cannot be vectorised: {error}"[:300])
            else:
                yield here, found
                continue
        for i in range(here.start, here.stop):
            yield slice(i, i + 1), {n: g[None] for n, g in grad(one)(values, batch.inputs[i], wanted[i], i).items()}


def _vectorised(one: Callable[..., Tensor], values: Tensors, x: Any, y: Tensor) -> Tensors:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found: Tensors = vmap(grad(one), in_dims=(None, 0, 0))(values, x, y)
    return found


def sample_squares(
    ctx: Context,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    targets: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    shift: float = 0.0,
) -> Tensors:
    """``sum_i w_i (shift + grad loss_i)^2`` over the samples of a batch, by parameter.

    Args:
        ctx: Task and notes.
        batch: The samples.
        parameters: Which gradients.
        targets: Labels other than the true ones.
        weights: ``[B]``, by default ones.
        shift: Added to every gradient before squaring.
    """
    total = {n: torch.zeros(p.shape, dtype=accumulate_dtype(p.dtype), device=p.device) for n, p in parameters.items()}
    for here, chunk in sample_gradients(ctx, batch, parameters, targets):
        for name, g in chunk.items():
            squares = (g + shift).square().to(total[name].dtype)
            if weights is not None:
                squares *= weights[here].to(squares).reshape(-1, *[1] * (g.ndim - 1))
            total[name] += squares.sum(0)
    return total


@torch.no_grad()
def gram_product(task: Task, batch: Batch, parameters: Mapping[str, Tensor], vector: Tensors) -> Tensors:
    """``sum_i g_i (g_i . vector)`` over the samples of a batch, without storing any ``g_i``.

    The gradient ``sum_i c_i g_i`` is linear in ``c``; its own derivative along ``vector`` gives ``c_i = g_i . vector``.
    """
    values, losses = _losses(task, parameters)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        found, pull, *_ = vjp(lambda v: losses(v, batch, batch.targets), values)
        _, push, *_ = vjp(lambda c: pull(c)[0], torch.zeros_like(found))
        result: Tensors = pull(push(vector)[0])[0]
    return result


def add(total: Tensors, more: Mapping[str, Tensor], factor: float = 1.0) -> Tensors:
    """``total + factor * more``, in place; an empty ``total`` starts at ``factor * more``."""
    for name, value in more.items():
        if name in total:
            total[name].add_(value, alpha=factor)
        else:
            total[name] = value * factor
    return total


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All elements as one vector, in the mapping's order."""
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """Inverse of :func:`flatten`."""
    pieces = torch.split(vector, [t.numel() for t in like.values()])
    return {n: piece.reshape(t.shape) for piece, (n, t) in zip(pieces, like.items(), strict=True)}


@torch.no_grad()
def changes_within(space: OpenSpace, deltas: Mapping[str, Tensor], who: str) -> dict[str, Change]:
    """Differences to the original as changes, zero outside the space's masks, each in its smallest form.

    Raises:
        DivergedError: A difference is not finite.
    """
    found: dict[str, Change] = {}
    for name, delta in deltas.items():
        mask = space.mask(name)
        delta = delta.detach().to(accumulate_dtype(delta.dtype))
        if mask is not None:
            delta = torch.where(mask.to(delta.device), delta, torch.zeros_like(delta))
        if not bool(torch.isfinite(delta).all()):
            raise DivergedError(f"{who}: the change of '{name}' is not finite; the model is left as it was")
        change = smallest(delta)
        if change is not None:
            found[name] = change
    return found
