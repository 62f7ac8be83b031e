"""Training originals and retrained oracles with the same loop that unlearns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from expunge.data import DataSpec, load_data
from expunge.data.captions import CaptionedImages
from expunge.data.splitting import stratified
from expunge.errors import DataError
from expunge.objectives.cross_entropy import FineTune
from expunge.objectives.smoothed import SmoothedFineTune
from expunge.patch import Patch
from expunge.patch.apply import apply, settle
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.run import execute
from expunge.schedule import Single
from expunge.spaces.averaged import AveragedWeights
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Split, Task
from expunge.tasks.images import ImageTask
from expunge.track import TrackerName

#: SalUn's protocol for CIFAR: SGD, 182 epochs, rate 0.1 divided by ten at epochs 91 and 136.
PUBLISHED = Optim(
    lr=0.1, epochs=182, lr_schedule="multistep", milestones=(91, 136), norm="train", augment=True, weight_decay=5e-4
)


def training_recipe(
    optim: Optim = PUBLISHED, batch_size: int = 256, label_smoothing: float = 0.0, average: float | None = None
) -> Recipe:
    """The task's loss on everything that is not excluded, all weights, from the model's present weights."""
    schedule = Single(role="retain", batch_size=batch_size)
    smoothed = SmoothedFineTune(schedule=schedule, label_smoothing=label_smoothing) if label_smoothing else None
    return Recipe(
        name="train",
        objective=smoothed or FineTune(schedule=schedule),
        space=AllWeights() if average is None else AveragedWeights(decay=average),
        optim=optim,
    )


def fit(
    task: Task,
    *,
    exclude: ForgetRequest | None = None,
    optim: Optim = PUBLISHED,
    batch_size: int = 256,
    label_smoothing: float = 0.0,
    average: float | None = None,
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
        label_smoothing: Share of every target that is spread evenly over all classes.
        average: Decay of a moving average of the weights, which is then the result.
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
        training_recipe(optim, batch_size, label_smoothing, average),
        seed=seed,
        run_dir=run_dir,
        trackers=trackers,
        progress=progress,
    )
    apply(task.model, patch)
    settle(task.model)
    return split


def validation_rows(spec: DataSpec, task: ImageTask) -> list[int]:
    """Row numbers of the validation images in the data set as it was before they were taken out.

    Args:
        spec: What the task's data were read from.
        task: The task.

    Raises:
        DataError: The data have changed since the task was made.
    """
    if task.data.val is None:
        return []
    whole = load_data(spec.model_copy(update={"val_fraction": 0.0})).train
    rows = stratified(whole.labels, spec.val_fraction, spec.seed, "validation split")[1]
    val = task.data.val
    labels = val.axes[next(iter(whole.axes))].labels if isinstance(whole, CaptionedImages) else val.labels  # type: ignore[attr-defined]
    if not torch.equal(whole.labels[rows], labels):
        raise DataError(f"data '{spec.name}' changed while they were read: the validation rows differ")
    return rows.tolist()
