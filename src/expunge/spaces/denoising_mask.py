"""SalUn's space for diffusion models: a mask from the noise loss of guided or plain predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from expunge import rng
from expunge.context import Context
from expunge.digest import combine, state_digests, tensor_digest
from expunge.errors import ConfigError
from expunge.objectives.conditioning import diffusion_task
from expunge.part import part
from expunge.registry import Info
from expunge.saliency import Mask, make_mask, saliency_scores
from expunge.spaces.base import OpenSpace, editable
from expunge.spaces.saliency import MaskedSpace, SaliencyMask
from expunge.spaces.unet_set import named, unet_parameters
from expunge.tasks.base import Batch
from expunge.tasks.diffusion import DiffusionTask


class ClippedFirst(MaskedSpace):
    """Clips the gradient of all weights before it is masked, as published: the masked step is then shorter."""

    def __init__(self, parameters: dict[str, nn.Parameter], mask: Mask, clip: float) -> None:
        super().__init__(parameters, mask)
        self._clip = clip
        self.full_norm = float("nan")

    def before_step(self) -> None:
        """Clip, then mask."""
        self.full_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self._clip))
        super().before_step()


@part(
    "denoising_mask",
    Info(
        "Only the weights that a diffusion model's loss on the forget set depends on most may change.",
        paper="Fan et al., SalUn, ICLR 2024, arXiv 2310.12508",
        upstream="OPTML-Group/Unlearn-Saliency",
        commit="a6e89fd",
        needs=("forget", "diffusion"),
        deviations=(
            "conditional predictions instead of guided ones: `guidance`",
            "several draws of times and noise: `passes`",
            "gradients are not clipped per batch (`clip_scores`), and the step is clipped after masking (`clip`)",
        ),
    ),
)
class DenoisingMask(SaliencyMask):
    """``m = 1[S >= gamma]`` with ``S = |grad mean (eps_g(x_t, c) - noise)^2|`` over the forget set.

    Of a pipeline the U-Net is ranked and trained, never the text encoders: a mask over both would be another method.
    A guided prediction is two branches in one pass, so a ``batch_size`` needs the memory of twice as many samples; as
    scores add up over samples, a smaller one gives the same mask.

    Args:
        keep: Fraction of weights that may change.
        targets: Glob patterns on parameter names that take part in the ranking; others do not change.
        parameters: Instead of ``targets``, a named set of a text-to-image U-Net: ``full-weight``, ``x``, ``kv``,
            ``compvis-noxattn`` or another of :data:`expunge.diffusion.parameter_sets.SETS`.
        scope: Rank globally or within each parameter.
        select: ``top``, or the controls ``bottom`` and ``random`` of equal size.
        reduction: See :func:`expunge.saliency.saliency_scores`.
        rounding: See :func:`expunge.saliency.count_ones`.
        freeze: See :class:`~expunge.spaces.saliency.SaliencyMask`.
        residual: Not for diffusion models.
        batch_size: Samples per backward pass.
        file: Use this saved mask instead of computing one.
        guidance: ``g`` of the scored predictions ``eps_null + g (eps_c - eps_null)``; 1 is none. As published 3 for
            CIFAR-10 and 8.5 for Stable Diffusion, whose code counts from 0.
        passes: Draws of a time and noise for each sample.
        clip_scores: Largest norm of a batch's gradient (of sums over pixels) before it is added; 1 as published.
        clip: Largest norm of a step's gradient before masking; 1 as published.
    """

    residual: Literal[False] = False
    parameters: str | None = None
    batch_size: int = Field(default=128, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    passes: int = Field(default=4, ge=1)
    clip_scores: float | None = Field(default=None, gt=0)
    clip: float | None = Field(default=None, gt=0)

    @field_validator("parameters")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                named(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_selection(self) -> DenoisingMask:
        if self.parameters is not None and self.targets != ("*",):
            raise ValueError("'parameters' names a set of the U-Net and 'targets' patterns: give one of them")
        return self

    def selected(self, ctx: Context) -> dict[str, nn.Parameter]:
        """Parameters that are ranked."""
        if self.parameters is None:
            return editable(ctx, self.targets)
        return unet_parameters(ctx.model, diffusion_task(ctx, self.part_name).unet, self.parameters)

    def open(self, ctx: Context) -> OpenSpace:
        """Compute (or load) the mask and open on the selected parameters.

        Raises:
            CapabilityError: No diffusion model.
            RequestError: The selection fits nothing.
        """
        task = diffusion_task(ctx, self.part_name)
        parameters = self.selected(ctx)
        base = combine(state_digests(parameters))
        forget = tensor_digest(ctx.split["forget"])
        if self.file is None:
            scores = self.scores(task.guided(self.guidance), self._batches(ctx), parameters)
            made = make_mask(
                scores, self.keep, scope=self.scope, select=self.select, rule=self.rounding, key=ctx.key("mask")
            )
            mask = replace(made, base=base, forget=forget)
        else:
            mask = Mask.load(self.file, parameters)
            mask.check(base, forget, self.file)
        if self.clip is not None:
            return ClippedFirst(parameters, mask, self.clip)
        return MaskedSpace(parameters, mask, self.freeze)

    def _batches(self, ctx: Context) -> Iterator[Batch]:
        for number in range(self.passes):
            for batch in ctx.batches("forget", self.batch_size):
                yield replace(batch, key=rng.key(batch.key, "mask pass", number))

    def scores(
        self, task: DiffusionTask, batches: Iterator[Batch], parameters: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Absolute values of the gradient accumulated over batches, by parameter."""
        if self.clip_scores is None:
            return saliency_scores(task, batches, parameters, self.reduction)[0]
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for batch in batches:
            _, found = saliency_scores(task, [batch], parameters, "batch_mean_sum")
            pixels = batch.inputs[0].numel()
            norm = pixels * torch.nn.utils.get_total_norm(list(found.values()))
            factor = pixels * min(1.0, self.clip_scores / (float(norm) + 1e-6))
            for name, gradient in found.items():
                total[name].add_(gradient, alpha=factor)
        return {n: g.abs() for n, g in total.items()}
