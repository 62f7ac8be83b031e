"""``unlearn``: preflight, work, invariants, patch. And the run folder that makes it resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import checkpoint, guards, rng
from expunge.context import Context
from expunge.digest import combine, json_digest, named_tensors, state_digests
from expunge.errors import ArtifactError, ConfigError, NoEffectError, ResourceError
from expunge.files import atomic_write, sha256_file
from expunge.loop import Loop, OnStep, Saving, make_accelerator
from expunge.patch import Manifest, Patch, Replace
from expunge.patch.apply import applied
from expunge.patch.apply import apply as apply_patch
from expunge.patch.changes import Change
from expunge.patch.patch import current_versions
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.restore import as_found, freeze_norm_statistics
from expunge.tasks.base import Split, Task
from expunge.track import Tracker, TrackerName

PATCH, RUN, LOG, CHECKPOINT, LOCK = "patch.safetensors", "run.json", "log.jsonl", "checkpoint.safetensors", ".lock"


def unlearn(
    task: Task,
    request: ForgetRequest,
    recipe: Recipe,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    trackers: Sequence[TrackerName] = (),
    progress: bool = False,
    inplace: bool = False,
    allow_no_effect: bool = False,
    on_step: OnStep | None = None,
) -> Patch:
    """Make a model forget and return the change as a patch.

    The model is left exactly as found unless ``inplace``. Every draw derives from ``seed``; on one machine and one set
    of versions the patch is reproducible bit for bit on the CPU.

    Args:
        task: Model and data.
        request: What to forget.
        recipe: How.
        seed: Seed of the run.
        run_dir: Folder for ``run.json``, ``log.jsonl``, ``checkpoint.safetensors`` and ``patch.safetensors``. A killed
            run with the same settings resumes there; a finished one returns its patch.
        checkpoint_every: Steps between checkpoints; by default at every epoch's end.
        trackers: ``tensorboard``, ``wandb``.
        progress: Show a progress bar.
        inplace: Apply the patch to the model before returning.
        allow_no_effect: Return an empty patch instead of failing when nothing changed (the lr = 0 control).
        on_step: Called after every step with the number of steps taken, the model and the optimiser.

    Returns:
        The patch; its manifest holds the base digest, request, recipe, seed, versions and remarks.

    Raises:
        RequestError: The request does not fit the data, or a selector matches nothing.
        CapabilityError: The recipe needs what the task lacks.
        DivergedError: A loss, gradient or weight became NaN or infinite.
        NoEffectError: Nothing changed.
        InvariantError: A weight outside the space moved.
        ConfigError: The run folder belongs to a run with other settings.
    """
    if inplace and applied(task.model):
        raise ConfigError(
            "the model carries applied patches; `revert` them, or make them permanent with `settle`, first"
        )
    split = task.split(request)
    guards.check_disjoint(split, recipe)
    patch = execute(
        task,
        split,
        request,
        recipe,
        seed=seed,
        run_dir=run_dir,
        checkpoint_every=checkpoint_every,
        trackers=trackers,
        progress=progress,
        allow_no_effect=allow_no_effect,
        on_step=on_step,
    )
    if inplace:
        apply_patch(task.model, patch)
    return patch


def execute(
    task: Task,
    split: Split,
    request: ForgetRequest,
    recipe: Recipe,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    trackers: Sequence[TrackerName] = (),
    progress: bool = False,
    allow_no_effect: bool = False,
    on_step: OnStep | None = None,
) -> Patch:
    """Carry out a recipe on index sets that are already resolved; :func:`unlearn` is the front door."""
    guards.check_capabilities(task, split, recipe)
    guards.check_coupled(task, recipe, int(os.environ.get("WORLD_SIZE", "1")))
    tensors, aliases = named_tensors(task.model)
    guards.check_finite_model(tensors)
    digests = state_digests(tensors)
    identity = _identity(task, request, recipe, seed, digests)
    folder = Path(run_dir) if run_dir is not None else None
    with run_folder(folder, identity) as finished:
        if finished is not None:
            patch = finished
            if not len(patch) and not allow_no_effect:
                raise NoEffectError(f"{folder} holds a finished run that changed nothing")
        else:
            if not allow_no_effect:
                guards.check_rate(recipe)
            ctx = Context(task, split, seed, augment=recipe.optim.augment, progress=progress)
            ctx.notes.extend(split.notes)
            saving = Saving(folder / CHECKPOINT if folder else None, checkpoint_every, json_digest(identity))
            with as_found(task.model) as base, _tracker(folder, trackers, identity, progress) as tracker:
                changes = _work(ctx, recipe, base, digests, saving, tracker, on_step)
            guards.check_put_back(tensors, digests, changes)
            if not allow_no_effect:
                facts = guards.check_effect(changes, base, recipe)
                if facts["share"] < 1e-6:
                    ctx.note(f"only {int(facts['changed'])} weights changed")
            patch = _patch(changes, ctx, request, recipe, digests, aliases)
            if folder is not None and is_main_process():
                patch.save(folder / PATCH)
                (folder / CHECKPOINT).unlink(missing_ok=True)
            wait_for_everyone()
    return patch


def _tracker(folder: Path | None, trackers: Sequence[TrackerName], identity: dict[str, Any], progress: bool) -> Tracker:
    return Tracker(folder, trackers, identity, progress, read_only=not is_main_process())


def wait_for_everyone() -> None:
    """Let all processes of a distributed run meet, so that none reads what the first has not written yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _work(
    ctx: Context,
    recipe: Recipe,
    base: dict[str, Tensor],
    digests: dict[str, str],
    saving: Saving,
    tracker: Tracker,
    on_step: OnStep | None,
) -> dict[str, Change]:
    model = ctx.model
    rng.seed_everything(ctx.seed)
    accelerator = make_accelerator(recipe.optim.precision)
    if accelerator.device.type != "cpu":
        model.to(accelerator.device)
    mixed = make_masters(ctx, recipe)
    beside = accelerator.autocast if mixed else nullcontext  # what runs the model outside the steps
    buffers = {n: t for n, t in named_tensors(model)[0].items() if not isinstance(t, torch.nn.Parameter)}
    model.eval()
    roles = guards.roles_read(recipe)
    if not recipe.from_scratch:
        guards.check_label_space(ctx, roles)
    space = recipe.space.open(ctx)
    try:
        if recipe.edit is not None:
            changes = recipe.edit.compute(ctx, space)
            guards.check_within(changes, space)
            return changes
        assert recipe.objective is not None
        with beside():
            recipe.objective.prepare(ctx)
        resume = saving.path is not None and saving.path.exists()
        if resume and saving.path is not None:  # long preparations of the killed run are not repeated
            ctx.state.update(checkpoint.objective_state(saving.path, saving.identity))
        with beside():
            losses = recipe.objective.bind(ctx)
        penalties = [p.bind(ctx, space) for p in recipe.protections]
        chosen = {id(p) for p in space.parameters.values()}
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
        model.train()
        if recipe.optim.norm == "frozen":
            freeze_norm_statistics(model)
        saving.buffers = buffers
        if recipe.from_scratch:
            reinitialise(model, ctx.key("init"))
        rng.seed_everything(ctx.seed)
        loop = Loop(
            ctx, recipe.objective, recipe.optim, space, losses, penalties, tracker, saving, accelerator, on_step, beside
        )
        loop.run(resume=resume)
        guards.check_masked(space)
        with beside():
            guards.check_outputs(ctx, roles, min(64, loop.at_once) or 1)  # what fitted in a step fits here
        changes = space.changes()
    finally:
        space.close()
    changes |= _buffer_changes(buffers, base)
    free = set(buffers) if recipe.optim.norm == "train" else set()
    guards.check_outside(digests, base, named_tensors(model)[0], set(space.parameters) | free)
    return changes


