"""How forget, retain and surrogate batches interleave: pure functions of (sizes, epoch, key)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from expunge import rng
from expunge.part import Frozen

#: One optimiser step: positions within each role's index set.
Step = dict[str, Tensor]

#: Key of a step (with no positions) that runs its forward passes and makes no update; normalisation statistics move.
FORWARD_ONLY = "forward_only"


class _Batched(Frozen):
    batch_size: int = Field(default=256, ge=1)
    shuffle: bool = True

    def _order(self, n: int, key: int, epoch: int, stream: int) -> tuple[Tensor, ...]:
        order = rng.permutation(rng.key(key, "order", epoch, stream), n) if self.shuffle else torch.arange(n)
        return torch.split(order, self.batch_size)


class Single(_Batched):
    """One pass over one role per epoch; ``mixed`` is forget and retain shuffled together."""

    kind: Literal["single"] = "single"
    role: Literal["forget", "retain", "mixed", "surrogate"] = "forget"

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return (self.role,)

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        return [{self.role: ids} for ids in self._order(sizes[self.role], key, epoch, 0)]


class Sequential(_Batched):
    """Per epoch a pass over the forget set, then a pass over the retain set.

    Args:
        forget_epochs: Epochs that begin with the forget pass; later ones are retain passes only. ``None``: all.
    """

    kind: Literal["sequential"] = "sequential"
    forget_epochs: int | None = Field(default=None, ge=0)

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if k != "forget_epochs" or v is not None}

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return ("forget", "retain")

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        forget: list[Step] = []
        if self.forget_epochs is None or epoch < self.forget_epochs:
            forget = [{"forget": ids} for ids in self._order(sizes["forget"], key, epoch, 0)]
        return forget + [{"retain": ids} for ids in self._order(sizes["retain"], key, epoch, 1)]


class Paired(_Batched):
    """Every step holds one batch of each role.

    An epoch is one pass over the first role. Each other role advances through its own shuffled passes without a break
    between epochs, so its samples are used evenly (counts differ by at most one).

    Args:
        streams: Roles; the first one sets the length of an epoch.
        batch_sizes: Sizes that differ from ``batch_size``.
    """

    kind: Literal["paired"] = "paired"
    streams: tuple[str, ...] = ("forget", "retain")
    batch_sizes: dict[str, int] = Field(default_factory=dict)

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return self.streams

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        lead = self.streams[0]
        size = {r: min(self.batch_sizes.get(r, self.batch_size), sizes[r]) for r in self.streams}
        first = torch.split(
            rng.permutation(rng.key(key, "order", epoch, 0), sizes[lead])
            if self.shuffle
            else torch.arange(sizes[lead]),
            size[lead],
        )
        steps: list[Step] = [{lead: ids} for ids in first]
        for stream, role in enumerate(self.streams[1:], start=1):
            n, start, total = sizes[role], epoch * len(first) * size[role], len(first) * size[role]
            laps = range(start // n, -(-(start + total) // n))
            flow = torch.cat([rng.permutation(rng.key(key, "order", lap, stream), n) for lap in laps])
            if not self.shuffle:
                flow = torch.arange(n).repeat(len(laps))
            offset = start - laps[0] * n
            for step, ids in zip(steps, torch.split(flow[offset : offset + total], size[role]), strict=True):
                step[role] = ids
        return steps


class Nested(_Batched):
    """Several steps per batch of the first role, each with another batch of the second (SCAR, DUCK).

    The number of steps per lead batch is ``min(repeats, batches of the inner role)``.

    Args:
        lead: Role that sets the length of an epoch.
        inner: Role that changes at every step.
        repeats: Steps per lead batch.
        inner_batch_size: Batch size of the inner role, by default ``batch_size``.
        shuffle: Shuffle the lead batches; the inner role is always shuffled.
        restart: Begin a fresh pass over the inner role at every lead batch; otherwise passes follow each other without
            a break, so its samples are used evenly.
        discard: After the last step of a lead batch, forward one more pair without an update, as published.
    """

    kind: Literal["nested"] = "nested"
    lead: str = "forget"
    inner: str = "surrogate"
    repeats: int = Field(default=6, ge=1)
    inner_batch_size: int | None = Field(default=None, ge=1)
    shuffle: bool = False
    restart: bool = False
    discard: bool = False

    @model_validator(mode="after")
    def _two_roles(self) -> Nested:
        if self.lead == self.inner:
            raise ValueError(f"'lead' and 'inner' are both '{self.lead}'; a step holds one batch of each role")
        return self

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return (self.lead, self.inner)

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        size = self.inner_batch_size or self.batch_size
        n = sizes[self.inner]
        per_pass = -(-n // size)
        count = min(self.repeats, per_pass)
        lead = self._order(sizes[self.lead], key, epoch, 0)
        found: list[Step] = []
        for number, ids in enumerate(lead):
            start = (epoch * len(lead) + number) * (per_pass if self.restart else count)
            lap = range(start, start + count + (self.discard and count < per_pass))
            pairs = [{self.lead: ids, self.inner: self._inner(n, size, key, *divmod(b, per_pass))} for b in lap]
            for pair in pairs[count:]:
                pair[FORWARD_ONLY] = torch.empty(0, dtype=torch.int64)
            found += pairs
        return found

    def _inner(self, n: int, size: int, key: int, lap: int, batch: int) -> Tensor:
        return rng.permutation(rng.key(key, "order", lap, 1), n)[batch * size : (batch + 1) * size]


class Replay(Frozen):
    """Exactly these steps, recorded elsewhere: one list of steps per epoch, each mapping roles to positions."""

    kind: Literal["replay"] = "replay"
    epochs: tuple[tuple[dict[str, tuple[int, ...]], ...], ...]

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        found = dict.fromkeys(r for steps in self.epochs for step in steps for r in step)
        return tuple(r for r in found if r != FORWARD_ONLY)

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        return [{r: torch.tensor(p, dtype=torch.int64) for r, p in step.items()} for step in self.epochs[epoch]]


Schedule = Annotated[Single | Sequential | Paired | Nested | Replay, Field(discriminator="kind")]


def chunks(step: Step, micro_batch: int | None) -> Sequence[Step]:
    """Cut a step into pieces of at most ``micro_batch`` samples per role; together they hold every sample once."""
    if micro_batch is None or all(len(ids) <= micro_batch for ids in step.values()):
        return [step]
    count = max(-(-len(ids) // micro_batch) for ids in step.values())
    cut = {role: torch.tensor_split(ids, count) for role, ids in step.items()}
    return [{role: parts[i] for role, parts in cut.items() if len(parts[i])} for i in range(count)]
