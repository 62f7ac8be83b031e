"""The tour of two-tower models: a small CLIP forgets an object and a style, with evidence and exact undo.

The model (0.4 million parameters) and the pictures (drawn) come with the package. No download, no GPU, under two
minutes on two cores.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import experiment
from expunge.config import RunConfig, Source, parse_config
from expunge.demo.common import Say, compared, farewell, few_threads, fresh_folder, undo_on_files
from expunge.digest import model_digest
from expunge.models.weights import save_weights
from expunge.patch import Patch, apply, revert
from expunge.report.model import Report
from expunge.tasks.clip import ClipTask

#: What each part forgets: the label axis and the concept.
CONCEPTS = {"object": "ring", "style": "neon"}
#: SLUG is the subject; the others are shown beside it, with rates found by a short search on training images.
METHODS: dict[str, dict[str, Any]] = {
    "slug": {"forget_text": "name", "utility_images": 240},
    "gradient_ascent": {"batch_size": 48, "optim": {"name": "adamw", "lr": 2e-4, "epochs": 2, "weight_decay": 0.0}},
    "gaft": {"batch_size": 48, "optim": {"name": "adamw", "lr": 2e-4, "epochs": 2, "weight_decay": 0.0}},
    "salun": {
        "on": "neg_grad_plus",
        "mixing": "sequential",
        "batch_size": 48,
        "optim": {"name": "adamw", "lr": 2e-4, "epochs": 2, "weight_decay": 0.0},
    },
    "ssd": {"profile": "as_published", "alpha": 3.0, "dampening": 0.5, "batch_size": 16},
}


@dataclass(frozen=True)
class ClipDemoResult:
    """Reports and patches by axis, whether both together work in any order, and whether undo was exact."""

    folder: Path
    reports: dict[str, Report]
    patches: dict[str, dict[str, Path]]
    together: dict[str, float]
    undone: bool
    seconds: float


def run_clip_demo(
    output: str | Path = "runs/demo-clip",
    *,
    quick: bool = False,
    progress: bool = False,
    say: Say = lambda _: None,
) -> ClipDemoResult:
    """Run the tour.

    Args:
        output: Folder for everything; an earlier tour there is replaced.
        quick: SLUG only, on fewer pictures.
        progress: Show progress bars.
        say: Receives lines of text and tables.

    Raises:
        CapabilityError: transformers is not installed.
        ConfigError: The folder holds something else.
    """
    folder = Path(output)
    fresh_folder(folder)
    start = time.perf_counter()
    methods = dict(list(METHODS.items())[:1]) if quick else METHODS
    size = {"limit": 480, "test_limit": 240} if quick else {"limit": 960, "test_limit": 720}
    reports: dict[str, Report] = {}
    patches: dict[str, dict[str, Path]] = {}
    weights = folder / "original.safetensors"
    with few_threads(2):
        say("1. A small CLIP, trained on drawn pictures of eight objects in six styles, comes with the package.")
        for number, (axis, concept) in enumerate(CONCEPTS.items(), start=2):
            task, config = _part(axis, concept, size, "slug", METHODS["slug"])
            if not weights.exists():
                save_weights(task.model, weights)
            say(f"{number}. Forget the {axis} '{concept}' with {', '.join(methods)}.")
            reports[axis], patches[axis] = compared(
                folder / axis,
                task,
                config,
                methods,
                title=f"Canvas CLIP: forgetting the {axis} '{concept}'",
                model_name="canvas CLIP",
                progress=progress,
            )
            say(reports[axis].table())
            if reports[axis].contrastive is not None:
                say(reports[axis].contrastive.table())  # type: ignore[union-attr]
            for flag in reports[axis].flags:
                say(f"   note: {flag}")
        made = [Patch.load(found["slug"]) for found in patches.values()]
        together = _together(size, made, say)
        undone = undo_on_files(folder, weights, [found["slug"] for found in patches.values()], say)
    seconds = time.perf_counter() - start
    farewell(folder, patches, seconds, say)
    return ClipDemoResult(folder, reports, patches, together, undone, seconds)


def _part(
    axis: str, concept: str, size: dict[str, int], method: str, settings: dict[str, Any]
) -> tuple[ClipTask, RunConfig]:
    task = {"family": "clip", "model": {"name": "canvas"}, "data": {"name": "canvas", **size}, "axis": axis}
    recipe = {"method": method, **settings}
    body = {"name": f"canvas {axis} {method}", "task": task, "request": {"concept": concept}, "recipe": recipe}
    config = parse_config(RunConfig, Source(body, "demo"))
    made = experiment.make_task(config.task)
    assert isinstance(made, ClipTask)
    return made, config


def _together(size: dict[str, int], patches: list[Patch], say: Say) -> dict[str, float]:
    """Both patches on one model: what is left of each concept, in whichever order they were applied."""
    say("4. Both patches on one model.")
    found: dict[str, float] = {}
    digests = set()
    for order in (patches, patches[::-1]):
        for axis, concept in CONCEPTS.items():
            task, config = _part(axis, concept, size, "slug", METHODS["slug"])
            apply(task.model, *order)
            digests.add(model_digest(task.model))
            split = task.split(config.request.build())
            for role, what in (("forget_test", concept), ("test", f"other {axis}s")):
                logits, labels = task.logits(role, split)
                found[what] = 100 * float((logits.argmax(1) == labels).float().mean())
            revert(task.model, *order)
    say("   accuracy: " + ", ".join(f"{what} {value:.1f} %" for what, value in found.items()))
    same = "the same weights, bit for bit" if len(digests) == 1 else "DIFFERENT weights"
    say(f"   in either order: {same}")
    return found