def make_masters(ctx: Context, recipe: Recipe) -> bool:
    """Put weights that are stored in half precision into float32, where small steps do not vanish.

    All of them; or, where the task knows that the results are the same, those that the space asks for.

    Returns:
        Whether some stay in half precision; the model then runs under autocast only.
    """
    tensors = named_tensors(ctx.model)[0].values()
    half = [t for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    wanted = None if recipe.full_precision or not half else recipe.space.masters(ctx)
    masters = None if wanted is None else ctx.task.masters(wanted.values())
    stay = set() if masters is None else {id(p) for p in ctx.model.parameters()} - {id(p) for p in masters}
    for tensor in half:
        if id(tensor) not in stay:
            tensor.data = tensor.data.float()
    return any(id(t) in stay for t in half)


def _buffer_changes(buffers: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Change]:
    return {
        n: Replace(b.detach().to("cpu", base[n].dtype).clone())
        for n, b in buffers.items()
        if not torch.equal(b.detach().to(base[n]), base[n])
    }


def reinitialise(model: torch.nn.Module, key: int) -> None:
    """Draw fresh weights with every layer's own ``reset_parameters``.

    Raises:
        ConfigError: A layer with weights of its own offers no such method.
    """
    rng.seed_everything(key % 2**32)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(isinstance(t, torch.nn.Parameter) for t in own):
            raise ConfigError(
                f"'{name}' ({type(module).__name__}) cannot be re-initialised; build a fresh model instead"
            )


def _patch(
    changes: dict[str, Change],
    ctx: Context,
    request: ForgetRequest,
    recipe: Recipe,
    digests: dict[str, str],
    aliases: dict[str, tuple[str, ...]],
) -> Patch:
    manifest = Manifest(
        base_digest=combine(digests),
        base_tensors=digests,
        aliases=aliases,
        request=request.model_dump(mode="json"),
        request_digest=request.digest,
        recipe=recipe.describe(),
        seed=ctx.seed,
        versions=current_versions(),
        notes=tuple(ctx.notes),
        findings=ctx.findings,
    )
    return Patch(changes, manifest)


def _identity(task: Task, request: ForgetRequest, recipe: Recipe, seed: int, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "recipe": recipe.describe(),
        "request": request.model_dump(mode="json"),
        "seed": seed,
        "base": combine(digests),
        "data": task.data_digest(),
        "files": {path: sha256_file(path) for path in _files(recipe.describe()) if Path(path).is_file()},
    }


def _files(settings: Any) -> list[str]:
    """Files that a recipe reads (see the keys): their content belongs to the run's identity."""
    if isinstance(settings, dict):
        keys = ("file", "statistics", "captions", "exclude_similar_to")
        own = [settings[k] for k in keys if isinstance(settings.get(k), str)]
        return own + [f for v in settings.values() for f in _files(v)]
    return [f for v in settings for f in _files(v)] if isinstance(settings, list) else []


def is_main_process() -> bool:
    """Whether this process writes the run folder: rank 0 of a distributed run, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def run_folder(folder: Path | None, identity: dict[str, Any]) -> Iterator[Patch | None]:
    """Lock a run folder, check that it belongs to this run, and yield the patch if the run is finished.

    Raises:
        ResourceError: Another live process uses the folder.
        ConfigError: The folder belongs to a run with other settings; the differing keys are named.
    """
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / LOCK):
        known = folder / RUN
        if known.exists():
            differing = differences(_read_identity(known), identity)
            if differing:
                raise ConfigError(
                    f"{folder} holds a run with other settings: {'; '.join(differing[:5])}. Choose another folder "
                    "or remove it"
                )
        elif is_main_process():
            atomic_write(known, json.dumps({"identity": identity, "versions": current_versions()}, indent=2))
        done = folder / PATCH
        try:
            yield Patch.load(done) if done.exists() else None
        except Exception:
            if is_main_process() and not _begun(folder):  # nothing is lost when the corrected run takes the folder
                known.unlink(missing_ok=True)
            raise


def _begun(folder: Path) -> bool:
    """Whether a run left anything that another one must not take for its own."""
    log = folder / LOG
    return any((folder / n).exists() for n in (CHECKPOINT, PATCH)) or (log.exists() and log.stat().st_size > 0)


def _read_identity(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not the record of a run ({error}); remove the folder or choose another") from None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the folder; the other processes of a distributed run share the first one's lock."""
    if not is_main_process():
        yield
        return
    import fcntl

    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise ResourceError(f"{path.parent} is in use by process {handle.read().strip() or 'unknown'}") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        for stale in path.parent.glob(".*.tmp"):  # a process was killed while writing
            stale.unlink()
        yield


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted keys at which two JSON values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    short = [json.dumps(v)[:60] for v in (old, new)]
    return [] if json.dumps(old) == json.dumps(new) else [f"{where}: {short[0]} there, {short[1]} here"]
