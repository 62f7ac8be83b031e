"""The findings in plain words. No verdicts: figures with their comparison, and where there is none, that fact."""

from __future__ import annotations

from typing import Any

from expunge.metrics.estimate import Estimate
from expunge.report.model import Report

ROLE_WORDS = {
    "before": "the original model",
    "after": "the model after forgetting",
    "reference": "trained again without the data; the yardstick",
    "control": "a check that shows what the figures do without the method",
    "baseline": "another method or patch, for comparison",
}


def size(count: float) -> str:
    """Bytes in the unit people read.

    >>> size(512), size(45_000_000)
    ('512 bytes', '45.0 MB')
    """
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in the unit people read.

    >>> duration(7.04), duration(600)
    ('7.0 s', '10.0 min')
    """
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def percent(value: float) -> str:
    """A percentage with one digit, never rounded to a bound it has not reached.

    >>> percent(99.97), percent(0.004), percent(100)
    ('99.97 %', '<0.01 %', '100 %')
    """
    if min(abs(value), abs(value - 100)) < 1e-9:  # what sums of fractions leave of a bound
        return f"{round(value)} %"
    if value < 0.01:
        return "<0.01 %"
    if value > 99.99:
        return ">99.99 %"
    return f"{value:.2f} %" if value < 0.1 or value > 99.9 else f"{value:.1f} %"


def _value(report: Report, role: str, name: str) -> Estimate | None:
    row = report.row(role)
    found = row.metrics.get(name) if row is not None else None
    return found if found is not None and found.value is not None else None


def headline(report: Report) -> str:
    """Two or three sentences with the main figures."""
    noun = str(report.request.get("noun", "samples"))
    before, after, reference = (_value(report, r, "ua") for r in ("before", "after", "reference"))
    if _value(report, "after", "gen_ua") is not None:
        return _drawn(report, checked=after is None or reference is not None)
    parts = []
    if after is not None and after.value is not None:
        now = f"recognises {percent(100 - after.value)} of the {after.n:,} {noun} it was asked to forget"
        if before is not None and before.value is not None:
            parts.append(f"The model {now}; before, it was {percent(100 - before.value)}.")
        else:
            parts.append(f"The model {now}.")
        if reference is not None and reference.value is not None:
            parts.append(f"A model trained again without them recognises {percent(100 - reference.value)}.")
        else:
            parts.append("No retrained model was measured, so it is open how much of this is expected.")
    old, new = _value(report, "before", "ta"), _value(report, "after", "ta")
    if old is not None and new is not None and old.value is not None and new.value is not None:
        parts.append(f"Accuracy on new {noun} is {percent(new.value)} (before: {percent(old.value)}).")
    if not parts and report.samples is not None and report.samples.about:
        return report.samples.about
    if not parts:
        return "The figures below compare the model before and after the change."
    return " ".join(parts)


def _drawn(report: Report, checked: bool) -> str:
    """The main figures of images that a judge has seen; ``checked`` unless a retrained model is missing."""
    parts = [report.samples.about] if report.samples is not None and report.samples.about else []
    old, new = (_value(report, r, "gen_ira") for r in ("before", "after"))
    if new is not None and new.value is not None:
        was = f" (before: {percent(old.value)})" if old is not None and old.value is not None else ""
        parts.append(f"Of images asked for others of its kind it recognises {percent(new.value)}{was}.")
    if not checked:
        parts.append("No retrained model was measured, so it is open how much of this is expected.")
    return " ".join(parts)


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """Key facts of the change: (value, label, detail)."""
    patch, request, found = report.patch, report.request, []
    noun = str(request.get("noun", "samples"))
    if _is_number(request.get("n_forget")):
        kept = f"of {request['n_forget'] + request['n_retain']:,}" if _is_number(request.get("n_retain")) else ""
        found.append((f"{request['n_forget']:,}", f"{noun} to forget", kept))
    if _is_number(patch.get("weights_changed")):
        total = report.base.get("parameters")
        found.append((percent(patch["weights_changed"]), "of weights changed", f"of {total:,}" if total else ""))
    if _is_number(patch.get("bytes")):
        found.append((size(patch["bytes"]), "patch size", "original model stays as it is"))
    if _is_number(patch.get("seconds")):
        found.append((duration(patch["seconds"]), "run time", str(report.environment.get("device", ""))))
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
