"""The membership attack of SCAR: a support vector machine on whole softmax vectors, mended and as published.

Paper: Bonato, Cotogni, Sabetta, "Is Retain Set All You Need in Machine Unlearning?", ECCV 2024 (arXiv 2404.12922).
Upstream: jbonato1/SCAR 280ceae, src/MIA_code/MIA.py.

Members are the samples to be forgotten, non-members test samples: of the forgotten classes for a class request.

Deviates: as intended, both sides have equally many distinct samples, features are standardised, the splits are
stratified and seeded, and balanced accuracy and AUC are reported. The published attack on a class has three members per
non-member (guessing gives 75 %), shuffles so that about half of the rows are lost and others repeat, on both sides of
its train-test split, and calls plain accuracy F1. The attack on samples has none of these faults.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expunge import rng
from expunge.errors import DataError
from expunge.metrics.aus import COMMIT, PAPER, UPSTREAM
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, not_run, wilson
from expunge.metrics.membership import MIN_SAMPLES, auc
from expunge.metrics.outputs import ClassifierOutputs
from expunge.registry import Info

GRID_C = (1.0, 5.0, 10.0, 100.0)
GRID_GAMMA = (1.0, 0.1, 0.01)
FOLDS = 3
REPETITIONS = 5
#: Largest number of samples per side of the mended attack in reports: the search fits 37 machines per repetition.
MAX_PER_SIDE = 1000


@dataclass(frozen=True, eq=False)
class AttackResult:
    """One repetition. Decision values are positive for label 1.

    Args:
        labels: True labels of the attack's test rows.
        predicted: Its calls.
        decision: Its decision values.
        cv_accuracy: Mean fold accuracy of the twelve settings, gamma fastest.
        best: The chosen ``(C, gamma)``.
    """

    labels: np.ndarray
    predicted: np.ndarray
    decision: np.ndarray
    cv_accuracy: np.ndarray
    best: tuple[float, float]

    @property
    def accuracy(self) -> float:
        """Share of right calls, which micro-averaged precision, recall and F1 equal."""
        return float((self.predicted == self.labels).mean())

    def accuracy_of(self, label: int) -> float:
        """Share of right calls among the rows of one label."""
        rows = self.labels == label
        return float((self.predicted[rows] == label).mean())

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two labels' accuracies; 0.5 is guessing whatever their numbers."""
        return (self.accuracy_of(0) + self.accuracy_of(1)) / 2

    @property
    def f1(self) -> float:
        """F1 of label 1, as the name says: ``2 TP / (2 TP + FP + FN)``."""
        hit = int((self.predicted & self.labels).sum())
        return 2 * hit / max(1, int(self.predicted.sum() + self.labels.sum()))

    @property
    def roc_auc(self) -> Estimate:
        """AUC of the decision values with its interval."""
        return auc(self.decision[self.labels == 1], self.decision[self.labels == 0])

    @property
    def mutual_information(self) -> float:
        """Mutual information of call and truth in bits."""
        from sklearn.metrics import mutual_info_score

        return float(mutual_info_score(self.labels, self.predicted) / np.log(2))


