"""The tour: forget a class and then 10 % of the samples of the bundled digits, with evidence and exact undo.

No download, no GPU, one core, well under two minutes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import experiment
from expunge.config import RunConfig, Source, TrainConfig, parse_config, resolved_yaml
from expunge.demo.common import Say, few_threads, fresh_folder, undo_on_files
from expunge.evaluation import Candidate, controls, evaluate
from expunge.patch import Patch
from expunge.report.model import Report
from expunge.run import LOG, PATCH, unlearn
from expunge.track import read_log

TASK: dict[str, Any] = {
    "model": {"name": "small_cnn", "n_classes": 10, "input_shape": [1, 8, 8]},
    "data": {"name": "digits"},
    "surrogate": {"name": "shapes", "quantity": 2000},
}
#: Protocol of the original and of the retrained models.
TRAINING: dict[str, Any] = {
    "lr": 0.05,
    "epochs": 25,
    "lr_schedule": "cosine",
    "milestones": [],
    "norm": "train",
    "augment": False,
    "weight_decay": 5e-4,
}
#: Methods per request; the first one is the subject of the report, the others are shown beside it. SCAR gets the class
#: statistics of the training, so it opens no retain image. It is left out of the random request: a retrained model gets
#: all of these samples right, and SCAR's stop rule asks for fewer than that.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "class": {
        "salun": {"batch_size": 64, "optim": {"lr": 0.003, "epochs": 5, "augment": False}},
        "barrier": {
            "targets": ["fc", "fc1"],
            "lambda_interval": 0.03,
            "use_actual_bounds": False,
            "batch_size": 64,
            "optim": {"lr": 0.003, "epochs": 30},
        },
        "scar": {"batch_size": 64, "optim": {"lr": 0.0005, "epochs": 30}},
        "random_label": {"batch_size": 64, "optim": {"lr": 0.003, "epochs": 5, "augment": False}},
        "fine_tune": {"batch_size": 64, "optim": {"lr": 0.01, "epochs": 5, "augment": False}},
    },
    "random": {
        "salun": {"batch_size": 64, "optim": {"lr": 0.002, "epochs": 10, "augment": False}},
        "barrier": {
            "targets": ["fc", "fc1"],
            "lambda_interval": 0.03,
            "use_actual_bounds": False,
            "batch_size": 64,
            "optim": {"lr": 0.001, "epochs": 10},
        },
        "random_label": {"batch_size": 64, "optim": {"lr": 0.002, "epochs": 10, "augment": False}},
        "fine_tune": {"batch_size": 64, "optim": {"lr": 0.01, "epochs": 5, "augment": False}},
    },
}
REQUESTS: dict[str, dict[str, Any]] = {"class": {"class": 3}, "random": {"fraction": 0.1, "seed": 0}}


@dataclass(frozen=True)
class DemoResult:
    """Reports and patches by request, and whether undo restored the original's digest."""

    folder: Path
    reports: dict[str, Report]
    patches: dict[str, dict[str, Path]]
    undone: bool
    seconds: float


def run_demo(
    output: str | Path = "runs/demo",
    *,
    quick: bool = False,
    progress: bool = False,
    say: Say = lambda _: None,
) -> DemoResult:
    """Run the tour.

    Args:
        output: Folder for everything; an earlier tour there is replaced.
        quick: One method, few epochs, no second request.
        progress: Show progress bars.
        say: Receives lines of text and tables.

    Raises:
        ConfigError: The folder holds something else.
    """
    folder = Path(output)
    fresh_folder(folder)
    start = time.perf_counter()
    with few_threads():
        say("1. Train a small network on 8x8 digits.")
        training = {**TRAINING, **({"epochs": 6} if quick else {})}
        weights = folder / "original.safetensors"
        original = {"name": "original", "task": TASK, "optim": training, "batch_size": 64, "output": str(weights)}
        settings = parse_config(TrainConfig, Source({**original, "statistics": True}, "demo"))
        trained = experiment.train(settings, progress=progress)
        say("   accuracy: " + ", ".join(f"{k} {v:.1f} %" for k, v in trained.accuracy.items()))
        task = {**TASK, "model": {**TASK["model"], "weights": str(weights)}}
        reports: dict[str, Report] = {}
        patches: dict[str, dict[str, Path]] = {}
        for number, kind in enumerate(["class"] if quick else REQUESTS, start=2):
            methods = dict(list(SETTINGS[kind].items())[:1]) if quick else dict(SETTINGS[kind])
            if "scar" in methods:
                methods["scar"] = {**methods["scar"], "statistics": str(trained.statistics)}
            title = parse_config(RunConfig, _source(kind, task, next(iter(methods.items())))).request.build().title
            say(f"{number}. Forget {title} with {', '.join(methods)}; retrain without it for comparison.")
            reports[kind], patches[kind] = _forget(folder / kind, kind, task, methods, training, progress)
            say(reports[kind].table())
            for flag in reports[kind].flags:
                say(f"   note: {flag}")
        undone = undo_on_files(folder, weights, [next(iter(patches["class"].values()))], say)
    seconds = time.perf_counter() - start
    say(f"Finished in {seconds:.0f} s. Look at:")
    for kind, made in patches.items():
        say(f"   {folder / kind / experiment.REPORT_HTML}")
        for path in made.values():
            say(f"   {path}")
    return DemoResult(folder, reports, patches, undone, seconds)


def _source(kind: str, task: dict[str, Any], method: tuple[str, dict[str, Any]]) -> Source:
    recipe = {"method": method[0], **method[1]}
    name = f"digits {kind} {method[0]}"
    return Source({"name": name, "task": task, "request": REQUESTS[kind], "recipe": recipe}, "demo")


def _forget(
    folder: Path,
    kind: str,
    task_settings: dict[str, Any],
    methods: dict[str, dict[str, Any]],
    training: dict[str, Any],
    progress: bool,
) -> tuple[Report, dict[str, Path]]:
    """All methods on one request, one report: the first method is the subject, the others are baselines."""
    candidates: list[Candidate] = []
    patches: dict[str, Path] = {}
    first = parse_config(RunConfig, _source(kind, task_settings, next(iter(methods.items()))))
    task = experiment.make_task(first.task)
    request = first.request.build()
    for item in methods.items():
        config = parse_config(RunConfig, _source(kind, task_settings, item))
        where = folder / item[0]
        start = time.perf_counter()
        patch: Patch = unlearn(task, request, config.build_recipe(), seed=config.seed, run_dir=where, progress=progress)
        seconds = time.perf_counter() - start
        role: Any = "baseline" if candidates else "after"
        candidates.append(Candidate(item[0], patch, role, seconds, "", read_log(where / LOG)))
        patches[item[0]] = where / PATCH
    candidates += controls(task, request, first.build_recipe(), seed=first.seed, progress=progress)
    retrain = {"method": "retrain", "batch_size": 64, "optim": training}
    oracle = parse_config(RunConfig, _source(kind, task_settings, ("retrain", retrain))).build_recipe()
    candidates.append(experiment.trained_reference(task, request, oracle, 1, folder / "retrained", progress=progress))
    report = evaluate(
        task,
        request,
        candidates,
        title=f"Digits: forgetting {request.title}",
        config=resolved_yaml(first),
        undo=[
            f"expunge apply original.safetensors {PATCH} -o forgotten.safetensors",
            "expunge revert forgotten.safetensors -o restored.safetensors",
        ],
        model_name="small_cnn",
    )
    experiment.save_report(report, folder)
    return report, patches
