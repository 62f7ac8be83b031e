"""How figures of the report are drawn: one style, one clean-up of the SVG text, colours of classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Up to ten classes: distinct for common forms of colour blindness together with a legend.
CLASS_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FBF", "#7f8792", "#8C510A", "#B8B000",
)  # fmt: skip
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": "#3a424b",
    "xtick.color": "#59626c",
    "ytick.color": "#59626c",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,
}


@contextmanager
def style(name: str) -> Iterator[None]:
    """Settings of all figures; ``name`` keeps the ids of several figures of one page apart."""
    import matplotlib

    settings: Any = {**_STYLE, "svg.hashsalt": f"expunge-{name}"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text in the SVG: the reader's fonts draw it, so glyphs that are missing here do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def make_figure(width: float, height: float) -> Figure:
    """An empty figure in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element without dates, names of tools or references to elsewhere."""
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    opening = f'<svg viewBox="{{}}" role="img" aria-label="{label}">'
    box = re.search(r'viewBox="([^"]*)"', text)
    return opening.format(box.group(1) if box else "0 0 600 300") + text[text.index(">") + 1 :]


def class_colours(n: int) -> list[str]:
    """One colour per class."""
    if n <= len(CLASS_COLOURS):
        return list(CLASS_COLOURS[:n])
    import matplotlib
    import numpy as np
    from matplotlib.colors import to_hex

    return [to_hex(c) for c in matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, n))]
