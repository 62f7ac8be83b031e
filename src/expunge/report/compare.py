"""Put two reports side by side, or refuse."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.errors import NotComparableError
from expunge.metrics.estimate import Estimate
from expunge.report.model import Report, Role, Row

#: Libraries whose version may change a figure.
VERSIONS = ("expunge", "torch", "numpy", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Difference:
    """One metric of two reports. ``distinct`` is True when the intervals are disjoint, None without intervals."""

    metric: str
    a: Estimate
    b: Estimate
    difference: float | None
    distinct: bool | None


def compare(a: Report, b: Report, *, role: Role = "after") -> list[Difference]:
    """Differences ``b - a`` of the rows of one role.

    Metrics that one report did not run are listed without a difference. Costs (seconds, bytes) need no equal n.

    Raises:
        NotComparableError: Another request or base model, other versions of a library that may change figures,
            another definition of a metric, another number of samples, or nothing in common.
    """
    problems = []
    for name, mine, other in (("request", a.request, b.request), ("base model", a.base, b.base)):
        if mine.get("digest") != other.get("digest"):
            problems.append(f"{name}: {mine.get('digest')} and {other.get('digest')}")
    for library in VERSIONS:
        if a.versions.get(library) != b.versions.get(library):
            problems.append(f"{library}: {a.versions.get(library)} and {b.versions.get(library)}")
    row_a, row_b = _row(a, role), _row(b, role)
    shared = [m for m in row_a.metrics if m in row_b.metrics]
    if not shared:
        problems.append("no metric in common")
    found = []
    for m in shared:
        x, y = row_a.metrics[m], row_b.metrics[m]
        first, second = a.definitions.get(m, {}), b.definitions.get(m, {})
        if first.get("version") != second.get("version"):
            problems.append(f"{m}: definition {first.get('version')} and {second.get('version')}")
        if x.value is None or y.value is None:
            found.append(Difference(m, x, y, None, None))
            continue
        if (x.unit, x.method) != (y.unit, y.method):
            problems.append(f"{m}: measured as {x.method or x.unit!r} and {y.method or y.unit!r}")
        if x.n != y.n:
            problems.append(f"{m}: n={x.n} and n={y.n}")
        overlap = x.overlaps(y)
        found.append(Difference(m, x, y, y.value - x.value, None if overlap is None else not overlap))
    if problems:
        raise NotComparableError("these reports cannot be compared: " + "; ".join(problems))
    return found


def _row(report: Report, role: Role) -> Row:
    row = report.row(role)
    if row is None:
        raise NotComparableError(f"report {report.title[:80]!r} has no row with the role {role!r}")
    return row
