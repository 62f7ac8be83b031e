"""One self-contained page: inline style, inline SVG, no script, nothing to fetch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from expunge.metrics.describe import ARROWS, shown
from expunge.metrics.estimate import Estimate
from expunge.report.contrastive_plots import figures
from expunge.report.model import Report, clean
from expunge.report.plots import COLOURS, render_all
from expunge.report.words import ROLE_WORDS, headline, percent, size, tiles

SHOWN_LAYERS = 12


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expunge.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: x if hasattr(x, "__html__") else clean(x, 100_000) if isinstance(x, str) else x,
    )
    environment.filters.update(bytesize=size, percent=percent)
    return environment.get_template("report.html.j2")


def render(report: Report) -> str:
    """The page as text. All values are escaped; the only markup inserted is the SVG made by this package."""
    from markupsafe import Markup

    rows = report.ordered()
    metrics = [
        {
            "name": name,
            "about": report.definitions.get(name, {}),
            "direction": ARROWS.get(report.definitions.get(name, {}).get("direction", ""), ""),
            "cells": [_cell(row.metrics.get(name)) for row in rows],
            "missing": sum(name in row.metrics and not row.metrics[name].ran for row in rows),
        }
        for name in shown(report.metric_names())
    ]
    layers = sorted(report.patch.get("layers", []), key=lambda x: -x["changed"])
    return _template().render(
        report=report,
        rows=rows,
        role_words=ROLE_WORDS,
        colours=COLOURS,
        headline=headline(report),
        tiles=tiles(report),
        metrics=metrics,
        footnotes=_footnotes(report),
        layers=layers[:SHOWN_LAYERS],
        more_layers=len(layers) - SHOWN_LAYERS,
        untouched=sum(x["changed"] == 0 for x in layers),
        plots={name: Markup(svg) for name, svg in {**render_all(report), **figures(report.contrastive)}.items()},
        cell=_cell,
        facts=_facts(report),
    )


def _cell(estimate: Estimate | None) -> dict[str, str]:
    if estimate is None:
        return {"value": "", "interval": "", "n": "", "missing": ""}
    if estimate.value is None:
        return {"value": "not run", "interval": "", "n": "", "missing": estimate.note}
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{_plain(estimate.low, estimate.unit)} to {_plain(estimate.high, estimate.unit)}"
    unit = estimate.unit
    value = size(estimate.value) if unit == "bytes" else _plain(estimate.value, unit) + (f" {unit}" if unit else "")
    return {"value": value, "interval": interval, "n": f"{estimate.n:,}" if estimate.n else "", "missing": ""}


def _plain(x: float, unit: str) -> str:
    if unit == "%":
        return percent(x).removesuffix(" %")
    return f"{x:.3f}" if abs(x) < 10 and not unit else f"{x:,.1f}"


def _footnotes(report: Report) -> list[tuple[str, str, str]]:
    """Notes and methods of the estimates of the row after forgetting: (metric, method, note)."""
    row = report.row("after") or (report.rows[0] if report.rows else None)
    found = []
    for name, estimate in row.metrics.items() if row is not None else ():
        label = report.definitions.get(name, {}).get("label", name)
        if estimate.ran and (estimate.method or estimate.note):
            found.append((str(label), estimate.method, estimate.note))
    return found


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Blocks of key and value for the last section."""
    groups: dict[str, dict[str, Any]] = {
        "Versions": report.versions,
        "Environment": report.environment,
        "Seeds": report.seeds,
        "Digests": report.digests,
        "Recipe": report.recipe,
    }
    return [(title, [(str(k), str(v)) for k, v in items.items()]) for title, items in groups.items() if items]
