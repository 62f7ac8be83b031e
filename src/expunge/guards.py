"""Checks before and after a run, one small function each. None of them repairs anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from expunge.context import Context
from expunge.digest import tensor_digest
from expunge.errors import CapabilityError, ConfigError, DivergedError, InvariantError, NoEffectError, RequestError
from expunge.patch.changes import Change, Replace, accumulate_dtype
from expunge.recipe import Recipe
from expunge.registry import registry
from expunge.restore import bits
from expunge.spaces.base import OpenSpace
from expunge.tasks.base import Split, Task


def check_capabilities(task: Task, split: Split, recipe: Recipe) -> None:
    """Every data role and capability that the recipe needs is there.

    Raises:
        CapabilityError: Something is missing; methods that would work are listed.
    """
    offered = set(split.roles()) | task.capabilities | {"loss", "predict"}
    missing = sorted(recipe.needs() - offered)
    if missing:
        working = [
            e.name for kind in ("objective", "edit") for e in registry.list(kind) if set(e.info.needs) <= offered
        ]
        raise CapabilityError(
            f"{recipe.name} needs {', '.join(missing)}; this {task.name} task offers {', '.join(sorted(offered))}. "
            f"Parts that would work: {', '.join(working)}"
        )


def check_rate(recipe: Recipe) -> None:
    """Refuse a learning rate of 0, which is for controls: after hours of training nothing would have changed.

    Raises:
        NoEffectError: The rate is 0, and no statistics move either.
    """
    if recipe.objective is not None and recipe.optim.lr == 0 and recipe.optim.norm == "frozen":
        raise NoEffectError(
            f"{recipe.name} would change nothing: the learning rate is 0 (a control does that by itself)"
        )


def check_coupled(task: Task, recipe: Recipe, processes: int) -> None:
    """A loss that compares the samples of a batch is not computed piecewise.

    Raises:
        ConfigError: Micro-batches or several processes would change it.
    """
    if not task.couples_samples or recipe.edit is not None:
        return
    if recipe.optim.micro_batch is not None or processes > 1:
        what = "'optim.micro_batch'" if recipe.optim.micro_batch is not None else f"{processes} processes"
        raise ConfigError(
            f"the loss of the {task.name} task compares the samples of a batch, so {what} would change it; use one "
            "process and choose 'batch_size' instead"
        )


def check_finite_model(tensors: Mapping[str, Tensor]) -> None:
    """The base model has no NaN or infinite weight.

    Raises:
        RequestError: Names the first tensor that has.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RequestError(f"the base model's '{name}' has NaN or infinite values; repair the model first")


def check_disjoint(split: Split, recipe: Recipe) -> None:
    """Forget and retain set are disjoint and not empty; a recipe that reads neither may do without both.

    Raises:
        RequestError: They are not.
    """
    forget, retain = split["forget"], split["retain"]
    if not len(forget) and not len(retain) and not {"forget", "retain"} & recipe.needs():
        return
    if not len(forget) or not len(retain):
        drawn = (
            ". A task with prompts alone has none: `expunge generate` draws images of what goes and of what stays, and "
            "`data: {name: captions}` reads them (docs/diffusion.md)"
        )
        raise RequestError(
            f"the forget set has {len(forget)} and the retain set {len(retain)} samples; both are needed"
            f"{drawn if not len(forget) and not len(retain) else ''}"
        )
    both = int(torch.isin(forget, retain).sum())
    if both:
        raise RequestError(f"{both} samples are in both the forget and the retain set")


def roles_read(recipe: Recipe) -> tuple[str, ...]:
    """Data roles that checks may look at too: a method that does without retain or forget images is kept to that."""
    read = set(recipe.needs())
    if "retain" in read or not {"surrogate", "concept"} & read:
        read.add("forget")
    return tuple(r for r in ("forget", "retain", "surrogate", "concept") if r in read)


@torch.no_grad()
def check_label_space(ctx: Context, roles: Sequence[str], limit: int = 512) -> None:
    """A classifier has one output per class, and it knows what it is to forget (else a note says so).

    Raises:
        RequestError: The model's outputs are not the data's classes.
    """
    classes = getattr(ctx.task, "n_classes", None)
    role = next((r for r in roles if len(ctx.split[r])), None)
    if classes is None or role is None:
        return
    batch = ctx.task.load(role, ctx.split[role][:limit], ctx.split)
    logits = ctx.task.predict(batch)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise RequestError(f"the model has {list(logits.shape[1:])} outputs but the data have {classes} classes")
    if role != "forget":
        return
    accuracy = float((logits.argmax(1) == batch.targets).float().mean())
    if accuracy < max(0.1, 1 / classes):
        ctx.note(
            f"forget accuracy is already {100 * accuracy:.0f} % before unlearning; the model may never have learnt it"
        )


