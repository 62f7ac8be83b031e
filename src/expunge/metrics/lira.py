"""U-LiRA: can models that unlearned the samples be told from models that never saw them, sample by sample?

Shadow models come in pairs with one seed: one is trained on everything and then unlearns the request by the recipe
under test, the other is trained without the samples. For every forgotten sample, Gaussians are fitted to its
logit-scaled confidence ``phi = log(p_y / (1 - p_y))`` under both kinds, and the log likelihood ratio

    log N(phi; mu_unlearned, s_unlearned) - log N(phi; mu_unseen, s_unseen)

decides. The Gaussians are fitted to one half of the pairs and judged on the other half: equal distributions give 0.5 in
the mean, and the judged pairs are independent, so the interval is honest. (Leaving out one pair at a time judges twice
as many, but every fit then leans away from the pair left out; of its 95 % intervals only about 82 % hold 0.5.)

Paper: Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy" (arXiv
2403.01218); Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022 (arXiv 2112.03570).

Deviates: the shadows keep the request itself instead of drawing random halves of the data, so it also holds for
classes; and both kinds are compared on the forgotten samples only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge import files, rng
from expunge.digest import json_digest, model_digest
from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, mean, not_run, proportion
from expunge.metrics.membership import auc
from expunge.metrics.outputs import to_numpy
from expunge.part import Frozen
from expunge.patch import Patch, apply, revert
from expunge.patch.apply import settle
from expunge.patch.patch import current_versions
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.request import ForgetRequest
from expunge.run import execute, reinitialise, unlearn
from expunge.tasks.base import Split, Task
from expunge.tasks.classifier import ClassifierTask
from expunge.train import PUBLISHED, training_recipe

log = logging.getLogger("expunge")
PAPER = "Hayes et al., Inexact Unlearning Needs More Careful Evaluations, arXiv 2403.01218"
#: Two pairs are needed for a variance and two more for an interval.
MIN_SHADOWS = 4
#: Below this many shadows one variance is shared by all samples, as Carlini et al. advise.
OWN_VARIANCE = 64
Variance = Literal["pooled", "per_sample"]


def scaled_confidence(logits: Any, labels: Any) -> np.ndarray:
    """``log(p_y / (1 - p_y))`` per row from logits ``[N, C]`` and labels ``[N]``, float64, without overflow."""
    x = to_numpy(logits).astype(np.float64)
    y = to_numpy(labels)
    own = x[np.arange(len(y)), y]
    others = x.copy()
    others[np.arange(len(y)), y] = -np.inf
    return own - np.logaddexp.reduce(others, axis=1)


def log_ratio(
    unlearned: np.ndarray, unseen: np.ndarray, target: np.ndarray, *, variance: Variance | None = None
) -> np.ndarray:
    """Log likelihood ratio ``[F]``, positive where a sample looks unlearned rather than never seen.

    Args:
        unlearned: Scaled confidences ``[N, F]`` under models that unlearned the samples.
        unseen: The same under models that never saw them ``[M, F]``.
        target: Scaled confidences under the judged model ``[F]``.
        variance: One variance per kind for all samples, or one each; by default by the number of shadows.

    Raises:
        DataError: Fewer than two models of a kind, or models that do not differ.
    """
    if variance is None:
        variance = "pooled" if min(len(unlearned), len(unseen)) < OWN_VARIANCE else "per_sample"
    terms = []
    for name, shadows in (("unlearned", unlearned), ("unseen", unseen)):
        if len(shadows) < 2:
            raise DataError(f"lira: {len(shadows)} {name} shadow models; at least two are needed for a variance")
        spread = shadows.var(axis=0, ddof=1)
        pooled = float(spread.mean())
        if not pooled > 0:
            raise DataError(f"lira: the {name} shadow models do not differ on any sample; use other seeds")
        # a variance from few models can be tiny by chance and would make one sample decide everything
        v = np.full_like(spread, pooled) if variance == "pooled" else np.maximum(spread, 1e-3 * pooled)
        terms.append(-0.5 * ((target - shadows.mean(axis=0)) ** 2 / v + np.log(2 * math.pi * v)))
    return np.asarray(terms[0] - terms[1])


def held_out_ratios(
    unlearned: np.ndarray, unseen: np.ndarray, *, variance: Variance | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ratios ``[N // 2, F]`` of the unlearned and of the unseen models of the last pairs, judged by the first ones.

    Args:
        unlearned: Scaled confidences ``[N, F]``.
        unseen: Those of the other models of the pairs ``[N, F]``.
        variance: See :func:`log_ratio`.

    Raises:
        DataError: Fewer than four pairs, or shapes that differ.
    """
    n = len(unlearned)
    if unlearned.shape != unseen.shape or n < MIN_SHADOWS:
        raise DataError(f"lira: shadows {unlearned.shape} and {unseen.shape}; needs pairs, at least {MIN_SHADOWS}")
    fit = n - n // 2
    first, last = (
        np.stack([log_ratio(unlearned[:fit], unseen[:fit], row, variance=variance) for row in side[fit:]])
        for side in (unlearned, unseen)
    )
    return first, last


