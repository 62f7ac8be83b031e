"""How forget, retain and surrogate batches interleave: pure functions of (sizes, epoch, key)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge import rng
from expunge.part import Frozen

#: One optimiser step: positions within each role's index set.
Step = dict[str, Tensor]


class _Batched(Frozen):
    batch_size: int = Field(default=256, ge=1)
    shuffle: bool = True

    def _order(self, n: int, key: int, epoch: int, stream: int) -> tuple[Tensor, ...]:
        order = rng.permutation(rng.key(key, "order", epoch, stream), n) if self.shuffle else torch.arange(n)
        return torch.split(order, self.batch_size)


class Single(_Batched):
    """One pass over one role per epoch: forget only, retain only, or both shuffled together (``mixed``)."""

    kind: Literal["single"] = "single"
    role: Literal["forget", "retain", "mixed"] = "forget"

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return (self.role,)

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        return [{self.role: ids} for ids in self._order(sizes[self.role], key, epoch, 0)]


class Sequential(_Batched):
    """Per epoch a pass over the forget set, then a pass over the retain set."""

    kind: Literal["sequential"] = "sequential"

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return ("forget", "retain")

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
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


class Replay(Frozen):
    """Exactly these steps, recorded elsewhere: one list of steps per epoch, each mapping roles to positions."""

    kind: Literal["replay"] = "replay"
    epochs: tuple[tuple[dict[str, tuple[int, ...]], ...], ...]

    def roles(self) -> tuple[str, ...]:
        """Roles that the schedule reads."""
        return tuple(dict.fromkeys(r for steps in self.epochs for step in steps for r in step))

    def steps(self, sizes: Mapping[str, int], epoch: int, key: int) -> list[Step]:
        """The steps of one epoch."""
        return [{r: torch.tensor(p) for r, p in step.items()} for step in self.epochs[epoch]]


Schedule = Annotated[Single | Sequential | Paired | Replay, Field(discriminator="kind")]


def chunks(step: Step, micro_batch: int | None) -> Sequence[Step]:
    """Cut a step into pieces of at most ``micro_batch`` samples per role; together they hold every sample once."""
    if micro_batch is None or all(len(ids) <= micro_batch for ids in step.values()):
        return [step]
    count = max(-(-len(ids) // micro_batch) for ids in step.values())
    cut = {role: torch.tensor_split(ids, count) for role, ids in step.items()}
    return [{role: parts[i] for role, parts in cut.items() if len(parts[i])} for i in range(count)]
