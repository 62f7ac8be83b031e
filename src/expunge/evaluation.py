"""Before, after, controls and reference, measured the same way: the evidence."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expunge import guards
from expunge.controls import Candidate as Candidate
from expunge.controls import controls as controls
from expunge.digest import named_tensors
from expunge.errors import CapabilityError
from expunge.metrics.accuracy import GAP_KEYS as GAP_KEYS
from expunge.metrics.accuracy import per_class_accuracy
from expunge.metrics.aus import aus_estimate
from expunge.metrics.classifier import measure_classifier, warnings_for
from expunge.metrics.cost import run_time
from expunge.metrics.divergence import divergences, gap_estimate
from expunge.metrics.estimate import Estimate, not_run
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.probe import Probe, probed
from expunge.objectives.stopping import ACCURACY, TARGET
from expunge.patch import Patch, applied, apply, revert
from expunge.patch.patch import current_versions
from expunge.report.model import Histogram, Report, Row
from expunge.request import ForgetRequest
from expunge.tasks.base import Observed, Split, Task
from expunge.tasks.classifier import ClassifierTask

#: Columns of the log that are no loss terms.
BOOKKEEPING = frozenset({"epoch", "end_of_epoch", "lr", "grad_norm", "skipped", ACCURACY, TARGET})


@dataclass(frozen=True)
class Measured:
    """What one model says about the data, and its figures."""

    seen: Observed
    metrics: dict[str, Estimate]

    @property
    def outputs(self) -> dict[str, ClassifierOutputs]:
        """Classifier outputs by role."""
        return self.seen.outputs


def measure(
    task: Task,
    split: Split,
    patch: Patch | None,
    *,
    attacks: tuple[str, ...] = ("mia", "mia_threshold"),
    seconds: float | None = None,
    seed: int = 0,
) -> Measured:
    """Measure one model and leave the task's model as found.

    Raises:
        CapabilityError: The task's family has no metrics here.
    """
    base = dict(named_tensors(task.model)[0])
    metrics: dict[str, Estimate] = {}
    if patch is not None:
        facts = guards.effect(patch.changes, base)
        metrics["weights_changed"] = Estimate(
            100 * facts["share"], n=int(facts["total"]), unit="%", method="exact count"
        )
        metrics["patch_bytes"] = Estimate(patch.nbytes, unit="bytes", method="stored tensors")
        apply(task.model, patch)
    try:
        seen = task.observe(split)
    finally:
        if patch is not None:
            revert(task.model, patch)
    found: dict[str, Estimate] = {}
    if task.classifies or seen.outputs:  # drawn images that no judge has seen have none
        found = measure_classifier(seen.outputs, class_wise=bool(split.removed), attacks=attacks, seed=seed)
    if not task.classifies:  # what a model draws is no membership or accuracy of its training samples
        found = {name: estimate for name, estimate in found.items() if estimate.ran}
    found |= task.further_metrics(split, seen)
    if seconds is not None:
        found["run_time"] = run_time(seconds)
    return Measured(seen, {**found, **metrics})


def evaluate(
    task: Task,
    request: ForgetRequest,
    candidates: Sequence[Candidate],
    *,
    title: str = "",
    attacks: tuple[str, ...] = ("mia", "mia_threshold"),
    probes: Sequence[Probe] = (),
    embeddings: bool = False,
    seed: int = 0,
    progress: bool = False,
    config: str = "",
    undo: Sequence[str] = (),
    model_name: str = "",
    not_shown: Sequence[str] = (),
) -> Report:
    """Measure the base and every candidate and put the report together.

    Args:
        task: Model (the base, no patch applied) and data.
        request: What was to be forgotten.
        candidates: The first one with role ``after`` is the subject; the others are controls, baselines, reference.
        title: Headline; made from the request by default.
        attacks: Membership attacks: ``mia``, ``mia_threshold``, ``mia_svc``, ``mia_scar``, ``mia_scar_published``.
        probes: Measurements that train, such as :class:`~expunge.metrics.relearn.Relearn` and
            :class:`~expunge.metrics.lira.Lira`; controls are left out.
        embeddings: Add t-SNE pictures and Wasserstein distances of the embeddings.
        seed: Seed of the attacks' draws.
        progress: Show the progress of the probes.
        config: The configuration as text, for the reproducibility block.
        undo: Commands that restore the original.
        model_name: Shown name of the model.
        not_shown: Further limits to state.

    Raises:
        CapabilityError: A patch is still applied, or the task has no metrics.
    """
    if applied(task.model):
        raise CapabilityError("evaluate needs the base model: take the applied patches off with expunge.revert first")
    split = task.split(request)
    class_wise = bool(split.removed)
    subject = next((c for c in candidates if c.role == "after"), None)
    reference = next((c for c in candidates if c.role == "reference"), None)

    def run(c: Candidate) -> Measured:
        return measure(task, split, c.patch, attacks=attacks, seconds=c.seconds, seed=seed)

    def score(m: Measured) -> dict[str, Estimate]:
        return {"aus": aus_estimate(m.metrics, before.metrics, class_wise)} if task.classifies else {}

    before = run(Candidate("untouched", None))
    results: dict[str, Measured] = {}
    untouched = {**before.metrics, **score(before)}
    rows = [Row("untouched", "before", untouched, "the model as it was")]
    for candidate in candidates:
        if candidate.patch is None:
            missing = {k: not_run(candidate.note or "no patch") for k in ("ua", "ra", "ta")}
            rows.append(Row(candidate.name, candidate.role, missing, candidate.note))
            continue
        results[candidate.name] = run(candidate)
    oracle = results.get(reference.name) if reference is not None else None
    for candidate in candidates:
        measured = results.get(candidate.name)
        if measured is not None:
            metrics = {**measured.metrics, **score(measured)}
            if oracle is not None and candidate is not reference:
                metrics["avg_gap"] = gap_estimate(measured.metrics, oracle.metrics)
                metrics |= divergences(measured.outputs, oracle.outputs, seed=seed)
            if candidate.role != "control":
                metrics |= probed(task, request, candidate.patch, probes, seed=seed, progress=progress)
            rows.append(Row(candidate.name, candidate.role, metrics, candidate.note))
    after = results.get(subject.name) if subject is not None else None
    report = Report(
        title=title or f"Forgetting {request.title}",
        request=_request_facts(task, request, split),
        base={"name": model_name or type(task.model).__name__, **_base_facts(task, candidates)},
        rows=rows,
        class_accuracy=_class_accuracy(task, split, {"before": before, "after": after, "reference": oracle}),
        forgotten_classes=_forgotten(task, split),
        confidence=_confidence(before, after) if task.classifies else {},
        history=[_loss_terms(r) for r in subject.history] if subject is not None else [],
        not_shown=[*_limits(class_wise, oracle is not None, len(split["forget"]), rows), *not_shown],
        undo=list(undo),
        versions=current_versions(),
        environment={
            "device": str(task.device),
            "threads": str(torch.get_num_threads()),
            "machine": platform.machine(),
        },
        seeds={"evaluation": seed},
        digests={"request": request.digest, "data": task.data_digest()},
        config=config,
    )
    if subject is not None and subject.patch is not None and after is not None:
        _describe_patch(report, task, subject, subject.patch, after)
        found = warnings_for(
            after.outputs,
            after.metrics,
            before=before.metrics,
            reference=oracle.metrics if oracle is not None else None,
            class_wise=class_wise,
        )
        report.flags = [*found, *_control_flags(before, subject, candidates, results)]
    task.describe(
        report,
        split,
        before.seen,
        after.seen if after is not None else None,
        subject.patch if subject is not None else None,
    )
    if embeddings and isinstance(task, ClassifierTask):
        from expunge.analysis import analysis_section

        report.embeddings = analysis_section(task, split, candidates, seed=seed)
    return report


def _loss_terms(row: Mapping[str, Any]) -> dict[str, Any]:
    """A logged step without what is not a part of the loss."""
    return {k: v for k, v in row.items() if k not in BOOKKEEPING}


def _request_facts(task: Task, request: ForgetRequest, split: Split) -> dict[str, Any]:
    kind = "class" if split.removed else "random" if request.what.kind == "fraction" else "samples"
    named = _forgotten(task, split)
    told = all(name in request.title for name in named)
    return {
        "summary": f"Make the model forget {request.title}" + ("" if told else f" ({', '.join(named)})") + ".",
        "noun": "images",
        "kind": kind,
        "n_forget": len(split["forget"]),
        "n_retain": len(split["retain"]),
        "digest": request.digest,
    }


def _forgotten(task: Task, split: Split) -> list[str]:
    return [task.classes[c] for c in split.removed]


def _base_facts(task: Task, candidates: Sequence[Candidate]) -> dict[str, Any]:
    tensors = named_tensors(task.model)[0].values()
    weights = sum(t.numel() for t in tensors if isinstance(t, torch.nn.Parameter))
    digest = next((c.patch.manifest.base_digest for c in candidates if c.patch is not None), "")
    return {"digest": digest, "parameters": weights}


def _class_accuracy(task: Task, split: Split, models: Mapping[str, Measured | None]) -> dict[str, dict[str, Estimate]]:
    names = task.classes
    found = {}
    for which, measured in models.items():
        if measured is None:
            continue
        shown: dict[str, Estimate] = {}
        drawn = "diffusion" in task.capabilities  # there images asked for what was forgotten are new ones, too
        for role in ("test", "forget" if drawn else "forget_test"):
            if role in measured.outputs:
                shown |= {names[c]: e for c, e in per_class_accuracy(measured.outputs[role]).items()}
        found[which] = {n: shown[n] for n in names if n in shown}
    return found


def _confidence(before: Measured, after: Measured | None) -> dict[str, Histogram]:
    found = {}
    for when, measured in (("before", before), ("after", after)):
        if measured is not None:
            for role in ("forget", "test", "retain"):
                if role in measured.outputs:
                    found[f"{role}_{when}"] = Histogram.of(measured.outputs[role].confidence)
    return found


def _limits(class_wise: bool, has_reference: bool, n_forget: int, rows: Sequence[Row]) -> list[str]:
    limits = ["One run with one seed; intervals cover the sampling of images, not the variation between runs."]
    if not any("relearn_steps" in r.metrics for r in rows):
        limits.insert(0, "Whether a little further training brings the knowledge back (relearning) was not measured.")
    if not has_reference:
        limits.insert(0, "No model retrained without the data was at hand, so 'as if never seen' could not be checked.")
    if class_wise:
        limits.append("The test accuracy leaves the forgotten class out; its test images are a row of their own.")
    if 0 < n_forget < 100:
        limits.append(f"The forget set has only {n_forget} samples; its figures have wide intervals.")
    return limits


def _describe_patch(report: Report, task: Task, subject: Candidate, patch: Patch, after: Measured) -> None:
    base = named_tensors(task.model)[0]
    layers = []
    for name, change in patch.changes.items():
        facts = guards.effect({name: change}, {name: base[name]})
        layers.append(
            {
                "name": name,
                "changed": int(facts["changed"]),
                "total": int(facts["total"]),
                "relative": facts["relative_norm"],
            }
        )
    report.recipe = _flat(patch.manifest.recipe)
    report.patch = {
        "path": "patch.safetensors",
        "bytes": patch.nbytes,
        "digest": patch.digest,
        "weights_changed": after.metrics["weights_changed"].value,
        "layers": layers,
        **({"seconds": subject.seconds} if subject.seconds is not None else {}),
    }
    report.seeds = {"run": patch.manifest.seed, **report.seeds}
    report.digests = {"base": patch.manifest.base_digest, "patch": patch.digest, **report.digests}
    report.not_shown += list(patch.manifest.notes)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, without those that are not set."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            for number, item in enumerate(value):
                found |= _flat(item, f"{prefix}{name}.{number}.")
        elif value not in (None, [], ()):
            found[f"{prefix}{name}"] = value
    return found


def _control_flags(
    before: Measured, subject: Candidate, candidates: Sequence[Candidate], results: Mapping[str, Measured]
) -> list[str]:
    """Sentences where a control explains the effect as well as the method does."""
    flags: list[str] = []
    after = results[subject.name].metrics.get("ua")
    if after is None:  # images that no judge has seen
        return flags
    for c in candidates:
        if c.role != "control" or c.name not in results:
            continue
        ua, start = results[c.name].metrics["ua"], before.metrics["ua"]
        moved = ua.overlaps(start) is False
        if c.name == "lr = 0" and moved:
            flags.append(
                f"The control 'lr = 0' alone moves the forget set's error from {start.value:.1f} % to {ua.value:.1f} "
                "%: normalisation statistics, not learning, explain that part."
            )
        elif c.name != "lr = 0" and moved and ua.overlaps(after) is not False:
            flags.append(f"The control '{c.name}' forgets as much as the method within the intervals.")
    return flags
