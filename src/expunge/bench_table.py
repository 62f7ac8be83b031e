"""The table of a benchmark: cells grouped over seeds, as text, Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from expunge.metrics.describe import definitions, shown
from expunge.report.model import clean

if TYPE_CHECKING:
    from rich.table import Table

#: Columns of the table, where measured.
COLUMNS = (
    "gen_ua",
    "gen_ira",
    "gen_cra",
    "fid_real",
    "kid_real",
    "clip_score",
    "ua",
    "ra",
    "ta",
    "mia",
    "mia_threshold",
    "mia_scar",
    "mia_scar_auc",
    "mia_scar_published",
    "lira",
    "lira_auc",
    "lira_forget",
    "relearn_steps",
    "forget_test",
    "aus",
    "avg_gap",
    "js_forget",
    "js_test",
    "kl_forget",
    "kl_test",
    "weights_changed",
    "patch_bytes",
    "run_time",
)


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark.

    Args:
        label: Method, or name of a control.
        role: ``before``, ``after``, ``control`` or ``reference``.
        request: Title of the request.
        seed: Seed of the run.
        folder: Its run folder, relative to the benchmark's.
        metrics: Estimates as plain values, by metric.
        error: What went wrong, empty if nothing did.
        exit_code: Exit code of the error.
        reused: Taken from an earlier benchmark run.
    """

    label: str
    role: str
    request: str
    seed: int
    folder: str
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""
    exit_code: int = 0
    reused: bool = False

    def value(self, name: str) -> float | None:
        """A measured figure, or ``None``."""
        return self.metrics.get(name, {}).get("value")


@dataclass(frozen=True)
class Line:
    """One row of the table: a method's cells over the seeds."""

    request: str
    label: str
    role: str
    values: dict[str, list[float]]
    runs: int
    failed: int

    def text(self, name: str) -> str:
        """``mean ± std`` over the seeds that measured a figure; one run has no spread."""
        v = self.values.get(name, [])
        if not v:
            return "failed" if self.failed and not self.runs else "-"
        if name == "patch_bytes":
            return f"{mean(v):,.0f}"
        digits = 4 if name == "kid_real" else 2
        return f"{mean(v):.{digits}f}" + (f" ± {stdev(v):.{digits}f}" if len(v) > 1 else "")


def lines(cells: Sequence[Cell]) -> list[Line]:
    """Cells grouped by request and label, in order."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.request, cell.label), []).append(cell)
    found = []
    for (request, label), group in groups.items():
        values: dict[str, list[float]] = {}
        for cell in group:
            for name in cell.metrics:
                value = cell.value(name)
                if value is not None:
                    values.setdefault(name, []).append(value)
        good = sum(not c.error for c in group)
        found.append(Line(request, label, group[0].role, values, good, len(group) - good))
    return found


def columns(rows: Sequence[Line]) -> list[str]:
    """Columns that any row has."""
    return shown(c for c in COLUMNS if any(c in r.values for r in rows))


def headings(names: Sequence[str]) -> list[str]:
    """Labels with units, as registered."""
    known = definitions(list(names))
    units = {n: known.get(n, {}).get("unit", "") for n in names}
    return [f"{known.get(n, {}).get('label', n)}" + (f" ({units[n]})" if units[n] else "") for n in names]


def markdown(rows: Sequence[Line], title: str, digest: str) -> str:
    """The table of every request as Markdown, with the digest of the configuration."""
    names = columns(rows)
    parts = [f"# {_escaped(title)}", "", "Mean ± standard deviation over the seeds; runs: seeds that finished."]
    parts += [f"Configuration {digest[:16]}; `results.json` has every interval and sample count."]
    for request in dict.fromkeys(r.request for r in rows):
        parts += ["", f"## {_escaped(request)}", "", "| " + " | ".join(["model", "runs", *headings(names)]) + " |"]
        parts += ["|" + " --- |" * (len(names) + 2)]
        for row in (r for r in rows if r.request == request):
            runs = f"{row.runs}" + (f" ({row.failed} failed)" if row.failed else "")
            label = _escaped(row.label) + (f" ({row.role})" if row.role in ("reference", "control") else "")
            parts.append("| " + " | ".join([label, runs, *(row.text(n) for n in names)]) + " |")
    return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return clean(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def terminal(rows: Sequence[Line], request: str) -> Table:
    """The table of one request for a terminal."""
    from rich.table import Table
    from rich.text import Text

    names = columns(rows)
    table = Table(title=Text(clean(request, 200)), title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("runs", justify="right")
    for heading in headings(names):
        table.add_column(Text(heading), justify="right")
    for row in (r for r in rows if r.request == request):
        runs = f"{row.runs}" + (f" ({row.failed} failed)" if row.failed else "")
        table.add_row(Text(clean(row.label, 60)), runs, *(row.text(n) for n in names))
    return table
