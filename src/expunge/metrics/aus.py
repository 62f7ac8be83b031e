"""The adaptive unlearning score: what was kept over what was forgotten, as one number.

Paper: Bonato, Cotogni, Sabetta, "Is Retain Set All You Need in Machine Unlearning?", ECCV 2024 (arXiv 2404.12922).
Upstream: jbonato1/SCAR 280ceae, src/main.py.
Deviates: the accuracy of the original is measured on the same checkpoint and the same test samples, runs are scored one
by one, and the error counts an accuracy that occurs twice once. :func:`aus_published` keeps the published way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.errors import DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, mean, not_run
from expunge.metrics.mia import Variant
from expunge.registry import Info

PAPER = "Bonato et al., SCAR, ECCV 2024, arXiv 2404.12922"
UPSTREAM = "https://github.com/jbonato1/SCAR"
COMMIT = "280ceae"
#: Published accuracies of the original, ``{data set: {class-wise: (mean, std)}}``.
PUBLISHED_ORIGINAL: dict[str, dict[bool, tuple[float, float]]] = {
    "cifar10": {False: (0.8872, 0.0028), True: (0.8864, 0.0063)},
    "cifar100": {False: (0.7756, 0.0029), True: (0.7755, 0.0011)},
    "tiny_imagenet": {False: (0.6822, 0.0054), True: (0.6840, 0.0007)},
}


def aus(a_or: Any, a_t: Any, a_f: Any, *, class_wise: bool) -> np.ndarray:
    """The score, element-wise; accuracies are fractions.

    Class requests: ``(1 - (A_or - A_r^t)) / (1 + A_f^t)``. Sample requests: ``(1 - (A_or - A^t)) / (1 + |A_f - A^t|)``.

    Args:
        a_or: Test accuracy of the original model.
        a_t: Test accuracy of the model; on the classes that stay for a class request.
        a_f: Accuracy on the forgotten classes' test samples (class request) or on the forget set (sample request).
        class_wise: Whole classes were forgotten.

    Raises:
        DataError: An accuracy outside [0, 1], such as a percentage.

    >>> round(float(aus(0.7755, 0.7293, 0.02, class_wise=True)), 4)
    0.9351
    """
    o, t, f = (np.asarray(x, dtype=np.float64) for x in (a_or, a_t, a_f))
    for name, x in (("a_or", o), ("a_t", t), ("a_f", f)):
        if not ((x >= 0) & (x <= 1)).all():  # also catches NaN
            raise DataError(f"aus: {name} has {x.min():.4g} to {x.max():.4g}; accuracies are fractions in [0, 1]")
    return (1 - (o - t)) / (1 + (f if class_wise else np.abs(f - t)))


def aus_error(
    a_or: Any,
    a_t: Any,
    a_f: Any,
    errors: tuple[Any, Any, Any],
    *,
    class_wise: bool,
    variant: Variant = "as_intended",
) -> np.ndarray:
    """First-order error of the score from the errors of its three accuracies, taken as independent.

    Args:
        a_or: As in :func:`aus`.
        a_t: As in :func:`aus`.
        a_f: As in :func:`aus`.
        errors: Standard errors of the three, in this order.
        class_wise: As in :func:`aus`.
        variant: ``as_published`` treats the two occurrences of ``a_t`` in the second form as independent numbers.
    """
    o, t, f = (np.asarray(x, dtype=np.float64) for x in (a_or, a_t, a_f))
    s_o, s_t, s_f = (np.asarray(x, dtype=np.float64) for x in errors)
    score = aus(o, t, f, class_wise=class_wise)
    below = 1 + (f if class_wise else np.abs(f - t))
    up, down = 1 / below, score / below  # derivatives of numerator and denominator, up to sign
    if class_wise:
        return np.sqrt((up * s_o) ** 2 + (up * s_t) ** 2 + (down * s_f) ** 2)
    if variant == "as_published":
        return np.sqrt((up * s_o) ** 2 + (up * s_t) ** 2 + (down * s_t) ** 2 + (down * s_f) ** 2)
    sign = np.sign(t - f)
    return np.sqrt((up * s_o) ** 2 + ((up - sign * down) * s_t) ** 2 + (sign * down * s_f) ** 2)


@metric(
    "aus",
    Info(
        "Adaptive unlearning score: accuracy kept, over what is still known of the forgotten data.",
        PAPER,
        UPSTREAM,
        COMMIT,
        needs=("forget", "test", "before"),
        deviations=(
            "The original's accuracy is measured on the same checkpoint and test samples, not a published constant.",
            "Runs are scored one by one; the published code scores the means over runs.",
            "The error counts the test accuracy once where the formula holds it twice.",
        ),
    ),
    label="AUS",
    explain="One number for both aims: 1 means the test accuracy of the original and nothing left of the forgotten "
    "data (for a class: none of its test images recognised; for samples: as accurate on them as on new data). It "
    "falls when accuracy is lost or forgetting is incomplete, and is above 1 if the model became better.",
    unit="",
    direction="higher",
    bounds=(0.0, 2.0),
)
def aus_estimate(measured: Mapping[str, Any], before: Mapping[str, Any], class_wise: bool) -> Estimate:
    """The score of one run against the original model measured in the same evaluation.

    The interval is the first-order error from the intervals of the accuracies, taken as independent. The test samples
    of original and model are the same, so it is rather too wide than too narrow.

    Args:
        measured: Figures of the model in percent: ``ta`` and ``forget_test`` (class request) or ``ua``; estimates, or
            estimates as plain values.
        before: Figures of the untouched model; its ``ta`` is read.
        class_wise: Whole classes were forgotten.
    """
    key = "forget_test" if class_wise else "ua"
    parts = [("the original's test accuracy", before.get("ta")), ("test accuracy", measured.get("ta"))]
    parts.append(("accuracy on the forgotten data", measured.get(key)))
    values, halves, n = [], [], 0
    for name, given in parts:
        e = Estimate.from_dict(given) if isinstance(given, Mapping) else given
        if e is None or e.value is None:
            return not_run(f"{name} was not measured")
        values.append(e.value / 100)
        halves.append(None if e.low is None or e.high is None else (e.high - e.low) / 200)
        n = e.n if not n else min(n, e.n)
    o, t, f = values[0], values[1], values[2] if class_wise else 1 - values[2]
    value = float(aus(o, t, f, class_wise=class_wise))
    known = [h for h in halves if h is not None]
    if len(known) < len(halves):
        return Estimate(value, n=n, method="AUS, no interval")
    # the error is linear in its inputs, so half-widths of 95 % intervals give a half-width
    half = float(aus_error(o, t, f, (known[0], known[1], known[2]), class_wise=class_wise))
    return Estimate(value, max(0.0, value - half), value + half, n, "", "AUS, first-order 95 % interval")


def aus_runs(
    a_or: Sequence[float], a_t: Sequence[float], a_f: Sequence[float], *, class_wise: bool
) -> tuple[Estimate, float]:
    """The score of every run, then their mean (t interval) and sample standard deviation.

    Args:
        a_or: Accuracy of each run's original model.
        a_t: As in :func:`aus`, one per run.
        a_f: As in :func:`aus`, one per run.
        class_wise: As in :func:`aus`.

    Raises:
        DataError: Fewer than two runs, or unequal numbers of values.
    """
    if not len(a_or) == len(a_t) == len(a_f) or len(a_or) < 2:
        raise DataError(f"aus: {len(a_or)}, {len(a_t)} and {len(a_f)} values; runs, at least two, need one of each")
    scores = aus(a_or, a_t, a_f, class_wise=class_wise)
    return mean(scores.tolist()), float(scores.std(ddof=1))


def aus_published(
    dataset: str,
    *,
    a_t: tuple[float, float],
    a_f: tuple[float, float],
    class_wise: bool,
) -> tuple[float, float]:
    """The published table entry: score and error from (mean, std) over runs and the published original.

    Raises:
        DataError: No constant was published for the data set.
    """
    if dataset not in PUBLISHED_ORIGINAL:
        raise DataError(f"aus: no published accuracy for {dataset!r}; there is one for {', '.join(PUBLISHED_ORIGINAL)}")
    original = PUBLISHED_ORIGINAL[dataset][class_wise]
    values = (original[0], a_t[0], a_f[0])
    errors = (original[1], a_t[1], a_f[1])
    score = aus(*values, class_wise=class_wise)
    return float(score), float(aus_error(*values, errors, class_wise=class_wise, variant="as_published"))
