"""Figures of the section "Embeddings"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expunge.report.svg import class_colours, make_figure, style, to_svg

if TYPE_CHECKING:
    from expunge.report.model import Report

_SHOWN = {"before": "Before", "after": "After forgetting", "reference": "Retrained"}
_LEGEND_LIMIT = 20
_MAX_CLASSES = 24


def tsne(report: Report) -> str | None:
    """The joint map, one panel per model with common axes."""
    section = report.embeddings
    if section is None:
        return None
    from matplotlib.lines import Line2D

    from expunge.report.model import clean

    colours = class_colours(len(section.classes))
    tints = [colours[k] for k in section.labels]
    with style("tsne"):
        figure = make_figure(9.4, 4.1)
        panels = figure.subplots(1, len(section.maps), sharex=True, sharey=True, squeeze=False)[0]
        for axis, shown in zip(panels, section.maps, strict=True):
            for wanted, size, edge in ((False, 13, "none"), (True, 19, "#000000")):
                chosen = [i for i, f in enumerate(section.forget) if f is wanted]
                if chosen:
                    x, y = zip(*(shown.points[i] for i in chosen), strict=True)
                    tint: Any = [tints[i] for i in chosen]
                    axis.scatter(x, y, c=tint, s=size, edgecolors=edge, linewidths=0.7, alpha=0.85)
            x, y = zip(*shown.prototypes, strict=True)
            axis.scatter(x, y, c=colours, marker="X", s=70, edgecolors="#000000", linewidths=0.9)
            axis.set_title(_SHOWN.get(shown.role, clean(shown.name, 40)), loc="left", fontsize=11)
            axis.tick_params(labelbottom=False, labelleft=False, length=0)
            axis.set_box_aspect(1)

        def mark(marker: str, label: str, face: str, edge: str) -> Line2D:
            style_: Any = {"marker": marker, "ls": "", "mfc": face, "mec": edge}
            return Line2D([], [], label=clean(label, 24), **style_)

        entries = [mark("o", n, c, c) for n, c in zip(section.classes, colours, strict=True)]
        entries = entries if len(entries) <= _LEGEND_LIMIT else []
        entries.append(mark("X", "prototype", "#ffffff", "#000000"))
        if any(section.forget):
            entries.append(mark("o", "to be forgotten", "#ffffff", "#000000"))
        figure.legend(handles=entries, loc="outside lower left", ncols=6, fontsize=9, handletextpad=0.2)
        return to_svg(figure, "Map of the embeddings of every model")


def wasserstein(report: Report) -> str | None:
    """Changes of the distances between classes, one panel per model, on one scale centred at 0."""
    section = report.embeddings
    if section is None or not section.differences:
        return None
    import matplotlib
    import numpy as np

    from expunge.report.model import clean

    grids = [np.array([[np.nan if v is None else v for v in row] for row in d.values]) for d in section.differences]
    known = np.concatenate([np.abs(g[~np.isnan(g)]) for g in grids])
    if not known.size:
        return None
    top = float(known.max()) or 1.0
    keep = _classes(section.classes, report.forgotten_classes, grids)
    names = [clean(section.classes[k], 16) for k in keep]
    marked = [section.classes[k] in report.forgotten_classes for k in keep]
    # Few colours, so that the colour bar stays made of shapes: an embedded image would be blocked by the page.
    colours = matplotlib.colormaps["PiYG_r"].resampled(21)
    with style("wasserstein"):
        figure = make_figure(9.4, 4.4 if len(grids) > 1 else 5.4)
        panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
        for axis, change, grid in zip(panels, section.differences, grids, strict=True):
            shown = grid[np.ix_(keep, keep)]
            mesh = axis.pcolormesh(np.ma.masked_invalid(shown), cmap=colours, vmin=-top, vmax=top, rasterized=False)
            axis.set_box_aspect(1)
            ticks = [k + 0.5 for k in range(len(keep))]
            axis.set_xticks(ticks, names, rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
            axis.set_yticks(ticks, names, fontsize=8.5)
            shared = axis is not panels[0]  # then its vertical labels are those of the first panel
            for labels in (axis.get_xticklabels(), [] if shared else axis.get_yticklabels()):
                for label, bold in zip(labels, marked, strict=bool(labels)):
                    label.set_fontweight("bold" if bold else "normal")
            axis.grid(visible=False)
            axis.tick_params(length=0)
            title = {"after": "After forgetting", "reference": "Retrained"}.get(change.role, clean(change.name, 40))
            axis.set_title(f"{title}, compared with before", loc="left", fontsize=11)
        panels[0].invert_yaxis()  # shared by all panels
        figure.colorbar(mesh, ax=list(panels), shrink=0.75, label="change of distance")
        return to_svg(figure, "Change of the distances between classes")


def _classes(names: tuple[str, ...], forgotten: list[str], grids: list[Any]) -> list[int]:
    """All classes, or the forgotten ones and those that moved most, in their order."""
    import numpy as np

    if len(names) <= _MAX_CLASSES:
        return list(range(len(names)))
    moved = np.zeros(len(names))
    for g in grids:
        size = np.where(np.isnan(g), 0.0, np.abs(g))
        moved += size.sum(0) + size.sum(1)
    order = sorted(range(len(names)), key=lambda k: (names[k] not in forgotten, -moved[k]))
    return sorted(order[:_MAX_CLASSES])
