"""Logs: one JSON line per step always, TensorBoard and Weights & Biases when asked, and a progress bar.

A tracker that fails (no key, no network) never stops a run: the local lines are the record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from expunge.errors import ArtifactError, CapabilityError
from expunge.files import atomic_write

TrackerName = Literal["tensorboard", "wandb"]
log = logging.getLogger("expunge")


class Sink(Protocol):
    """Something that takes numbers."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Flush and release."""


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise CapabilityError(
                "the tensorboard tracker needs the extra 'track': pip install 'expunge[track]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise CapabilityError("the wandb tracker needs the extra 'track': pip install 'expunge[track]'") from None
        self._run: Any = wandb.init(project="expunge", dir=str(folder), config=dict(config))

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class Tracker:
    """Writes step rows to ``log.jsonl`` of a run folder and to optional sinks; shows progress.

    Args:
        folder: Run folder, or ``None`` to keep nothing on disk.
        sinks: Optional trackers.
        config: What to tell the trackers about the run.
        progress: Show a progress bar on the terminal.
        read_only: Only read the earlier rows (every process but the first of a distributed run).
    """

    def __init__(
        self,
        folder: Path | None = None,
        sinks: Sequence[TrackerName] = (),
        config: Mapping[str, Any] | None = None,
        progress: bool = False,
        read_only: bool = False,
    ) -> None:
        self._read_only = read_only
        sinks = () if read_only else sinks
        self._path = folder / "log.jsonl" if folder is not None else None
        self._file: Any = None
        self._sinks: list[Sink] = []
        self._bar: Any = None
        self._task: Any = None
        self._want_bar = progress and sys.stderr.isatty() and not read_only
        for name in sinks:
            if folder is None:
                raise CapabilityError(f"the {name} tracker needs a run folder")
            self._open(name, folder, config or {})

    def _open(self, name: TrackerName, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            self._sinks.append(_TensorBoard(folder) if name == "tensorboard" else _Wandb(folder, config))
        except CapabilityError:
            raise
        except Exception as error:
            log.warning("tracker %s is not available (%s); log.jsonl has every number", name, error)

    def start(self, total: int, done: int = 0) -> list[dict[str, Any]]:
        """Begin at step ``done``; earlier rows are kept and returned, later ones (of a killed run) are dropped."""
        rows: list[dict[str, Any]] = []
        if self._path is not None:
            if done:
                rows = self._known(done)
            if not self._read_only:
                atomic_write(self._path, "".join(json.dumps(r) + "\n" for r in rows))
                self._file = self._path.open("a", encoding="utf-8")
        if self._want_bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("unlearning", total=total, completed=done)
        return rows

    def _known(self, done: int) -> list[dict[str, Any]]:
        assert self._path is not None
        rows = []
        if self._path.exists():
            rows = [r for r in read_log(self._path, tolerate_tail=True) if r["step"] < done]
        if len(rows) != done:  # a stop rule would see another history than the run that was interrupted
            raise ArtifactError(
                f"{self._path} has {len(rows)} of the {done} steps before the checkpoint; remove the run folder"
            )
        return rows

    def row(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one step."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
        for sink in list(self._sinks):
            try:
                sink.write(row)
            except Exception as error:
                self._sinks.remove(sink)
                log.warning("a tracker stopped working (%s); log.jsonl has every number", error)
        if self._bar is not None:
            loss = row.get("loss", math.nan)
            self._bar.update(self._task, advance=1, description=f"loss {loss:8.4f}")

    def flush(self) -> None:
        """Bring the lines to disk (before a checkpoint that refers to them)."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Stop the bar and close everything."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("a tracker did not close cleanly (%s)", error)
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path, *, tolerate_tail: bool = False) -> list[dict[str, Any]]:
    """Read ``log.jsonl``; a half-written last line (killed run) is dropped only if ``tolerate_tail``.

    Raises:
        ArtifactError: A line is not JSON.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if tolerate_tail and number == len(lines):
                break
            raise ArtifactError(f"{path}: line {number} is not JSON ({error})") from None
    return rows
