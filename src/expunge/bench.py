"""Methods x seeds x requests, or a list of experiments: cells that resume, failures that do not stop the rest."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge import files
from expunge.bench_files import BenchResult, save
from expunge.bench_table import Cell
from expunge.config import BenchConfig, resolved_yaml
from expunge.config.experiments import Experiments, check_index_file
from expunge.config.models import Experiment
from expunge.controls import control_recipes
from expunge.data.spec import SurrogateSpec
from expunge.data.surrogate import load_surrogate
from expunge.digest import json_digest, model_digest
from expunge.errors import CapabilityError, ExpungeError
from expunge.evaluation import measure
from expunge.experiment import make_task, reference_of
from expunge.metrics.aus import aus_estimate
from expunge.metrics.divergence import gap_estimate
from expunge.metrics.estimate import Estimate
from expunge.metrics.probe import probed
from expunge.patch import Patch
from expunge.patch.patch import current_versions
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import CHECKPOINT, PATCH, unlearn
from expunge.tasks.base import Task
from expunge.tasks.images import ImageTask

log = logging.getLogger("expunge")
CELL = "cell.json"


@dataclass(frozen=True)
class _Job:
    label: str
    role: str
    seed: int
    recipe: Recipe | None  # None: the base itself, or a reference read from a file
    allow_no_effect: bool = False
    surrogate: SurrogateSpec | None = None  # images of its own, instead of the task's


@dataclass(frozen=True)
class _Group:
    """Cells that share a task."""

    config: Experiment
    items: Sequence[tuple[ForgetRequest, _Job]]
    index_files: Sequence[str] = ()


def bench(
    config: BenchConfig,
    *,
    progress: bool = False,
    on_cell: Callable[[int, int, Cell], None] | None = None,
) -> BenchResult:
    """Run every cell, then write ``table.md``, ``table.csv``, ``results.json``, ``results.csv``, ``results.parquet``.

    A cell lives in a folder named by a digest of everything that its result depends on, weights and data included; one
    that is finished is not repeated. A cell that fails is recorded with its error, the others go on.

    Args:
        config: What to run.
        progress: Progress bars of the single runs.
        on_cell: Called after every cell with its number, the total and the cell.
    """
    requests = [wanted.build() for wanted in config.requests]
    listed = [wanted.index_file for wanted in config.requests if wanted.index_file is not None]
    group = _Group(config, [(request, job) for request in requests for job in plan(config)], listed)
    return _run([group], config.folder, config.name, config.digest, resolved_yaml(config), progress, on_cell)


def bench_experiments(
    experiments: Experiments,
    *,
    progress: bool = False,
    on_cell: Callable[[int, int, Cell], None] | None = None,
) -> BenchResult:
    """Run a list of experiments as one benchmark; see :func:`bench`.

    Args:
        experiments: From :func:`expunge.config.experiments.load_experiments`.
        progress: Progress bars of the single runs.
        on_cell: Called after every cell with its number, the total and the cell.
    """
    groups = []
    for group in experiments.groups:
        items: list[tuple[ForgetRequest, _Job]] = []
        for request, label, role, seed, recipe in group.items:
            items.append((request, _Job(label, role, seed, recipe)))
            if group.config.controls and role == "after" and recipe is not None and seed == 0:
                shown = [_Job(f"{label}, {n}", "control", seed, r, True) for n, r in control_recipes(recipe)]
                items += [(request, job) for job in shown]
        listed = [e.idxs_to_forget for e in group.entries if isinstance(e.idxs_to_forget, str)]
        groups.append(_Group(group.config, items, listed))
    shared = experiments.settings
    return _run(groups, shared.folder, shared.name, experiments.digest, experiments.resolved(), progress, on_cell)


def _run(
    groups: Sequence[_Group],
    folder: Path,
    name: str,
    digest: str,
    resolved: str,
    progress: bool,
    on_cell: Callable[[int, int, Cell], None] | None,
) -> BenchResult:
    total = sum(len(g.items) for g in groups)
    cells: list[Cell] = []
    facts: list[dict[str, str]] = []
    for group in groups:
        task = make_task(group.config.task)
        for path in group.index_files:
            check_index_file(path, task.training_digest())
        if not cells:
            folder.mkdir(parents=True, exist_ok=True)
            files.atomic_write(folder / "config.yaml", resolved)
        base = model_digest(task.model)
        tasks: dict[SurrogateSpec | None, Task] = {None: task}
        for own in {j.surrogate for _, j in group.items} - {None}:  # a set that cannot be read ends it before any run
            assert own is not None
            if not isinstance(task, ImageTask):
                raise CapabilityError(f"the {task.name} task takes no surrogate images")
            tasks[own] = task.with_surrogate(load_surrogate(own, task.data.train.shape).images)
        for request, job in group.items:
            cells.append(_cell(group.config, tasks[job.surrogate], base, request, job, folder, progress))
            recipe = job.recipe
            facts.append(
                {
                    "recipe": "" if recipe is None else recipe.name,
                    "recipe_digest": "" if recipe is None else recipe.digest,
                    "request_digest": request.digest,
                    "model_digest": base,
                    "data_digest": tasks[job.surrogate].data_digest(),
                    "config_digest": digest,
                }
            )
            if on_cell is not None:
                on_cell(len(cells), total, cells[-1])
    asked = [f["request_digest"] for f in facts]
    cells = [_compared(c, [o for o, d in zip(cells, asked) if d == own]) for c, own in zip(cells, asked, strict=True)]
    result = BenchResult(folder, cells, facts)
    save(result, name, digest)
    return result


def plan(config: BenchConfig) -> list[_Job]:
    """The cells of one request: the base, the reference, every method with every seed, controls with the first seed."""
    jobs = [_Job("untouched", "before", config.seeds[0], None)]
    if config.reference is not None:
        recipe = config.reference.recipe() if config.reference.method is not None else None
        seeds = config.seeds if recipe is not None else config.seeds[:1]
        jobs += [_Job("retrained", "reference", seed, recipe) for seed in seeds]
    own = config.surrogates()
    for label, recipe in config.recipes():
        role, images = "reference" if recipe.from_scratch else "after", own.get(label)
        jobs += [_Job(label, role, seed, recipe, surrogate=images) for seed in config.seeds]
        wanted = label in config.controls if isinstance(config.controls, tuple) else config.controls
        for name, control in control_recipes(recipe) if wanted and role == "after" else []:
            jobs.append(_Job(f"{label}, {name}", "control", config.seeds[0], control, True, images))
    return jobs


def _cell(
    config: Experiment,
    task: Task,
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
            "evaluate": None if job.role == "control" else config.evaluate.model_dump(mode="json"),
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
        measured = measure(
            task,
            task.split(request),
            patch,
            attacks=config.attacks,
            seconds=seconds,
            seed=job.seed,
        )
        probes = () if job.role == "control" else config.evaluate.probes()
        found = measured.metrics | probed(task, request, patch, probes, seed=job.seed, progress=progress)
        cell = _replace(blank, metrics={k: e.to_dict() for k, e in found.items()})
    except ExpungeError as error:
        cell = _replace(blank, error=f"{type(error).__name__}: {error}", exit_code=error.exit_code)
    except Exception as error:  # one broken cell must not cost the others; it is recorded and ends in a non-zero exit
        log.debug("cell %s", name, exc_info=True)
        cell = _replace(blank, error=f"{type(error).__name__}: {error}", exit_code=1)
    files.atomic_write(where / CELL, json.dumps({"key": key, **asdict(cell)}, indent=1))
    return cell


def _patch(
    config: Experiment, task: Task, request: ForgetRequest, job: _Job, where: Path, progress: bool
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


def _file_key(config: Experiment) -> str:
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


def _compared(cell: Cell, cells: Sequence[Cell]) -> Cell:
    """Add what takes two models: AUS against the untouched one, the average gap to the reference.

    Of several references the one with the cell's seed counts; there is no gap if none of several has it.
    """
    if cell.error:
        return cell
    good = [c for c in cells if not c.error and c.request == cell.request]
    added: dict[str, Estimate] = {}
    before = next((c for c in good if c.role == "before"), None)
    if before is not None:
        added["aus"] = aus_estimate(cell.metrics, before.metrics, "forget_test" in cell.metrics)
    references = [c for c in good if c.role == "reference"]
    oracle = next((c for c in references if c.seed == cell.seed), references[0] if len(references) == 1 else None)
    if oracle is not None and cell.role != "reference":
        gap = gap_estimate(*({k: Estimate.from_dict(e) for k, e in c.metrics.items()} for c in (cell, oracle)))
        if gap.ran:
            method = f"mean of four differences to '{oracle.label}', seed {oracle.seed}"
            added["avg_gap"] = dataclasses.replace(gap, method=method)
    return _replace(cell, metrics={**cell.metrics, **{k: e.to_dict() for k, e in added.items()}})


def _word(text: str) -> str:
    """A text as a folder name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in text)[:60].strip("._")
    return kept or "request"


def _replace(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{**asdict(cell), **changes})