def grid_attack(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    folds: Any = FOLDS,
    class_weight: str | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = -1,
    random_state: int = 0,
) -> AttackResult:
    """Choose C and gamma by cross-validated accuracy, refit on all training rows, call the test rows.

    Args:
        train_x: Rows the attack learns from ``[N, F]``.
        train_y: Their labels, 0 or 1.
        test_x: Rows it is judged on ``[M, F]``.
        test_y: Their labels.
        folds: A number (stratified by position) or the fold number of every training row ``[N]``.
        class_weight: As in scikit-learn.
        tolerance: Stopping tolerance of the solver.
        max_iterations: Limit of the solver, -1 for none.
        random_state: Passed to the machine, which does not use it for decision values.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.svm import SVC

    machine = SVC(
        kernel="rbf", tol=tolerance, max_iter=max_iterations, class_weight=class_weight, random_state=random_state
    )
    cv = PredefinedSplit(folds) if isinstance(folds, np.ndarray) else folds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published limit of 4,000 iterations is often met
        search = GridSearchCV(machine, {"C": list(GRID_C), "gamma": list(GRID_GAMMA)}, cv=cv).fit(train_x, train_y)
    best = (float(search.best_params_["C"]), float(search.best_params_["gamma"]))
    return AttackResult(
        np.asarray(test_y, dtype=np.int64),
        search.predict(test_x).astype(np.int64),
        search.decision_function(test_x),
        np.asarray(search.cv_results_["mean_test_score"]),
        best,
    )


def attack(members: np.ndarray, nonmembers: np.ndarray, *, tolerance: float = 1e-4) -> AttackResult:
    """The mended attack on rows in an order already drawn; label 1 is a member.

    The first 70 % of each side train the attack. Features are standardised by its training rows, classes weighted, and
    the folds of the search hold equally many of both sides.

    Args:
        members: Softmax vectors ``[N, C]`` of samples that were trained on.
        nonmembers: Softmax vectors ``[N, C]`` of as many others that were not.
        tolerance: Stopping tolerance of the solver.

    Raises:
        DataError: Unequal or too few rows.
    """
    n = len(members)
    cut = round(0.7 * n)
    if len(nonmembers) != n or cut < 2 * FOLDS or n == cut:
        raise DataError(f"mia_scar: {n} members and {len(nonmembers)} non-members; needs as many of both, at least 9")
    train = np.concatenate([members[:cut], nonmembers[:cut]]).astype(np.float64)
    test = np.concatenate([members[cut:], nonmembers[cut:]]).astype(np.float64)
    centre, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread == 0] = 1.0  # a class that no row mentions tells nothing
    sides = np.array([1, 0])
    return grid_attack(
        (train - centre) / spread,
        np.repeat(sides, cut),
        (test - centre) / spread,
        np.repeat(sides, n - cut),
        folds=np.tile(np.arange(cut) % FOLDS, 2),
        class_weight="balanced",
        tolerance=tolerance,
    )


def draw_sides(n_members: int, n_nonmembers: int, *, key: int, limit: int | None = None) -> tuple[np.ndarray, ...]:
    """Equally many distinct rows of both sides in random order; the streams of the sides differ."""
    n = min(n_members, n_nonmembers, *([] if limit is None else [limit]))
    sides = enumerate((n_members, n_nonmembers))
    return tuple(rng.permutation(rng.key(key, "mia_scar", side), size).numpy()[:n] for side, size in sides)


def scar_attack(
    members: np.ndarray,
    nonmembers: np.ndarray,
    *,
    seed: int = 0,
    repetitions: int = REPETITIONS,
    limit: int | None = MAX_PER_SIDE,
) -> list[AttackResult]:
    """The mended attack, repeated with other draws and splits.

    Args:
        members: Softmax vectors ``[N, C]``.
        nonmembers: Softmax vectors ``[M, C]`` of other samples.
        seed: Of the draws.
        repetitions: How often.
        limit: Most samples per side.
    """
    found = []
    for repetition in range(repetitions):
        key = rng.key(seed, "repetition", repetition)
        rows = draw_sides(len(members), len(nonmembers), key=key, limit=limit)
        found.append(attack(members[rows[0]], nonmembers[rows[1]]))
    return found


def published_shuffle(n: int, key: int) -> np.ndarray:
    """Which old row the published shuffle leaves in every new row ``[n]``.

    Swapping two rows of a tensor by assignment copies the second over the first and then back onto itself, so a
    Fisher-Yates shuffle gives row ``i`` a row drawn from ``0..i`` and loses what was there.
    """
    rows = torch.arange(n)
    draws = rng.uniform_bits(key, rows) >> np.uint64(11)
    return (draws % (rows.numpy().astype(np.uint64) + np.uint64(1))).astype(np.int64)


def published_rows(
    members: np.ndarray, nonmembers: np.ndarray, *, class_wise: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training rows and labels, test rows and labels of the published attack, from sides in their drawn order.

    Label 0 is a member. A class request keeps up to three members per non-member and puts non-members first; a sample
    request keeps one and puts members first. Each side is split 80 to 20 by position.
    """
    members = members[: len(nonmembers) * (3 if class_wise else 1)]
    sides = [(members, 0), (nonmembers, 1)]
    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    labels: tuple[list[int], list[int]] = ([], [])
    for rows, label in reversed(sides) if class_wise else sides:
        cut = int(0.8 * len(rows))
        train.append(rows[:cut])
        test.append(rows[cut:])
        labels[0].extend([label] * cut)
        labels[1].extend([label] * (len(rows) - cut))
    return np.concatenate(train), np.array(labels[0]), np.concatenate(test), np.array(labels[1])


def published_attack(
    members: np.ndarray, nonmembers: np.ndarray, *, class_wise: bool, random_state: int = 0
) -> AttackResult:
    """One repetition of the published attack on sides in their drawn order."""
    rows = published_rows(members, nonmembers, class_wise=class_wise)
    return grid_attack(*rows, max_iterations=4000, random_state=random_state)


def scar_attack_published(
    members: np.ndarray, nonmembers: np.ndarray, *, class_wise: bool, seed: int = 0, repetitions: int = REPETITIONS
) -> list[AttackResult]:
    """The published attack with its faults, repeated with other shuffles."""
    found = []
    for repetition in range(repetitions):
        keys = [rng.key(seed, "mia_scar_published", repetition, side) for side in (0, 1)]
        if class_wise:
            new = nonmembers[published_shuffle(len(nonmembers), keys[1])]
            old = members[published_shuffle(len(members), keys[0])]
        else:
            new, old = nonmembers, members[rng.permutation(keys[0], len(members)).numpy()]
        found.append(published_attack(old, new, class_wise=class_wise, random_state=repetition))
    return found


