"""Terminal output: escaped text, tables, places."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def clean(text: object, limit: int = 4000) -> str:
    """Make control and direction-changing characters visible; newlines stay."""
    shown = []
    for c in str(text)[:limit]:
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"
        shown.append(c.encode("unicode_escape", "surrogatepass").decode() if hidden else c)
    return "".join(shown)


def console() -> Console:
    """Standard output; without a terminal wide enough for every column."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=200)
    return found


def say(text: object) -> None:
    """Print one escaped line."""
    console().print(Text(clean(text)), soft_wrap=True)


def table(title: str, headings: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    shown = Table(title=Text(clean(title)), title_justify="left")
    for heading in headings:
        shown.add_column(Text(heading), overflow="fold")
    for row in rows:
        shown.add_row(*(Text(clean(cell)) for cell in row))
    console().print(shown)


def facts(title: str, values: Mapping[str, Any]) -> None:
    """Print key and value, one per line."""
    if title:
        console().print(Text(clean(title), style="bold"), soft_wrap=True)
    width = max((len(k) for k in values), default=0)
    for key, value in values.items():
        console().print(Text(f"  {clean(key).ljust(width)}  {clean(value)}"), soft_wrap=True)


def places(folder: Path, names: Iterable[str]) -> None:
    """Print where the files of a run lie."""
    for name in names:
        if (folder / name).exists():
            say(f"  {folder / name}")


def size(path: Path) -> str:
    """Bytes of a file in the unit people read."""
    from expunge.report.words import size as words

    return words(path.stat().st_size)
