"""Forget and retain sets of image-text pairs: found by name, checked, kept apart, written reproducibly.

Source: SLUG, ``src/clip/a0_create_tar.py`` and ``a0_create_tar_ucanvas.py``.

Deviates: names match whole words, with blanks or underscores, and not parts of words; the limit ends the search; keys
may contain dots; images keep their bytes (there: encoded twice more); repeating a run gives the same files (there: an
empty tar); a tar without pairs is an error; forget pairs, captions with the name and copies of forget images are taken
out of the retain set (there: shared).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.data.curate.match import Progress, Rules, Side, check_excluded, find_forget, find_retain
from expunge.data.curate.pairs import Pair, Shard
from expunge.data.curate.sources import find_shards
from expunge.data.curate.tables import Columns
from expunge.data.curate.write import FORGET, INDEX, RETAIN, Keys, check_target, published, write_index, write_tar

__all__ = ["Columns", "Curated", "Pair", "Rules", "Shard", "curate", "find_shards"]


@dataclass(frozen=True)
class Curated:
    """A curated set on disk.

    Args:
        folder: Where ``forget.tar``, ``retain.tar`` (if there is a retain side) and ``index.json`` lie.
        forget: The forget side.
        retain: The retain side, None if none was asked for.
        notes: What the user should know.
    """

    folder: Path
    forget: Side
    retain: Side | None
    notes: tuple[str, ...] = ()


def curate(
    forget: Sequence[Shard],
    retain: Sequence[Shard],
    out: str | Path,
    rules: Rules,
    *,
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Curated:
    """Find, check, separate and write a forget and a retain set.

    Args:
        forget: Where forget pairs are looked for.
        retain: Where retain pairs come from, empty for none; may be the same shards.
        out: Folder to make.
        rules: What is taken.
        facts: Recorded in the index (JSON).
        notes: Shown and recorded.
        overwrite: Replace an earlier curated set.
        progress: Told after every shard.

    Returns:
        What was written; nothing is if anything fails.

    Raises:
        ConfigError: The target exists, or an excluded key does not.
        DataError: Broken input, see :func:`~expunge.data.curate.match.find_forget` and ``find_retain``.
        RequestError: Nothing matches.
        ResourceError: The disk is full.

    Example:
        >>> rules = Rules(names=("Elon Musk",), limit=500)
        >>> shards = find_shards(["data/{00000..00010}.tar"])  # doctest: +SKIP
        >>> curate(shards, find_shards(["data/00000.tar"]), "curated/elon-musk", rules)  # doctest: +SKIP
    """
    folder = Path(out)
    check_target(folder, overwrite=overwrite)  # before the long part
    found = find_forget(forget, rules, progress)
    kept = find_retain(retain, found, rules, progress) if retain else None
    sides = [found] if kept is None else [found, kept]
    told = [*notes, *(f"excluded key {key!r} did not occur in what was read" for key in check_excluded(rules, sides))]
    repeated = len(found.taken) - len({t.sha256 for t in found.taken})
    if repeated:
        told.append(f"{repeated} forget images repeat another one byte for byte; they are kept")
    keys = Keys()
    members = [[(keys.of(t), t) for t in side.taken] for side in sides]
    index: dict[str, Any] = {
        "format": 1,
        "facts": dict(facts or {}),
        "rules": asdict(rules),
        "shards": {"forget": [s.name for s in forget], "retain": [s.name for s in retain]},
        "notes": told,
        "sha256": {},
    }
    with published(folder, overwrite=overwrite) as fresh:
        for name, side, rows in zip((FORGET, RETAIN)[: len(sides)], sides, members, strict=True):
            index["sha256"][name] = write_tar(fresh / name, rows)
            index[name.removesuffix(".tar")] = _described(side, rows)
        write_index(fresh / INDEX, index)
    return Curated(folder, found, kept, tuple(told))


def _described(side: Side, rows: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {
        "pairs": [
            {
                "key": key,
                "source": t.pair.shard,
                "source_key": t.pair.key,
                "caption": t.pair.caption,
                "sha256": t.sha256,
                "names": list(t.names),
            }
            for key, t in sorted(rows, key=lambda row: row[0])
        ],
        "looked_at": side.looked_at,
        "complete": side.complete,
        "removed": {k: list(v) for k, v in side.removed.items()},
        "skipped": [{"where": where, "why": why} for where, why in side.skipped],
    }
