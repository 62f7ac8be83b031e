"""What a part sees while it works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.tasks.base import TRAIN_ROLES, Batch, Split, Task


@dataclass
class Context:
    """The running state that objectives, spaces, protections and edits share.

    Attributes:
        task: Model and data.
        split: Index sets of the request.
        seed: Seed of the run; every draw derives from it through :meth:`key`.
        epoch: 0-based epoch.
        step: 0-based step within the whole run.
        epochs: Epochs planned.
        steps_per_epoch: Steps planned per epoch.
        roles: Roles of the current step.
        position: 0-based position of the current step in its pass (the run of steps with the same roles).
        augment: Whether training batches are augmented, or the roles whose batches are.
        state: Tensors that belong to the run's state; they are checkpointed and restored by name.
        notes: Remarks for the manifest.
        progress: Whether long work shows progress bars.
        findings: What the method found out, as plain data, for the manifest and the report.
    """

    task: Task
    split: Split
    seed: int = 0
    epoch: int = 0
    step: int = 0
    epochs: int = 1
    steps_per_epoch: int = 0
    roles: tuple[str, ...] = ()
    position: int = 0
    augment: bool | tuple[str, ...] = False
    state: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    progress: bool = False
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model that is edited."""
        return self.task.model

    def key(self, purpose: str, *counters: int) -> int:
        """A key for draws of one purpose."""
        return rng.key(self.seed, purpose, *counters)

    def note(self, text: str) -> None:
        """Record a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def batches(self, role: str, batch_size: int, *, augment: bool = False) -> Iterator[Batch]:
        """One pass over a role's samples in stored order."""
        ids = self.split[role]
        for number, chunk in enumerate(torch.split(ids, batch_size)):
            key = self.key("pass augment", number) if augment else None
            batch = self.task.load(role, chunk, self.split, augment=key)
            yield replace(batch, key=self.key("pass draws", number))

    def load(self, role: str, ids: Tensor) -> Batch:
        """Load the samples of a training step, augmented if the run augments."""
        chosen = TRAIN_ROLES if self.augment is True else self.augment or ()
        key = self.key("augment", self.epoch) if role in chosen else None
        return replace(self.task.load(role, ids, self.split, augment=key), key=self.key("draws", self.step))
