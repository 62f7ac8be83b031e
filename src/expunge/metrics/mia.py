"""The membership attack of the SalUn evaluation: a support vector classifier on one score per sample.

Paper: Fan et al., "SalUn", ICLR 2024 (MIA-efficacy); modified entropy: Song and Mittal, USENIX Security 2021, eq. 3.
Upstream: OPTML-Group/Unlearn-Saliency a6e89fd, Classification/evaluation/SVC_MIA.py.

Deviates: ``as_intended`` is the default for the modified entropy; the published code takes log p for log(1 - p) and
overwrites whole columns. ``svc_fast`` fits the same classifier on weighted bin means instead of on every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from expunge.errors import DataError
from expunge.metrics.outputs import ClassifierOutputs

Variant = Literal["as_intended", "as_published"]
FEATURES = ("correctness", "confidence", "entropy", "m_entropy", "prob")
_TINY = 1e-30
_C = 3.0


def attack_scores(outputs: ClassifierOutputs, variant: Variant = "as_intended") -> dict[str, np.ndarray]:
    """The five scores of the attack, float64: four ``[N]`` and the probability vector ``[N, C]``.

    * ``confidence`` p_y, ``correctness`` 0/1, ``entropy`` -sum p log p
    * ``m_entropy`` -(1 - p_y) log p_y - sum_{j != y} p_j log(1 - p_j), logarithms of max(value, 1e-30).
      ``as_published``: -sum_j a_j with a_j = (1 - p_j) log p_j for every class j that occurs among these labels and
      p_j log p_j for the others, so one sample's score depends on which other samples are present.
    """
    p, y = outputs.prob, outputs.labels
    rows = np.arange(len(y))
    log_p = np.log(np.maximum(p, _TINY))
    if variant == "as_published":
        present = np.isin(np.arange(p.shape[1]), y)
        m_entropy = -np.where(present, (1 - p) * log_p, p * log_p).sum(axis=1)
    else:
        terms = p * np.log(np.maximum(1 - p, _TINY))
        terms[rows, y] = (1 - p[rows, y]) * log_p[rows, y]
        m_entropy = -terms.sum(axis=1)
    return {
        "correctness": outputs.correct.astype(np.float64),
        "confidence": outputs.confidence,
        "entropy": -(p * log_p).sum(axis=1),
        "m_entropy": m_entropy,
        "prob": p,
    }


def fit_svc(members: np.ndarray, nonmembers: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Fit ``SVC(C=3, kernel="rbf", gamma="auto")``, members labelled 1, on scores ``[N]`` or ``[N, F]``.

    Raises:
        DataError: One side is empty.
    """
    from sklearn.svm import SVC

    if len(members) == 0 or len(nonmembers) == 0:
        raise DataError(f"membership attack: {len(members)} members and {len(nonmembers)} non-members to learn from")
    x = np.concatenate([_columns(members), _columns(nonmembers)])
    y = np.concatenate([np.ones(len(members)), np.zeros(len(nonmembers))])
    return SVC(C=_C, kernel="rbf", gamma="auto").fit(x, y, sample_weight=weights)


def _columns(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@dataclass(frozen=True, eq=False)
class SvcScore:
    """Result of one score's attack: reported fraction, and predictions and decision values per target."""

    score: float
    predicted: dict[str, np.ndarray]
    decision: dict[str, np.ndarray]


def svc_mia(
    shadow_train: ClassifierOutputs,
    shadow_test: ClassifierOutputs,
    target_test: ClassifierOutputs,
    target_train: ClassifierOutputs | None = None,
    *,
    features: tuple[str, ...] = FEATURES,
    variant: Variant = "as_intended",
) -> dict[str, SvcScore]:
    """The published attack, one classifier per score.

    Args:
        shadow_train: Known members to learn from.
        shadow_test: Known non-members to learn from.
        target_test: The forget set; its part of the score is the share called non-member.
        target_train: Optional known members; their part is the share called member, and the score is the mean.
        features: Which of the five scores.
        variant: Definition of the modified entropy.

    Returns:
        Per feature the score as a fraction (times 100: MIA-efficacy).
    """
    train, test = attack_scores(shadow_train, variant), attack_scores(shadow_test, variant)
    targets = {"target_test": attack_scores(target_test, variant)}
    if target_train is not None:
        targets["target_train"] = attack_scores(target_train, variant)
    results = {}
    for feature in features:
        svc = fit_svc(train[feature], test[feature])
        decision = {t: svc.decision_function(_columns(s[feature])) for t, s in targets.items()}
        predicted = {t: svc.predict(_columns(s[feature])).astype(np.uint8) for t, s in targets.items()}
        parts = [1 - float(predicted["target_test"].mean())]
        if target_train is not None:
            parts.insert(0, float(predicted["target_train"].mean()))
        results[feature] = SvcScore(float(np.mean(parts)), predicted, decision)
    return results


@dataclass(frozen=True, eq=False)
class DecisionTable:
    """A decision on one score as the points where it changes: ``cuts`` ascending, ``first`` left of all of them.

    A sample on a cut belongs to the right side.
    """

    cuts: np.ndarray
    first: bool

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Whether each score is called a member, bool ``[N]``."""
        return (np.searchsorted(self.cuts, scores, side="right") % 2 == 1) != self.first


def tabulate(
    decision: Callable[[np.ndarray], np.ndarray], low: float = 0.0, high: float = 1.0, points: int = 2049
) -> DecisionTable:
    """Find where a smooth decision function changes sign on ``[low, high]``.

    The kernel of the attack has width 0.7 on ``[0, 1]``; a grid of 2,049 points cannot miss one of its sign changes,
    each of which is then located by Brent's method.

    Args:
        decision: Vectorised; positive means member.
        low: Smallest possible score.
        high: Largest possible score.
        points: Grid points.
    """
    from scipy.optimize import brentq

    grid = np.linspace(low, high, points)
    member = decision(grid) > 0
    cuts = [
        brentq(lambda x: float(decision(np.array([x]))[0]), grid[i], grid[i + 1], xtol=1e-14)
        for i in np.flatnonzero(member[1:] != member[:-1])
    ]
    return DecisionTable(np.array(cuts), bool(member[0]))


def condense(scores: np.ndarray, bins: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Replace sorted scores by the means of ``bins`` equally filled bins and their counts.

    With ``len(scores) <= bins`` nothing is lost: every sample is its own bin.
    """
    ordered = np.sort(scores)
    edges = np.linspace(0, len(ordered), min(bins, len(ordered)) + 1).astype(np.int64)
    counts = np.diff(edges).astype(np.float64)
    return np.add.reduceat(ordered, edges[:-1]) / counts, counts


def svc_rule(members: np.ndarray, nonmembers: np.ndarray, *, bins: int | None = None) -> DecisionTable:
    """The support vector decision on confidence, as a table of cuts.

    Args:
        members: Confidences of members ``[N]``.
        nonmembers: Confidences of non-members ``[M]``.
        bins: None fits on every sample, as published. A number fits on that many weighted bin means per side: the
            kernel is far smoother than a bin is wide, so the decision moves by less than a sample or two in a
            thousand, at about a hundredth of the time for 10,000 samples.
    """
    if bins is None:
        svc = fit_svc(members, nonmembers)
    else:
        (a, wa), (b, wb) = condense(members, bins), condense(nonmembers, bins)
        svc = fit_svc(a, b, np.concatenate([wa, wb]))
    return tabulate(lambda x: svc.decision_function(x[:, None]))
