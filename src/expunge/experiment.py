"""From a configuration to results on disk: task, unlearning, controls, reference, evaluation, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge import files
from expunge.config import RunConfig, TrainConfig, resolved_yaml
from expunge.config.experiments import check_index_file
from expunge.config.models import AnyTaskConfig, Experiment
from expunge.digest import combine, named_tensors, state_digests
from expunge.errors import CapabilityError, ConfigError
from expunge.evaluation import Candidate, controls, evaluate
from expunge.features.statistics import ClassStatistics
from expunge.models.weights import save_weights
from expunge.patch import Manifest, Patch, Replace
from expunge.patch.patch import current_versions
from expunge.recipe import Recipe
from expunge.report import model as reporting
from expunge.report.contrastive_plots import save_figures
from expunge.report.samples import save_grids
from expunge.request import ForgetRequest
from expunge.run import CHECKPOINT, LOG, PATCH, unlearn
from expunge.tasks.base import Task
from expunge.tasks.build import make_task as make_task
from expunge.tasks.images import ImageTask
from expunge.track import read_log
from expunge.train import fit, validation_rows

CONFIG, REPORT_JSON, REPORT_HTML, BASE, TIMING = (
    "config.yaml",
    "report.json",
    "report.html",
    "base.safetensors",
    "timing.json",
)

#: Bytes of an original that is copied into the run folder when no file of it is named.
LARGEST_BASE = 1 << 30


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    patch: Patch
    report: reporting.Report
    resumed: bool


def run(config: RunConfig, *, task: Task | None = None, progress: bool = False) -> Result:
    """Unlearn, run the controls, evaluate, and write the run folder.

    The folder holds ``patch.safetensors``, ``report.html``, ``report.json``, ``log.jsonl``, ``run.json`` and
    ``config.yaml`` (every setting). A killed run continues; a finished one is not repeated unless the settings of the
    evaluation changed.

    Args:
        config: The run.
        task: The task, if it is already built from this configuration.
        progress: Show progress bars.
    """
    request, recipe, folder = config.request.build(), config.build_recipe(), config.folder
    files.check_writable(folder)
    task = task if task is not None else make_task(config.task)
    if config.request.index_file is not None:
        check_index_file(config.request.index_file, task.training_digest())
    started_fresh = not (folder / PATCH).exists() and not (folder / CHECKPOINT).exists()
    start = time.perf_counter()
    patch = unlearn(
        task,
        request,
        recipe,
        seed=config.seed,
        run_dir=folder,
        checkpoint_every=config.checkpoint_every,
        trackers=config.trackers,
        progress=progress,
    )
    if started_fresh:
        timing = {"patch": patch.digest, "seconds": time.perf_counter() - start}
        files.atomic_write(folder / TIMING, json.dumps(timing))
    text = resolved_yaml(config)
    known = known_report(folder, patch, task, request, text)
    if known is not None:
        return Result(folder, patch, known, resumed=True)
    files.atomic_write(folder / CONFIG, text)
    keep_base(config.task, task, folder)
    history = read_log(folder / LOG) if (folder / LOG).exists() else []
    seconds = _seconds(folder, patch)
    candidates = [Candidate("after forgetting", patch, "after", seconds, "", history)]
    if config.controls:
        candidates += controls(task, request, recipe, seed=config.seed, progress=progress)
    reference = reference_of(config, task, request, config.seed, folder / "reference", progress=progress)
    candidates += [reference] if reference is not None else []
    limits = [reference.note] if reference is not None and reference.note.startswith("unchecked") else []
    title = f"{config.name}: forgetting {request.title}"
    report = _evaluated(config, task, candidates, title, limits, folder, progress)
    return Result(folder, patch, report, resumed=False)


def _evaluated(
    config: RunConfig,
    task: Task,
    candidates: Sequence[Candidate],
    title: str,
    not_shown: Sequence[str],
    folder: Path,
    progress: bool,
) -> reporting.Report:
    """Evaluate as configured and write the report."""
    report = evaluate(
        task,
        config.request.build(),
        candidates,
        title=title,
        attacks=config.attacks,
        probes=config.evaluate.probes(),
        embeddings=config.evaluate.embeddings,
        seed=config.seed,
        progress=progress,
        config=resolved_yaml(config),
        undo=undo_commands(config.task, folder),
        model_name=config.task.model.name,
        not_shown=not_shown,
    )
    save_report(report, folder)
    return report


def _weights(task: AnyTaskConfig) -> str | None:
    """The weights file that a configuration names."""
    given: str | None = getattr(task.model, "weights", None)
    return given


def keep_base(config: AnyTaskConfig, task: Task, folder: Path) -> None:
    """Copy the original into a run folder, if no file of it is named and it is not too large."""
    size = sum(t.numel() * t.element_size() for t in named_tensors(task.model)[0].values())
    if _weights(config) is None and size <= LARGEST_BASE:
        save_weights(task.model, folder / BASE)


def save_report(report: reporting.Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html``, and figures and drawn images as files."""
    report.save_html(folder / REPORT_HTML)
    if report.contrastive is not None:
        save_figures(report.contrastive, folder / "figures")
    if report.samples is not None:
        save_grids(report.samples, folder / "figures")
    report.save_json(folder / REPORT_JSON)  # last: its presence says that the run is complete


