"""Training originals and retrained oracles with the same loop that unlearns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expunge.objectives.cross_entropy import FineTune
from expunge.patch import Patch
from expunge.patch.apply import apply, settle
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.run import execute
from expunge.schedule import Single
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Split, Task
from expunge.track import TrackerName

#: SalUn's protocol for CIFAR: SGD, 182 epochs, rate 0.1 divided by ten at epochs 91 and 136.
PUBLISHED = Optim(
    lr=0.1, epochs=182, lr_schedule="multistep", milestones=(91, 136), norm="train", augment=True, weight_decay=5e-4
)


def training_recipe(optim: Optim = PUBLISHED, batch_size: int = 256) -> Recipe:
    """Cross-entropy on everything that is not excluded, all weights, from the model's present weights."""
    return Recipe(
        name="train",
        objective=FineTune(schedule=Single(role="retain", batch_size=batch_size)),
        space=AllWeights(),
        optim=optim,
    )


def fit(
    task: Task,
    *,
    exclude: ForgetRequest | None = None,
    optim: Optim = PUBLISHED,
    batch_size: int = 256,
    seed: int = 0,
    run_dir: str | Path | None = None,
    trackers: Sequence[TrackerName] = (),
    progress: bool = False,
) -> Split:
    """Train the task's model in place, optionally without the samples that a request names.

    Args:
        task: Model and data; the model's present weights are the start.
        exclude: What the model must never see (a retrained oracle); ``None`` trains on the whole training set.
        optim: Optimiser settings; normalisation layers follow ``optim.norm``.
        batch_size: Samples per step.
        seed: Seed of batch order, augmentation and dropout.
        run_dir: Folder for log and checkpoints; a killed training resumes there.
        trackers: ``tensorboard``, ``wandb``.
        progress: Show a progress bar.

    Returns:
        The index sets; ``forget`` holds what was excluded.

    Raises:
        RequestError: The exclusion does not fit the data.
        DivergedError: Training diverged; the model is as before.
    """
    request = exclude if exclude is not None else ForgetRequest.samples(())
    split = task.split(exclude) if exclude is not None else task.everything()
    patch: Patch = execute(
        task,
        split,
        request,
        training_recipe(optim, batch_size),
        seed=seed,
        run_dir=run_dir,
        trackers=trackers,
        progress=progress,
    )
    apply(task.model, patch)
    settle(task.model)
    return split
