"""Figures of a two-tower model's section: fronts, searches, accuracy over the step, images against names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expunge.files import atomic_write, confined
from expunge.report.contrastive import ContrastiveSection, short
from expunge.report.svg import class_colours, make_figure, style, to_svg

_TITLES = {"vision": "Image tower", "language": "Text tower"}
_FORGET, _KEEP, _DARK, _SOFT = "#D55E00", "#0072B2", "#1d242c", "#9aa3ad"
_MAX_PANELS = 9
_MAX_LEGEND = 12
_MAX_CELLS = 12


def pareto(section: ContrastiveSection) -> str | None:
    """Importance over alignment of every candidate, one panel per tower, both logarithmic.

    A value of 0 has no place on a logarithmic axis: it becomes a triangle at the edge, below the least positive one.
    """
    towers = section.towers
    if not towers:
        return None
    from expunge.report.model import clean

    rows = max(1, max((min(len(section.front(t)), _MAX_LEGEND) + 1) // 2 for t in towers))
    with style("pareto"):
        figure = make_figure(9.4, 3.6 + 0.2 * rows)
        panels = figure.subplots(1, len(towers), squeeze=False)[0]
        for axis, tower in zip(panels, towers, strict=True):
            scores, front = section.scored(tower), section.front(tower)
            members = {id(s) for s in front}
            floors = [_floor([abs(s[k]) for s in scores]) for k in ("alignment", "importance")]

            def place(s: dict[str, Any], floors: list[float] = floors) -> tuple[float, float, str]:
                x, y = abs(s["alignment"]), s["importance"]
                marker = "<" if x == 0 else "v" if y == 0 else ""
                return x or floors[0], y or floors[1], marker

            for s in (s for s in scores if id(s) not in members):
                x, y, marker = place(s)
                axis.plot(x, y, marker or "x", color=_SOFT, ms=5)
            for i, (s, colour) in enumerate(zip(front, class_colours(len(front)), strict=True)):
                x, y, marker = place(s)
                label = clean(short(s["name"]), 28) if i < _MAX_LEGEND else None
                axis.plot(x, y, marker or "o", color=colour, ms=7.5, mec="#ffffff", mew=0.6, label=label, zorder=3)
                if section.is_chosen(s):
                    axis.plot(x, y, "o", mfc="none", mec=_DARK, ms=14, mew=1.6, zorder=4)
            _logarithmic(axis, "x")
            _logarithmic(axis, "y")
            axis.set_title(_TITLES[tower], loc="left", fontsize=11)
            axis.set_xlabel("alignment with the retain gradient")
            if front:
                axis.legend(
                    loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9, handletextpad=0.2
                )  # below its panel
        panels[0].set_ylabel("importance")
        return to_svg(figure, "Importance and alignment of every candidate layer")


def _logarithmic(axis: Any, which: str) -> None:
    """A logarithmic scale with plain numbers, also within one decade; powers would be typeset as formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    getattr(axis, f"set_{which}scale")("log")
    low, high = getattr(axis, f"get_{which}lim")()
    scale = getattr(axis, f"{which}axis")
    logarithmic = LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5), numticks=6)
    scale.set_major_locator(logarithmic if high > 3 * low else MaxNLocator(4))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _floor(values: Sequence[float]) -> float:
    positive = [v for v in values if v > 0]
    return min(positive) / 3 if positive else 1e-12