def check_outside(
    before: Mapping[str, str], base: Mapping[str, Tensor], now: Mapping[str, Tensor], allowed: set[str]
) -> None:
    """Every tensor outside the space has the bits it had before the run (after rounding to its own precision).

    Raises:
        InvariantError: Names the tensor that moved.
    """
    for name, digest in before.items():
        if name not in allowed and tensor_digest(now[name].detach().to(base[name].dtype)) != digest:
            raise InvariantError(f"'{name}' is outside the chosen space but changed during the run; nothing was saved")


def check_within(changes: Iterable[str], space: OpenSpace) -> None:
    """A one-shot edit changed only what its space names.

    Raises:
        InvariantError: Names the tensor outside.
    """
    allowed = set(space.base) | set(space.parameters)
    outside = [n for n in changes if n not in allowed]
    if outside:
        raise InvariantError(f"the edit changed '{outside[0]}' ({len(outside)} in all), which its space does not name")


def check_masked(space: OpenSpace) -> None:
    """Every masked-out weight has the bits it had before the run.

    Raises:
        InvariantError: Names the tensor and how many of its weights moved.
    """
    for name, parameter in space.parameters.items():
        mask = space.mask(name)
        if mask is None:
            continue
        moved = (bits(parameter) != bits(space.base[name])) & ~mask.to(parameter.device)
        if bool(moved.any()):
            raise InvariantError(f"{int(moved.sum())} masked weights of '{name}' moved; nothing was saved")


def check_put_back(tensors: Mapping[str, Tensor], digests: Mapping[str, str], names: Iterable[str]) -> None:
    """What the run changed has its first bits again.

    Args:
        tensors: Of the model after the run.
        digests: Of the same tensors before it.
        names: Of those that were changed.

    Raises:
        InvariantError: One has other bits, so the model in memory is not the one that was given.
    """
    for name in names:
        if tensor_digest(tensors[name]) != digests[name]:
            raise InvariantError(f"'{name}' was not put back as it was; nothing was saved, load the model again")


def effect(changes: Mapping[str, Change], base: Mapping[str, Tensor]) -> dict[str, float]:
    """How much the changes do after rounding to the weights' own precision.

    Returns:
        ``changed``: weights whose bits differ, ``total``: weights of the model, ``share``, and ``relative_norm``: norm
        of the change over the norm of the changed tensors.
    """
    changed, delta_sq, base_sq = 0, 0.0, 0.0
    for name, change in changes.items():
        old = base[name].detach()
        acc = accumulate_dtype(old.dtype) if old.is_floating_point() else torch.float64
        dense = change.dense().to(old.device, acc)
        delta = dense - old.to(acc) if isinstance(change, Replace) else dense
        new = old.to(acc) + delta
        changed += int((new.to(old.dtype) != old).sum())
        delta_sq += float(delta.double().pow(2).sum())
        base_sq += float(old.double().pow(2).sum())
    total = sum(t.numel() for t in base.values())
    return {
        "changed": float(changed),
        "total": float(total),
        "share": changed / max(total, 1),
        "relative_norm": (delta_sq / base_sq) ** 0.5 if base_sq else 0.0,
    }


def check_effect(changes: Mapping[str, Change], base: Mapping[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """The run changed the model as it will be used.

    Raises:
        NoEffectError: Nothing changed, with the likely cause.
    """
    facts = effect(changes, base)
    if facts["changed"] == 0:
        if changes:
            cause = "every change is smaller than the weights' precision can hold; raise the learning rate or use "
            cause += "fp32 weights"
        else:
            cause = "no gradient reached the chosen space (everything frozen, or a loss that does not depend on it)"
        raise NoEffectError(f"{recipe.name} changed nothing: {cause}")
    return facts


@torch.no_grad()
def check_outputs(ctx: Context, roles: Sequence[str], samples: int) -> None:
    """The model's outputs are finite; weights can be finite and overflow all the same.

    Raises:
        DivergedError: They are not.
    """
    role = next(r for r in ("retain", "surrogate", "forget", "concept") if r in roles)
    ctx.model.eval()
    outputs = ctx.task.predict(ctx.task.load(role, ctx.split[role][:samples], ctx.split))
    if not bool(torch.isfinite(outputs).all()):
        raise DivergedError(
            f"after step {ctx.step} the weights are finite but the outputs on the {role} set are not. Use a smaller "
            "learning rate or fewer steps; the model is left as it was"
        )


def check_device(name: str) -> None:
    """Refuse a device that is not there, before anything is loaded.

    Raises:
        ConfigError: Its name is none of torch's, or this machine has no such device.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(f"device {name!r} is not available here ({reason}); take another, such as cpu") from None
