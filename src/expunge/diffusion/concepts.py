"""Several concepts: a patch for each, any subset of them at work, what they do to one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.diffusion.at_once import Weights, train_at_once
from expunge.diffusion.concept_plan import ConceptPlan, Wordings, plan_concepts, rooms
from expunge.diffusion.merge import Effect, effects, reproject
from expunge.diffusion.nullspace import TOLERANCE, component
from expunge.diffusion.selection import KEY, VALUE
from expunge.diffusion.shift import invariance
from expunge.digest import named_tensors
from expunge.errors import ArtifactError, ConfigError, RequestError, did_you_mean
from expunge.patch import Patch, apply, revert
from expunge.patch.apply import applied, materialise
from expunge.patch.changes import Change
from expunge.patch.low_rank import compress
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import PATCH, RUN, is_main_process, unlearn
from expunge.spaces.concept_shift import FINDINGS, states_of
from expunge.tasks.text_to_image import TextToImageTask

#: Where the effects of concepts on one another, and of all of them together, stand in a patch's findings.
EFFECTS, TOGETHER = "effects", "together"


def erase_concepts(
    task: TextToImageTask,
    concepts: Sequence[str | ForgetRequest],
    recipe: Recipe,
    *,
    earlier: Mapping[str, Patch] | None = None,
    wordings: Wordings = "all",
    at_once: bool = False,
    weights: Weights = "balanced",
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool = False,
) -> dict[str, Patch]:
    """Erase concepts, each into a patch of its own: one after the other, or in one run.

    Every shift protects the prompts of all other concepts and starts at the untouched model, so that no shift has a
    gradient on another's concept, and any subset can be at work: apply the patches in any order, take any of them off.
    Source: SRS-ME, arXiv 2402.05947, section 4.2.

    Training at once takes the memory of training one, and with ``equal`` weights gives what separate runs give. It
    makes a difference where concepts do not protect one another entirely (``wordings``, ``others_tolerance``): each is
    then trained in the presence of the others.

    Earlier patches are not made anew: they do not protect what came later. The findings of the patches say how much
    they change it; :func:`protect_later` makes up for it.

    Args:
        task: The pipeline, without any patch.
        concepts: What to erase, in words or as requests.
        recipe: How to erase each of them, in the space ``concept_shift``.
        earlier: Patches of concepts that were erased before, by name; new ones protect them.
        wordings: Protect all prompts of the other concepts, or the first of each.
        at_once: All in one run, whose every step grades concept after concept.
        weights: Of the concepts in such a run: ``balanced`` as in the paper, or ``equal``.
        seed: Seed of the runs.
        run_dir: Folder of the runs, one below it for each concept.
        checkpoint_every: Steps between checkpoints; by default at every epoch's end.
        progress: Show progress bars.

    Returns:
        Patches by concept, in the order given.

    Raises:
        ConfigError: A recipe of another kind, or a model with patches.
        RequestError: A concept is named twice, or more are protected than fit.
    """
    plan = plan_concepts(task, concepts, recipe, earlier=earlier, wordings=wordings)
    folders = _folders(plan, run_dir, at_once)
    rooms(task, plan)
    patches: dict[str, Patch]
    if at_once:
        top = None if run_dir is None else Path(run_dir)
        patches = train_at_once(
            task,
            plan.requests,
            plan.recipes,
            weights=weights,
            seed=seed,
            run_dir=top,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
    else:
        patches = {
            name: unlearn(
                task,
                request,
                plan.recipes[name],
                seed=seed,
                run_dir=folders.get(name),
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
            for name, request in plan.requests.items()
        }
    report = _report(task, plan.earlier, patches, plan.prompts, plan.always)
    for name, patch in patches.items():
        patches[name] = _with_findings(patch, report(name))
        if name in folders and is_main_process():
            folders[name].mkdir(parents=True, exist_ok=True)
            patches[name].save(folders[name] / PATCH)
    return patches


def folder_of(concept: str) -> str:
    """Name of a concept's folder within that of several.

    >>> folder_of("Van Gogh")
    'Van_Gogh'
    """
    return re.sub(r"[^\w-]+", "_", concept)


def _folders(plan: ConceptPlan, run_dir: str | Path | None, at_once: bool) -> dict[str, Path]:
    """A folder for each concept.

    Raises:
        ConfigError: Two concepts would share one, or runs of the other kind are there.
    """
    if run_dir is None:
        return {}
    top = Path(run_dir)
    found = {n: top / folder_of(n) for n in plan.requests}
    if len(set(found.values())) < len(found):
        raise ConfigError(f"two of the concepts {', '.join(found)} have the same folder name; run them apart")
    if not at_once and (top / RUN).exists():
        raise ConfigError(f"{top} holds a run of several concepts at once; choose another folder or remove it")
    separate = next((f for f in found.values() if (f / RUN).exists()), None)
    if at_once and separate is not None:
        raise ConfigError(f"{separate} holds a run of its own; choose another folder for a run at once, or remove it")
    return found


def _report(
    task: TextToImageTask,
    before: Mapping[str, Patch],
    new: Mapping[str, Patch],
    prompts: Mapping[str, Sequence[str]],
    always: Sequence[str],
) -> Callable[[str], dict[str, Any]]:
    """Findings of a concept's patch, by its name."""
    patches = {**before, **new}
    between = [replace(e, later=e.erased in before and e.on in new) for e in effects_between(task, patches, prompts)]
    names = sorted({n for p in patches.values() for n in p})
    tensors = named_tensors(task.model)[0]
    base = {n: tensors[n].detach() for n in names}
    merged = {n: materialise(n, base[n], list(patches.values())) for n in names}
    moved = invariance(base, merged, dict(zip(always, states_of(task, always), strict=True)))
    prompt, worst = max(moved.items(), key=lambda item: item[1].relative)
    together = {
        "concepts": list(patches),
        "dtype": str(base[names[0]].dtype).removeprefix("torch."),
        "moves_protected": {"relative": worst.relative, "prompt": prompt, "tensor": worst.tensor},
    }

    def of(name: str) -> dict[str, Any]:
        own = [e for e in between if name in (e.erased, e.on)]
        return {EFFECTS: [{**vars(e), "protected": e.protected, "text": str(e)} for e in own], TOGETHER: together}

    return of