def search(section: ContrastiveSection) -> str | None:
    """The probes of every search from top to bottom, by step size; both accuracies stand beside them."""
    shown = [s for s in section.searches if s["probes"]][:_MAX_PANELS]
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    from expunge.report.model import clean

    chosen = {c["layer"] for c in section.findings.get("chosen", ())}
    n, across = len(shown), min(3, len(shown))
    down = -(-n // across)
    rows = [max(len(s["probes"]) for s in shown[i * across : (i + 1) * across]) for i in range(down)]
    with style("search"):
        figure = make_figure(9.4, sum(1.2 + 0.19 * n for n in rows))
        widths, heights = [1, 0.45] * across, [3 + n for n in rows]
        grid = figure.subplots(down, 2 * across, squeeze=False, height_ratios=heights, width_ratios=widths)
        panels, sides = grid[:, ::2], grid[:, 1::2]  # every panel has a column of figures at its right
        for axis in (*sides.flat, *panels.flat[n:]):
            axis.set_axis_off()
        for k, (axis, side, s) in enumerate(zip(panels.flat[:n], sides.flat[:n], shown, strict=True)):
            alphas, order = [p["alpha"] for p in s["probes"]], range(1, len(s["probes"]) + 1)
            axis.plot(alphas, order, color="#c3c9d0", lw=1.2, zorder=1)
            for y, p in zip(order, s["probes"], strict=True):
                face = _KEEP if p["ok"] else "#ffffff"
                axis.plot(p["alpha"], y, "o" if p["ok"] else "X", mfc=face, mec=_KEEP if p["ok"] else _FORGET, ms=6.5)
                for x, key in zip(_COLUMNS, ("forget", "utility"), strict=True):
                    side.text(x, y, _percent(p[key]), **_FIGURE)
            for x, head in zip(_COLUMNS, ("forgotten", "kept"), strict=True):
                side.text(x, 0.1, head, **{**_FIGURE, "color": _SOFT})
            if s["alpha"] is not None:
                axis.axvline(s["alpha"], color=_DARK, lw=1, ls=(0, (4, 3)), zorder=0)
            _logarithmic(axis, "x")
            for one in (axis, side):
                one.set_ylim(rows[k // across] + 0.6, 0.4)
            axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            title = clean(section.label(s["layer"]), 30)
            bold = "bold" if s["layer"] in chosen else "normal"
            axis.set_title(title, loc="left", fontsize=10, fontweight=bold, pad=13)
            axis.grid(axis="y", visible=False)
            axis.set_xlabel("step α", fontsize=9)
            axis.tick_params(labelsize=8.5)
        for row in panels:
            row[0].set_ylabel("trial")
        return to_svg(figure, "Steps tried by the search of every layer, in order")


_COLUMNS = (0.5, 1.0)
_FIGURE: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8.5, "color": "#3a424b"}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}".removesuffix(".0")


def alpha(section: ContrastiveSection) -> str | None:
    """Accuracies over the step size for the chosen layer: the sweep, or the probes of its search."""
    edits = section.findings.get("chosen", ())
    steps = [c["alpha"] for c in edits if c["alpha"] is not None]
    own = next((s for s in section.searches if edits and s["layer"] == edits[0]["layer"]), None)
    lines: dict[str, list[tuple[float, float]]] = {}
    if section.sweep:
        for step in section.sweep:
            for name, value in step.values.items():
                lines.setdefault(name, []).append((step.alpha, value))
    elif own is not None:
        for key, label in (("forget", "forgotten class"), ("utility", "kept classes")):
            lines[label] = [(p["alpha"], 100 * p[key]) for p in own["probes"] if p[key] is not None]
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    from expunge.report.model import clean

    palette = [_FORGET, _KEEP, "#009E73", "#CC79A7", "#E69F00", "#7f8792"]
    with style("alpha"):
        figure = make_figure(9.4, 3.2)
        axis = figure.subplots()
        for i, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            marker = ("o", "s", "D", "^", "v", "P")[i % 6]
            axis.plot(x, y, marker=marker, ms=5, lw=1.7, color=palette[i % 6], label=clean(name, 40))
        if own is not None and not section.sweep:
            for key, colour in (("forget", _FORGET), ("utility", _KEEP)):
                if own["original"][key] is not None:
                    axis.axhline(100 * own["original"][key], color=colour, lw=1, ls=(0, (1, 2)))
        for at in steps[:1]:
            axis.axvline(at, color=_DARK, lw=1, ls=(0, (4, 3)), label="chosen step")
        _logarithmic(axis, "x")
        axis.set_ylim(-4, 104)
        axis.set_xlabel("step α, as a share of the layer's length")
        axis.set_ylabel("accuracy, %")
        figure.legend(loc="outside right upper", fontsize=9.5)
        return to_svg(figure, "Accuracy over the step size for the chosen layer")


def cosines(section: ContrastiveSection) -> str | None:
    """Images against names, before and after, on one colour scale; what was to be forgotten is framed."""
    found = section.cosines
    if found is None:
        return None
    import matplotlib
    from matplotlib.patches import Rectangle

    from expunge.report.model import clean

    rows, columns = _some(found.rows, found.forgotten), _some(found.columns, found.forgotten)
    tables = [[[t[i][j] for j in columns] for i in rows] for t in (found.before, found.after)]
    values = [v for t in tables for r in t for v in r]
    low, high = min(values), max(values)
    high = high if high > low else low + 1e-6
    # Few colours, so that the colour bar stays made of shapes: an embedded image would be blocked by the page.
    colours = matplotlib.colormaps["viridis"].resampled(21)
    size = 8.5 if len(columns) <= 8 else 6.8
    with style("cosines"):
        figure = make_figure(9.4, 1.9 + 0.36 * len(rows))
        panels = figure.subplots(1, 2, sharey=True)
        for axis, table, title in zip(panels, tables, ("Before", "After forgetting"), strict=True):
            mesh = axis.pcolormesh(table, cmap=colours, vmin=low, vmax=high, rasterized=False)
            for i, row in enumerate(table):
                for j, v in enumerate(row):
                    tint = "#1d242c" if (v - low) / (high - low) > 0.6 else "#ffffff"
                    text = f"{v:.2f}".replace("-0.00", "0.00")
                    axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size, color=tint)
            frame: Any = {"fill": False, "ec": _FORGET, "lw": 2.2, "clip_on": False, "zorder": 4}
            for k, name in enumerate([found.columns[j] for j in columns]):
                if name in found.forgotten:
                    axis.add_patch(Rectangle((k, 0), 1, len(rows), **frame))
            for k, name in enumerate([found.rows[i] for i in rows]):
                if name in found.forgotten:
                    axis.add_patch(Rectangle((0, k), len(columns), 1, **frame))
            ticks = [k + 0.5 for k in range(len(columns))]
            labels = [clean(found.columns[j], 18) for j in columns]
            axis.set_xticks(ticks, labels, rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
            axis.set_yticks([k + 0.5 for k in range(len(rows))], [clean(found.rows[i], 18) for i in rows], fontsize=8.5)
            axis.set_title(title, loc="left", fontsize=11)
            axis.set_xlabel("name")
            axis.grid(visible=False)
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
        panels[0].invert_yaxis()  # shared by both
        panels[0].set_ylabel("images of")
        figure.colorbar(mesh, ax=list(panels), shrink=0.8, label="cosine")
        return to_svg(figure, "Cosines of images and names before and after forgetting")


def _some(names: Sequence[str], forgotten: Sequence[str]) -> list[int]:
    """The forgotten names and the first others, in their order, so that every number can be read."""
    order = sorted(range(len(names)), key=lambda k: (names[k] not in forgotten, k))
    return sorted(order[:_MAX_CELLS])


FIGURES: dict[str, Callable[[ContrastiveSection], str | None]] = {
    "pareto": pareto,
    "search": search,
    "alpha": alpha,
    "cosines": cosines,
}


def figures(section: ContrastiveSection | None) -> dict[str, str]:
    """Every figure the section has data for, by name, as SVG."""
    if section is None:
        return {}
    made = {name: draw(section) for name, draw in FIGURES.items()}
    return {name: svg for name, svg in made.items() if svg is not None}


def save_figures(section: ContrastiveSection | None, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the figures as SVG files into a folder and return their paths."""
    saved = []
    for name, svg in figures(section).items():
        target = confined(folder, f"{name}.svg")
        atomic_write(target, svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ' + _LINKS, 1))
        saved.append(target)
    return saved


_LINKS = 'xmlns:xlink="http://www.w3.org/1999/xlink" '
