"""What a benchmark leaves on disk: the table, every figure, and the result frame."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from expunge import files
from expunge.bench_table import Cell, columns, lines, markdown
from expunge.errors import CapabilityError
from expunge.patch.patch import current_versions

if TYPE_CHECKING:
    from pyarrow import Table

log = logging.getLogger("expunge")
#: Columns of the result frame; one row per cell and metric, and one without a metric for a cell that failed.
FRAME = {
    **dict.fromkeys(("request", "label", "role", "recipe"), str),
    "seed": int,
    "metric": str,
    **dict.fromkeys(("value", "low", "high"), float),
    "n": int,
    **dict.fromkeys(("unit", "method", "note", "error"), str),
    **dict.fromkeys(("request_digest", "recipe_digest", "model_digest", "data_digest", "config_digest"), str),
    **dict.fromkeys(("versions", "folder"), str),
}


@dataclass(frozen=True)
class BenchResult:
    """All cells, and where the table lies.

    ``facts`` holds for every cell the name of its recipe and the digests of request, recipe, model, data and
    configuration.
    """

    folder: Path
    cells: list[Cell]
    facts: list[dict[str, str]] = field(default_factory=list)

    @property
    def failed(self) -> list[Cell]:
        """Cells with an error."""
        return [c for c in self.cells if c.error]

    @property
    def exit_code(self) -> int:
        """0, or the code of the first failure."""
        return next((c.exit_code or 1 for c in self.failed), 0)

    def rows(self) -> list[dict[str, Any]]:
        """The results in long form: one row per cell and metric, with the keys of :data:`FRAME`.

        ``method`` says how a figure was obtained; a figure that could not be measured has no value and the reason in
        ``note``; a cell that failed has one row without a metric, with its ``error``.
        """
        found: list[dict[str, Any]] = []
        for cell, facts in zip(self.cells, self.facts, strict=True):
            shared = dict.fromkeys(FRAME) | {"versions": json.dumps(current_versions(), sort_keys=True), **facts}
            shared |= {k: getattr(cell, k) for k in ("request", "label", "role", "seed", "folder", "error")}
            metrics = {} if cell.error else cell.metrics
            found += [{**shared, "metric": name, **estimate} for name, estimate in metrics.items()]
            found += [] if metrics else [shared]
        return found

    def frame(self) -> Table:
        """The results in long form as an Arrow table; its ``to_pandas()`` gives a data frame.

        Raises:
            CapabilityError: pyarrow is not installed.
        """
        try:
            import pyarrow
        except ImportError as error:
            raise CapabilityError("a result frame needs pyarrow: pip install pyarrow") from error
        types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        schema = pyarrow.schema([(name, types[kind]) for name, kind in FRAME.items()])
        return pyarrow.Table.from_pylist(self.rows(), schema=schema)


def save(result: BenchResult, name: str, digest: str) -> None:
    """Write ``table.md``, ``table.csv`` (per metric ``_avg``, ``_std``, ``_n``; one run has an empty ``_std``),
    ``results.json``, and the long form ``results.csv`` and ``results.parquet``.
    """  # noqa: D205
    rows = lines(result.cells)
    names = columns(rows)
    files.atomic_write(result.folder / "table.md", markdown(rows, name, digest))
    head = ["request", "model", "role", "runs", "failed", *(f"{n}{s}" for n in names for s in ("_avg", "_std", "_n"))]
    table: list[list[Any]] = []
    for row in rows:
        numbers: list[Any] = []
        for n in names:
            v = row.values.get(n, [])
            numbers += [mean(v) if v else "", stdev(v) if len(v) > 1 else "", len(v)]
        table.append([row.request, row.label, row.role, row.runs, row.failed, *numbers])
    files.atomic_write(result.folder / "table.csv", _csv(head, table))
    cells = [asdict(c) for c in result.cells]
    body = {"name": name, "config": digest, "versions": current_versions(), "cells": cells}
    files.atomic_write(result.folder / "results.json", json.dumps(body, indent=1, allow_nan=False))
    files.atomic_write(result.folder / "results.csv", _csv(list(FRAME), [list(r.values()) for r in result.rows()]))
    try:
        frame = result.frame()
    except CapabilityError as error:
        (result.folder / "results.parquet").unlink(missing_ok=True)  # one of an earlier run would contradict the rest
        log.warning("results.parquet was not written: %s; results.csv holds the same rows", error)
        return
    from pyarrow import parquet

    with files.atomic_path(result.folder / "results.parquet") as temporary:
        parquet.write_table(frame, temporary)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([head, *rows])
    return buffer.getvalue()
