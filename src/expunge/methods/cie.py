"""CiE: concept-irrelevant erasure of all cross-attention weights. Nothing is protected; the change cannot be split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from expunge.context import Context
from expunge.diffusion.correlation import GradientSum
from expunge.diffusion.selection import cross_attention
from expunge.method import method
from expunge.methods._common import Profile
from expunge.objectives.concept_correlation import ConceptCorrelation
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Paired
from expunge.spaces.base import DirectSpace, OpenSpace, Space
from expunge.spaces.concept_shift import CODE, COMMIT, PAPER, prefix_of
from expunge.tasks.diffusion import text_task

#: Rate of the paper; the code's default is 1e-6.
OPTIM = Optim(name="adam", lr=1e-5, weight_decay=0.0, epochs=1000, max_steps=1000)


class _Attention(DirectSpace):
    def __init__(self, parameters: dict[str, nn.Parameter], accumulate: bool) -> None:
        super().__init__(parameters)
        self._accumulate, self._sums = accumulate, GradientSum()

    def before_step(self) -> None:
        if self._accumulate:
            self._sums.add(self.parameters)

    def state(self) -> dict[str, Tensor]:
        return dict(self._sums.sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._sums.sums = {n: t.to(self.parameters[n]) for n, t in state.items()}


@part(
    "cross_attention",
    Info(
        "All weights and biases of the U-Net's cross-attention may change.",
        paper=PAPER,
        upstream=CODE,
        commit=COMMIT,
        needs=("diffusion", "text"),
        deviations=("gradients are cleared at every step; the code sums them over all steps: `accumulate`",),
    ),
)
class CrossAttention(Space):
    """Every tensor of the blocks called ``attn2``: 80 of Stable Diffusion 1.x, with 43,962,560 weights.

    Args:
        accumulate: Every step follows the sum of all gradients so far, as published.
    """

    accumulate: bool = False

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """These tensors."""
        unet: nn.Module = text_task(ctx.task, "the space 'cross_attention'").unet
        prefix = prefix_of(ctx.model, unet)
        return {prefix + n: p for n, p in cross_attention(unet).items()}

    def open(self, ctx: Context) -> OpenSpace:
        """Open on these tensors."""
        return _Attention(self.masters(ctx), self.accumulate)


@method(
    "cie",
    Info(
        "Erase a concept with the concept-correlation loss on all cross-attention weights, protecting nothing.",
        paper=PAPER + " (SRS-ME-ddagger, the irreversible variant)",
        upstream=CODE,
        commit=COMMIT,
        needs=("diffusion", "text"),
        deviations=(
            "gradients are cleared at every step, and the step that crosses the threshold makes no update",
            "one U-Net: the original has the first values of the trained tensors, not a second model",
            "the learning rate is the paper's 1e-5; the code's default is 1e-6",
            "`profile = 'as_published'` restores the summed gradients, the stop rule and one pass in order",
        ),
        aliases=("concept_irrelevant_erasure",),
    ),
)
def cie(
    *,
    images: Literal["forget", "concept"] = "forget",
    prompts: tuple[str, ...] = (),
    against: str = "",
    lambda_l1: Annotated[float, Field(ge=0)] = 1e-6,
    threshold: float | None = 0.0,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    statistic: Literal["correlation", "ratio"] = "correlation",
    profile: Profile = "as_intended",
    batch_size: Annotated[int, Field(ge=1)] = 1,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min_theta mean(r_u * r_o) + lambda_l1 mean_l ||theta_l - theta_0,l||_1`` over all cross-attention tensors.

    Source: SRS-ME, the variant without decoupling, for concepts that are never to come back. The patch comes off like
    any other, but changes of several concepts act on one another.

    Deviates:
        See the card. ``as_published`` follows the code at the recorded commit.

    Args:
        images: What is noised: the ``forget`` images, or images that the original model draws for the ``concept``.
        prompts: What the samples show, in turn; by default the prompts of the request.
        against: The prompt without the concept.
        lambda_l1: Weight of the l1 norm of the change.
        threshold: Stop when the running mean of the loss is below (0 in the paper, for nudity); null: never.
        momentum: Of the running mean.
        statistic: Stop on the ``correlation`` itself, or on its ``ratio`` to that of the original model.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    objective = ConceptCorrelation(
        schedule=Paired(streams=(images,), batch_size=batch_size, shuffle=not published),
        prompts=prompts,
        against=against,
        lambda_l1=lambda_l1,
        threshold=threshold,
        momentum=momentum,
        statistic=statistic,
        published_stop=published,
    )
    optim = optim.model_copy(update={"epochs": 1}) if published and optim.epochs == OPTIM.epochs else optim
    return Recipe(name="cie", objective=objective, space=CrossAttention(accumulate=published), optim=optim)
