"""All zero-shot figures of a two-tower model from its outputs by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expunge.errors import DataError, did_you_mean
from expunge.metrics.estimate import Estimate, not_run
from expunge.metrics.outputs import ClassifierOutputs
from expunge.metrics.zero_shot import (
    cross_axis,
    cross_axis_forget,
    forget_top1,
    forget_top5,
    macro_with,
    macro_without,
    other_top1,
    paired_cosine,
    paired_cosine_retain,
    zero_shot_top1,
    zero_shot_top5,
)

ROLES = ("forget", "retain", "test", "val", "forget_test")
Rows = dict[str, np.ndarray]


def measure_zero_shot(
    outputs: Mapping[str, ClassifierOutputs],
    *,
    forgotten: Sequence[int],
    axes: Mapping[str, Mapping[str, ClassifierOutputs]] | None = None,
    others: Mapping[str, ClassifierOutputs] | None = None,
    pairs: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Estimate]:
    """All zero-shot figures of one model.

    Held-out images (``test``, ``forget_test``) are used where there are any of the kind, else the training images of
    ``forget`` and ``retain``, and the note says so. Which images belong to a forgotten class is read from the labels.

    Args:
        outputs: Zero-shot logits ``[N, C]`` along the main axis by role.
        forgotten: Classes of the main axis that were to be forgotten; empty if none went as a whole.
        axes: For every other axis its outputs by role, with the same rows as ``outputs``.
        others: Outputs on further data sets, by name.
        pairs: :func:`cosines` by role, of ``forget`` and ``retain``.

    Returns:
        Every metric by registered name; one that could not be measured carries the reason instead of a value.

    Raises:
        DataError: Unknown roles, forgotten classes out of range, or an axis whose rows are not those of ``outputs``.
    """
    for role in (*outputs, *(r for by_role in (axes or {}).values() for r in by_role), *(pairs or {})):
        if role not in ROLES:
            raise DataError(f"zero-shot: {role!r} is not known{did_you_mean(role, ROLES)}")
    size = min((o.table.shape[1] for o in outputs.values()), default=0)
    wrong = [c for c in forgotten if not 0 <= c < size]
    if wrong:
        raise DataError(f"zero-shot: forgotten class {wrong[0]} of {size} classes")
    gone, kept = (_choose(outputs, forgotten, which) for which in (True, False))
    found: dict[str, Estimate] = {}
    for key, score, rows in (
        ("fa1", forget_top1, gone),
        ("fa5", forget_top5, gone),
        ("zs_top1", zero_shot_top1, kept),
        ("zs_top5", zero_shot_top5, kept),
        ("zs_macro", macro_without, kept),
        ("zs_macro_all", macro_with, _union(gone, kept)),
    ):
        taken = _take(outputs, rows)
        reason = f"no images of {'a forgotten' if rows is gone else 'the needed'} class"
        found[key] = not_run(reason, unit="%") if taken is None else score(taken, note=_whence(rows))
    if others:
        found["zs_other"] = other_top1(others)
    if axes:
        for key, along, rows in (("cross_axis", cross_axis, kept), ("cross_axis_forget", cross_axis_forget, gone)):
            there = {name: _take(_aligned(by_role, outputs, rows, name), rows) for name, by_role in axes.items()}
            given = {name: o for name, o in there.items() if o is not None}
            found[key] = along(given, note=_whence(rows)) if given else not_run("no such images", unit="%")
    if pairs and "forget" in pairs:
        found["paired_cosine"] = paired_cosine(pairs["forget"])
    if pairs and "retain" in pairs:
        found["paired_cosine_retain"] = paired_cosine_retain(pairs["retain"])
    return found


def _choose(outputs: Mapping[str, ClassifierOutputs], forgotten: Sequence[int], gone: bool) -> Rows:
    """Rows by role of the images of forgotten (or of other) classes: held-out ones, else training images."""
    for roles in (("test", "forget_test"), ("forget",) if gone else ("retain",)):
        rows = {r: np.flatnonzero(np.isin(outputs[r].labels, forgotten) == gone) for r in roles if r in outputs}
        found = {r: i for r, i in rows.items() if len(i)}
        if found:
            return found
    return {}


def _union(a: Rows, b: Rows) -> Rows:
    if not a or not b:
        return {}
    return {r: np.concatenate([x[r] for x in (a, b) if r in x]) for r in {**a, **b}}


def _take(outputs: Mapping[str, ClassifierOutputs], rows: Rows) -> ClassifierOutputs | None:
    parts = [outputs[role].take(i) for role, i in rows.items()]
    if not parts:
        return None
    table, labels = (np.concatenate(x) for x in ([p.table for p in parts], [p.labels for p in parts]))
    return ClassifierOutputs(logits=table, labels=labels)


def _whence(rows: Rows) -> str:
    seen = [r for r in rows if r in ("forget", "retain")]
    return "training images: there are no held-out ones" if seen else ""


def _aligned(
    by_role: Mapping[str, ClassifierOutputs], outputs: Mapping[str, ClassifierOutputs], rows: Rows, axis: str
) -> Mapping[str, ClassifierOutputs]:
    for role in rows:
        got = len(by_role[role]) if role in by_role else 0
        if got != len(outputs[role]):
            raise DataError(f"zero-shot: axis {axis!r} has {got} of the {len(outputs[role])} {role} images")
    return by_role
