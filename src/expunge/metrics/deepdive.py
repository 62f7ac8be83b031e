"""The evaluation of SalUn_DeepDive, for comparison with its numbers only; not registered as a metric.

Upstream: lorenzoorsingher/SalUn_DeepDive 8277bbe, metrics.py.
Deviates: ``as_intended`` resets the accuracy counter for every loader, uses one loss per sample and runs no forest
(the published one learns from batch means and reports the largest of six results).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from expunge.errors import DataError
from expunge.metrics.mia import Variant
from expunge.metrics.outputs import ClassifierOutputs

ORDER = ("test", "forget", "retain", "val")


@dataclass(frozen=True, eq=False)
class DeepDive:
    """Accuracies as fractions in the order of the loaders, losses per loader, and (AUC, accuracy) in percent."""

    accuracy: dict[str, float]
    losses: dict[str, np.ndarray]
    mia: tuple[float, float] | None


def evaluate(
    outputs: Mapping[str, ClassifierOutputs],
    *,
    variant: Variant = "as_intended",
    batch_size: int = 32,
    order: tuple[str, ...] = ORDER,
) -> DeepDive:
    """Accuracies, losses and the forest attack.

    Args:
        outputs: One entry per name in ``order``.
        variant: ``as_published`` keeps the accumulator that is never reset, ``acc_i = (correct_i + acc_(i-1)) / n_i``,
            the batch-mean losses and the forest.
        batch_size: Of the published loaders; only used ``as_published``.
        order: In which the loaders are visited.

    Raises:
        DataError: A set is empty.
    """
    empty = [k for k in order if len(outputs[k]) == 0]
    if empty:
        raise DataError(f"deepdive evaluation: no samples in {', '.join(empty)}")
    if variant == "as_intended":
        plain = {k: float(outputs[k].correct.mean()) for k in order}
        return DeepDive(plain, {k: outputs[k].losses for k in order}, None)
    accuracy, carried = {}, 0.0
    for k in order:
        carried = (float(outputs[k].correct.sum()) + carried) / len(outputs[k])
        accuracy[k] = carried
    losses = {k: _batch_means(outputs[k].losses, batch_size) for k in order}
    return DeepDive(accuracy, losses, forest_mia(losses))


def _batch_means(losses: np.ndarray, size: int) -> np.ndarray:
    return np.array([losses[i : i + size].mean() for i in range(0, len(losses), size)])


def forest_mia(losses: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(AUC, share called non-member) in percent of the forest with the largest share; depends on scikit-learn."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score

    x = np.concatenate([losses["retain"], losses["val"]])[:, None]
    y = np.concatenate([np.ones(len(losses["retain"])), np.zeros(len(losses["val"]))])
    target = np.concatenate([losses["forget"], losses["test"]])[:, None]
    truth = np.concatenate([np.ones(len(losses["forget"])), np.zeros(len(losses["test"]))])
    best = (0.0, 0.0)
    for trees in (20, 50, 100):
        for criterion in ("gini", "entropy"):
            forest = RandomForestClassifier(n_estimators=trees, criterion=criterion, random_state=0).fit(x, y)
            share = 100 * (1 - float(forest.predict(losses["forget"][:, None]).mean()))
            if share > best[1]:
                best = (100 * float(roc_auc_score(truth, forest.predict_proba(target)[:, 1])), share)
    return best
