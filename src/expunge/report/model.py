"""The report as data: everything the page and the terminal table show, and nothing that has to be recomputed."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.files import atomic_write
from expunge.metrics.describe import definitions, shown
from expunge.metrics.estimate import Estimate
from expunge.report.contrastive import ContrastiveSection
from expunge.report.embeddings import EmbeddingSection
from expunge.report.samples import SamplesSection

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
Role = Literal["before", "after", "control", "reference", "baseline"]
ROLES: tuple[str, ...] = ("before", "after", "reference", "control", "baseline")
_MAX_BYTES = 50_000_000
#: Confidence bins, narrow near 1 where members and non-members differ.
EDGES = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)


def clean(text: object, limit: int = 2000) -> str:
    """Make text safe to show: control and direction-changing characters become visible escapes, length is capped."""
    shown = []
    for c in str(text)[: limit + 1]:
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"
        shown.append(c.encode("unicode_escape", "surrogatepass").decode() if hidden else c)
    return "".join(shown[:limit]) + (" ..." if len(shown) > limit else "")


#: Figures that a terminal table leaves to the page.
_PAGE_ONLY = frozenset({"mia_threshold", "attack_auc", "js_test", "kl_forget", "kl_test"}) | {
    *("zs_top1", "zs_macro", "zs_macro_all", "zs_top5", "fa5"),
    *("cross_axis_forget", "paired_cosine", "paired_cosine_retain"),
    *("gen_cra_all", "fid_real", "kid_real", "pair_max", "lpips_64", "style_loss"),
}


@dataclass(frozen=True)
class Row:
    """One measured model.

    Args:
        name: Shown name, such as "after forgetting" or "random mask".
        role: ``before``, ``after``, ``reference`` (retrained without the data), ``control`` (same effort without the
            idea under test, or nothing done) or ``baseline`` (another method).
        metrics: Estimates by registered metric name.
        note: What the reader has to know about this model.
    """

    name: str
    role: Role
    metrics: dict[str, Estimate]
    note: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"report row {self.name!r}: role {self.role!r} is none of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Histogram:
    """Counts of values between ascending edges, both ends included."""

    counts: tuple[int, ...]
    edges: tuple[float, ...] = EDGES

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.edges))
        if len(self.edges) != len(self.counts) + 1 or len(self.counts) < 2 or not rising or min(self.counts) < 0:
            raise DataError("histogram: counts and ascending edges do not fit")

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @classmethod
    def of(cls, values: Any, edges: Sequence[float] = EDGES) -> Self:
        """Count values.

        Raises:
            DataError: Values outside the edges or not finite.
        """
        x = np.asarray(values, dtype=np.float64).reshape(-1)
        slack = 1e-6 * (edges[-1] - edges[0])
        if not np.isfinite(x).all() or (x.size and (x.min() < edges[0] - slack or x.max() > edges[-1] + slack)):
            raise DataError(f"histogram: values must lie in [{edges[0]}, {edges[-1]}]")
        counts, _ = np.histogram(np.clip(x, edges[0], edges[-1]), bins=np.asarray(edges))
        return cls(tuple(int(c) for c in counts), tuple(float(e) for e in edges))


@dataclass
class Report:
    """What was asked, what changed, the evidence with controls, and what was not shown.

    Args:
        title: Headline of the page.
        request: Summary of the request: ``summary`` (a sentence), ``noun`` ("images"), ``kind`` ("class", "random"),
            ``n_forget``, ``n_retain``, ``digest`` ...; further keys are listed as given.
        base: The original model: ``name``, ``digest``, ``parameters`` ...
        recipe: Settings of the run.
        patch: ``path``, ``bytes``, ``digest``, ``weights_changed`` (percent), ``seconds`` and ``layers``: a list of
            ``{"name", "changed", "total", "relative"}``.
        rows: Measured models.
        class_accuracy: ``{"before" | "after" | "reference": {class name: Estimate}}``.
        forgotten_classes: Class names to mark in the plot.
        confidence: Histograms of the probability of the true class, by ``"<forget|test|retain>_<before|after>"``.
        history: One mapping per logged step, with ``step`` and loss terms.
        embeddings: Maps of embeddings and changes of class distances, if they were made.
        contrastive: Layers, step search, neighbours and cosines of a two-tower model.
        samples: What a generative model draws before and after.
        not_shown: What was not measured, and limits of what was.
        flags: Warnings to be read first.
        undo: Commands that restore the original model.
        versions: Library versions.
        environment: Machine facts that may matter (device, threads).
        seeds: Seeds by purpose.
        digests: Digests by thing (data, weights, request).
        config: The configuration as text.
        definitions: Meaning of each metric; taken from the registry when left empty.
    """

    title: str
    request: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    patch: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    class_accuracy: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    forgotten_classes: list[str] = field(default_factory=list)
    confidence: dict[str, Histogram] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    embeddings: EmbeddingSection | None = None
    contrastive: ContrastiveSection | None = None
    samples: SamplesSection | None = None
    not_shown: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    undo: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    config: str = ""
    definitions: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"report: two rows are called {twice[0]!r}; names tell them apart")
        if not self.definitions:
            self.definitions = definitions(self.metric_names())

    def row(self, role: str) -> Row | None:
        """The first row of a role."""
        return next((r for r in self.rows if r.role == role), None)

    def ordered(self) -> list[Row]:
        """Rows in reading order: before, after, reference, controls, baselines."""
        return sorted(self.rows, key=lambda r: ROLES.index(r.role))

    def metric_names(self) -> list[str]:
        """Every metric of any row, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.ordered() for name in row.metrics))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ArtifactError: Another format, unknown keys, or values that do not form a report.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ArtifactError(f"report: not a report of format {FORMAT}")
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ArtifactError(f"report: unknown keys {unknown}")
        try:
            rows = [Row(**{**r, "metrics": _estimates(r["metrics"])}) for r in data.get("rows", [])]
            classes = {k: _estimates(v) for k, v in data.get("class_accuracy", {}).items()}
            histograms = {
                k: Histogram(tuple(h["counts"]), tuple(h["edges"])) for k, h in data.get("confidence", {}).items()
            }
            section = data.get("embeddings")
            maps = None if section is None else EmbeddingSection.from_dict(section)
            towers = data.get("contrastive")
            drawn = data.get("samples")
            made = {
                "rows": rows,
                "class_accuracy": classes,
                "confidence": histograms,
                "embeddings": maps,
                "contrastive": None if towers is None else ContrastiveSection.from_dict(towers),
                "samples": None if drawn is None else SamplesSection.from_dict(drawn),
            }
            return cls(**{**data, **made})
        except (TypeError, KeyError, AttributeError, ValueError, ConfigError, DataError) as error:
            raise ArtifactError(f"report: malformed: {error}") from None

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            DataError: A number is not finite.
        """
        try:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=True)
        except ValueError:
            bad = next((f"history step {h.get('step')}" for h in self.history if not _finite(h)), "a value")
            raise DataError(f"report: {bad} is not finite; leave the value out") from None
        atomic_write(path, text + "\n")

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report.

        Raises:
            ArtifactError: Missing, oversized or malformed file.
        """
        file = Path(path)
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise ArtifactError(f"{file}: {file.stat().st_size} bytes is too large for a report")
            data = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{file}: not a readable report: {error}") from None
        try:
            return cls.from_dict(data)
        except ArtifactError as error:
            raise ArtifactError(f"{file}: {error}") from None

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the self-contained page, whole or not at all."""
        from expunge.report.html import render

        atomic_write(path, render(self))

    def table(self) -> Table:
        """The main results for a terminal: one line per metric, one column per model. The page has all of them."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(clean(self.title, 200)), show_lines=False)
        table.add_column("metric")
        rows = self.ordered()
        for row in rows:
            table.add_column(Text(f"{clean(row.name, 60)} ({row.role})"), justify="right")
        names = shown(self.metric_names())
        for name in (n for n in names if n not in _PAGE_ONLY):
            label = self.definitions.get(name, {}).get("label", name)
            cells = [Text(clean(row.metrics[name], 120)) if name in row.metrics else Text("-") for row in rows]
            table.add_row(Text(clean(label, 60)), *cells)
        more = sum(n in _PAGE_ONLY for n in names)
        table.caption = f"{more} more figures in the report" if more else None
        return table


def _estimates(data: Mapping[str, Any]) -> dict[str, Estimate]:
    return {k: v if isinstance(v, Estimate) else Estimate.from_dict(v) for k, v in data.items()}


def _finite(values: Mapping[str, Any] | Sequence[Any]) -> bool:
    items = values.values() if isinstance(values, Mapping) else values
    return all(math.isfinite(v) for v in items if isinstance(v, float))
