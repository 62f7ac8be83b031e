"""The tour of text-to-image models: a tiny Stable Diffusion forgets an object and a style, and gets one of them back.

Pipeline, judge and pictures come with the package. No download, no GPU, under four minutes on two cores.
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
from expunge.tasks.text_to_image import TextToImageTask

#: What each part forgets: the label axis and the concept.
CONCEPTS = {"object": "ring", "style": "neon"}
#: The bare concept as a prompt, and what UCE puts in its place.
WORDS = {"object": ("a ring", ""), "style": ("in neon style", "flat")}


def methods_of(axis: str) -> dict[str, dict[str, Any]]:
    """Settings by method. SRS-ME is the subject; the others are shown beside it."""
    words, guide = WORDS[axis]
    return {
        "srs_me": {
            "prompts": [words],
            "others_tolerance": 0.01,
            "beta": 0.05,
            "statistic": "ratio",
            "threshold": -1.0,
            "batch_size": 16,
            "optim": {"name": "adam", "lr": 0.1, "max_steps": 80, "epochs": 20},
        },
        "esd": {
            "x_t": "images",
            "batch_size": 8,
            "prompts": [words],
            "erase_from": "{}",
            "eta": 3.0,
            "optim": {"name": "adam", "lr": 3e-4, "max_steps": 80, "epochs": 20},
        },
        "uce": {"texts": "prompts", **({"guides": [guide]} if guide else {})},
    }


@dataclass(frozen=True)
class DiffusionDemoResult:
    """Reports and patches by axis; whether the revoked state has the bits of the other patch alone; exact undo."""

    folder: Path
    reports: dict[str, Report]
    patches: dict[str, dict[str, Path]]
    recovered: bool
    undone: bool
    seconds: float


def run_diffusion_demo(
    output: str | Path = "runs/demo-diffusion",
    *,
    quick: bool = False,
    progress: bool = False,
    say: Say = lambda _: None,
) -> DiffusionDemoResult:
    """Run the tour.

    Args:
        output: Folder for everything; an earlier tour there is replaced.
        quick: SRS-ME only, fewer pictures and steps.
        progress: Show progress bars.
        say: Receives lines of text and tables.

    Raises:
        CapabilityError: diffusers is not installed.
        ConfigError: The folder holds something else.
    """
    folder = Path(output)
    fresh_folder(folder)
    start = time.perf_counter()
    reports: dict[str, Report] = {}
    patches: dict[str, dict[str, Path]] = {}
    weights = folder / "original.safetensors"
    with few_threads():
        say("1. A tiny text-to-image pipeline (drawn pictures of eight objects in six styles) comes with the package.")
        for number, (axis, concept) in enumerate(CONCEPTS.items(), start=2):
            methods = methods_of(axis)
            methods = {"srs_me": methods["srs_me"]} if quick else methods
            task, config = _part(axis, concept, quick, methods["srs_me"])
            if not weights.exists():
                save_weights(task.model, weights)
            say(f"{number}. Forget the {axis} '{concept}' with {', '.join(methods)}.")
            reports[axis], patches[axis] = compared(
                folder / axis,
                task,
                config,
                methods,
                title=f"Canvas pipeline: forgetting the {axis} '{concept}'",
                model_name="canvas pipeline",
                progress=progress,
            )
            say(reports[axis].table())
            for flag in reports[axis].flags:
                say(f"   note: {flag}")
        recovered = _recovered([Patch.load(found["srs_me"]) for found in patches.values()], say)
        undone = undo_on_files(folder, weights, [found["srs_me"] for found in patches.values()], say)
    seconds = time.perf_counter() - start
    farewell(folder, patches, seconds, say)
    return DiffusionDemoResult(folder, reports, patches, recovered, undone, seconds)


def _part(axis: str, concept: str, quick: bool, settings: dict[str, Any]) -> tuple[TextToImageTask, RunConfig]:
    task = {
        "family": "text_to_image",
        "model": {"name": "canvas"},
        "data": {"name": "canvas", "limit": 240 if quick else 960, "test_limit": 96},
        "axis": axis,
        "steps": 10,
        "guidance": 3.0,
        "sample_batch": 96,
        "images_per_prompt": 1 if quick else 2,
        "judge": "canvas",
    }
    recipe = {"method": "srs_me", **settings}
    body = {"name": f"canvas {axis}", "task": task, "request": {"concept": concept}, "recipe": recipe}
    config = parse_config(RunConfig, Source(body, "demo"))
    made = experiment.make_task(config.task)
    assert isinstance(made, TextToImageTask)
    return made, config


def _recovered(patches: list[Patch], say: Say) -> bool:
    """Both erasures on one model, then the first one revoked: the bits must be those of the second alone."""
    say("4. Both erasures on one model, then the first is revoked.")
    task, _ = _part("object", CONCEPTS["object"], True, methods_of("object")["srs_me"])
    first, second = patches
    apply(task.model, second)
    alone = model_digest(task.model)
    apply(task.model, first)
    both = model_digest(task.model)
    revert(task.model, first)
    now = model_digest(task.model)
    say(f"   both {both[:16]}, after revoking {now[:16]}, the second alone {alone[:16]}")
    say(f"   {'equal bit for bit' if now == alone else 'DIFFERENT'}")
    revert(task.model, second)
    return now == alone != both
