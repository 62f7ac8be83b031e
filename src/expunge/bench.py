"""Methods x seeds x requests from one file: cells that resume, failures that do not stop the rest, one table."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from expunge import files
from expunge.bench_table import Cell, columns, lines, markdown
from expunge.config import BenchConfig, resolved_yaml
from expunge.digest import json_digest, model_digest
from expunge.errors import ExpungeError, NotComparableError
from expunge.evaluation import GAP_KEYS, control_recipes, measure
from expunge.experiment import make_task, reference_of
from expunge.metrics.accuracy import avg_gap
from expunge.metrics.estimate import Estimate
from expunge.patch import Patch
from expunge.patch.patch import current_versions
from expunge.recipe import Recipe
from expunge.request import ForgetRequest, Label
from expunge.run import CHECKPOINT, PATCH, unlearn
from expunge.tasks.classifier import ClassifierTask

log = logging.getLogger("expunge")
CELL = "cell.json"


@dataclass(frozen=True)
class BenchResult:
    """All cells, and where the table lies."""

    folder: Path
    cells: list[Cell]

    @property
    def failed(self) -> list[Cell]:
        """Cells with an error."""
        return [c for c in self.cells if c.error]

    @property
    def exit_code(self) -> int:
        """0, or the code of the first failure."""
        return next((c.exit_code or 1 for c in self.failed), 0)


@dataclass(frozen=True)
class _Job:
    label: str
    role: str
    seed: int
    recipe: Recipe | None  # None: the base itself, or a reference read from a file
    allow_no_effect: bool = False


def bench(
    config: BenchConfig,
    *,
    progress: bool = False,
    on_cell: Callable[[int, int, Cell], None] | None = None,
) -> BenchResult:
    """Run every cell, then write ``table.md``, ``table.csv`` and ``results.json`` (and ``report.html``).

    A cell lives in a folder named by a digest of everything that its result depends on, weights and data included; one
    that is finished is not repeated. A cell that fails is recorded with its error, the others go on.

    Args:
        config: What to run.
        progress: Progress bars of the single runs.
        on_cell: Called after every cell with its number, the total and the cell.
    """
    task = make_task(config.task)
    base = model_digest(task.model)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    files.atomic_write(folder / "config.yaml", resolved_yaml(config))
    cells: list[Cell] = []
    jobs = plan(config)
    total = len(jobs) * len(config.requests)
    for wanted in config.requests:
        request = wanted.build()
        for job in jobs:
            cells.append(_cell(config, task, base, request, job, folder, progress))
            if on_cell is not None:
                on_cell(len(cells), total, cells[-1])
    cells = [_with_gap(c, cells) for c in cells]
    result = BenchResult(folder, cells)
    save(result, config)
    return result


def plan(config: BenchConfig) -> list[_Job]:
    """The cells of one request: the base, the reference, every method with every seed, controls with the first seed."""
    jobs = [_Job("untouched", "before", config.seeds[0], None)]
    if config.reference is not None:
        recipe = config.reference.recipe() if config.reference.method is not None else None
        seeds = config.seeds if recipe is not None else config.seeds[:1]
        jobs += [_Job("retrained", "reference", seed, recipe) for seed in seeds]
    for label, recipe in config.recipes():
        role = "reference" if recipe.from_scratch else "after"
        jobs += [_Job(label, role, seed, recipe) for seed in config.seeds]
        wanted = label in config.controls if isinstance(config.controls, tuple) else config.controls
        if wanted and role == "after":
            jobs += [_Job(f"{label}, {n}", "control", config.seeds[0], r, True) for n, r in control_recipes(recipe)]
    return jobs


def _cell(
    config: BenchConfig,
    task: ClassifierTask,
    base: str,
    request: ForgetRequest,
    job: _Job,
    folder: Path,
    progress: bool,
) -> Cell:
    key = json_digest(
        {
            "base": base,
            "data": task.data_digest(),
            "request": request.digest,
            "recipe": None if job.recipe is None else job.recipe.describe(),
            "reference": _file_key(config) if job.role == "reference" and job.recipe is None else None,
            "seed": job.seed,
            "attacks": list(config.attacks),
            "versions": current_versions(),
        }
    )
    name = f"{_word(request.title)}/{_word(job.label)}-s{job.seed}-{key[:12]}"
    where = files.confined(folder, f"cells/{name}")
    known = _finished(where / CELL, key, job, request)
    if known is not None:
        return known
    blank = Cell(job.label, job.role, request.title, job.seed, f"cells/{name}")
    try:
        patch, seconds = _patch(config, task, request, job, where, progress)
        class_wise = isinstance(request.what, Label)
        measured = measure(
            task,
            task.split(request),
            patch,
            class_wise=class_wise,
            attacks=config.attacks,
            seconds=seconds,
            seed=job.seed,
        )
        cell = _replace(blank, metrics={k: e.to_dict() for k, e in measured.metrics.items()})
    except ExpungeError as error:
        cell = _replace(blank, error=f"{type(error).__name__}: {error}", exit_code=error.exit_code)
    except Exception as error:  # one broken cell must not cost the others; it is recorded and ends in a non-zero exit
        log.debug("cell %s", name, exc_info=True)
        cell = _replace(blank, error=f"{type(error).__name__}: {error}", exit_code=1)
    files.atomic_write(where / CELL, json.dumps({"key": key, **asdict(cell)}, indent=1))
    return cell


def _patch(
    config: BenchConfig, task: ClassifierTask, request: ForgetRequest, job: _Job, where: Path, progress: bool
) -> tuple[Patch | None, float | None]:
    if job.role == "before":
        return None, None
    if job.recipe is None:
        candidate = reference_of(config, task, request, job.seed, where, progress=progress)
        assert candidate is not None
        return candidate.patch, None
    fresh = not (where / CHECKPOINT).exists() and not (where / PATCH).exists()
    start = time.perf_counter()
    patch = unlearn(
        task,
        request,
        job.recipe,
        seed=job.seed,
        run_dir=where,
        checkpoint_every=config.checkpoint_every,
        trackers=config.trackers,
        progress=progress,
        allow_no_effect=job.allow_no_effect,
    )
    return patch, time.perf_counter() - start if fresh else None


def _file_key(config: BenchConfig) -> str:
    wanted = config.reference
    path = None if wanted is None else wanted.patch or wanted.weights
    return files.sha256_file(path) if path is not None and Path(path).is_file() else str(path)


def _finished(path: Path, key: str, job: _Job, request: ForgetRequest) -> Cell | None:
    """A cell of an earlier run, if it is complete and its key is this one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("key") != key or data["error"]:
            return None
        cell = Cell(**{**data, "reused": True})
        for estimate in cell.metrics.values():
            Estimate.from_dict(estimate)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ExpungeError):
        return None
    same = (cell.label, cell.role, cell.request, cell.seed) == (job.label, job.role, request.title, job.seed)
    return cell if same else None


