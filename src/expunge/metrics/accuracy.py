"""Accuracy on what was forgotten, kept and never seen (UA, RA, TA), per class, and the average gap.

Paper: Fan et al., "SalUn", ICLR 2024, section 5 (arXiv 2310.12508).
Upstream: OPTML-Group/Unlearn-Saliency a6e89fd, Classification/trainer/val.py.
Deviates: accuracies are exact counts instead of float32 averages of batch means; every value has an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expunge.errors import DataError, NotComparableError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, mean, proportion
from expunge.metrics.outputs import ClassifierOutputs
from expunge.registry import Info

PAPER = "Fan et al., SalUn, ICLR 2024, arXiv 2310.12508"
UPSTREAM = "https://github.com/OPTML-Group/Unlearn-Saliency"
COMMIT = "a6e89fd"
GAP_KEYS = ("ua", "ra", "ta", "mia")


def accuracy(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Share of samples whose most likely class is the true one, in percent.

    Raises:
        DataError: No samples.
    """
    if len(outputs) == 0:
        raise DataError("accuracy: no samples")
    return proportion(int(outputs.correct.sum()), len(outputs), note=note)


@metric(
    "ua",
    Info("Share of forgotten samples the model now gets wrong.", PAPER, UPSTREAM, COMMIT, needs=("forget",)),
    label="UA (forgetting)",
    explain="Share of the samples to be forgotten that the model now gets wrong (100 % minus accuracy). A model that "
    "never saw them still recognises many from similar ones, so the aim is the retrained model's value, not 100 %.",
)
def unlearning_accuracy(forget: ClassifierOutputs, *, note: str = "") -> Estimate:
    """UA = 100 - accuracy on the forget set, percent."""
    if len(forget) == 0:
        raise DataError("ua: no samples to be forgotten")
    return proportion(int((~forget.correct).sum()), len(forget), note=note)


@metric(
    "ra",
    Info("Accuracy on the training samples that stay.", PAPER, UPSTREAM, COMMIT, needs=("retain",)),
    label="RA (kept data)",
    explain="Accuracy on the training data that stay. A clear fall means that forgetting damaged the rest.",
    direction="higher",
)
def retain_accuracy(retain: ClassifierOutputs, *, note: str = "") -> Estimate:
    """RA, percent."""
    return accuracy(retain, note=note)


@metric(
    "ta",
    Info("Accuracy on test samples.", PAPER, UPSTREAM, COMMIT, needs=("test",)),
    label="TA (new data)",
    explain="Accuracy on data the model never trained on: is it still useful? "
    "When a whole class is forgotten, that class is left out here.",
    direction="higher",
)
def unseen_accuracy(test: ClassifierOutputs, *, note: str = "") -> Estimate:
    """TA, percent."""
    return accuracy(test, note=note)


@metric(
    "val_accuracy",
    Info("Accuracy on validation samples.", needs=("val",)),
    label="Validation data",
    explain="Accuracy on held-out data that may have been used to choose settings or when to stop; a rough guide only.",
    direction="higher",
)
def validation_accuracy(val: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Accuracy on the validation set, percent."""
    return accuracy(val, note=note)


@metric(
    "forget_test",
    Info("Accuracy on unseen samples of the forgotten class.", needs=("forget_test",)),
    label="Forgotten class, new data",
    explain="Accuracy on test images of the forgotten class, never used in training. Low means the model lost the "
    "class itself and not only the particular images it was trained on.",
    direction="lower",
)
def forget_test_accuracy(forget_test: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Accuracy on the forgotten class's test samples, percent."""
    return accuracy(forget_test, note=note)


def per_class_accuracy(outputs: ClassifierOutputs, n_classes: int | None = None) -> dict[int, Estimate]:
    """Accuracy per true class, percent; classes without samples are absent from the result."""
    size = outputs.table.shape[1] if n_classes is None else n_classes
    total = np.bincount(outputs.labels, minlength=size)
    right = np.bincount(outputs.labels[outputs.correct], minlength=size)
    return {c: proportion(int(right[c]), int(total[c])) for c in range(size) if total[c]}


def constant_prediction(outputs: ClassifierOutputs) -> int | None:
    """The class predicted for every sample, if it is the same for all and the true labels differ."""
    predicted = outputs.table.argmax(axis=1)
    if len(predicted) > 1 and (predicted == predicted[0]).all() and len(np.unique(outputs.labels)) > 1:
        return int(predicted[0])
    return None


def _averages(runs: Mapping[str, float] | Sequence[Mapping[str, float]], keys: Sequence[str]) -> dict[str, float]:
    listed = [runs] if isinstance(runs, Mapping) else list(runs)
    if not listed:
        raise DataError("avg_gap: no runs")
    for key in keys:
        if any(key not in run for run in listed):
            raise NotComparableError(f"avg_gap: {key!r} was not measured in every run; the mean over fewer is no gap")
    return {key: float(np.mean([run[key] for run in listed])) for key in keys}


@metric(
    "avg_gap",
    Info(
        "Mean distance to the retrained model over UA, RA, TA and MIA.", PAPER, UPSTREAM, COMMIT, needs=("reference",)
    ),
    label="Average gap",
    explain="Mean distance to a model retrained without the data, over UA, RA, TA and MIA, in percentage points. "
    "0 would mean: the same four figures as retraining.",
    direction="lower",
)
def avg_gap(
    values: Mapping[str, float] | Sequence[Mapping[str, float]],
    reference: Mapping[str, float] | Sequence[Mapping[str, float]],
    keys: Sequence[str] = GAP_KEYS,
) -> float:
    """Gap of means: mean over ``keys`` of ``|mean(values) - mean(reference)|``, in percentage points.

    Args:
        values: One run ``{key: percent}`` or a list of runs.
        reference: The same of the retrained model.
        keys: Metrics to average over.

    Raises:
        NotComparableError: A key is missing somewhere.

    >>> run = {"ua": 2.85, "ra": 99.62, "ta": 93.93, "mia": 14.39}
    >>> retrained = {"ua": 5.24, "ra": 100.0, "ta": 94.26, "mia": 12.88}
    >>> round(avg_gap(run, retrained), 2)
    1.15
    """
    a, b = _averages(values, keys), _averages(reference, keys)
    return float(np.mean([abs(a[key] - b[key]) for key in keys]))


def seed_gap(
    values: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]], keys: Sequence[str] = GAP_KEYS
) -> Estimate:
    """Mean of the gaps of runs paired by seed, with a t interval; never smaller than the gap of means.

    Raises:
        NotComparableError: The numbers of runs differ, or a key is missing.
    """
    if len(values) != len(reference):
        raise NotComparableError(f"seed_gap: {len(values)} runs against {len(reference)} reference runs; pair them")
    return mean([avg_gap(a, b, keys) for a, b in zip(values, reference, strict=True)], unit="points")
