"""Captions of anchors: the lists that come with the package, and text files with a caption per line."""

from __future__ import annotations

from pathlib import Path

import expunge
from expunge.data.captions import mentions
from expunge.errors import ConfigError, DataError

FOLDER = Path(expunge.__file__).parent / "assets" / "captions"
#: Lists in the package: 200 captions each, all of which name the anchor.
ANCHORS = ("painting", "cat", "dog", "fish", "robot", "person")


def check_source(source: str) -> None:
    """The source is a list of the package or a file that is there.

    Raises:
        ConfigError: It is neither.
    """
    if source not in ANCHORS and not Path(source).is_file():
        raise ConfigError(
            f"captions '{source}': neither a list of the package ({', '.join(ANCHORS)}) nor a text file that is there"
        )


def anchor_captions(source: str, anchor: str = "") -> list[str]:
    """Captions of an anchor, in the order of the file, without empty lines and lines that begin with ``#``.

    Args:
        source: A name of :data:`ANCHORS`, or a text file in UTF-8.
        anchor: What every caption must name, as whole words; nothing by default.

    Raises:
        ConfigError: There is neither such a list nor such a file.
        DataError: The file is not text, holds no caption, one of them twice, or one that does not name the anchor.
    """
    check_source(source)
    path = FOLDER / f"{source}.txt" if source in ANCHORS else Path(source)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text file in UTF-8 ({error})") from None
    rows = [(i, " ".join(line.split())) for i, line in enumerate(lines, start=1)]
    rows = [(i, line) for i, line in rows if line and not line.startswith("#")]
    if not rows:
        raise DataError(f"{path}: no captions in it")
    first: dict[str, int] = {}
    for i, line in rows:
        if line in first:
            raise DataError(f"{path}: line {i} repeats line {first[line]}")
        first[line] = i
        if anchor and not mentions(line, anchor):
            raise DataError(f"{path}: line {i} does not name '{anchor}': {line!r}")
    return list(first)