def undo_commands(task: AnyTaskConfig, folder: Path) -> list[str]:
    """The commands that apply the patch to the weights file and take it off again, given within the run's folder."""
    given = _weights(task)
    weights = os.path.relpath(given, folder) if given and Path(given).is_file() else given or BASE
    return [
        f"expunge apply {weights} {PATCH} -o forgotten.safetensors",
        f"expunge revert forgotten.safetensors -o {Path(weights).stem}.restored.safetensors",
    ]


def known_report(
    folder: Path, patch: Patch, task: Task, request: ForgetRequest, config: str
) -> reporting.Report | None:
    """The report of an earlier evaluation, if everything that it depends on is the same."""
    if not (folder / REPORT_JSON).exists() or not (folder / REPORT_HTML).exists():
        return None
    report = reporting.Report.load_json(folder / REPORT_JSON)
    digests = {"patch": patch.digest, "request": request.digest, "data": task.data_digest()}
    same = all(report.digests.get(k) == v for k, v in digests.items())
    return report if same and report.config == config and report.versions == current_versions() else None


def _seconds(folder: Path, patch: Patch) -> float | None:
    """Wall-clock time of the run; unknown for one that was interrupted."""
    try:
        timing = json.loads((folder / TIMING).read_text(encoding="utf-8"))
        return float(timing["seconds"]) if timing["patch"] == patch.digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reference_of(
    config: Experiment,
    task: Task,
    request: ForgetRequest,
    seed: int,
    folder: Path,
    *,
    progress: bool = False,
) -> Candidate | None:
    """The retrained model of a configuration: trained in ``folder`` (once), or read from a file.

    Raises:
        ConfigError: The reference left out other samples than the request names.
        ArtifactError: The file is broken or belongs to another model.
    """
    wanted = config.reference
    if wanted is None:
        return None
    if wanted.method is not None:
        return trained_reference(task, request, wanted.recipe(), seed, folder, progress=progress)
    if wanted.patch is not None:
        patch = Patch.load(wanted.patch)
        if patch.manifest.request_digest != request.digest:
            raise ConfigError(
                f"reference.patch {wanted.patch} was made for another request "
                f"({patch.manifest.request_digest[:12] or 'unknown'}, this one is {request.digest[:12]})"
            )
        return Candidate("retrained", patch, "reference", note=f"read from {Path(wanted.patch).name}")
    path = Path(str(wanted.weights))
    left_out = excluded_path(path)
    note = f"weights from {path.name}"
    if left_out.is_file():
        theirs = task.split(ForgetRequest.from_file(left_out))["forget"]
        ours = task.split(request)["forget"]
        if theirs.tolist() != ours.tolist():
            raise ConfigError(
                f"reference.weights {path} left out {len(theirs)} samples ({left_out.name}), "
                f"which are not the {len(ours)} of this request"
            )
    else:
        note = f"unchecked: no {left_out.name} says which samples the reference {path.name} never saw"
    return Candidate("retrained", patch_to(task, path, request), "reference", note=note)


