"""Faults on demand: NaN, out of memory, a kill, a full disk, a corrupt file. Each at a named step."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

ROOT = Path(__file__).parents[2]
REQUEST = ForgetRequest.label("ant")


class Fault(Exception):  # noqa: N818
    """An error that the library knows nothing about."""


def recipe(**changes: Any) -> Recipe:
    """Random labels on forget then retain batches of 20, all weights, eight steps an epoch."""
    settings: dict[str, Any] = {
        "name": "fault",
        "objective": {"kind": "random_label", "schedule": {"kind": "sequential", "batch_size": 20}},
        "space": "all",
        "optim": {"lr": 0.01, "epochs": 2},
    }
    return Recipe(**settings).replace(**changes)


class FaultyTask(ClassifierTask):
    """A classifier task whose loss can be made to fail; ``calls`` counts its training losses."""

    def __init__(self, like: ClassifierTask) -> None:
        self.__dict__.update(like.__dict__)
        self.calls = 0
        self.sizes: list[int] = []
        self.seen: list[tuple[str, list[int]]] = []
        self.fault: Callable[[int, Tensor], Tensor] = lambda call, losses: losses

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """The task's loss, passed through the fault."""
        losses = super().loss(batch, targets)
        if not torch.is_grad_enabled() or not losses.requires_grad:
            return losses
        self.calls += 1
        self.sizes.append(len(batch))
        self.seen.append((batch.role, batch.ids.tolist()))
        return self.fault(self.calls, losses)


def faulty(**settings: Any) -> FaultyTask:
    """A fresh tiny task; by default without dropout, so that micro-batches do not change the maths."""
    return FaultyTask(tiny_classifier(**{"dropout": 0.0, **settings}))


def nan_at(task: FaultyTask, call: int) -> None:
    """The n-th training loss has one NaN."""

    def fault(number: int, losses: Tensor) -> Tensor:
        poison = torch.ones_like(losses)
        poison[0] = float("nan") if number == call else 1.0
        return losses * poison

    task.fault = fault


def oom_at(task: FaultyTask, call: int, limit: int) -> None:
    """From the n-th training loss on, more than ``limit`` samples do not fit into memory."""

    def fault(number: int, losses: Tensor) -> Tensor:
        if number >= call and len(losses) > limit:
            torch.rand(3)  # a failed attempt has drawn numbers
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses

    task.fault = fault


def raise_at(step: int, error: BaseException) -> Callable[[int, nn.Module, torch.optim.Optimizer], None]:
    """An ``on_step`` that raises after the n-th step."""

    def on_step(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == step:
            raise error

    return on_step


def kill_at(step: int) -> Callable[[int, nn.Module, torch.optim.Optimizer], None]:
    """An ``on_step`` that ends the process at once, as ``kill -9`` does."""

    def on_step(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


@contextmanager
def disk_full(monkeypatch: pytest.MonkeyPatch, which: str, after: int = 0) -> Iterator[list[str]]:
    """Syncing a file whose name contains ``which`` fails with ENOSPC, after that many good ones."""
    real, hits = os.fsync, []

    def fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if which in Path(name).name:
            hits.append(name)
            if len(hits) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield hits


def corrupt(path: Path, how: str) -> None:
    """``truncate`` a file to half, ``flip`` one bit near its end, or ``empty`` it."""
    raw = bytearray(path.read_bytes())
    if how == "flip":
        raw[-2] ^= 1
    path.write_bytes(bytes(raw[: len(raw) // 2]) if how == "truncate" else b"" if how == "empty" else bytes(raw))


def script(body: str) -> str:
    """A program with the names of this module at hand."""
    return f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom inject import *\n" + textwrap.dedent(
        body
    )


def start(body: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run a program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script(body), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
