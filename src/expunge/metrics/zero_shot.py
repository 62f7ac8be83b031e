"""Zero-shot accuracy of two-tower models: forgotten names, kept names, other axes, and image-caption cosines.

Paper: Cai et al., "SLUG", ICML 2025 (arXiv 2407.11867), CLIP experiments; cross-axis accuracy: Zhang et al.,
"UnlearnCanvas" (arXiv 2402.11846).
Upstream: CSIPlab/SLUG 59629a2, src/clip/a0_eval_celeba.py, src/clip/a0_eval_imagenet.py.
Deviates: every value has an interval; macro accuracy is given with and without the forgotten name (published: with it
only); ties have a stated rule instead of the order of a sort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from expunge.errors import DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import LEVEL, Estimate, bootstrap, clopper_pearson, mean, not_run, proportion
from expunge.metrics.outputs import ClassifierOutputs, to_numpy
from expunge.registry import Info

PAPER = "Cai et al., SLUG, ICML 2025, arXiv 2407.11867"
CANVAS = "Zhang et al., UnlearnCanvas, arXiv 2402.11846"
UPSTREAM = "https://github.com/CSIPlab/SLUG"
COMMIT = "59629a2"
TOP = 5
Ties = Literal["recognised", "first"]


def ranks(outputs: ClassifierOutputs, *, ties: Ties = "first") -> np.ndarray:
    """Rank of the true class among the logits, 0 being the largest, int64 ``[N]``.

    Ties matter in half precision, where many logits are equal. ``first``: the class with the lower index goes first,
    as in :attr:`ClassifierOutputs.correct`; a model whose logits are all equal then scores at chance.
    ``recognised``: only strictly larger logits go before, so that no tie ever counts as forgetting.
    """
    table, labels = outputs.table, outputs.labels[:, None]
    true = np.take_along_axis(table, labels, axis=1)
    before = table > true
    if ties == "first":
        before |= (table == true) & (np.arange(table.shape[1]) < labels)
    return before.sum(axis=1)


def exact(k: int, n: int, *, note: str = "") -> Estimate:
    """``100 k / n`` percent with the exact (Clopper-Pearson) 95 % interval, made for few samples.

    With no hit, or only hits, one end is certain and the whole 5 % goes to the other: ``0 of 18`` is at most 15.3 %
    (the two-sided interval would say 18.5 %, Wilson's 17.6 %).

    Raises:
        DataError: No samples, or counts out of range.
    """
    found = proportion(k, n, interval="clopper_pearson", note=note)
    low, high = clopper_pearson(k, n, level=0.9) if k in (0, n) else clopper_pearson(k, n)
    method = "proportion, Clopper-Pearson 95 % interval (one-sided where none or all)"
    return replace(found, low=100 * low, high=100 * high, method=method)


def _hits(outputs: ClassifierOutputs, k: int, ties: Ties, name: str) -> np.ndarray:
    if len(outputs) == 0:
        raise DataError(f"{name}: no samples")
    return ranks(outputs, ties=ties) < k


def _too_few(outputs: ClassifierOutputs, k: int = TOP) -> Estimate | None:
    c = outputs.table.shape[1]
    if c > k:
        return None
    return not_run(f"the top {k} of {c} classes hold every class", unit="%")


@metric(
    "fa1",
    Info("Share of images of the forgotten class that still get its name.", PAPER, UPSTREAM, COMMIT, needs=("forget",)),
    label="FA@1 (forgotten name)",
    explain="Share of images of the forgotten class for which its name is still the best match among all names. 0 is "
    "the aim of the method; a tie counts as recognised. With few images even 0 leaves room, see the interval.",
    direction="lower",
)
def forget_top1(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """FA@1 of images of forgotten classes, percent, exact interval.

    Raises:
        DataError: No samples.
    """
    return exact(int(_hits(outputs, 1, "recognised", "fa1").sum()), len(outputs), note=note)


@metric(
    "fa5",
    Info(
        "Share of images of the forgotten class with its name among the best five.",
        PAPER,
        UPSTREAM,
        COMMIT,
        needs=("forget",),
    ),
    label="FA@5 (forgotten name)",
    explain="Share of images of the forgotten class for which its name is among the five best matches. Stricter than "
    "FA@1: the name must fall behind at least five others. Not run with five names or fewer.",
    direction="lower",
)
def forget_top5(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """FA@5 of images of forgotten classes, percent, exact interval; not run if five names are all there are.

    Raises:
        DataError: No samples.
    """
    hits = _hits(outputs, TOP, "recognised", "fa5")
    return _too_few(outputs) or exact(int(hits.sum()), len(outputs), note=note)


@metric(
    "zs_top1",
    Info("Zero-shot accuracy on images of the other classes.", PAPER, UPSTREAM, COMMIT, needs=("test",)),
    label="Zero-shot accuracy",
    explain="Share of images of the classes that stay for which the right name is the best match among all names, the "
    "forgotten one included. A fall is damage to the rest.",
    direction="higher",
)
def zero_shot_top1(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Top-1 accuracy over images, percent, Wilson interval.

    Raises:
        DataError: No samples.
    """
    return proportion(int(_hits(outputs, 1, "first", "zs_top1").sum()), len(outputs), note=note)


@metric(
    "zs_top5",
    Info("Zero-shot top-5 accuracy on images of the other classes.", PAPER, UPSTREAM, COMMIT, needs=("test",)),
    label="Zero-shot accuracy, best five",
    explain="The same with the right name among the five best matches. Not run with five names or fewer.",
    direction="higher",
)
def zero_shot_top5(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Top-5 accuracy over images, percent, Wilson interval; not run if five names are all there are.

    Raises:
        DataError: No samples.
    """
    hits = _hits(outputs, TOP, "first", "zs_top5")
    return _too_few(outputs) or proportion(int(hits.sum()), len(outputs), note=note)


def mean_of_proportions(hits: Sequence[np.ndarray], *, note: str = "") -> Estimate:
    """Unweighted mean ``m`` of the hit rates of ``C`` groups, percent; the groups are fixed, the images in them drawn.

    Interval: Wilson's for a rate of ``m`` among ``C^2 / sum(1 / n_c)`` samples, as if all groups had that rate. Where
    they differ the variance is smaller, so it is rather too wide. Unlike the bootstrap's it has a width where every
    group is at 100 %.

    Raises:
        DataError: No group, or an empty one.
    """
    from scipy.stats import norm

    if not hits or any(len(h) == 0 for h in hits):
        raise DataError("mean of proportions: no groups, or a group without samples")
    m, sizes = float(np.mean([h.mean() for h in hits])), np.array([len(h) for h in hits])
    n, z2 = float(len(hits) ** 2 / (1 / sizes).sum()), float(norm.ppf(0.5 + LEVEL / 2)) ** 2
    centre = (m + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (m * (1 - m) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low, high = (min(max(100 * (centre + sign * half), 0.0), 100.0) for sign in (-1, 1))
    method = "mean of proportions, Wilson 95 % interval of the effective n"
    return Estimate(100 * m, low, high, int(sizes.sum()), "%", method, note)


def _macro(outputs: ClassifierOutputs, name: str, note: str) -> Estimate:
    hits = _hits(outputs, 1, "first", name)
    classes = np.unique(outputs.labels)
    text = "; ".join(filter(None, (f"{len(classes)} classes with images", note)))
    return mean_of_proportions([hits[outputs.labels == c] for c in classes], note=text)


@metric(
    "zs_macro",
    Info("Mean of the accuracies of the other classes.", PAPER, UPSTREAM, COMMIT, needs=("test",)),
    label="Zero-shot accuracy, mean of classes",
    explain="Accuracy of each class that stays, averaged over classes, so that small ones count as much as large ones. "
    "The forgotten class is left out.",
    direction="higher",
)
def macro_without(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Macro accuracy over the classes of ``outputs`` (pass those that stay), percent.

    Raises:
        DataError: No samples.
    """
    return _macro(outputs, "zs_macro", note)


@metric(
    "zs_macro_all",
    Info("Mean of the accuracies of all classes.", PAPER, UPSTREAM, COMMIT, needs=("test", "forget_test")),
    label="The same with the forgotten class",
    explain="The published figure: the mean over all classes, the forgotten one included. A part of its fall is the "
    "forgetting itself, one class in so many, so it is no measure of damage.",
    direction="reference",
)
def macro_with(outputs: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Macro accuracy over all classes of ``outputs``, percent.

    Raises:
        DataError: No samples.
    """
    return _macro(outputs, "zs_macro_all", note)


@metric(
    "zs_other",
    Info("Zero-shot accuracy on another data set with names of its own.", PAPER, UPSTREAM, COMMIT, needs=("others",)),
    label="Other data sets",
    explain="Zero-shot accuracy on data sets with names of their own, ImageNet for instance when a person is "
    "forgotten; the mean if there are several. Far from the request, so it should not move.",
    direction="higher",
)
def other_top1(sets: Mapping[str, ClassifierOutputs], *, note: str = "") -> Estimate:
    """Top-1 accuracy, mean over data sets, percent.

    Raises:
        DataError: No set, or an empty one.
    """
    hits = {name: _hits(o, 1, "first", f"zs_other, {name}") for name, o in sets.items()}
    return mean_of_proportions(list(hits.values()), note="; ".join(filter(None, (_listed(hits), note))))


def _shared(axes: Mapping[str, ClassifierOutputs], note: str, name: str) -> Estimate:
    hits = {axis: _hits(o, 1, "first", f"{name}, axis {axis}") for axis, o in axes.items()}
    sizes = {len(h) for h in hits.values()}
    if len(sizes) != 1:
        raise DataError(f"{name}: every axis labels the same images, got {sorted(sizes)} of them")
    note = "; ".join(filter(None, (f"axis {next(iter(hits))}" if len(hits) == 1 else _listed(hits), note)))
    if len(hits) == 1:
        only = next(iter(hits.values()))
        return proportion(int(only.sum()), len(only), note=note)
    return bootstrap(lambda x: 100 * float(x.mean()), np.mean(list(hits.values()), axis=0), unit="%", note=note)


def _listed(hits: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {100 * h.mean():.1f} %" for name, h in hits.items())


@metric(
    "cross_axis",
    Info("Accuracy along another axis (style, when an object goes), kept images.", CANVAS, needs=("test", "axes")),
    label="Other axis, kept images",
    explain="How well images that stay are named along another axis: their style when an object was forgotten, their "
    "object when it was a style. It should not move.",
    direction="higher",
)
def cross_axis(axes: Mapping[str, ClassifierOutputs], *, note: str = "") -> Estimate:
    """Top-1 accuracy along other axes, percent; with several axes the mean over them, images re-drawn together.

    Raises:
        DataError: No samples, or axes that do not label the same images.
    """
    return _shared(axes, note, "cross_axis")


@metric(
    "cross_axis_forget",
    Info("Accuracy along another axis, images of the forgotten class.", CANVAS, needs=("forget", "axes")),
    label="Other axis, forgotten images",
    explain="The same on images of the forgotten class: after forgetting dogs, is a dog in oil still seen as an oil "
    "painting? A fall means that more was lost than the name.",
    direction="higher",
)
def cross_axis_forget(axes: Mapping[str, ClassifierOutputs], *, note: str = "") -> Estimate:
    """As :func:`cross_axis`, on images of the forgotten class.

    Raises:
        DataError: No samples, or axes that do not label the same images.
    """
    return _shared(axes, note, "cross_axis_forget")


def cosines(image: object, text: object) -> np.ndarray:
    """Cosine of every image with its own text, float64 ``[N]``, from embeddings ``[N, D]`` of any length.

    Raises:
        DataError: Shapes that do not fit, or an embedding that is zero or not finite.
    """
    a, b = (to_numpy(x).astype(np.float64) for x in (image, text))
    if a.ndim != 2 or a.shape != b.shape:
        raise DataError(f"cosines: two arrays [N, D] expected, got {a.shape} and {b.shape}")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise DataError("cosines: an embedding is zero or not finite; the model is broken")
    return np.einsum("nd,nd->n", a, b) / lengths


def _mean_cosine(values: np.ndarray, note: str) -> Estimate:
    return replace(mean(values.tolist(), note=note), method="mean over pairs, t 95 % interval")


@metric(
    "paired_cosine",
    Info("Mean cosine of forgotten images with their own captions.", PAPER, UPSTREAM, COMMIT, needs=("forget",)),
    label="Match with own caption, forgotten",
    explain="How close the images to be forgotten lie to their own captions (cosine, 1 is the same direction). "
    "Forgetting pushes them apart; far below the match with wrong captions is itself recognisable.",
    unit="",
    direction="lower",
    bounds=(-1.0, 1.0),
)
def paired_cosine(values: np.ndarray, *, note: str = "") -> Estimate:
    """Mean of :func:`cosines` of the forget pairs.

    Raises:
        DataError: No pairs, or a value that is not finite.
    """
    return _mean_cosine(values, note)


@metric(
    "paired_cosine_retain",
    Info("Mean cosine of kept images with their own captions.", PAPER, UPSTREAM, COMMIT, needs=("retain",)),
    label="Match with own caption, kept",
    explain="The same for pairs that stay. It should not move.",
    unit="",
    direction="higher",
    bounds=(-1.0, 1.0),
)
def paired_cosine_retain(values: np.ndarray, *, note: str = "") -> Estimate:
    """Mean of :func:`cosines` of the retain pairs.

    Raises:
        DataError: No pairs, or a value that is not finite.
    """
    return _mean_cosine(values, note)
