"""From what a user names (files, folders, braces, globs) to shards in a fixed order."""

from __future__ import annotations

import functools
import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from expunge.data.curate.pairs import IMAGES, MAX_CAPTION_BYTES, Grouped, Pair, Shard, caption_text, split_name
from expunge.data.curate.tables import METADATA, Columns, read_metadata, read_parquet
from expunge.data.curate.tars import read_tar
from expunge.errors import DataError

#: What ``expunge generate`` writes beside its images.
GENERATED = "generated.json"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 100_000


def find_shards(patterns: Sequence[str | Path], columns: Columns | None = None) -> list[Shard]:
    """Find the shards that the patterns name.

    A pattern is a tar or Parquet file or a folder; ``{00000..00010}`` and ``{a,b}`` are expanded, and so are ``*``,
    ``?`` and ``[...]``. A folder stands for the tar files in it, else for its Parquet files, else for the images below
    it with their text files or metadata.

    Args:
        patterns: At least one.
        columns: Columns of tables.

    Returns:
        Shards in the order of the patterns, those of one pattern sorted, each once.

    Raises:
        DataError: A pattern names nothing, or a file of another kind.
    """
    if not patterns:
        raise DataError("no shards given")
    columns = columns or Columns()
    found: dict[Path, Shard] = {}
    for pattern in patterns:
        for path in _paths(str(pattern)):
            for shard_path, shard in _shards(path, columns):
                found.setdefault(shard_path.resolve(), shard)
    return list(found.values())


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{00..10}`` as a shell does; numbers keep their leading zeros.

    >>> expand_braces("{08..10}.{tar,txt}")[:3]
    ['08.tar', '08.txt', '09.tar']
    """
    parts = _BRACES.split(pattern)
    choices = [[text] if i % 2 == 0 else list(_alternatives(text)) for i, text in enumerate(parts)]
    total = 1
    for options in choices:
        total *= len(options)
    if total > _MAX_FILES:
        raise DataError(f"{pattern!r} stands for {total} files, more than {_MAX_FILES}")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _alternatives(text: str) -> Iterable[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= _MAX_FILES:
        raise DataError(f"{{{text}}} is not an ascending range of at most {_MAX_FILES} numbers")
    return [f"{n:0{len(numbers[1])}d}" for n in range(first, last + 1)]


def _paths(pattern: str) -> list[Path]:
    names = [pattern] if Path(pattern).expanduser().exists() else expand_braces(pattern)
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        full = str(Path(name).expanduser())
        hits = [full] if Path(full).exists() else sorted(glob.glob(full)) if glob.has_magic(full) else []
        found += [Path(hit) for hit in hits]
        missing += [] if hits else [name]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise DataError(f"{len(missing)} of {len(names)} shards do not exist: {shown}")
    return found


def _shards(path: Path, columns: Columns) -> Iterator[tuple[Path, Shard]]:
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        # A download of webdataset shards has a Parquet file without images beside each tar file.
        files = [p for p in inside if p.suffix == ".tar"] or [p for p in inside if p.suffix == ".parquet"]
        if files:
            for file in files:
                yield from _shards(file, columns)
            return
        yield path, Shard(str(path), functools.partial(read_folder, path, columns))
    elif path.suffix == ".tar":
        yield path, Shard(str(path), functools.partial(read_tar, path))
    elif path.suffix == ".parquet":
        yield path, Shard(str(path), functools.partial(read_parquet, path, columns))
    else:
        raise DataError(f"{path} is neither a .tar nor a .parquet file nor a folder")


def read_folder(folder: Path, columns: Columns | None = None) -> list[Pair]:
    """Pairs of a folder: by its metadata or its list of drawn images, else images and texts of equal name at any depth.

    Raises:
        DataError: No image and no caption, or the metadata are not readable.
    """
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        return read_metadata(metadata, columns or Columns())
    if (folder / GENERATED).is_file():
        return _read_generated(folder)
    found = Grouped(str(folder))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        key, extension = split_name(name)
        if extension not in (*IMAGES, "txt") or any(part.startswith(".") for part in name.split("/")):
            continue
        if not path.is_file():
            found.add(key, problem=f"{extension} is not a file")
        elif extension == "txt":
            text, problem = _caption(path)
            found.add(key, caption=text, problem=problem)
        else:
            found.add(key, read=path.read_bytes)
    pairs = found.pairs()
    if not pairs:
        raise DataError(f"{folder} holds no tar or Parquet files and no images or captions")
    return pairs


def _read_generated(folder: Path) -> list[Pair]:
    """Pairs of a folder that ``expunge generate`` drew: the prompts are the captions."""
    from expunge.diffusion.image_folder import recorded

    found = Grouped(str(folder))
    for ask in recorded(folder)[1]:
        file = folder / ask.name
        problem = "" if file.is_file() else "not drawn yet"
        found.add(file.stem, caption=ask.prompt, read=None if problem else file.read_bytes, problem=problem)
    return found.pairs()


def _caption(path: Path) -> tuple[str | None, str]:
    try:
        with path.open("rb") as stream:
            return caption_text(stream.read(MAX_CAPTION_BYTES + 1))
    except OSError as error:
        return None, f"caption cannot be read: {error}"