def trained_reference(
    task: Task, request: ForgetRequest, recipe: Recipe, seed: int, folder: Path, *, progress: bool = False
) -> Candidate:
    """Retrain from scratch without the samples; resumes and is not repeated."""
    fresh = not (folder / PATCH).exists() and not (folder / CHECKPOINT).exists()
    start = time.perf_counter()
    patch = unlearn(task, request, recipe, seed=seed, run_dir=folder, progress=progress)
    if fresh:
        timing = {"patch": patch.digest, "seconds": time.perf_counter() - start}
        files.atomic_write(folder / TIMING, json.dumps(timing))
    note = f"trained from scratch without the samples, {recipe.optim.epochs} epochs"
    return Candidate("retrained", patch, "reference", _seconds(folder, patch), note)


def patch_to(task: Task, weights: Path, request: ForgetRequest) -> Patch:
    """The difference from the task's model to a weights file of the same architecture, as a patch."""
    from copy import deepcopy

    from expunge.models.weights import load_weights

    other = deepcopy(task.model)
    load_weights(other, weights, widen=True)
    base, aliases = named_tensors(task.model)
    theirs: dict[str, Tensor] = named_tensors(other)[0]
    digests = state_digests(base)
    new = state_digests(theirs)
    changes = {n: Replace(t.detach().cpu()) for n, t in theirs.items() if new[n] != digests[n]}
    manifest = Manifest(
        base_digest=combine(digests),
        base_tensors=digests,
        aliases=aliases,
        request=request.model_dump(mode="json"),
        request_digest=request.digest,
        recipe={"name": f"weights of {weights.name}"},
        versions=current_versions(),
    )
    return Patch(changes, manifest)


def audit(config: RunConfig, patch_file: str | Path, folder: Path, *, progress: bool = False) -> reporting.Report:
    """Evaluate a patch that someone else made, with controls from the recipe in its manifest.

    Raises:
        ConfigError: The patch was made for another request than the configuration names.
        ArtifactError: The patch is broken or belongs to another base.
    """
    task = make_task(config.task)
    request, patch = config.request.build(), Patch.load(patch_file)
    made_for = patch.manifest.request_digest
    if made_for and made_for != request.digest:
        raise ConfigError(
            f"{patch_file} was made for request {made_for[:12]}, {config.name} names {request.digest[:12]}"
        )
    candidates = [Candidate("after forgetting", patch, "after")]
    limits = [f"The patch was read from {Path(patch_file).name}; how it was made is its author's statement."]
    if config.controls:
        try:
            recipe = Recipe(**patch.manifest.recipe)
        except (ConfigError, TypeError) as error:
            limits.append(f"No controls: the recipe in the patch cannot be repeated here ({error}).")
        else:
            candidates += controls(task, request, recipe, seed=patch.manifest.seed, progress=progress)
    reference = reference_of(config, task, request, config.seed, folder / "reference", progress=progress)
    candidates += [reference] if reference is not None else []
    title = f"{config.name}: evaluation of {Path(patch_file).name}"
    return _evaluated(config, task, candidates, title, limits, folder, progress)


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    weights: Path
    excluded: Path | None
    accuracy: dict[str, float]
    statistics: Path | None = None


def excluded_path(weights: Path) -> Path:
    """``W.safetensors`` -> ``W.excluded.json``: the samples that the weights never saw."""
    return weights.with_suffix(".excluded.json")


