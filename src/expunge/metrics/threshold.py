"""Membership attacks that need nothing but one threshold: the exact best one, and the published one per class.

Upstream of :func:`class_threshold_mia`: OPTML-Group/Unlearn-Saliency a6e89fd, Classification/evaluation/MIA.py
(after Song and Mittal, USENIX Security 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expunge.errors import DataError
from expunge.metrics.estimate import Estimate, from_draws
from expunge.metrics.mia import attack_scores
from expunge.metrics.outputs import ClassifierOutputs


@dataclass(frozen=True)
class Threshold:
    """Call a sample a member when its score is at least ``value``; ``balanced_accuracy`` is of the fitted set."""

    value: float
    balanced_accuracy: float

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Whether each score is called a member, bool ``[N]``."""
        return scores >= self.value


def _cut(distinct: np.ndarray, members: np.ndarray, nonmembers: np.ndarray) -> tuple[int, int]:
    """Best cut before position i of the distinct scores, given counts per score; (i, gain as an exact integer).

    The gain ``NM * below_N - NN * below_M`` is balanced accuracy up to constants. Ties: widest gap, then lowest.
    """
    below_m = np.concatenate([[0], np.cumsum(members)])
    below_n = np.concatenate([[0], np.cumsum(nonmembers)])
    gain = below_m[-1] * below_n - below_n[-1] * below_m
    best = np.flatnonzero(gain == gain.max())
    gaps = np.concatenate([[0.0], np.diff(distinct), [0.0]])
    i = int(best[gaps[best].argmax()])
    return i, int(gain[i])


def best_threshold(members: np.ndarray, nonmembers: np.ndarray) -> Threshold:
    """The threshold with the largest balanced accuracy, over all possible ones: O(n log n), by sorting.

    ``0.5 (share of members >= t + share of non-members < t)`` only changes at observed scores. It is computed in
    exact integers for every cut between two distinct scores and beyond both ends; the threshold is the middle of the
    gap. Ties go to the widest gap, then to the lowest one.

    Raises:
        DataError: One side is empty or not finite.

    >>> best_threshold(np.array([0.9, 0.7]), np.array([0.1, 0.3])).value
    0.5
    """
    if len(members) == 0 or len(nonmembers) == 0:
        raise DataError(f"membership attack: {len(members)} members and {len(nonmembers)} non-members to learn from")
    pooled = np.concatenate([members, nonmembers]).astype(np.float64)
    if not np.isfinite(pooled).all():
        raise DataError("membership attack: scores are not finite")
    distinct, where = np.unique(pooled, return_inverse=True)
    m = np.bincount(where[: len(members)], minlength=len(distinct))
    n = np.bincount(where[len(members) :], minlength=len(distinct))
    i, gain = _cut(distinct, m, n)
    return Threshold(_value(distinct, i), 0.5 + gain / (2 * len(members) * len(nonmembers)))


def _value(distinct: np.ndarray, i: int) -> float:
    if i == 0:
        return float(distinct[0])
    if i == len(distinct):
        return float(np.nextafter(distinct[-1], np.inf))
    middle = (distinct[i - 1] + distinct[i]) / 2
    return float(middle if middle > distinct[i - 1] else distinct[i])


def threshold_efficacy(
    members: np.ndarray, nonmembers: np.ndarray, forget: np.ndarray, *, draws: int = 200, seed: int = 0
) -> Estimate:
    """Share of forget samples below the best threshold, percent.

    The interval is a percentile bootstrap that resamples members, non-members and forget samples and sets the
    threshold anew in each draw, so it covers the choice of the threshold as well. The best cut is a cube-root
    estimator, for which such intervals are approximate.

    Args:
        members: Scores of known members ``[N]``.
        nonmembers: Scores of known non-members ``[M]``.
        forget: Scores of the forget set ``[F]``.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap's own generator.
    """
    rule = best_threshold(members, nonmembers)
    if len(forget) == 0:
        raise DataError("membership attack: no samples to be forgotten")
    pooled = np.concatenate([members, nonmembers]).astype(np.float64)
    distinct, where = np.unique(pooled, return_inverse=True)
    where_m, where_n = where[: len(members)], where[len(members) :]
    ordered = np.sort(np.asarray(forget, dtype=np.float64))
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = np.empty(draws)
    for b in range(draws):
        m = np.bincount(where_m[rng.integers(0, len(where_m), len(where_m))], minlength=len(distinct))
        n = np.bincount(where_n[rng.integers(0, len(where_n), len(where_n))], minlength=len(distinct))
        below = np.searchsorted(ordered, _value(distinct, _cut(distinct, m, n)[0]), side="left") / len(ordered)
        drawn[b] = 100 * rng.binomial(len(ordered), below) / len(ordered)
    value = 100 * float((~rule.predict(ordered)).mean())
    return from_draws(value, drawn, n=len(ordered), unit="%", method=f"best threshold, bootstrap of {draws} draws")


def class_threshold_mia(
    shadow_train: ClassifierOutputs,
    shadow_test: ClassifierOutputs,
    target_train: ClassifierOutputs,
    target_test: ClassifierOutputs,
) -> dict[str, tuple[float, float]]:
    """The published attack with one threshold per class, on four scores.

    Per class the candidates are the scores of ``shadow_train``, then of ``shadow_test``, in stored order; the first
    with the strictly largest balanced accuracy is kept. A class that one of the shadow sets lacks keeps threshold 0.

    Returns:
        Per score (share of target_train called member, share of target_test called non-member), fractions.
    """
    sets = [shadow_train, shadow_test, target_train, target_test]
    scores = [attack_scores(s) for s in sets]
    result = {"correctness": (float(target_train.correct.mean()), 1 - float(target_test.correct.mean()))}
    for name, sign in (("confidence", 1.0), ("entropy", -1.0), ("m_entropy", -1.0)):
        values = [sign * s[name] for s in scores]
        hits = [0, 0]
        for c in np.unique(np.concatenate([s.labels for s in sets])):
            own = [v[s.labels == c] for v, s in zip(values, sets, strict=True)]
            t = _first_best(own[0], own[1])
            hits[0] += int((own[2] >= t).sum())
            hits[1] += int((own[3] < t).sum())
        result[name] = (hits[0] / len(target_train), hits[1] / len(target_test))
    return result


def _first_best(train: np.ndarray, test: np.ndarray) -> float:
    if len(train) == 0 or len(test) == 0:
        return 0.0
    candidates = np.concatenate([train, test])
    above = (len(train) - np.searchsorted(np.sort(train), candidates, side="left")) / len(train)
    below = np.searchsorted(np.sort(test), candidates, side="left") / len(test)
    gain = 0.5 * (above + below)
    return float(candidates[gain.argmax()]) if gain.max() > 0 else 0.0
