"""Teachers for distillation: frozen copies of a model, and the divergence of a student from them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional

from expunge.tasks.base import Batch, Task


def frozen_copy(task: Task) -> Task:
    """The same task around a deep copy of its model, in eval mode and without gradients."""
    teacher = copy.copy(task)
    teacher.model = copy.deepcopy(task.model).eval().requires_grad_(False)
    return teacher


@torch.no_grad()
def advice(teacher: Task, batch: Batch) -> Tensor:
    """The teacher's logits ``[B, C]``."""
    return teacher.predict(batch)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))`` per sample, in nats.

    Args:
        teacher: Logits ``[B, C]``.
        student: Logits ``[B, C]``.
        temperature: ``T``.

    Returns:
        ``[B]``.
    """
    p = functional.log_softmax(teacher / temperature, dim=1)
    q = functional.log_softmax(student / temperature, dim=1)
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
