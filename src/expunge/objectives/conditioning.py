"""Objectives for any diffusion model: what the prediction for a condition shall be instead of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.diffusion import esd
from expunge.diffusion.process import Eps
from expunge.diffusion.teacher import Teacher
from expunge.errors import CapabilityError, ConfigError, RequestError, did_you_mean
from expunge.objectives.base import LossFn, Objective, Term
from expunge.objectives.cross_entropy import remaining_labels
from expunge.part import part
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import Paired, Schedule
from expunge.tasks.base import Batch
from expunge.tasks.concepts import named_count
from expunge.tasks.diffusion import DiffusionTask

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

Reference = Literal["current", "frozen"]
_SALUN = "Fan et al., SalUn, ICLR 2024, arXiv 2310.12508"
_BARRIER = "Miksa et al., BARRIER, arXiv 2605.15737"


def diffusion_task(ctx: Context, who: str) -> DiffusionTask:
    """The task of a context as one whose model predicts noise.

    Raises:
        CapabilityError: It is of another family.
    """
    if not isinstance(ctx.task, DiffusionTask):
        raise CapabilityError(f"{who} needs a diffusion model, not the {ctx.task.name} task")
    return ctx.task


def predictor(task: DiffusionTask, reference: Reference) -> Eps:
    """Predicts noise without gradients and in eval mode, with the weights as they stand or as they were."""
    if reference == "frozen":
        return Teacher(task.unet, task.eps)

    def current(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        with evaluating(task.unet):
            return task.eps(x_t, t, condition)

    return current


class _OnForget(Objective):
    """A loss of forget samples, and the denoising loss of retain samples beside it."""

    schedule: Schedule = Paired()
    alpha: float = Field(default=1.0, ge=0)

    def _with_retain(
        self, task: DiffusionTask, forget: Callable[[Batch], Tensor]
    ) -> Callable[[dict[str, Batch]], dict[str, Term]]:
        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                if role == "forget":
                    terms[role] = Term(forget(batch), role)
                elif role == "retain":
                    if self.alpha:
                        terms[role] = Term(task.loss(batch), role, self.alpha)
                else:
                    raise ConfigError(
                        f"{self.part_name} reads forget and retain samples, not the role '{role}'; choose the mixing "
                        "paired, sequential or forget_only"
                    )
            return terms

        return loss


@part(
    "pseudo_label",
    Info(
        "Train the prediction for the forget samples' condition to be the one for another class or prompt.",
        paper=f"{_SALUN}; {_BARRIER}",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
        needs=("forget", "diffusion"),
        deviations=(
            "another class at random per sample and epoch instead of the next one: `pseudo`",
            "one latent per image (the mean of the autoencoder's posterior); the code draws one for each prediction",
        ),
    ),
)
class PseudoLabel(_OnForget):
    """``mean (eps(x_t, c) - sg eps(x_t, c'))^2 + alpha * mean loss(retain)``, both predictions at the same ``x_t``.

    Args:
        schedule: ``paired``, ``sequential``, or ``single`` over ``forget``.
        pseudo: What ``c'`` is. ``class``: the same caption (or class) with another class at random, per sample and
            epoch, none that the request removes. ``next``: the class after the own one, as published, or the first one
            after it that stays. ``retain``: the caption of a retain image at random. Prompts: these in turn, by sample
            id. Prompts by name of class (hypernyms: ``{tench: a photo of a fish}``): that of the sample's class. By
            default ``class``, and ``retain`` for a concept in words, whose captions would keep it, or where no other
            class has a name.
        reference: Whose prediction the goal is: the ``current`` weights', or the ``frozen`` original's.
        alpha: Weight of the retain loss; 0 reads no retain sample's loss.
    """

    pseudo: Literal["class", "next", "retain"] | tuple[str, ...] | dict[str, str] | None = None
    reference: Reference = "current"

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function.

        Raises:
            CapabilityError: No diffusion model, or prompts for one without text.
            RequestError: ``pseudo`` does not fit the request or the classes.
        """
        task = diffusion_task(ctx, self.part_name)
        other, predict = self._conditions(ctx, task), predictor(task, self.reference)

        def forget(batch: Batch) -> Tensor:
            x_t, t, _ = task.drawn(batch)
            with torch.no_grad():
                condition = other(batch)
            goal = predict(x_t, t, condition)
            return (task.eps(x_t, t, task.condition(batch)) - goal).square().flatten(1).mean(1)

        return self._with_retain(task, forget)

    def _conditions(self, ctx: Context, task: DiffusionTask) -> Callable[[Batch], Any]:
        chosen = self.pseudo
        if chosen is None:
            chosen = "retain" if ctx.split.concept or _no_other(ctx, task) else "class"
        if chosen in ("class", "next"):
            if ctx.split.concept:
                raise RequestError(
                    f"pseudo '{chosen}' exchanges the names of classes, and '{ctx.split.concept}' is none: choose "
                    "'retain' or prompts"
                )
            if _no_other(ctx, task):
                raise RequestError(f"pseudo '{chosen}': no other class has a name; choose 'retain' or prompts")
            following = chosen == "next"
            return lambda batch: task.condition(batch, self._labels(ctx, task, batch, following))
        if "text" not in task.capabilities:
            raise CapabilityError(f"pseudo prompts need a text-to-image model; for the {task.name} task take 'class'")
        prompts = cast("TextToImageTask", task)
        if chosen == "retain":
            return lambda batch: prompts.conditions(_retained(ctx, prompts, batch))
        if isinstance(chosen, Mapping):
            names = _by_class(ctx, prompts, chosen)
            return lambda batch: prompts.conditions([names[c] for c in batch.targets.tolist()])
        if not chosen:
            raise RequestError("'pseudo' holds no prompt")
        return lambda batch: prompts.conditions([chosen[i % len(chosen)] for i in batch.ids.tolist()])

    def _labels(self, ctx: Context, task: DiffusionTask, batch: Batch, following: bool) -> Tensor:
        if not following:
            return remaining_labels(ctx, batch, ctx.key("wrong target", ctx.epoch))
        count, gone = named_count(task.classes), set(ctx.split.removed)
        after = [
            next((c + i) % count for i in range(1, count + 1) if (c + i) % count not in gone) for c in range(count)
        ]
        return torch.tensor([after[c] if 0 <= c < count else 0 for c in batch.targets.tolist()]).to(batch.targets)


def _no_other(ctx: Context, task: DiffusionTask) -> bool:
    """Whether no class with a name would be left to draw."""
    return "text" in task.capabilities and not set(range(named_count(task.classes))) - set(ctx.split.removed)


def _retained(ctx: Context, task: TextToImageTask, batch: Batch) -> list[str]:
    """Captions of retain images at random, a function of the epoch and the sample ids."""
    ids = ctx.split["retain"]
    drawn = rng.randint(ctx.key("pseudo caption", ctx.epoch), batch.ids, len(ids))
    return task.captions("retain", ids[drawn])


def _by_class(ctx: Context, task: TextToImageTask, given: Mapping[str, str]) -> dict[int, str]:
    numbers = {name: i for i, name in enumerate(task.classes)}
    unknown = [n for n in given if n not in numbers]
    if unknown:
        raise RequestError(f"'pseudo' names no class: {unknown[0]!r}{did_you_mean(unknown[0], numbers)}")
    labels = task.images_of("forget").labels[ctx.split["forget"]].unique().tolist()
    missing = [task.classes[c] for c in labels if task.classes[c] not in given]
    if missing:
        raise RequestError(f"'pseudo' has no prompt for: {', '.join(missing)}")
    return {numbers[n]: prompt for n, prompt in given.items()}


@part(
    "denoising_esd",
    Info(
        "Train the prediction for the forget samples' condition to be the one guided away from it.",
        paper=f"Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345; {_BARRIER}",
        upstream="rohitgandikota/erasing",
        needs=("forget", "diffusion"),
        deviations=(
            "noised forget images instead of partially denoised samples of the model, for which there is `esd`",
            "a noise loss on retain samples beside it: `alpha`",
        ),
        aliases=("class_esd",),
    ),
)
class DenoisingEsd(_OnForget):
    """``mean (eps(x_t, c) - target)^2 + alpha * mean loss(retain)``.

    The target is ``eps_null - eta (eps_c - eps_null)`` in the paper's convention; with ``eta = 0`` the condition is
    taught to say nothing (BARRIER's ``esd``). See :mod:`expunge.diffusion.esd`.

    Args:
        schedule: ``paired``, ``sequential``, or ``single`` over ``forget``.
        eta: Strength of the negative guidance.
        convention: How ``eta`` counts.
        reference: Whose predictions make the target: the ``frozen`` original's, or the ``current`` weights'.
        alpha: Weight of the retain loss.
    """

    eta: float = Field(default=1.0, ge=0)
    convention: esd.Convention = "paper"
    reference: Reference = "frozen"

    def bind(self, ctx: Context) -> LossFn:
        """Remember the original and return the loss function."""
        task = diffusion_task(ctx, self.part_name)
        predict = predictor(task, self.reference)

        def forget(batch: Batch) -> Tensor:
            x_t, t, _ = task.drawn(batch)
            own = task.condition(batch)
            with torch.no_grad():
                both = torch.cat([own, task.unconditional(len(own)).to(own)])
                given, without = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
                goal = esd.target(given, without, self.eta, convention=self.convention)
            return (task.eps(x_t, t, own) - goal).square().flatten(1).mean(1)

        return self._with_retain(task, forget)