def _with_gap(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """Add the average gap to the reference with the same seed (or the only one)."""
    references = [c for c in cells if c.role == "reference" and c.request == cell.request and not c.error]
    oracle = next((c for c in references if c.seed == cell.seed), references[0] if len(references) == 1 else None)
    if cell.role == "reference" or oracle is None or cell.error:
        return cell
    ours, theirs = ({k: c.value(k) for k in GAP_KEYS} for c in (cell, oracle))
    if any(v is None for v in (*ours.values(), *theirs.values())):
        return cell
    try:
        gap = avg_gap({k: float(v or 0) for k, v in ours.items()}, {k: float(v or 0) for k, v in theirs.items()})
    except NotComparableError:
        return cell
    estimate = Estimate(
        gap, n=1, unit="points", method=f"mean of four differences to '{oracle.label}', seed {oracle.seed}"
    )
    return _replace(cell, metrics={**cell.metrics, "avg_gap": estimate.to_dict()})


def save(result: BenchResult, config: BenchConfig) -> None:
    """Write ``table.md``, ``table.csv`` and ``results.json``."""
    rows = lines(result.cells)
    names = columns(rows)
    files.atomic_write(result.folder / "table.md", markdown(rows, config.name, config.digest))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["request", "model", "role", "runs", "failed", *(f"{n}{s}" for n in names for s in ("", "_std", "_n"))]
    )
    for row in rows:
        numbers: list[Any] = []
        for n in names:
            v = row.values.get(n, [])
            numbers += [mean(v) if v else "", stdev(v) if len(v) > 1 else "", len(v)]
        writer.writerow([row.request, row.label, row.role, row.runs, row.failed, *numbers])
    files.atomic_write(result.folder / "table.csv", buffer.getvalue())
    cells = [asdict(c) for c in result.cells]
    body = {"name": config.name, "config": config.digest, "versions": current_versions(), "cells": cells}
    files.atomic_write(result.folder / "results.json", json.dumps(body, indent=1, allow_nan=False))


def _word(text: str) -> str:
    """A text as a folder name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in text)[:60].strip("._")
    return kept or "request"


def _replace(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**asdict(cell), **changes})
