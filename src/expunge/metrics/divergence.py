"""How far the predictions of two models lie apart, sample by sample: Jensen-Shannon distance and KL divergence.

Both in bits, from log-probabilities in float64. The reference is a model retrained without the data.
Source: Lin, IEEE Trans. Inf. Theory 37 (1991), eq. 4.1; Endres and Schindelin, IEEE Trans. Inf. Theory 49 (2003).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from expunge.errors import NotComparableError
from expunge.metrics.accuracy import GAP_KEYS, avg_gap
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate, bootstrap, not_run
from expunge.metrics.outputs import ClassifierOutputs, log_softmax
from expunge.registry import Info

ROLES = ("forget", "test")
_DRAWS = 200


def _log(outputs: ClassifierOutputs) -> np.ndarray:
    """Log-probabilities ``[N, C]``; minus infinity where a probability is 0."""
    if outputs.logits is not None:
        return log_softmax(outputs.logits)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(outputs.prob))


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """``sum_j p_j (log p_j - log q_j)`` per row in bits; terms with ``p_j = 0`` are 0."""
    p = np.exp(log_p)
    difference = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=p > 0)
    return np.maximum((p * difference).sum(axis=1) / math.log(2), 0.0)


def _aligned(a: ClassifierOutputs, b: ClassifierOutputs) -> tuple[np.ndarray, np.ndarray]:
    same = a.table.shape == b.table.shape and np.array_equal(a.labels, b.labels)
    if not same or (a.ids is not None and b.ids is not None and not np.array_equal(a.ids, b.ids)):
        raise NotComparableError(
            f"divergence: outputs of shape {a.table.shape} and {b.table.shape} are not of the same samples in one order"
        )
    return _log(a), _log(b)


def js_distances(a: ClassifierOutputs, b: ClassifierOutputs) -> np.ndarray:
    """Jensen-Shannon distance per sample, ``sqrt((KL(p, m) + KL(q, m)) / 2)`` with ``m = (p + q) / 2``; 0 to 1.

    Raises:
        NotComparableError: The outputs belong to other samples.
    """
    p, q = _aligned(a, b)
    m = np.logaddexp(p, q) - math.log(2)
    return np.sqrt(np.clip((_kl(p, m) + _kl(q, m)) / 2, 0.0, 1.0))


def kl_divergences(a: ClassifierOutputs, reference: ClassifierOutputs) -> np.ndarray:
    """``KL(reference || a)`` per sample in bits: what the model's predictions miss of the reference's.

    Infinite where the reference gives weight to a class to which ``a`` gives exactly none; softmax outputs never do.

    Raises:
        NotComparableError: The outputs belong to other samples.
    """
    q, p = _aligned(a, reference)
    return _kl(p, q)


_JS_TEXT = (
    "How differently this model and the retrained one predict the same images, image by image: 0 means the same "
    "probabilities, 1 means no class in common."
)
_KL_TEXT = (
    "Bits lost on average when this model's probabilities stand in for the retrained model's: 0 means the same. Unlike "
    "the distance it has no upper end and weighs confident disagreement heavily."
)


@metric(
    "js_forget",
    Info("Mean Jensen-Shannon distance to the retrained model's predictions on the forget set.", needs=("reference",)),
    label="Distance to retrained, forgotten data",
    explain=_JS_TEXT,
    unit="",
    direction="lower",
    bounds=(0.0, 1.0),
)
def js_forget(a: ClassifierOutputs, reference: ClassifierOutputs, *, seed: int = 0) -> Estimate:
    """Mean of :func:`js_distances`, bootstrap interval over samples."""
    return bootstrap(lambda x: float(x.mean()), js_distances(a, reference), draws=_DRAWS, seed=seed)


@metric(
    "js_test",
    Info("Mean Jensen-Shannon distance to the retrained model's predictions on test samples.", needs=("reference",)),
    label="Distance to retrained, new data",
    explain=_JS_TEXT,
    unit="",
    direction="lower",
    bounds=(0.0, 1.0),
)
def js_test(a: ClassifierOutputs, reference: ClassifierOutputs, *, seed: int = 0) -> Estimate:
    """Mean of :func:`js_distances`, bootstrap interval over samples."""
    return js_forget(a, reference, seed=seed)


@metric(
    "kl_forget",
    Info("Mean KL divergence from the retrained model's predictions on the forget set.", needs=("reference",)),
    label="KL from retrained, forgotten data",
    explain=_KL_TEXT,
    unit="bits",
    direction="lower",
    bounds=(0.0, None),
)
def kl_forget(a: ClassifierOutputs, reference: ClassifierOutputs, *, seed: int = 0) -> Estimate:
    """Mean of :func:`kl_divergences`, bootstrap interval over samples."""
    values = kl_divergences(a, reference)
    if not np.isfinite(values).all():
        return not_run(f"infinite for {int((~np.isfinite(values)).sum())} samples", unit="bits", n=len(values))
    return bootstrap(lambda x: float(x.mean()), values, draws=_DRAWS, seed=seed, unit="bits")


@metric(
    "kl_test",
    Info("Mean KL divergence from the retrained model's predictions on test samples.", needs=("reference",)),
    label="KL from retrained, new data",
    explain=_KL_TEXT,
    unit="bits",
    direction="lower",
    bounds=(0.0, None),
)
def kl_test(a: ClassifierOutputs, reference: ClassifierOutputs, *, seed: int = 0) -> Estimate:
    """Mean of :func:`kl_divergences`, bootstrap interval over samples."""
    return kl_forget(a, reference, seed=seed)


def divergences(
    outputs: Mapping[str, ClassifierOutputs], reference: Mapping[str, ClassifierOutputs], *, seed: int = 0
) -> dict[str, Estimate]:
    """Distance and divergence on the forget set and on test samples, where both models have outputs.

    Raises:
        NotComparableError: The outputs belong to other samples.
    """
    found = {}
    for name, function in (("js", js_forget), ("kl", kl_forget)):
        for role in ROLES:
            if len(outputs.get(role, ())) and len(reference.get(role, ())):
                found[f"{name}_{role}"] = function(outputs[role], reference[role], seed=seed)
    return found


def gap_estimate(measured: Mapping[str, Estimate], reference: Mapping[str, Estimate]) -> Estimate:
    """The average gap to the retrained model of one run, or which figure it lacks."""
    values = [{k: m[k].value for k in GAP_KEYS if k in m} for m in (measured, reference)]
    missing = [k for k in GAP_KEYS if any(v.get(k) is None for v in values)]
    if missing:
        return not_run(f"{', '.join(missing)} was not measured")
    ours, theirs = ({k: x for k, x in v.items() if x is not None} for v in values)
    return Estimate(avg_gap(ours, theirs), n=1, unit="points", method="mean of four differences, one run")
