"""DUCK: pull forget features to the centroid of the nearest wrong class, keep the labels of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from expunge import rng
from expunge.context import Context
from expunge.errors import RequestError
from expunge.method import method
from expunge.methods._common import Profile
from expunge.methods._scar_tables import SCAR_CODE, SCAR_COMMIT, StopsWhenForgotten, as_run
from expunge.objectives.base import LossFn, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Nested, Schedule
from expunge.spaces.layers import AllWeights
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask

_PAPER = "Cotogni, Bonato, Sabetta, Pelosin, Nicolosi, DUCK, 2023, arXiv 2312.02052"
_SAMPLES, _STEPS, _CLASSES = "duck.samples", "duck.steps", "duck.classes"

#: Columns compared with labels: by the class they stand for, or (a fault) by their number.
Columns = Literal["explicit", "compact"]
#: Target classes of a batch, from its samples and their features.
Targets = Callable[[Batch, Tensor], Tensor]

#: Defaults of this method.
OPTIM = Optim(
    name="adam",
    lr=4e-4,
    weight_decay=0.0,
    epochs=30,
    lr_schedule="multistep",
    milestones=(25, 40),
    gamma=0.5,
    augment=("retain",),
)


@torch.no_grad()
def centroids(task: ClassifierTask, ctx: Context, batch_size: int, batches: int | None = None) -> tuple[Tensor, Tensor]:
    """Class means of the retain features.

    Args:
        task: Model (in eval mode) and data.
        ctx: Index sets and seed.
        batch_size: Samples per forward pass.
        batches: Only this many shuffled retain batches, as published.

    Returns:
        Centroids ``[K, D]`` in double precision on the CPU, with NaN for a class that no sample was seen of, and the
        classes they stand for, int64 ``[K]``: all but the removed ones.

    Raises:
        RequestError: The retain set has no sample of a class, and all of it was to be looked at.
    """
    ids = ctx.split["retain"]
    if batches is not None:
        ids = ids[rng.permutation(ctx.key("centroids"), len(ids))][: batches * batch_size]
    kept = torch.tensor([c for c in range(task.n_classes) if c not in ctx.split.removed])
    counts = torch.zeros(task.n_classes, dtype=torch.float64)
    sums: Tensor | None = None
    for chunk in torch.split(ids, batch_size):
        batch = task.load("retain", chunk, ctx.split)
        features, labels = task.represent(batch)[0].cpu().double(), batch.targets.cpu()
        if sums is None:
            sums = torch.zeros(task.n_classes, features.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, features)
        counts += torch.bincount(labels, minlength=task.n_classes)
    assert sums is not None, "guards refuse an empty retain set"
    absent = [task.classes[c] for c in kept.tolist() if counts[c] == 0]
    if absent and batches is None:
        raise RequestError(
            f"the retain set has no sample of class {', '.join(map(repr, absent[:5]))}, so it has no centroid; request "
            "the removal of the whole class by its label, or keep some of its samples"
        )
    if absent:
        ctx.note(f"the first {batches} retain batches hold no sample of {', '.join(absent[:5])}: not used as targets")
    return (sums / counts[:, None])[kept], kept


def cosine_distances(features: Tensor, centers: Tensor) -> Tensor:
    """``1 - cos`` between features ``[B, D]`` and centroids ``[K, D]``: ``[B, K]``."""
    return 1 - functional.normalize(features, dim=1) @ functional.normalize(centers, dim=1).T


def nearest_wrong(distances: Tensor, labels: Tensor, classes: Tensor, columns: Columns = "explicit") -> Tensor:
    """The nearest class that is not the sample's own.

    Args:
        distances: ``[B, K]``; NaN counts as infinitely far.
        labels: True classes, int64 ``[B]``.
        classes: Class of each column, int64 ``[K]``.
        columns: ``compact`` compares labels with column numbers, as published: with a class removed, some samples miss
            their nearest class.

    Returns:
        Class numbers, int64 ``[B]``.
    """
    names = classes if columns == "explicit" else torch.arange(len(classes), device=classes.device)
    out = (names[None] == labels[:, None]) | distances.isnan()
    return classes[distances.masked_fill(out, float("inf")).argmin(1)]


@part(
    "duck",
    Info(
        "Pull forget features to the centroid of the nearest wrong class, keep the labels of the retain set.",
        paper=_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget", "retain", "features"),
    ),
)
class Duck(StopsWhenForgotten):
    """``lambda_1 mean_forget (1 - cos(f(x), c_target)) + lambda_2 mean_retain CE(g(x) / T, y)``.

    Args:
        schedule: ``nested``, forget batches outside and retain batches inside, or any with both in a step.
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the retain term.
        temperature: ``T``.
        label_smoothing: Of the cross-entropy.
        columns: How the nearest class is kept from being the sample's own; see :func:`nearest_wrong`.
        assignment: ``upfront`` chooses all targets with the original model in eval mode. ``appended`` is the published
            rule: chosen anew at every visit of the first epoch, thrown-away ones included, and appended to one list;
            in later epochs forget batch number ``i`` reads entry ``i`` of the list.
        centroid_batches: Centroids from this many retain batches; ``None`` means all.
        centroid_batch_size: Samples per forward pass for centroids and targets.
    """

    schedule: Schedule = Nested(lead="forget", inner="retain", repeats=6)
    lambda_1: float = Field(default=1.0, ge=0)
    lambda_2: float = Field(default=1.4, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    columns: Columns = "explicit"
    assignment: Literal["upfront", "appended"] = "upfront"
    centroid_batches: int | None = Field(default=None, ge=1)
    centroid_batch_size: int = Field(default=256, ge=1)

    def bind(self, ctx: Context) -> LossFn:
        """Measure centroids with the original model, choose targets, return the loss function."""
        task = ctx.task
        assert isinstance(task, ClassifierTask)
        means, kept = centroids(task, ctx, self.centroid_batch_size, self.centroid_batches)
        first = next(ctx.model.parameters())
        means, kept = means.to(first), kept.to(first.device)
        column = torch.full((task.n_classes,), -1, device=first.device)
        column[kept] = torch.arange(len(kept), device=first.device)

        def choose(batch: Batch, features: Tensor) -> Tensor:
            distances = cosine_distances(features.detach().to(means), means)
            return nearest_wrong(distances, batch.targets, kept, self.columns)

        make = upfront if self.assignment == "upfront" else appended
        targets = make(ctx, choose, self.centroid_batch_size)

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            terms = {}
            if "forget" in batches or "retain" not in batches:
                batch = batches["forget"]
                features, _ = task.represent(batch)
                goal = means[column[targets(batch, features)]].to(features)
                terms["forget"] = Term(1 - functional.cosine_similarity(features, goal), "forget", self.lambda_1)
            if "retain" in batches:
                batch = batches["retain"]
                logits = task.predict(batch) / self.temperature
                values = functional.cross_entropy(
                    logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing
                )
                terms["retain"] = Term(values, "retain", self.lambda_2)
            return terms

        return loss


def upfront(ctx: Context, choose: Targets, batch_size: int) -> Targets:
    """Targets of all forget samples, chosen now."""
    task = ctx.task
    assert isinstance(task, ClassifierTask)
    ids = ctx.split["forget"]
    table = torch.full((int(ids.max()) + 1,), -1)
    with torch.no_grad():
        for batch in ctx.batches("forget", batch_size):
            table[batch.ids] = choose(batch, task.represent(batch)[0]).cpu()
    return lambda batch, features: table[batch.ids].to(features.device)


def appended(ctx: Context, choose: Targets, batch_size: int) -> Targets:
    """Targets chosen at every visit of the first epoch and kept in one list, in ``ctx.state``."""
    for name in (_SAMPLES, _STEPS, _CLASSES):
        ctx.state.setdefault(name, torch.empty(0, dtype=torch.int64))

    def targets(batch: Batch, features: Tensor) -> Tensor:
        if ctx.epoch > 0:
            return _read(ctx, batch.ids).to(features.device)
        chosen = choose(batch, features)
        ids, steps, classes = (ctx.state[n] for n in (_SAMPLES, _STEPS, _CLASSES))
        old = (steps == ctx.step) & torch.isin(ids, batch.ids)  # a step that is repeated with smaller pieces
        for name, before, new in (
            (_SAMPLES, ids, batch.ids),
            (_STEPS, steps, torch.full_like(batch.ids, ctx.step)),
            (_CLASSES, classes, chosen.cpu()),
        ):
            ctx.state[name] = torch.cat([before[~old], new])
        return chosen

    return targets


def _read(ctx: Context, ids: Tensor) -> Tensor:
    """Row by row the entry of the list whose number is that of the forget batch which holds the samples."""
    samples, steps, classes = (ctx.state[n] for n in (_SAMPLES, _STEPS, _CLASSES))
    visits = steps.unique()
    leaders = [int(samples[steps == s][0]) for s in visits]
    order = list(dict.fromkeys(leaders))  # forget batches in the order of their first visit
    own = int(steps[samples == ids[0]][0])
    rows = samples[steps == own]
    entry = classes[steps == visits[order.index(int(rows[0]))]]
    place = torch.tensor([int((rows == i).nonzero()[0]) for i in ids])
    if int(place.max()) >= len(entry):
        raise RequestError("the published target list has no entry for this forget batch; use `as_intended`")
    return entry[place]


@method(
    "duck",
    Info(
        "Pull forget features to the centroid of the nearest wrong class, keep the labels of the retain set.",
        paper=_PAPER,
        upstream=SCAR_CODE,
        commit=SCAR_COMMIT,
        needs=("forget", "retain", "features"),
        deviations=(
            "targets are chosen once, with the original model in eval mode; the code chooses them while it trains and "
            "from the second epoch on reads those of other forget batches: `profile`",
            "with a class removed, the code compares labels with column numbers and so misses some nearest classes: "
            "`profile`",
            "centroids come from all retain samples; the code takes ten batches and a class that they lack gets NaN: "
            "`profile`",
            "retain passes follow each other; the code begins a new one at every forget batch and forwards one pair "
            "that it throws away: `profile`",
            "centroids are of images without augmentation",
            "normalisation statistics are frozen; the code updates them: `profile`",
            "lambda_2, the temperature, the rate and the batch size are the authors' own repository's, not SCAR's copy",
        ),
    ),
)
def duck(
    *,
    lambda_1: Annotated[float, Field(ge=0)] = 1.0,
    lambda_2: Annotated[float, Field(ge=0)] = 1.4,
    temperature: Annotated[float, Field(gt=0)] = 2.0,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    repeats: Annotated[int, Field(ge=1)] = 6,
    profile: Profile = "as_intended",
    batch_size: int = 256,
    optim: Optim = OPTIM,
) -> Recipe:
    """``min lambda_1 mean_forget (1 - cos(f(x), c_target)) + lambda_2 mean_retain CE(g(x) / T, y)``.

    After each epoch it stops if the forget samples are forgotten: below 1 % accuracy on them for a class request, 1.5
    points below the original model's accuracy on unseen data for a request of samples.

    Source: Cotogni et al. 2023, as in SCAR's comparison (class ``DUCK`` of its code).

    Deviates:
        Targets are fixed before the first step and classes are mapped explicitly; all retain samples make the
        centroids; no forward pass is thrown away; normalisation layers keep their statistics.
        ``profile = "as_published"`` restores the code's behaviour in all of these.

    Args:
        lambda_1: Weight of the forget term.
        lambda_2: Weight of the retain term.
        temperature: Divides the logits of the retain term.
        label_smoothing: Of the retain term (0.2 in SCAR's TinyImageNet runs).
        repeats: Steps per forget batch, each with another retain batch.
        profile: ``as_intended`` or ``as_published``.
        batch_size: Samples per step and role.
        optim: Optimiser and loop settings; retain images are augmented, as the code does when a class is removed.
    """
    published = profile == "as_published"
    schedule = Nested(
        lead="forget",
        inner="retain",
        repeats=repeats,
        batch_size=batch_size,
        restart=published,
        discard=published,
    )
    objective = Duck(
        schedule=schedule,
        lambda_1=lambda_1,
        lambda_2=lambda_2,
        temperature=temperature,
        label_smoothing=label_smoothing,
        columns="compact" if published else "explicit",
        assignment="appended" if published else "upfront",
        centroid_batches=10 if published else None,
        centroid_batch_size=batch_size,
    )
    return Recipe(name="duck", objective=objective, space=AllWeights(), optim=as_run(optim, profile))