_EXPLAIN = (
    "The strongest attack here: it knows, for each forgotten image, how confident models are that unlearned it by this "
    "very method, and how confident models are that never saw it. "
)


@metric(
    "lira",
    Info("U-LiRA: balanced accuracy of telling unlearned models from retrained ones.", PAPER, needs=("forget",)),
    label="U-LiRA",
    explain=_EXPLAIN + "Share of right calls: 50 % is guessing, so the method cannot be told from retraining.",
)
def lira(unlearned: np.ndarray, unseen: np.ndarray) -> Estimate:
    """Balanced accuracy in percent from held-out ratios ``[N, F]`` of both kinds; ties count half."""
    values = [50 * float((np.sign(a) - np.sign(b)).mean() / 2 + 1) for a, b in zip(unlearned, unseen, strict=True)]
    return _clipped(mean(values, unit="%"), 100.0, unlearned.shape)


@metric(
    "lira_auc",
    Info("U-LiRA: AUC of telling unlearned models from retrained ones.", PAPER, needs=("forget",)),
    label="U-LiRA, AUC",
    explain=_EXPLAIN + "Chance that it ranks an image of an unlearned model above one of a retrained model: 0.5 is "
    "guessing.",
    unit="",
    bounds=(0.0, 1.0),
)
def lira_auc(unlearned: np.ndarray, unseen: np.ndarray) -> Estimate:
    """AUC from held-out ratios ``[N, F]`` of both kinds, mean over the held-out pairs."""
    values = [auc(a, b).value for a, b in zip(unlearned, unseen, strict=True)]
    return _clipped(mean([v for v in values if v is not None]), 1.0, unlearned.shape)


@metric(
    "lira_forget",
    Info("U-LiRA on this model: share of forgotten samples that look unlearned.", PAPER, needs=("forget",)),
    label="U-LiRA, this model",
    explain=_EXPLAIN + "Share of the forgotten images that, under this one model, look unlearned rather than never "
    "seen: about 50 % if nothing can be told.",
)
def lira_forget(ratios: np.ndarray) -> Estimate:
    """Share of positive ratios ``[F]`` of the audited model, percent."""
    return proportion(int((ratios > 0).sum()), len(ratios), note="interval of the forget samples for these shadows")


def _clipped(e: Estimate, top: float, shape: tuple[int, ...]) -> Estimate:
    low, high = (None if v is None else min(top, max(0.0, v)) for v in (e.low, e.high))
    method = f"mean over {shape[0]} held-out pairs of shadow models, t 95 % interval"
    return Estimate(e.value, low, high, e.n, e.unit, method, f"{shape[1]} forget samples")


@dataclass(frozen=True, eq=False)
class LiraResult:
    """Figures by metric name, and the scaled confidences of both kinds of shadows ``[N, F]``."""

    metrics: dict[str, Estimate]
    unlearned: np.ndarray = field(repr=False)
    unseen: np.ndarray = field(repr=False)


def u_lira(
    task: Task,
    request: ForgetRequest,
    recipe: Recipe,
    *,
    train: Optim = PUBLISHED,
    batch_size: int = 256,
    shadows: int = 8,
    given: Sequence[tuple[str | Path, str | Path]] = (),
    patch: Patch | None = None,
    variance: Variance | None = None,
    seed: int = 0,
    progress: bool = False,
    on_shadow: Callable[[int, int], None] | None = None,
) -> LiraResult:
    """Train pairs of shadow models, unlearn one of each pair, and run the attack.

    Trained and unlearned shadows are kept under :func:`expunge.files.cache_dir` (``lira/``) by a digest of
    architecture, training, data, request, recipe and seed: a second call trains nothing, a killed one continues, and
    other recipes share the trained ones. The task's model is not touched.

    Args:
        task: Architecture and data; its weights are only read for ``patch``.
        request: What is forgotten.
        recipe: How.
        train: How the original was trained; the attack is only as good as the shadows resemble it.
        batch_size: Samples per training step.
        shadows: Pairs of shadow models, at least 4.
        given: Pairs of weights files (trained on everything, trained without the samples) to use instead of training.
        patch: The audited model on the task's weights; adds ``lira_forget``.
        variance: See :func:`log_ratio`.
        seed: Seed of the first pair.
        progress: Show progress bars, and log which pair is at work.
        on_shadow: Called before each pair with its number and the total.

    Raises:
        CapabilityError: The task is no classifier.
        ConfigError: Too few shadows, or a layer that cannot be initialised.
        ArtifactError: A given or cached file is broken.
    """
    if not isinstance(task, ClassifierTask):
        raise CapabilityError(f"lira is defined for classifiers, not for the {task.name} task")
    total = len(given) or shadows
    if total < MIN_SHADOWS:
        raise ConfigError(f"lira: {total} pairs of shadow models; at least {MIN_SHADOWS} are needed")
    split = task.split(request)
    blank = _blank(task)
    training = training_recipe(train, batch_size).replace(from_scratch=True)
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for k in range(total):
        if on_shadow is not None:
            on_shadow(k, total)
        if progress:
            log.info("lira: pair %d of %d", k + 1, total)
        number = rng.key(seed, "lira", k) % 2**31
        if given:
            full, unseen = (_loaded(blank, path) for path in given[k])
        else:
            nothing, all_of_it = ForgetRequest.samples(()), task.everything()
            full = _trained(blank, all_of_it, nothing, training, number, progress)
            unseen = _trained(blank, split, request, training, number, progress)
        own = rng.key(seed, "lira unlearn", k) % 2**31
        folder = _folder(full, request, recipe, own)
        change = unlearn(full, request, recipe, seed=own, run_dir=folder, allow_no_effect=True, progress=progress)
        apply(full.model, change)
        for side, model in zip(rows, (full, unseen), strict=True):
            side.append(scaled_confidence(*model.logits("forget", split)))
    unlearned, never = np.stack(rows[0]), np.stack(rows[1])
    ratios = held_out_ratios(unlearned, never, variance=variance)
    found = {"lira": lira(*ratios), "lira_auc": lira_auc(*ratios)}
    if patch is not None:
        found["lira_forget"] = lira_forget(
            log_ratio(unlearned, never, _confidence(task, split, patch), variance=variance)
        )
    return LiraResult(found, unlearned, never)


