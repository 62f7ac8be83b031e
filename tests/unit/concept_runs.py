"""What the tests of the concept erasers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expunge.context import Context
from expunge.request import ForgetRequest
from expunge.tasks.base import Batch

REQUEST = ForgetRequest.label("circle")
IDS = torch.tensor([0, 3, 9])


@contextmanager
def put_back(task: Any) -> Iterator[Any]:
    """The task; its weights, flags and modes are put back at the end."""
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    yield task
    task.model.load_state_dict(state)
    task.model.requires_grad_(True).eval()


def context(task: Any, request: ForgetRequest = REQUEST, seed: int = 0) -> Context:
    return Context(task, task.split(request), seed)


def batch_of(ctx: Context, role: str, positions: Tensor = IDS) -> Batch:
    return ctx.load(role, ctx.split[role][positions % len(ctx.split[role])])


def train_a_little(task: Any, names: list[str], values: Any, lr: float = 0.5) -> None:
    for name, p in task.unet.named_parameters():
        p.requires_grad_(name in names)
    chosen = [task.unet.get_parameter(n) for n in names]
    for p, g in zip(chosen, torch.autograd.grad(values().mean(), chosen), strict=True):
        p.data -= lr * g
