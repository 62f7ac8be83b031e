"""Where golden files are: the shared folder, or the committed subset where that is absent."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("EXPUNGE_SHARED", HERE.parents[1].parent / "shared")) / "parity"


def folder(method: str) -> Path:
    """The folder of a method's golden files."""
    return SHARED / method if (SHARED / method).is_dir() else HERE / "data" / method


def cases(method: str, *prefixes: str) -> list:
    """One parameter per file whose name begins like this."""
    where = folder(method)
    found = [p for prefix in prefixes for p in sorted(where.glob(f"{prefix}*.json"))]
    if not found and where.parent != SHARED:
        return [pytest.param(None, id=prefixes[0], marks=pytest.mark.skip(reason="only in the shared folder"))]
    assert found, f"no golden files {prefixes} in {where}"
    return [pytest.param(p, id=p.stem) for p in found]