def _blank(task: ClassifierTask) -> ClassifierTask:
    """The task with a model of its own whose weights depend on the architecture only, so that caches can be shared."""
    other = copy(task)
    other.model = deepcopy(task.model)
    settle(other.model)
    with rng.preserved():
        reinitialise(other.model, rng.key(0, "lira blank"))
    return other


def _own(task: ClassifierTask) -> ClassifierTask:
    other = copy(task)
    other.model = deepcopy(task.model)
    return other


def _trained(
    blank: ClassifierTask, split: Split, request: ForgetRequest, recipe: Recipe, seed: int, progress: bool
) -> ClassifierTask:
    folder = _folder(blank, request, recipe, seed)
    patch = execute(blank, split, request, recipe, seed=seed, run_dir=folder, progress=progress)
    other = _own(blank)
    apply(other.model, patch)
    settle(other.model)
    return other


def _loaded(blank: ClassifierTask, weights: str | Path) -> ClassifierTask:
    from expunge.models.weights import load_weights

    other = _own(blank)
    load_weights(other.model, weights)
    return other


def _folder(task: ClassifierTask, request: ForgetRequest, recipe: Recipe, seed: int) -> Path:
    key = {
        "architecture": [type(task.model).__qualname__, repr(task.model)],
        "weights": model_digest(task.model),
        "data": task.data_digest(),
        "request": request.digest,
        "recipe": recipe.digest,
        "seed": seed,
        "versions": current_versions(),
    }
    return files.cache_dir() / "lira" / json_digest(key)[:32]


def _confidence(task: ClassifierTask, split: Split, patch: Patch) -> np.ndarray:
    apply(task.model, patch)
    try:
        return scaled_confidence(*task.logits("forget", split))
    finally:
        revert(task.model, patch)


class Lira(Frozen):
    """Settings of the attack; calling it attacks the recipe that made a patch.

    Args:
        shadows: Pairs of shadow models.
        optim: Fields that replace those of the published training protocol; should match the original's training.
        batch_size: Samples per training step.
        given: Pairs of weights files to use instead of training: trained on everything, trained without the samples.
    """

    names: ClassVar[tuple[str, ...]] = ("lira", "lira_auc", "lira_forget")
    shadows: int = Field(default=8, ge=MIN_SHADOWS)
    optim: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=256, ge=1)
    given: tuple[tuple[str, str], ...] = ()

    def build_optim(self) -> Optim:
        """The optimiser settings, complete."""
        return Optim(**{**PUBLISHED.model_dump(), **self.optim})

    def __call__(
        self, task: Task, request: ForgetRequest, patch: Patch | None, *, seed: int = 0, progress: bool = False
    ) -> dict[str, Estimate]:
        """The figures for one patch; none for a model trained from scratch, which is what the attack compares with."""
        if patch is None:
            return {}
        try:
            recipe = Recipe(**patch.manifest.recipe)
        except (ConfigError, TypeError, ValueError) as error:
            reason = f"the patch does not say how it was made ({type(error).__name__})"
            return {name: not_run(reason) for name in self.names}
        if recipe.from_scratch:
            return {}
        return u_lira(
            task,
            request,
            recipe,
            train=self.build_optim(),
            batch_size=self.batch_size,
            shadows=self.shadows,
            given=self.given,
            patch=patch,
            seed=seed,
            progress=progress,
        ).metrics
