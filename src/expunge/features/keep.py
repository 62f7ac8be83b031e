"""Keep outputs as they were: distillation on surrogate images, without the classes that are to go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from expunge import rng
from expunge.part import Frozen


class Kept(NamedTuple):
    """Per-row values of the keep loss.

    Attributes:
        values: ``[B]``; 0 for rows that are left out.
        rows: Which rows count, bool ``[B]``.
    """

    values: Tensor
    rows: Tensor

    def mean(self) -> Tensor:
        """Mean over the rows that count; 0 if there are none."""
        return self.values.sum() / self.rows.sum().clamp_min(1)


class Keep(Frozen):
    """``KL(teacher || student)`` per surrogate, after the removed classes are erased from the teacher.

    Source: SCAR, arXiv 2404.12922, and its code (the paper calls the symmetrised form a Jensen-Shannon divergence;
    the code has this one direction).

    Args:
        temperature: ``T``.
        rule: ``both_T2``: ``T^2 KL(softmax(o/T), softmax(s/T))``. ``teacher_only``, as published, divides the teacher's
            logits alone, so that at ``T != 1`` the student flattens. ``ignored``: ``T`` is taken as 1.
        removed_logit: What a removed class's teacher logit becomes: ``row_min`` the smallest of its row,
            ``row_min_kept`` the smallest of its row's other classes, ``drop_column`` minus infinity, ``batch_min``, as
            published, the smallest of all rows that are left.
        row_filter: Rows are left out whose teacher prediction is among ``all_removed`` classes, or the
            ``first_removed`` one only, as published.
        logit_offset: ``c``: values are multiplied by ``exp(c)``; the published code has 1e-4.
    """

    temperature: float = Field(default=1.0, gt=0)
    rule: Literal["both_T2", "teacher_only", "ignored"] = "both_T2"
    removed_logit: Literal["row_min", "row_min_kept", "drop_column", "batch_min"] = "row_min"
    row_filter: Literal["all_removed", "first_removed"] = "all_removed"
    logit_offset: float = 0.0

    def counts(self, teacher: Tensor, removed: Sequence[int]) -> Tensor:
        """Which rows count, bool ``[B]``: those whose teacher prediction stays."""
        gone = removed if self.row_filter == "all_removed" else removed[:1]
        return ~torch.isin(teacher.argmax(1), torch.tensor(list(gone), dtype=torch.int64, device=teacher.device))

    def edited(self, teacher: Tensor, removed: Sequence[int], rows: Tensor) -> Tensor:
        """Teacher logits ``[B, C]`` without the removed classes, a new tensor; the one given stays as it is."""
        if not len(removed) or not bool(rows.any()):
            return teacher
        gone = torch.zeros(teacher.shape[1], dtype=torch.bool, device=teacher.device)
        gone[list(removed)] = True
        if self.removed_logit == "drop_column":
            return teacher.masked_fill(gone, -torch.inf)
        if self.removed_logit == "batch_min":
            low = teacher[rows].min()
        elif self.removed_logit == "row_min":
            low = teacher.min(1, keepdim=True).values
        else:
            low = teacher.masked_fill(gone, torch.inf).min(1, keepdim=True).values
        return torch.where(gone, low, teacher)

    def __call__(self, student: Tensor, teacher: Tensor, removed: Sequence[int] = ()) -> Kept:
        """Values per row.

        Args:
            student: Logits ``[B, C]``.
            teacher: Logits ``[B, C]`` of the original model.
            removed: Classes that are to go.
        """
        rows = self.counts(teacher, removed)
        edited = self.edited(teacher, removed, rows)
        T = 1.0 if self.rule == "ignored" else self.temperature
        S, scale = (T, T * T) if self.rule == "both_T2" else (1.0, 1.0)
        aim = functional.log_softmax(edited / T, dim=1)
        # Written as a difference of logarithms so that equal outputs give exactly 0 also in single precision.
        apart = torch.where(aim.isneginf(), 0, aim - functional.log_softmax(student / S, dim=1))
        kl = (aim.exp() * apart).sum(1)
        return Kept(torch.where(rows, scale * math.exp(self.logit_offset) * kl, 0), rows)


def balanced_weights(labels: Tensor, n_classes: int, *, rare_below: int = 3, rare_as: int = 5) -> Tensor:
    """Sampling weight of each surrogate, float64 ``[N]``: 1 over the count of its (pseudo-)class.

    Counts below ``rare_below`` are taken as ``rare_as``, so that the only image of a class is not drawn all the time.
    """
    count = torch.bincount(labels, minlength=n_classes)
    return 1 / torch.where(count < rare_below, rare_as, count)[labels].double()


def resample(weights: Tensor, key: int, size: int | None = None) -> Tensor:
    """Positions drawn in proportion to weights, int64 ``[size]``, by systematic resampling.

    Every position is drawn ``floor`` or ``ceil`` of ``size * weight / sum`` times: no drawing with replacement is
    evener. The result depends on nothing but its arguments.
    """
    n = size or len(weights)
    order = rng.permutation(rng.key(key, "resample order"), len(weights))
    order = order[torch.argsort(weights[order], stable=True)]  # equal weights side by side: their sums come out even
    total = weights.double()[order].cumsum(0)
    offset = (int(rng.uniform_bits(key, torch.zeros(1, dtype=torch.int64))[0]) >> 11) / 2**53
    marks = (torch.arange(n, dtype=torch.float64) + offset) * (float(total[-1]) / n)
    return order[torch.searchsorted(total, marks, right=True).clamp_max(len(weights) - 1)]
