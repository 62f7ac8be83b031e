"""Relearn time: how many steps of training on the forgotten samples bring them back.

Knowledge that was only hidden comes back faster than it is learned by a model that never had it, so the figure is read
next to the retrained model's.

Source: Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020 (arXiv 1911.04933); Tarun et al.,
"Fast Yet Effective Machine Unlearning", TNNLS 2023 (arXiv 2111.08947).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field
from torch import nn, optim

from expunge.errors import CapabilityError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, not_run
from expunge.objectives.cross_entropy import FineTune
from expunge.part import Frozen
from expunge.patch import Patch, apply, revert
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.request import ForgetRequest
from expunge.run import execute
from expunge.schedule import Single
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Split, Task
from expunge.tasks.images import ImageTask

#: Training that tries to bring the samples back.
OPTIM = Optim(lr=0.01, epochs=20)


class _Back(Exception):  # noqa: N818  not an error: it ends the training
    """The samples are known again."""


class Relearn(Frozen):
    """Settings of the measurement; calling it measures one model.

    Args:
        optim: Fields that replace those of the default: SGD at 0.01, 20 epochs, normalisation statistics frozen.
        batch_size: Samples per step.
        margin: How far below the original model's accuracy on the forget set counts as back, in percentage points.
        every: Steps between measurements; the last step is always measured.
    """

    names: ClassVar[tuple[str, ...]] = ("relearn_steps",)
    optim: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=64, ge=1)
    margin: float = Field(default=1.0, ge=0, le=100)
    every: int = Field(default=1, ge=1)

    def build_optim(self) -> Optim:
        """The optimiser settings, complete."""
        return Optim(**{**OPTIM.model_dump(), **self.optim})

    def __call__(
        self, task: Task, request: ForgetRequest, patch: Patch | None, *, seed: int = 0, progress: bool = False
    ) -> dict[str, Estimate]:
        """The figure of one model, given as a patch on the task's model."""
        found = relearn_steps(task, task.split(request), patch, self, seed=seed, progress=progress)
        return {"relearn_steps": found}


@metric(
    "relearn_steps",
    Info(
        "Training steps on the forget set until it is known as well as before.",
        paper="Golatkar et al., CVPR 2020, arXiv 1911.04933",
        needs=("forget",),
        deviations=("Counts steps to the original's accuracy less a margin, where the paper counts to its loss.",),
    ),
    label="Relearn time",
    explain="Training steps on the forgotten images until the model knows them as well as the original did. Far fewer "
    "than the retrained model needs means that the knowledge was hidden rather than removed.",
    unit="steps",
    bounds=(0.0, None),
)
def relearn_steps(
    task: Task,
    split: Split,
    patch: Patch | None,
    settings: Relearn | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """Fine-tune on the forget set and count the steps until its accuracy is back.

    The task's model is left as found. Models compared with each other see the same batches in the same order for one
    ``seed``.

    Args:
        task: The original model and the data.
        split: Index sets of the request.
        patch: The model to measure, as a patch on the original; ``None`` measures the original itself (0 steps).
        settings: Optimiser, margin and interval of the measurements.
        seed: Seed of the batch order.
        progress: Show a progress bar.

    Returns:
        Steps, with the epochs in the note; a reason instead of a value if the accuracy did not come back in time.

    Raises:
        CapabilityError: The task has no images to classify.
        DivergedError: Training diverged.
    """
    if not isinstance(task, ImageTask):
        raise CapabilityError(f"relearn time is defined for models that classify images, not for the {task.name} task")
    settings = Relearn() if settings is None else settings
    n = len(split["forget"])
    target = _accuracy(task, split) - settings.margin / 100
    schedule = Single(role="forget", batch_size=settings.batch_size)
    recipe = Recipe(
        name="relearn", objective=FineTune(schedule=schedule), space=AllWeights(), optim=settings.build_optim()
    )
    last = min(recipe.optim.max_steps or math.inf, recipe.optim.epochs * math.ceil(n / settings.batch_size))
    taken, reached = 0, 0.0

    def after_step(step: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
        nonlocal taken, reached
        taken = step
        if step % settings.every == 0 or step == last:
            reached = _accuracy(task, split)
            if reached >= target:
                raise _Back

    if patch is not None:
        apply(task.model, patch)
    try:
        reached = start = _accuracy(task, split)
        if start < target:
            request = ForgetRequest.samples(())
            execute(
                task, split, request, recipe, seed=seed, progress=progress, on_step=after_step, allow_no_effect=True
            )
    except _Back:
        pass
    finally:
        if patch is not None:
            revert(task.model, patch)
    path = f"from {100 * start:.1f} % towards {100 * target:.1f} %"
    if reached < target:
        return not_run(f"not back after {taken} steps: {path}, got to {100 * reached:.1f} %", unit="steps", n=n)
    epochs = taken * settings.batch_size / n
    often = "every step" if settings.every == 1 else f"every {settings.every} steps"
    method = f"{recipe.optim.name} on the forget set, rate {recipe.optim.lr:g}, measured {often}"
    return Estimate(taken, n=n, unit="steps", method=method, note=f"{path}; about {epochs:.1f} epochs")


def _accuracy(task: ImageTask, split: Split) -> float:
    logits, labels = task.logits("forget", split)
    return float((logits.argmax(1) == labels).double().mean())
