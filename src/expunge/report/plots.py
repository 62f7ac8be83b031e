"""Figures of the report as SVG text: deterministic, without dates, URLs or fonts to fetch.

Colours are from the Okabe-Ito palette, which stays readable with the common forms of colour blindness; marker shapes
repeat what colours say.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from expunge.files import atomic_write, confined
from expunge.metrics.describe import shown
from expunge.report.embedding_plots import tsne, wasserstein
from expunge.report.model import Report, clean
from expunge.report.svg import make_figure, style, to_svg

COLOURS = {
    "before": "#7f8792",
    "after": "#0072B2",
    "reference": "#009E73",
    "control": "#E69F00",
    "baseline": "#CC79A7",
    "forget": "#D55E00",
    "test": "#56B4E9",
    "retain": "#c3c9d0",
}
MARKERS = {"before": "o", "after": "D", "reference": "s", "control": "^", "baseline": "v"}
_GROUPS = {"forget": "forgotten", "test": "new", "retain": "kept"}
_GLANCE = ("ua", "ra", "ta", "gen_ua", "gen_ira", "gen_cra", "mia")


def glance(report: Report) -> str | None:
    """Dots with intervals: the main figures of every model, one panel per metric."""
    rows, once = report.ordered(), shown(report.metric_names())
    names = [m for m in _GLANCE if m in once and sum(r.metrics[m].ran for r in rows if m in r.metrics) >= 2]
    if not names:
        return None
    with style("glance"):
        figure = make_figure(9.4, 0.9 + 0.36 * len(rows))
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name in zip(panels, names, strict=True):
            for y, row in enumerate(rows):
                e = row.metrics.get(name)
                if e is None or e.value is None:
                    continue
                colour = COLOURS[row.role]
                if e.low is not None and e.high is not None:
                    axis.plot([e.low, e.high], [y, y], color=colour, lw=2.4, alpha=0.55, solid_capstyle="round")
                axis.plot(e.value, y, MARKERS[row.role], color=colour, ms=7)
                if row.role == "reference":
                    axis.axvline(e.value, color=colour, lw=1, ls=(0, (4, 3)), alpha=0.7, zorder=0)
            axis.set_title(clean(report.definitions.get(name, {}).get("label", name), 40), fontsize=10, loc="left")
            axis.margins(x=0.12)
            axis.set_xlabel("%", fontsize=9)
            axis.locator_params(axis="x", nbins=4)
            axis.grid(axis="y", visible=False)
            _widen(axis)
        panels[0].set_yticks(range(len(rows)), [clean(r.name, 28) for r in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        return to_svg(figure, "Main figures of every model with their intervals")


def _widen(axis: Any, least: float = 4.0) -> None:
    """Show at least a few points of range, so that rounding-size differences do not look like effects."""
    low, high = axis.get_xlim()
    if high - low < least:
        middle = (low + high) / 2
        axis.set_xlim(middle - least / 2, middle + least / 2)


def class_accuracy(report: Report) -> str | None:
    """Accuracy per class before and after; forgotten classes are shaded."""
    before, after = report.class_accuracy.get("before", {}), report.class_accuracy.get("after", {})
    names = [n for n in before if n in after] if before else list(after)
    if not names:
        return None
    if before and len(names) > 40:  # show the classes that changed most, the forgotten ones first
        moved = {n: abs((after[n].value or 0) - (before[n].value or 0)) for n in names}
        forgotten = set(report.forgotten_classes)
        names = sorted(names, key=lambda n: (n not in forgotten, -moved[n]))[:40]
    with style("classes"):
        figure = make_figure(9.4, 0.9 + 0.27 * len(names))
        axis = figure.subplots()
        for y, name in enumerate(names):
            if name in report.forgotten_classes:
                axis.axhspan(y - 0.5, y + 0.5, color=COLOURS["forget"], alpha=0.10, lw=0)
        for key, shift, found in (("before", -0.13, before), ("after", 0.13, after)):
            for y, name in enumerate(names):
                e = found.get(name)
                if e is None or e.value is None:
                    continue
                if e.low is not None and e.high is not None:
                    axis.plot([e.low, e.high], [y + shift] * 2, color=COLOURS[key], lw=1.6, alpha=0.5)
                label = key if y == 0 else None
                axis.plot(e.value, y + shift, MARKERS[key], color=COLOURS[key], ms=6.5, label=label, zorder=3)
        ticks = [clean(n, 28) + (" (forgotten)" if n in report.forgotten_classes else "") for n in names]
        axis.set_yticks(range(len(names)), ticks)
        axis.set_ylim(len(names) - 0.5, -0.5)
        ends = [e.low for found in (before, after) for n, e in found.items() if n in names and e.low is not None]
        least = min(ends, default=0.0)
        axis.set_xlim(-2 if least < 45 else least - 5, 102)
        axis.set_xlabel("accuracy, %")
        axis.grid(axis="y", visible=False)
        figure.legend(loc="outside upper right", ncols=2)
        return to_svg(figure, "Accuracy per class before and after")


def confidence(report: Report) -> str | None:
    """Bars of confidence in the true class: forgotten, new and kept samples, before and after.

    The bins are narrow near 1, where members and non-members differ.
    """
    times = [t for t in ("before", "after") if f"forget_{t}" in report.confidence and f"test_{t}" in report.confidence]
    if not times:
        return None
    with style("confidence"):
        figure = make_figure(9.4, 3.3)
        panels = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
        for axis, when in zip(panels, times, strict=True):
            histograms = [(r, t, report.confidence.get(f"{r}_{when}")) for r, t in _GROUPS.items()]
            groups = [(r, t, h) for r, t, h in histograms if h is not None and h.total]
            for i, (role, text, histogram) in enumerate(groups):
                width = 0.8 / len(groups)
                places = [x - 0.4 + (i + 0.5) * width for x in range(len(histogram.counts))]
                share = [100 * c / histogram.total for c in histogram.counts]
                label = f"{text} (n={histogram.total:,})"
                axis.bar(places, share, width * 0.92, color=COLOURS[role], label=label)
            if groups:
                edges = groups[0][2].edges
                axis.set_xticks(range(len(edges) - 1), _bin_names(edges), fontsize=9)
            axis.set_title({"before": "Before", "after": "After forgetting"}[when], loc="left", fontsize=11)
            axis.set_xlabel("confidence in the true class, %")
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0)
        panels[0].set_ylabel("share of samples, %")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=9.5)
        return to_svg(figure, "How sure the model is about forgotten and new samples")


def _bin_names(edges: tuple[float, ...]) -> list[str]:
    texts = [f"{100 * e:g}" for e in edges]
    middle = [f"{a}\u2013{b}" for a, b in itertools.pairwise(texts[1:-1])]
    return [f"< {texts[1]}", *middle, f"> {texts[-2]}"]


def curves(report: Report) -> str | None:
    """Loss terms over the steps of the run."""
    terms = [k for h in report.history for k, v in h.items() if k != "step" and isinstance(v, int | float)]
    names = list(dict.fromkeys(terms))[:6]
    if not names or len(report.history) < 2:
        return None
    palette = [COLOURS[c] for c in ("forget", "after", "reference", "control", "baseline", "before")]
    with style("curves"):
        figure = make_figure(9.4, 2.8)
        axis = figure.subplots()
        for i, name in enumerate(names):
            points = [(h["step"], h[name]) for h in report.history if isinstance(h.get(name), int | float)]
            x, y = zip(*points, strict=True)
            marker = "." if len(points) < 60 else ""
            axis.plot(x, y, color=palette[i], marker=marker, ls=("-", "--")[i % 2], lw=1.7, label=clean(name, 40))
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        figure.legend(loc="outside right upper")
        return to_svg(figure, "Loss terms during the run")


PLOTS = {
    "glance": glance,
    "class_accuracy": class_accuracy,
    "confidence": confidence,
    "tsne": tsne,
    "wasserstein": wasserstein,
    "curves": curves,
}


def render_all(report: Report) -> dict[str, str]:
    """Every figure the report has data for, by name."""
    made = {name: plot(report) for name, plot in PLOTS.items()}
    return {name: svg for name, svg in made.items() if svg is not None}


def save_plots(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the figures as SVG files into a folder and return their paths."""
    saved = []
    for name, svg in render_all(report).items():
        target = confined(folder, f"{name}.svg")
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        atomic_write(target, svg.replace("<svg ", "<svg " + spaces, 1))
        saved.append(target)
    return saved
