"""From a configuration and the names of concepts to patches and evidence on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import experiment, files
from expunge.config import RunConfig, resolved_yaml
from expunge.controls import Candidate, controls
from expunge.diffusion.at_once import Weights
from expunge.diffusion.concept_plan import Room, Wordings, plan_concepts, rooms
from expunge.diffusion.concepts import EFFECTS, TOGETHER, erase_concepts, folder_of
from expunge.digest import json_digest, named_tensors
from expunge.errors import ConfigError
from expunge.evaluation import evaluate
from expunge.objectives.concept_correlation import CORRELATION, ENERGY
from expunge.patch import Patch, Replace
from expunge.patch.apply import materialise
from expunge.report.model import Report
from expunge.run import LOG, PATCH
from expunge.tasks.text_to_image import TextToImageTask
from expunge.track import read_log


@dataclass(frozen=True)
class Erased:
    """What was left behind.

    Args:
        folder: Holds a folder for each concept, with its patch and report.
        patches: By concept; only the new ones.
        reports: By concept; empty for a task without a judge.
        effects: Share by which erasing the first concept of a pair changes keys and values of the second.
    """

    folder: Path
    patches: Mapping[str, Patch]
    reports: Mapping[str, Report]
    effects: Mapping[tuple[str, str], float]


def erase(
    config: RunConfig,
    concepts: Sequence[str],
    *,
    at_once: bool = False,
    earlier: Mapping[str, Patch] | None = None,
    wordings: Wordings = "all",
    weights: Weights = "balanced",
    folder: Path | None = None,
    progress: bool = False,
    planned: Callable[[Mapping[str, Room]], None] = lambda _: None,
) -> Erased:
    """Erase concepts, each into a patch of its own, and measure what each patch does alone, with all others, and off.

    Below the folder stands for every concept ``<concept>/patch.safetensors`` and, where the task has a judge,
    ``report.html``. A killed run continues; what is finished is not repeated.

    Args:
        config: Task, recipe and seed; its own request is not used.
        concepts: In words.
        at_once: All in one run; see :func:`~expunge.diffusion.concepts.erase_concepts`.
        earlier: Patches of concepts that were erased before, by name.
        wordings: Protect all prompts of the other concepts, or the first of each.
        weights: With ``at_once``: ``balanced`` as in the paper, or ``equal``.
        folder: Where results go; that of the configuration by default.
        progress: Show progress bars.
        planned: Receives what is left for each concept, before anything is trained.

    Raises:
        ConfigError: The configuration is not that of a text-to-image pipeline in the space ``concept_shift``.
        RequestError: The concepts do not fit the task, or more are protected than fit.
    """
    task = experiment.make_task(config.task)
    if not isinstance(task, TextToImageTask):
        raise ConfigError(f"concepts are erased from text-to-image pipelines, not from the {task.name} task")
    top, recipe = folder or config.folder, config.build_recipe()
    files.check_writable(top)
    plan = plan_concepts(task, concepts, recipe, earlier=earlier, wordings=wordings)
    planned(rooms(task, plan))
    patches = erase_concepts(
        task,
        concepts,
        recipe,
        earlier=earlier,
        wordings=wordings,
        at_once=at_once,
        weights=weights,
        seed=config.seed,
        run_dir=top,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
    )
    text = resolved_yaml(config)
    files.atomic_write(top / experiment.CONFIG, text)
    experiment.keep_base(config.task, task, top)
    everything = {**plan.earlier, **patches}
    together = json_digest(sorted(p.digest for p in everything.values()))
    reports = {}
    for name in patches if task.judge is not None else ():
        own, request = top / folder_of(name), plan.requests[name]
        known = experiment.known_report(own, patches[name], task, request, text)
        if known is not None and known.digests.get(TOGETHER) == together:
            reports[name] = known
            continue
        candidates = _candidates(task, everything, name, _history(top, name, at_once))
        if config.controls:
            candidates += controls(task, request, plan.recipes[name], seed=config.seed, progress=progress)
        report = evaluate(
            task,
            request,
            candidates,
            title=f"{config.name}: erasing '{name}', one of {len(everything)} concepts",
            attacks=config.attacks,
            seed=config.seed,
            progress=progress,
            config=text,
            undo=_undo(patches, name),
            model_name=config.task.model.name,
        )
        report.not_shown += [e["text"] for e in patches[name].manifest.findings[EFFECTS] if not e["protected"]]
        report.digests[TOGETHER] = together
        experiment.save_report(report, own)
        reports[name] = report
    return Erased(top, patches, reports, _effects(patches))


def _history(top: Path, name: str, at_once: bool) -> list[dict[str, Any]]:
    """The logged steps of a concept."""
    file = top / LOG if at_once else top / folder_of(name) / LOG
    rows = read_log(file) if file.exists() else []
    if not at_once:
        return rows
    own = {f"{term}.{name}": term for term in (CORRELATION, ENERGY, "l1")}
    return [{"step": r["step"]} | {t: r[k] for k, t in own.items() if k in r} for r in rows if next(iter(own)) in r]


def _candidates(
    task: TextToImageTask, patches: Mapping[str, Patch], name: str, history: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """The concept's own patch, all of them together, and all but its own."""
    found = [Candidate("own patch", patches[name], "after", history=history)]
    others = {n: p for n, p in patches.items() if n != name}
    if others:
        count = len(others)
        told = f"'{next(iter(others))}'" if count == 1 else f"the {count} other concepts"
        found += [
            Candidate("all patches", _merged(task, patches), "baseline", note=f"{told} erased, too"),
            Candidate("recovered", _merged(task, others), "baseline", note=f"{told} erased, this one taken off"),
        ]
    return found


def _merged(task: TextToImageTask, patches: Mapping[str, Patch]) -> Patch:
    """Several patches as one, to be measured: the very bits that they make together."""
    tensors, several = named_tensors(task.model)[0], list(patches.values())
    names = sorted({n for p in several for n in p})
    changes = {n: Replace(materialise(n, tensors[n].detach(), several).cpu()) for n in names}
    first = several[0].manifest
    update = {"request": {}, "request_digest": "", "recipe": {}, "notes": (), "findings": {}, "metrics": {}}
    return Patch(changes, first.model_copy(update={**update, "parents": tuple(p.digest for p in several)}))


def _undo(patches: Mapping[str, Patch], name: str) -> list[str]:
    files = {n: f"{folder_of(n)}/{PATCH}" for n in patches}
    keep = "".join(f" --keep {f}" for n, f in files.items() if n != name)
    return [
        f"expunge apply {experiment.BASE} {' '.join(files.values())} -o forgotten.safetensors",
        f"expunge revert forgotten.safetensors --patch {files[name]}{keep} -o with_{folder_of(name)}.safetensors",
    ]


def _effects(patches: Mapping[str, Patch]) -> dict[tuple[str, str], float]:
    rows = (e for p in patches.values() for e in p.manifest.findings[EFFECTS])
    return {(e["erased"], e["on"]): float(e["relative"]) for e in rows}
