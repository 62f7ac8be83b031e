"""What the tours share: their folder, the exact undo on files, and one thread for small networks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expunge import experiment
from expunge.config import RunConfig, resolved_yaml
from expunge.errors import ConfigError
from expunge.evaluation import Candidate, controls, evaluate
from expunge.patch import Patch
from expunge.patch.files import apply_files, revert_file
from expunge.report.model import Report
from expunge.run import PATCH, unlearn
from expunge.tasks.base import Task

MARKER = "demo.txt"
#: Receives lines of text and tables.
Say = Callable[[Any], None]


def fresh_folder(folder: Path) -> None:
    """Empty a folder of an earlier tour; anything else in it is not ours to remove.

    Raises:
        ConfigError: The folder holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ConfigError(f"{folder} is not empty and not of an earlier demo; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by `expunge demo`; the next demo replaces this folder.\n", encoding="utf-8")


def undo_on_files(folder: Path, weights: Path, patches: list[Path], say: Say) -> bool:
    """Apply patches to a weights file, take them off again, and compare digests."""
    say("Exact undo, on files:")
    applied = apply_files(weights, patches, folder / "forgotten.safetensors")
    assert applied.undo is not None
    restored = revert_file(applied.path, folder / "restored.safetensors")
    base = Patch.load(patches[0]).manifest.base_digest
    say(f"   original  {base[:16]}")
    size = applied.undo.stat().st_size
    say(f"   forgotten {applied.digest[:16]}  ({applied.changed:,} weights changed; undo file {size:,} bytes)")
    equal = restored.digest == base
    say(f"   restored  {restored.digest[:16]}  {'equal to the original, bit for bit' if equal else 'DIFFERENT'}")
    return equal


def compared(
    folder: Path,
    task: Task,
    config: RunConfig,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    model_name: str,
    progress: bool = False,
) -> tuple[Report, dict[str, Path]]:
    """All methods on one concept, one report: the first method is the subject, the others are baselines.

    Args:
        folder: Receives a run folder for each method and the report.
        task: Model and data.
        config: Request, and the recipe whose controls are run.
        methods: Settings by method.
        title: Of the report.
        model_name: Shown name of the model.
        progress: Show progress bars.

    Returns:
        The report, and the patches by method.
    """
    request = config.request.build()
    candidates: list[Candidate] = []
    patches: dict[str, Path] = {}
    for name, settings in methods.items():
        recipe = config.model_copy(update={"recipe": {"method": name, **settings}}).build_recipe()
        start = time.perf_counter()
        patch = unlearn(task, request, recipe, run_dir=folder / name, progress=progress)
        role: Any = "baseline" if candidates else "after"
        candidates.append(Candidate(name, patch, role, time.perf_counter() - start))
        patches[name] = folder / name / PATCH
    candidates += controls(task, request, config.build_recipe(), progress=progress)
    report = evaluate(
        task,
        request,
        candidates,
        title=title,
        config=resolved_yaml(config),
        undo=[
            f"expunge apply original.safetensors {folder.name}/{next(iter(methods))}/{PATCH} -o forgotten.safetensors",
            "expunge revert forgotten.safetensors -o restored.safetensors",
        ],
        model_name=model_name,
        attacks=(),
        progress=progress,
    )
    experiment.save_report(report, folder)
    return report, patches


def farewell(folder: Path, patches: Mapping[str, Mapping[str, Path]], seconds: float, say: Say) -> None:
    """Say where reports and patches are."""
    say(f"Finished in {seconds:.0f} s. Look at:")
    for part, found in patches.items():
        say(f"   {folder / part / experiment.REPORT_HTML}")
        for path in found.values():
            say(f"   {path} ({path.stat().st_size:,} bytes)")


@contextmanager
def few_threads(most: int = 1) -> Iterator[None]:
    """Networks this small are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(most, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
