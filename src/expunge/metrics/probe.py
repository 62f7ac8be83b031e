"""Measurements that train: what an evaluation calls for a patch beyond looking at outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from expunge.errors import ExpungeError
from expunge.metrics.estimate import Estimate, not_run
from expunge.patch import Patch
from expunge.request import ForgetRequest
from expunge.tasks.base import Task


class Probe(Protocol):
    """A measurement that trains: it gets a patch on the task's model and leaves the model as found.

    ``names`` are the metrics that it gives.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    def __call__(  # noqa: D102
        self, task: Task, request: ForgetRequest, patch: Patch | None, *, seed: int = 0, progress: bool = False
    ) -> dict[str, Estimate]: ...


def probed(
    task: Task,
    request: ForgetRequest,
    patch: Patch | None,
    probes: Sequence[Probe],
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Estimate]:
    """The figures of all probes; one that fails gives the reason instead of its figures."""
    found: dict[str, Estimate] = {}
    for probe in probes:
        try:
            found |= probe(task, request, patch, seed=seed, progress=progress)
        except ExpungeError as error:
            found |= {name: not_run(str(error)) for name in probe.names}
    return found