_EXPLAIN = (
    "An attacker who sees all class probabilities learns to tell the forgotten images from new ones, and is tested on "
    "images it did not learn from. "
)


@metric(
    "mia_scar",
    Info(
        "SCAR's attack, mended: balanced accuracy of an SVM on softmax vectors, forget set against unseen samples.",
        PAPER,
        UPSTREAM,
        COMMIT,
        needs=("forget", "test"),
        deviations=(
            "Equally many distinct samples of both sides, standardised, with stratified splits and folds.",
            f"At most {MAX_PER_SIDE} samples per side.",
            "Balanced accuracy instead of an accuracy called F1.",
        ),
    ),
    label="MIA (SCAR)",
    explain=_EXPLAIN + "The figure is its balanced accuracy: 50 % is guessing. Compare with the retrained model.",
)
def mia_scar(results: list[AttackResult]) -> Estimate:
    """Mean balanced accuracy over repetitions, percent; the interval is that of one repetition's test samples."""
    values = [r.balanced_accuracy for r in results]
    n = len(results[0].labels)
    ends = np.array([wilson(round(v * n), n) for v in values])
    value, (low, high) = float(np.mean(values)), ends.mean(axis=0)
    method = f"balanced accuracy, mean of {len(results)} repetitions, Wilson 95 % of one"
    return Estimate(100 * value, 100 * min(low, value), 100 * max(high, value), n, "%", method)


@metric(
    "mia_scar_auc",
    Info(
        "AUC of SCAR's attack, mended.",
        PAPER,
        UPSTREAM,
        COMMIT,
        needs=("forget", "test"),
        deviations=("Not published; see mia_scar.",),
    ),
    label="MIA (SCAR), AUC",
    explain=_EXPLAIN + "Chance that it ranks a forgotten image above a new one: 0.5 is guessing.",
    unit="",
    bounds=(0.0, 1.0),
)
def mia_scar_auc(results: list[AttackResult]) -> Estimate:
    """Mean AUC over repetitions; the interval is that of one repetition's test samples."""
    found = [r.roc_auc for r in results]
    value, low, high = (float(np.mean([getattr(e, k) for e in found])) for k in ("value", "low", "high"))
    method = f"AUC, mean of {len(results)} repetitions, Newcombe 95 % of one"
    return Estimate(value, low, high, len(results[0].labels), "", method)


@metric(
    "mia_scar_published",
    Info(
        "SCAR's attack with all its faults, for comparison with published tables only.",
        PAPER,
        UPSTREAM,
        COMMIT,
        needs=("forget", "test"),
        deviations=("The shuffles come from this library's generator, so single repetitions differ.",),
    ),
    label="MIA (SCAR, as published)",
    explain="The published form of the attack, to compare with published tables. For a class, guessing gives 75 %, and "
    "rows it is tested on are among those it learned from: read the other attacks instead.",
)
def mia_scar_published(results: list[AttackResult], class_wise: bool) -> Estimate:
    """Mean plain accuracy (there called F1) over repetitions, percent, without an interval."""
    value = float(np.mean([r.accuracy for r in results]))
    note = "guessing gives 75 %; attack test rows recur in its training rows" if class_wise else "guessing gives 50 %"
    method = f"accuracy, mean of {len(results)} repetitions, no interval"
    return Estimate(100 * value, n=len(results[0].labels), unit="%", method=method, note=note)


def measure_scar(
    outputs: Mapping[str, ClassifierOutputs],
    *,
    class_wise: bool,
    seed: int = 0,
    published: bool = False,
    min_samples: int = MIN_SAMPLES,
) -> dict[str, Estimate]:
    """The attack's figures from the outputs of each role, or the reason why there are none."""
    names = ("mia_scar_published",) if published else ("mia_scar", "mia_scar_auc")
    other = "forget_test" if class_wise else "test"
    for role in ("forget", other):
        if len(outputs.get(role, ())) < min_samples:
            have = len(outputs.get(role, ()))
            reason = f"{have} {role.replace('_', ' ')} samples, at least {min_samples} are needed"
            return {name: not_run(reason, unit="" if name.endswith("auc") else "%") for name in names}
    members, nonmembers = outputs["forget"].prob, outputs[other].prob
    if published:
        results = scar_attack_published(members, nonmembers, class_wise=class_wise, seed=seed)
        return {"mia_scar_published": mia_scar_published(results, class_wise)}
    results = scar_attack(members, nonmembers, seed=seed)
    return {"mia_scar": mia_scar(results), "mia_scar_auc": mia_scar_auc(results)}