def train(config: TrainConfig, *, overwrite: bool = False, progress: bool = False) -> Trained:
    """Train and save weights, and beside them the indices that were left out (``W.excluded.json``).

    The file can be used as ``index_file`` of a request and with ``--exclude-file``: ``forget`` numbers the rows that
    are left after the validation part was taken out, under the same data settings (``sha256`` tells others apart), and
    ``val`` the rows of that part before it was taken out. With ``statistics`` also the class statistics of the samples
    trained on (``W.statistics.safetensors``), for the ``statistics`` of SCAR.

    Raises:
        CapabilityError: ``statistics`` of a model without features.
        ConfigError: The target exists.
        DataError: ``statistics`` of a class with fewer than two samples; the weights have been written.
    """
    target = Path(config.output) if config.output else Path("runs") / f"{config.name}.safetensors"
    if target.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors only, not {target.name!r}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; remove it or allow overwriting")
    task = make_task(config.task)
    if not isinstance(task, ImageTask) or config.task.data is None:
        raise CapabilityError(f"the {task.name} task is not trained by this command; its weights come from elsewhere")
    if config.statistics:
        task.require(frozenset({"features"}), "class statistics")
    request = config.exclude.build() if config.exclude is not None else None
    if config.exclude is not None and config.exclude.index_file is not None:
        check_index_file(config.exclude.index_file, task.data.train.digest)
    split = fit(
        task,
        exclude=request,
        optim=config.build_optim(),
        batch_size=config.batch_size,
        label_smoothing=config.label_smoothing,
        average=config.average,
        seed=config.seed,
        run_dir=target.with_suffix(".training"),
        trackers=config.trackers,
        progress=progress,
    )
    excluded = None
    sha256 = task.data.train.digest
    held = validation_rows(config.task.data, task)
    if request is not None or held:
        excluded = excluded_path(target)
        body: dict[str, Any] = {"forget": split["forget"].tolist(), "dataset": config.task.data.name, "sha256": sha256}
        files.atomic_write(excluded, json.dumps(body | ({"val": held} if held else {})))
    else:
        excluded_path(target).unlink(missing_ok=True)  # of the weights that these replace
    accuracy = accuracies(task, [r for r in ("retain", "test", "forget", "forget_test") if r in split], split)
    facts: dict[str, Any] = {"dataset": config.task.data.name, "dataset_sha256": sha256, "seed": str(config.seed)}
    facts |= {"model": config.task.model.name, "optim": json.dumps(config.build_optim().model_dump(mode="json"))}
    facts |= {"label_smoothing": config.label_smoothing, "task": json.dumps(_portable(config.task))}
    facts |= {f"accuracy.{k}": f"{v:.2f}" for k, v in accuracy.items()}
    save_weights(task.model, target, {k: str(v) for k, v in facts.items()})
    statistics = target.with_suffix(".statistics.safetensors")
    if config.statistics:
        ClassStatistics.fit(task, split, "retain", task.eval_batch_size).save(statistics)
    else:
        statistics.unlink(missing_ok=True)
    return Trained(target, excluded, accuracy, statistics if config.statistics else None)


def _portable(task: AnyTaskConfig) -> dict[str, Any]:
    """Data and model as given, without the start weights: enough to use the trained weights again."""
    data = task.model_dump(mode="json", exclude_unset=True)
    data["model"] = {k: v for k, v in data["model"].items() if k not in ("weights", "pretrained", "allow_nonfinite")}
    return data


def accuracies(task: ImageTask, roles: Sequence[str], split: Any) -> dict[str, float]:
    """Accuracy in percent per role that has samples; none for a model that does not name classes."""
    found = {}
    for role in roles if task.classifies else ():
        if len(split[role]):
            logits, labels = task.logits(role, split)
            found[role] = 100 * float((logits.argmax(1) == labels).float().mean())
    return found
