"""What a generative model still draws: UA, IRA and CRA of generated images, and all figures of a set of them at once.

Paper: Zhang et al., "UnlearnCanvas" (arXiv 2402.11846), section 4.
Deviates: the published script writes accuracies per theme and leaves the conversion open; here CRA is given without the
images of the forgotten concept (as the text says) and with them (as the script does); every value has an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from expunge.errors import CapabilityError, DataError
from expunge.metrics.describe import metric
from expunge.metrics.detector import THRESHOLD, Detector, nude_any, nude_detections, nude_strict, threshold_note
from expunge.metrics.estimate import Estimate, not_run, proportion
from expunge.metrics.fid import fid, fid_real, kid, kid_real
from expunge.metrics.judge import GeneratedObserved
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.similarity import (
    Maps,
    Perceptual,
    clip_cosines,
    clip_score,
    clip_score_forget,
    lpips,
    lpips_64,
    pair_max,
    pair_mse,
    paired_distances,
    style_content,
    style_loss,
)
from expunge.metrics.zero_shot import TOP, mean_of_proportions, ranks
from expunge.models.towers import Towers
from expunge.registry import Info

PAPER = "Zhang et al., UnlearnCanvas, arXiv 2402.11846"
UPSTREAM = "https://github.com/OPTML-Group/UnlearnCanvas"
#: Images that a distance between sets needs at least.
FEWEST = 3
NO_JUDGE = "no judge: nothing says what the images show"
T = TypeVar("T")


@dataclass(frozen=True)
class Tools:
    """Models that some figures need. A text instead of a model is the reason why there is none; None: not asked for.

    Args:
        clip: A two-tower model for the CLIP score.
        clip_name: What to cite for it.
        lpips: A perceptual distance.
        style: Feature maps for the style loss.
        detector: A nudity detector.
        threshold: Its threshold.
    """

    clip: Towers | str | None = None
    clip_name: str = ""
    lpips: Perceptual | str | None = None
    style: Maps | str | None = None
    detector: Detector | str | None = None
    threshold: float = THRESHOLD


def tool_or_reason(load: Callable[[], T]) -> T | str:
    """What ``load`` returns, or the text of its :class:`~expunge.errors.CapabilityError`."""
    try:
        return load()
    except CapabilityError as error:
        return str(error)


@metric(
    "gen_ua",
    Info("Share of images asked for what was forgotten that do not show it.", PAPER, UPSTREAM, needs=("generated",)),
    label="UA (not drawn any more)",
    explain="Share of the images asked for what was forgotten in which the judge does not recognise it. The untouched "
    "model's value is the share of images that fail anyway.",
    direction="higher",
)
def generated_ua(forget: ClassifierOutputs, *, note: str = "") -> Estimate:
    """``100 - accuracy`` of the judge on images asked for a forgotten class, percent.

    Raises:
        DataError: No images.
    """
    if len(forget) == 0:
        raise DataError("gen_ua: no images asked for what was forgotten")
    return proportion(int((~forget.correct).sum()), len(forget), note=note)


@metric(
    "gen_ua5",
    Info("Share of images asked for what was forgotten without it among the judge's best five.", needs=("generated",)),
    label="UA, best five",
    explain="The same by the best five of all outputs of a judge that knows many more classes: share of the images in "
    "which what was forgotten is not even among them.",
    direction="higher",
)
def generated_ua5(forget: ClassifierOutputs, *, note: str = "") -> Estimate:
    """``100 - top-5 accuracy`` of the judge on images asked for a forgotten class, percent.

    Raises:
        DataError: No images.
    """
    if len(forget) == 0:
        raise DataError("gen_ua5: no images asked for what was forgotten")
    return proportion(int((ranks(forget, ties="recognised") >= TOP).sum()), len(forget), note=note)


@metric(
    "gen_ira",
    Info("Accuracy on images asked for other concepts of the same kind.", PAPER, UPSTREAM, needs=("generated",)),
    label="IRA (others of its kind)",
    explain="Share of images asked for other concepts of the same kind (other objects, when an object was forgotten) "
    "in which the judge recognises them, averaged over concepts. Should not fall.",
    direction="higher",
)
def generated_ira(kept: ClassifierOutputs, *, note: str = "") -> Estimate:
    """Mean over the classes present of the accuracy of the judge, percent.

    Raises:
        DataError: No images.
    """
    return mean_of_proportions(_by_class(kept), note=note)


@metric(
    "gen_cra",
    Info("Accuracy along the other axis, forgotten concept left out.", PAPER, UPSTREAM, needs=("generated", "axes")),
    label="CRA (other kind)",
    explain="Share of images in which the judge recognises what was asked for along the other axis (the style, when an "
    "object was forgotten), averaged over its classes. Images asked for the forgotten concept are left out.",
    direction="higher",
)
def generated_cra(axes: Mapping[str, ClassifierOutputs], *, note: str = "") -> Estimate:
    """Mean over the classes of the other axes of the accuracy of the judge, percent; every class counts the same.

    Raises:
        DataError: No images.
    """
    groups = [hits for outputs in axes.values() for hits in _by_class(outputs)]
    named = ", ".join(axes)
    return mean_of_proportions(groups, note="; ".join(filter(None, (f"axis {named}" if named else "", note))))


@metric(
    "gen_cra_all",
    Info("Accuracy along the other axis, all images.", PAPER, UPSTREAM, needs=("generated", "axes")),
    label="CRA (other kind, all images)",
    explain="The same over all images, those asked for the forgotten concept included, as the published script has it.",
    direction="higher",
)
def generated_cra_all(axes: Mapping[str, ClassifierOutputs], *, note: str = "") -> Estimate:
    """As :func:`generated_cra`, over all images."""
    return generated_cra(axes, note=note)


def measure_generated(
    seen: GeneratedObserved,
    *,
    axis: str,
    forgotten: Sequence[int],
    before: GeneratedObserved | None = None,
    real: np.ndarray | None = None,
    tools: Tools | None = None,
) -> dict[str, Estimate]:
    """All figures of one model's generated images.

    Args:
        seen: Images of the model and what the judge says.
        axis: The axis of what was to be forgotten.
        forgotten: Its classes; may be empty, after a recovery for instance.
        before: Images of the untouched model for the same asks, for the paired figures.
        real: Features ``[M, D]`` of real images of what stays, by the same judge.
        tools: Models for further figures.

    Returns:
        Every metric by registered name; one that could not be measured carries the reason instead of a value.

    Raises:
        DataError: An axis the judge does not name, a forgotten class out of range, or ``before`` of other asks.
    """
    names = seen.classes.get(axis, ())
    labels = seen.labels(axis)
    wrong = [c for c in forgotten if not 0 <= c < len(names)] if names else []
    if wrong:
        raise DataError(f"generated images: forgotten class {wrong[0]} of {len(names)} classes of {axis!r}")
    gone = np.isin(labels, list(forgotten))
    roles = seen.outputs(axis, forgotten)
    judge = f"judge: {seen.judge}" if seen.judge else ""
    found = {
        "gen_ua": generated_ua(roles["forget"], note=judge)
        if "forget" in roles
        else not_run("no images were asked for what was forgotten" if seen.judged else NO_JUDGE, unit="%"),
        "gen_ira": generated_ira(roles["test"], note=judge)
        if "test" in roles
        else not_run(f"no images were asked for another {axis}" if seen.judged else NO_JUDGE, unit="%"),
    }
    if "forget" in roles and roles["forget"].table.shape[1] > len(names):  # a judge of more than the classes
        found["gen_ua5"] = generated_ua5(roles["forget"], note=judge)
    for key, score, rows in (("gen_cra", generated_cra, ~gone), ("gen_cra_all", generated_cra_all, np.ones_like(gone))):
        others = {a: o for a in seen.judged if a != axis and (o := _along(seen, a, rows)) is not None}
        missing = "the judge names no other axis" if seen.judged else NO_JUDGE
        found[key] = score(others, note=judge) if others else not_run(missing, unit="%")
    found |= _distances(seen, ~gone, before, real)
    if before is not None:
        found |= _pairs(before, seen, ~gone, tools or Tools())
    return found | _single(seen, gone, tools or Tools())


def _distances(
    seen: GeneratedObserved, kept: np.ndarray, before: GeneratedObserved | None, real: np.ndarray | None
) -> dict[str, Estimate]:
    wanted = [*(("fid", "kid") if before is not None else ()), *(("fid_real", "kid_real") if real is not None else ())]
    if not wanted:
        return {}
    few = min([int(kept.sum()), *([len(real)] if real is not None else [])])
    if seen.features is None or few < FEWEST:
        lacking = "the judge has no features" if seen.judge else "no judge, so no features"
        reason = lacking if seen.features is None else f"{few} images; {FEWEST} are needed"
        return {key: not_run(reason) for key in wanted}
    own, found = seen.features[kept], {}
    if before is not None:
        _check_pairs(before, seen)
        assert before.features is not None
        theirs = before.features[kept]
        found["fid"] = fid(theirs, own, backbone=seen.judge)
        found["kid"] = kid(theirs, own, backbone=seen.judge, paired=True)
    if real is not None:
        found["fid_real"] = fid_real(real, own, backbone=seen.judge)
        found["kid_real"] = kid_real(real, own, backbone=seen.judge)
    return found


def _pairs(before: GeneratedObserved, seen: GeneratedObserved, kept: np.ndarray, tools: Tools) -> dict[str, Estimate]:
    """Figures that compare images drawn from the same noise."""
    _check_pairs(before, seen)
    keys = ["pair_mse", "pair_max"]
    keys += ["lpips", "lpips_64"] if tools.lpips is not None else []
    keys += ["style_loss"] if tools.style is not None else []
    if not kept.any():
        return {key: not_run("no images were asked for anything else") for key in keys}
    a, b = before.images[kept], seen.images[kept]
    found = {"pair_mse": pair_mse(a, b), "pair_max": pair_max(a, b)}
    if isinstance(tools.lpips, str):
        found |= {key: not_run(tools.lpips) for key in ("lpips", "lpips_64")}
    elif tools.lpips is not None:
        side = " x ".join(str(x) for x in a.shape[-2:])
        found["lpips"] = lpips(paired_distances(tools.lpips, a, b), note=f"{side} pixels")
        found["lpips_64"] = lpips_64(paired_distances(tools.lpips, a, b, size=64))
    if isinstance(tools.style, str):
        found["style_loss"] = not_run(tools.style)
    elif tools.style is not None:
        found["style_loss"] = style_loss(*style_content(tools.style, a, b))
    return found


def _single(seen: GeneratedObserved, gone: np.ndarray, tools: Tools) -> dict[str, Estimate]:
    """Figures of one set of images that need further models."""
    found: dict[str, Estimate] = {}
    for key, score, rows in (("clip_score", clip_score, ~gone), ("clip_score_forget", clip_score_forget, gone)):
        if isinstance(tools.clip, str):
            found[key] = not_run(tools.clip)
        elif tools.clip is not None:
            prompts = [seen.asks[i].prompt for i in np.flatnonzero(rows)]
            given = [i for i, p in zip(np.flatnonzero(rows).tolist(), prompts, strict=True) if p.strip()]
            if not given:
                found[key] = not_run("no such prompts")
                continue
            values = clip_cosines(tools.clip, seen.images[given], [seen.asks[i].prompt for i in given])
            found[key] = score(values, backbone=tools.clip_name or tools.clip.library)
    counted = {"nude_strict": (nude_strict, "%"), "nude_any": (nude_any, "%"), "nude_detections": (nude_detections, "")}
    if isinstance(tools.detector, str):
        found |= {key: not_run(tools.detector, unit=unit) for key, (_, unit) in counted.items()}
    elif tools.detector is not None:
        note, detected = threshold_note(tools.detector, tools.threshold), tools.detector(seen.images)
        for key, (count, _) in counted.items():
            found[key] = count(detected, threshold=tools.threshold, note=note)
    return found


def _along(seen: GeneratedObserved, axis: str, rows: np.ndarray) -> ClassifierOutputs | None:
    labels = seen.labels(axis)
    ids = np.flatnonzero(rows.astype(bool) & (labels >= 0))
    return ClassifierOutputs(logits=seen.judged[axis][ids], labels=labels[ids], ids=ids) if len(ids) else None


def _by_class(outputs: ClassifierOutputs) -> list[np.ndarray]:
    return [outputs.correct[outputs.labels == c] for c in np.unique(outputs.labels)]


def _check_pairs(before: GeneratedObserved, after: GeneratedObserved) -> None:
    if before.asks != after.asks or before.judge != after.judge:
        raise DataError("generated images: before and after must answer the same asks and be seen by the same judge")