def _with_findings(patch: Patch, findings: dict[str, Any]) -> Patch:
    manifest = patch.manifest
    return replace(patch, manifest=manifest.model_copy(update={"findings": {**manifest.findings, **findings}}))


def effects_between(
    task: TextToImageTask,
    patches: Mapping[str, Patch],
    prompts: Mapping[str, Sequence[str]] | None = None,
) -> list[Effect]:
    """What erasing each concept does to keys and values of the others.

    Args:
        task: The pipeline that the patches were made on, without them.
        patches: By concept, in the order in which they were added.
        prompts: Of each concept, and of whatever else is looked at; by default those of the patches' requests.
    """
    if prompts is None:
        requests = {n: ForgetRequest(**p.manifest.request) for n, p in patches.items()}
        prompts = {n: task.concept_prompts(task.split(r)) for n, r in requests.items()}
    tensors = named_tensors(task.model)[0]
    shifts = {n: {t: c.dense() for t, c in p.changes.items()} for n, p in patches.items()}
    base = {t: tensors[t].detach().cpu() for s in shifts.values() for t in s}
    states = {n: states_of(task, p).cpu() for n, p in prompts.items()}
    return effects(base, shifts, states)


def activate(model: nn.Module, patches: Mapping[str, Patch], concepts: Collection[str]) -> nn.Module:
    """Put exactly these concepts' patches on a model, and take the others of ``patches`` off; foreign patches stay.

    Whatever was on before and in whatever order, the weights are the same bits: changes are summed anew from the base
    in the order of the patches' digests.

    Args:
        model: The model that the patches were made on.
        patches: By concept.
        concepts: Which are to be erased; none of them gives the original back, bit for bit.

    Raises:
        RequestError: There is no patch of a concept.
        ArtifactError: The patches do not belong to this model.
    """
    for concept in concepts:
        if concept not in patches:
            raise RequestError(f"no patch of {concept!r}{did_you_mean(concept, patches)}")
    wanted = {patches[c].digest: patches[c] for c in concepts}
    known = {p.digest for p in patches.values()}
    present = {p.digest: p for p in applied(model)}
    off = [p for d, p in present.items() if d in known and d not in wanted]
    if off:
        revert(model, *off)
    new = [p for d, p in wanted.items() if d not in present]
    return apply(model, *new) if new else model


def protect_later(task: TextToImageTask, patch: Patch, prompts: Sequence[str]) -> Patch:
    """An earlier concept's patch that also leaves prompts alone that were not known then.

    ``dW (I - U^T U)`` with ``U`` the new prompts' part of the directions that the change uses: what it protected stays
    protected. The erasure gets weaker where both share directions, so measure it again.

    Args:
        task: The pipeline that the patch was made on.
        patch: Of keys and values, made by ``srs_me``.
        prompts: To protect from now on.

    Returns:
        A new patch, with the old one as parent.

    Raises:
        ArtifactError: The patch changes other tensors too.
        RequestError: The change does not reach the prompts, or nothing of it would be left.
    """
    odd = next((n for n in patch if not n.removesuffix(".weight").endswith((KEY, VALUE))), None)
    if odd is not None:
        raise ArtifactError(f"the patch changes '{odd}', which is no key or value matrix of cross-attention")
    deltas = {n: c.dense() for n, c in patch.changes.items()}
    new = component(_row_space(deltas.values()), states_of(task, prompts).cpu())
    changes = dict(_compressed(reproject(deltas, new), patch))
    if not changes:
        raise RequestError("nothing of the change is left: it acts in the new prompts' directions only")
    findings = dict(patch.manifest.findings)
    if FINDINGS in findings:
        known = findings[FINDINGS]
        findings[FINDINGS] = {**known, "protected": [*known["protected"], *prompts], "reprojected": True}
    update = {"findings": findings, "metrics": {}, "parents": (*patch.manifest.parents, patch.digest)}
    return Patch(changes, patch.manifest.model_copy(update=update))


def _row_space(deltas: Iterable[Tensor]) -> Tensor:
    """Orthonormal basis ``[r, d]`` of the rows of matrices, float64."""
    gram = torch.stack([d.double().T @ d.double() for d in deltas]).sum(0)
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, values > TOLERANCE**2 * values[-1]].T.contiguous()


def _compressed(deltas: Mapping[str, Tensor], patch: Patch) -> Iterator[tuple[str, Change]]:
    """Changes without what is rounding of the old ones."""
    for name, delta in deltas.items():
        if delta.norm() > 1e-6 * patch[name].dense().double().norm():
            change = compress(delta.float())
            if change is not None:
                yield name, change
