"""Erased Stable Diffusion: train the prediction for a prompt to be the negatively guided one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge import rng
from expunge.context import Context
from expunge.diffusion import esd as pure
from expunge.diffusion.process import Eps, draw_noise
from expunge.diffusion.teacher import Teacher
from expunge.errors import ConfigError
from expunge.method import method
from expunge.methods._concepts import captions_of, encoded, of_nothing, with_recipe
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.restore import evaluating
from expunge.schedule import Paired, Schedule
from expunge.spaces.unet_set import UNetSet
from expunge.tasks.base import Batch
from expunge.tasks.diffusion import text_task

if TYPE_CHECKING:
    from expunge.tasks.text_to_image import TextToImageTask

_PAPER = "Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345"
_CODE = "rohitgandikota/erasing"

#: Defaults of this method: those of the current public script.
OPTIM = Optim(name="adam", lr=5e-5, weight_decay=0.0, epochs=200, max_steps=200)


@part(
    "esd",
    Info(
        "Train the prediction for the concept's prompts to be the negatively guided one of the original model.",
        paper=_PAPER,
        upstream=_CODE,
        needs=("diffusion", "text"),
        deviations=(
            "the original is the same U-Net with the first values of its trained tensors, not a second one in memory",
            "weights and optimiser state are float32; the current script's bfloat16 rounds small updates away",
            "images have the size that the U-Net was trained for; the current script samples SD 1.4 at 1024 pixels",
            "the text encoder is not trained by this objective, whatever the space",
        ),
    ),
)
class ESD(Objective):
    """``mean |eps(x_t, c_from) - target|^2`` per sample, with a target of the original model's predictions.

    ``target = eps_0(c_from) - eta (eps_0(c) - eps_0(''))`` in the convention ``current``; see
    :mod:`expunge.diffusion.esd` for the others. ``c`` is the prompt of a sample: the concept's prompts in turn for the
    role ``concept``, the caption for images.

    Args:
        schedule: Over ``concept`` (virtual samples, no images are read) or ``forget``.
        x_t: ``sampled``: noise that a model has denoised for a random number of steps, the same for all samples of a
            step. ``images``: noised images of the concept, at uniform times.
        sampler: Who samples: the original model (``teacher``) or the one being trained (``student``).
        convention: First term of the target, and which times are drawn.
        eta: Strength of the negative guidance, in the convention's own counting.
        guidance: Classifier-free guidance while sampling.
        inference_steps: Sampling steps from noise to image.
        prompts: Prompts of the concept instead of the task's; they take turns.
        erase_from: Another prompt whose prediction is trained (``cowboy`` to erase ``cowboy hat`` from). ``{}`` in it
            stands for the sample's own caption: with ``prompts`` that name the concept alone, the rest of a caption
            (its style, its ground) is then kept.
    """

    schedule: Schedule = Paired(streams=("concept",), batch_size=1)
    x_t: Literal["sampled", "images"] = "sampled"
    sampler: Literal["teacher", "student"] = "teacher"
    convention: pure.Convention = "current"
    eta: float = Field(default=2.0, gt=0)
    guidance: float = Field(default=3.0, ge=0)
    inference_steps: int = Field(default=50, ge=3)
    prompts: tuple[str, ...] = ()
    erase_from: str | None = None

    def bind(self, ctx: Context) -> LossFn:
        """Keep the original and return the loss function.

        Raises:
            ConfigError: Settings that do not go together.
            CapabilityError: The task has no text.
        """
        task = text_task(ctx.task, "esd")
        if self.erase_from is not None and self.convention == "paper":
            raise ConfigError("convention 'paper' erases from the concept itself; take 'current' or 'alternative'")
        null = of_nothing(task)
        teacher = Teacher(task.unet, task.eps)

        def student(x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
            with evaluating(task.unet):
                return task.eps(x_t, t, states)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            for role, batch in batches.items():
                if role not in ("concept", "forget"):
                    raise ConfigError(f"esd trains on the roles 'concept' and 'forget'; its schedule reads '{role}'")
                states = self._states(task, batch, null)
                if self.x_t == "sampled":
                    x_t, t = self._sampled(ctx, batch, teacher if self.sampler == "teacher" else student, states)
                else:
                    x_t, t, _ = task.drawn(batch)
                values = pure.losses(task.eps, teacher, x_t, t, states, eta=self.eta, convention=self.convention)
                terms[role] = Term(values, role)
            return terms

        return loss

    def _states(self, task: TextToImageTask, batch: Batch, null: Tensor) -> pure.States:
        concept = encoded(task, captions_of(batch, self.prompts))
        if self.erase_from is None:
            return pure.States(concept, null)
        origin = self.erase_from
        return pure.States(concept, null, encoded(task, [origin.replace("{}", c) for c in captions_of(batch)]))

    def _sampled(self, ctx: Context, batch: Batch, eps: Eps, states: pure.States) -> tuple[Tensor, Tensor]:
        """``x_t`` after a random number of sampling steps, and ``t``; functions of the step and the sample ids."""
        task = text_task(ctx.task, "esd")
        total = self.inference_steps
        key, one = ctx.key("esd sampling steps", ctx.step), torch.zeros(1, dtype=torch.int64)
        drawn = pure.draw_steps(key, one, self.convention, total)
        # The paper counts from the clean end: bin i holds the time at which the last i + 1 of all steps begin.
        steps = total - 1 - int(drawn) if self.convention == "paper" else int(drawn)
        noise = draw_noise(rng.key(batch.key, "esd"), batch.ids, batch.inputs.shape[1:], batch.inputs.dtype)
        x_t, at = pure.denoise(
            eps,
            task.scheduler,
            noise.to(batch.inputs.device),
            states.trained,
            states.null,
            guidance=self.guidance,
            total=total,
            steps=steps,
        )
        if self.convention == "paper":
            at = pure.draw_paper_times(key, one, drawn, total, task.process.steps)[0]
        elif self.convention == "alternative":
            at = torch.tensor(pure.alternative_time(task.scheduler, steps, total))
        return x_t, at.to(x_t.device, torch.int64).expand(len(x_t))


Profile = Literal["diffusers-2024", "diffusers-2024-sdxl", "alternative", "paper"]


@method(
    "esd",
    Info(
        "Train the prediction for the concept's prompts to be the negatively guided one of the original model.",
        paper=_PAPER,
        upstream=_CODE,
        needs=("diffusion", "text"),
        deviations=(
            "one U-Net in memory, float32 weights, images of the size that the U-Net was trained for",
            "`strict` means key and value of cross-attention; a public helper of this name selects nothing",
            "the sampler is the pipeline's; the scripts take PNDM or DDIM as their generation has it",
        ),
        aliases=("erased_stable_diffusion",),
    ),
)
def esd(
    *,
    parameters: str = "x",
    profile: Profile = "diffusers-2024",
    eta: Annotated[float, Field(gt=0)] | None = None,
    convention: Literal["current", "paper", "alternative"] | None = None,
    guidance: Annotated[float, Field(ge=0)] | None = None,
    sampler: Literal["teacher", "student"] | None = None,
    x_t: Literal["sampled", "images"] = "sampled",
    inference_steps: Annotated[int, Field(ge=3)] = 50,
    prompts: tuple[str, ...] = (),
    erase_from: str | None = None,
    batch_size: int = 1,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min |eps(x_t, c) - [eps_0(x_t, c) - eta (eps_0(x_t, c) - eps_0(x_t, ''))]|^2``, ``eps_0`` the original.

    Source: Gandikota et al., equation 7; code ``esd_sd.py``, ``esd_sdxl.py``, ``alt_esd_diffusers.py`` and
    ``train-esd.py``. ``eta`` of the paper is one less than that of the current script for the same target.

    Deviates:
        See the card. ``diffusers-2024``: eta 2, guidance 3, Adam 5e-5, 200 steps, samples of the original model;
        ``diffusers-2024-sdxl``: eta 1, guidance 2, 2e-4; ``alternative``: eta 2 in the paper's counting, 2e-5, samples
        of the model being trained; ``paper``: eta 1, 1e-5, 1000 steps, likewise.

    Args:
        parameters: What is trained: ``x`` (cross-attention; for styles), ``strict`` (its keys and values), ``u``
            (all but cross-attention; for objects and nudity), ``all``, ``selfattn`` or another set of the U-Net.
        profile: Which generation of the code the defaults follow; ``optim`` replaces its rate and steps.
        eta: Strength of the negative guidance, in the convention's own counting.
        convention: First term of the target, and which times are drawn.
        guidance: Classifier-free guidance while sampling.
        sampler: ``teacher`` (the original model) or ``student``.
        x_t: ``sampled``, or noised ``images`` of the concept.
        inference_steps: Sampling steps from noise to image; one training step costs a random share of them.
        prompts: Prompts of the concept instead of the task's.
        erase_from: Another prompt whose prediction is trained; ``{}`` in it stands for the sample's caption.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    published = pure.PRESETS[profile]
    objective = ESD(
        schedule=Paired(streams=("concept",) if x_t == "sampled" else ("forget",), batch_size=batch_size),
        x_t=x_t,
        sampler=sampler or published["sampler"],
        convention=convention or published["convention"],
        eta=published["eta"] if eta is None else eta,
        guidance=published["guidance"] if guidance is None else guidance,
        inference_steps=inference_steps,
        prompts=prompts,
        erase_from=erase_from,
    )
    space = UNetSet(parameters=parameters, sdxl=profile == "diffusers-2024-sdxl")
    trained = with_recipe(optim, OPTIM, lr=published["lr"], max_steps=published["steps"])
    return Recipe(name="esd", objective=objective, space=space, optim=trained)
