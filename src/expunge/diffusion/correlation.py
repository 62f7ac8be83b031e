"""The concept-correlation loss of SRS-ME, its momentum stop, and what its variants need.

The representation of a concept in a noise prediction is ``r = eps(x_t, c) - eps(x_t, '')``. Erasing it means making the
representation of the changed model uncorrelated with that of the original (arXiv 2402.05947, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.diffusion.process import Eps
from expunge.errors import RequestError


@dataclass(frozen=True)
class Teacher:
    """Predictions of the original model, without gradients.

    Args:
        null: ``eps(x_t, '')`` ``[B, C, H, W]``.
        representation: ``r_o = eps(x_t, c) - eps(x_t, '')``.
    """

    null: Tensor
    representation: Tensor


@dataclass(frozen=True)
class Correlation:
    """The loss of a batch.

    Args:
        losses: ``L_cor`` per sample ``[B]``: mean of ``r_u * r_o`` over all entries of the sample; not bounded below.
        energy: Mean of ``r_o * r_o`` per sample ``[B]``, without gradients: what the loss is before any change.
        representation: ``r_u`` ``[B, C, H, W]``.
    """

    losses: Tensor
    energy: Tensor
    representation: Tensor

    @property
    def ratio(self) -> Tensor:
        """``q = sum(r_u r_o) / sum(r_o r_o)`` of the batch, 0-d, without gradients: 1 at first, 0 when uncorrelated."""
        return self.losses.detach().sum() / self.energy.sum()


@torch.no_grad()
def teach(eps: Eps, original: AbstractContextManager[object], x: Tensor, t: Tensor, c: Tensor, null: Tensor) -> Teacher:
    """Both predictions of the original model in one pass of twice the batch.

    Args:
        eps: Predicts noise with the model as it stands.
        original: Within it the model is the original one (:meth:`Attached.off <expunge.diffusion.shift.Attached.off>`,
            :func:`swapped`).
        x: Noisy latents ``[B, C, H, W]``.
        t: Timesteps ``[B]``.
        c: States of the concept ``[B, T, d]``.
        null: States of the empty prompt ``[B, T, d]``, or those of a phrase without the concept.
    """
    with original:
        blank, named = eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, c])).chunk(2)
    return Teacher(blank, named - blank)


def correlation(named: Tensor, null: Tensor, teacher: Teacher) -> Correlation:
    """``L_cor`` per sample (section 4.1), from predictions of the changed model.

    Args:
        named: ``eps(x_t, c)`` of the changed model ``[B, C, H, W]``, with gradients.
        null: ``eps(x_t, '')``. A shift that protects the empty prompt does not change it: give ``teacher.null``, which
            saves a graded pass and has the same gradient. A model changed without this guarantee must predict it anew.
        teacher: Predictions of the original model.

    Deviates: the public code takes the mean over a batch of one; here every sample has its own.
    """
    changed, first = named - null, teacher.representation
    losses = (changed * first).flatten(1).mean(1)
    return Correlation(losses, first.square().flatten(1).mean(1), changed)


def shifted(
    eps: Eps, original: AbstractContextManager[object], x: Tensor, t: Tensor, c: Tensor, null: Tensor
) -> Correlation:
    """The loss of a shift that protects the empty prompt: one teacher pass of ``2B``, one graded pass of ``B``.

    Deviates: four passes of which two are graded, and two models, in the public code.
    """
    teacher = teach(eps, original, x, t, c, null)
    return correlation(eps(x, t, c), teacher.null, teacher)


def unconfined(
    eps: Eps, original: AbstractContextManager[object], x: Tensor, t: Tensor, c: Tensor, null: Tensor
) -> Correlation:
    """The loss of the irreversible variant, whose changes also reach the empty prompt: ``2B`` graded."""
    teacher = teach(eps, original, x, t, c, null)
    blank, named = eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, c])).chunk(2)
    return correlation(named, blank, teacher)


def l1(changes: Iterable[Tensor]) -> Tensor:
    """``(1/M) sum_l ||d_l||_1`` over ``M`` tensors, 0-d; its gradient at zero is zero.

    Raises:
        RequestError: There is no tensor.
    """
    norms = [c.abs().sum() for c in changes]
    if not norms:
        raise RequestError("the l1 penalty was given no tensor")
    return torch.stack(norms).sum() / len(norms)


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values into parameters and take them out again; nothing is copied.

    The irreversible variant trains the model's own tensors; with copies of these alone as ``base`` the model itself is
    its teacher. Not while a graph is waiting for its backward pass.

    Raises:
        RequestError: A parameter has no value in ``base``.
    """
    missing = sorted(parameters.keys() - base.keys())
    if missing:
        raise RequestError(f"no original value of {len(missing)} parameters, first '{missing[0]}'")
    own = {n: p.data for n, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = base[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def joint_weights(losses: Tensor, *, largest: float = 1e3) -> Tensor:
    """``eta_i = max_k |L_k| / |L_i|`` of the joint variant, constants ``[N]``.

    Concepts that protect one another have no gradient on each other's shifts, so weights only matter for those that do
    not; otherwise train them in turn, each with its own shift on alone, in the memory of one.

    Args:
        losses: ``L_cor`` of each concept ``[N]``.
        largest: Limit of a weight.

    Deviates: the paper has no limit; a loss that crosses zero would get an infinite weight.
    """
    size = losses.detach().abs()
    top = size.max()
    return torch.where(size * largest > top, top / size, largest) if top > 0 else torch.ones_like(size)


class GradientSum:
    """Replaces every gradient by the sum of all so far: the public trainers never clear theirs.

    Call :meth:`add` between backward and step; the loop clears gradients as usual.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradients of this step and put the sums in their place. Parameters without one are left out."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                if name in self.sums:
                    parameter.grad += self.sums[name]
                self.sums[name] = parameter.grad.clone()


@dataclass(frozen=True)
class MomentumStop:
    """Stop on ``m_n = alpha m_(n-1) + (1 - alpha) L_n``, ``m_0 = L_0``, at the first ``m_n < threshold``.

    ``L_n`` is the loss measured before update ``n`` (without weights and penalties), or the scale-free ratio ``q``.

    Args:
        threshold: ``tau``.
        alpha: Momentum.
        at_most: Stop at this index whatever the value.
        published: As the public code: tested from index 11 on, ``at_most`` below that ignored, and the update of the
            step at which it stops is still made. Otherwise every index counts and the crossing step makes no update.
    """

    threshold: float
    alpha: float = 0.9
    at_most: int | None = None
    published: bool = False

    @property
    def first_tested(self) -> int:
        """First index at which the rule may stop."""
        return 11 if self.published else 0

    def statistics(self, losses: Sequence[float] | Tensor) -> list[float]:
        """``m_0 .. m_n``; in float32, as the losses are, in the published profile."""
        return list(self._running(losses))

    def index(self, losses: Sequence[float] | Tensor) -> int | None:
        """The index at which training stops, or ``None``: only logged losses are read."""
        for n, value in enumerate(self._running(losses)):
            if n >= self.first_tested and (value < self.threshold or n == self.at_most):
                return n
        return None

    def crossing(self, losses: Sequence[float] | Tensor) -> int | None:
        """First index with ``m_n < threshold``, whatever else would stop training; the formula of the paper."""
        return next((n for n, m in enumerate(self._running(losses)) if m < self.threshold), None)

    def updates(self, losses: Sequence[float] | Tensor) -> int:
        """Updates that the coefficients to be kept contain; all of them if the rule does not stop."""
        index = self.index(losses)
        if index is None:
            return len(losses)
        return index + 1 if self.published else index

    def _running(self, losses: Sequence[float] | Tensor) -> Iterator[float]:
        number: type[np.floating[Any]] = np.float32 if self.published else np.float64
        series = losses.tolist() if isinstance(losses, Tensor) else losses
        old, new, m = number(self.alpha), number(1 - self.alpha), None
        for value in series:
            loss = number(value)
            m = loss if m is None else old * m + new * loss
            yield float(m)
