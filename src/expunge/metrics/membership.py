"""Membership metrics on confidences: the SVC figure of the tables, its fast form, the best threshold, and AUC.

A figure of these attacks says "this attack, with n samples, found so much"; it never shows that nothing is left.
All are two-sided: the aim is the retrained model's value. Forgotten samples that stand out by being *less* likely
than unseen ones are recognisable too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from expunge import rng
from expunge.errors import DataError
from expunge.metrics.accuracy import COMMIT, PAPER, UPSTREAM
from expunge.metrics.describe import metric
from expunge.metrics.estimate import LEVEL, Estimate, proportion
from expunge.metrics.mia import svc_rule
from expunge.metrics.threshold import threshold_efficacy
from expunge.registry import Info

MIN_SAMPLES = 50
BINS = 256
_EXPLAIN = (
    "An attacker learns from the model's confidence how images used in training differ from new ones. The figure is "
    "the share of forgotten images it judges 'not used in training'. Far above the retrained model is as telling as "
    "far below."
)
_FIXED = "interval of the forget samples for the fitted attacker"


@dataclass(frozen=True, eq=False)
class AttackSets:
    """Confidences of equally many known members and known non-members, and of the forget set."""

    members: np.ndarray
    nonmembers: np.ndarray
    forget: np.ndarray


def attack_sets(
    members: np.ndarray,
    nonmembers: np.ndarray,
    forget: np.ndarray,
    *,
    member_ids: np.ndarray | None = None,
    forget_ids: np.ndarray | None = None,
    seed: int = 0,
    min_samples: int = MIN_SAMPLES,
) -> AttackSets:
    """Balance members and non-members (a seeded draw from the larger side) and check that they can carry a figure.

    Deviates: the published code takes the first samples of the retain set in stored order.

    Args:
        members: Confidences of training samples that stay ``[N]``.
        nonmembers: Confidences of samples never trained on ``[M]``.
        forget: Confidences of the forget set ``[F]``.
        member_ids: Train-set ids of the members, to check that none is in the forget set.
        forget_ids: Train-set ids of the forget set.
        seed: Of the draw.
        min_samples: Fewest samples per set.

    Raises:
        DataError: Too few samples, or members that are also evaluated.
    """
    for name, x in (("members", members), ("non-members", nonmembers), ("forget samples", forget)):
        if len(x) < min_samples:
            raise DataError(f"membership attack: {len(x)} {name}, at least {min_samples} are needed for a figure")
    if member_ids is not None and forget_ids is not None:
        shared = np.intersect1d(member_ids, forget_ids)
        if len(shared):
            raise DataError(f"membership attack: {len(shared)} forget samples are among the members it learns from")
    n = min(len(members), len(nonmembers))
    drawn = [
        x if len(x) == n else x[np.sort(rng.permutation(rng.key(seed, "mia_balance", side), len(x)).numpy()[:n])]
        for side, x in enumerate((members, nonmembers))
    ]
    return AttackSets(drawn[0], drawn[1], forget)


@metric(
    "mia_svc",
    Info(
        "MIA-efficacy: SVC on confidence, fitted on every sample.",
        PAPER,
        UPSTREAM,
        COMMIT,
        ("forget", "retain", "test"),
    ),
    label="MIA (full SVC)",
    explain=_EXPLAIN,
)
def mia_svc(sets: AttackSets) -> Estimate:
    """Share of forget samples called non-member by the published classifier, percent. About n^2 in time."""
    return _svc(sets, None, "SVC on confidence, Wilson 95 %")


@metric(
    "mia",
    Info(
        "MIA-efficacy: the SVC on confidence, fitted on weighted bins (same figure, about 100 times faster).",
        PAPER,
        UPSTREAM,
        COMMIT,
        ("forget", "retain", "test"),
        deviations=(f"Fitted on {BINS} weighted bin means per side instead of every sample.",),
    ),
    label="MIA",
    explain=_EXPLAIN,
)
def mia(sets: AttackSets) -> Estimate:
    """The figure of :func:`mia_svc` from a classifier fitted on weighted bin means, percent."""
    return _svc(sets, BINS, f"SVC on confidence, {BINS} weighted bins per side, Wilson 95 %")


def _svc(sets: AttackSets, bins: int | None, method: str) -> Estimate:
    called = svc_rule(sets.members, sets.nonmembers, bins=bins).predict(sets.forget)
    found = proportion(int((~called).sum()), len(called))
    note = f"{len(sets.members)} members and as many non-members; {_FIXED}"
    return Estimate(found.value, found.low, found.high, found.n, "%", method, note)


@metric(
    "mia_threshold",
    Info(
        "Share of forget samples below the confidence threshold that best separates members from non-members.",
        needs=("forget", "retain", "test"),
    ),
    label="MIA (best threshold)",
    explain="The same idea with the single best confidence cut-off, found exactly. It looks closer at confidences near "
    "100 % than MIA does, so the two figures differ and cannot stand in for each other.",
)
def mia_threshold(sets: AttackSets, *, draws: int = 200, seed: int = 0) -> Estimate:
    """Share of forget samples below the exact best threshold, percent, with a bootstrap interval."""
    return threshold_efficacy(sets.members, sets.nonmembers, sets.forget, draws=draws, seed=seed)


def auc(higher: np.ndarray, lower: np.ndarray) -> Estimate:
    """Chance that a random ``higher`` sample scores above a random ``lower`` one, ties counted half; 0 to 1.

    Interval: Newcombe's method 5 (Statistics in Medicine 2006), which solves ``(AUC - t)^2 = z^2 V(t)`` and stays
    sensible at 0 and 1.

    Raises:
        DataError: One side is empty.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm, rankdata

    m, n = len(higher), len(lower)
    if m == 0 or n == 0:
        raise DataError(f"auc: {m} and {n} samples; both sides need some")
    ranks = rankdata(np.concatenate([higher, lower]))
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    z, extra = float(norm.ppf(0.5 + LEVEL / 2)), (m + n) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) / (m * n) * (1 + extra * (1 - t) / (2 - t) + extra * t / (1 + t))
        return abs(value - t) - z * math.sqrt(variance)

    edge = 1e-12
    low = brentq(excess, edge, min(value, 1 - edge)) if value > edge and excess(edge) > 0 else 0.0
    high = brentq(excess, max(value, edge), 1 - edge) if value < 1 - edge and excess(1 - edge) > 0 else 1.0
    return Estimate(value, min(low, value), max(high, value), min(m, n), "", "AUC, Newcombe 95 % interval")


@metric(
    "attack_auc",
    Info("How well confidence separates kept training samples from unseen ones.", needs=("retain", "test")),
    label="Attack strength (AUC)",
    explain="How well the attacker tells kept training images from new ones: 0.5 is guessing, 1 is perfect. Near 0.5 "
    "the attack is too weak here to show anything about the forgotten images.",
    unit="",
    bounds=(0.0, 1.0),
)
def attack_auc(members: np.ndarray, nonmembers: np.ndarray) -> Estimate:
    """AUC of confidence, members against non-members. No fitting, so all samples are used."""
    return auc(members, nonmembers)


@metric(
    "forget_auc",
    Info("How forgotten samples compare with unseen ones in confidence.", needs=("forget", "test")),
    label="Forgotten vs. new (AUC)",
    explain="Chance that a forgotten image gets a higher confidence than a new one: 0.5 means they look alike. Both "
    "sides tell an attacker something: far above, the images are still known; far below, they stand out as erased.",
    unit="",
    bounds=(0.0, 1.0),
)
def forget_auc(forget: np.ndarray, nonmembers: np.ndarray) -> Estimate:
    """AUC of confidence, forget set against samples never trained on."""
    return auc(forget, nonmembers)
