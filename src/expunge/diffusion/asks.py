"""What to draw: one ask per image, from code or from a CSV file of prompts."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from expunge import rng
from expunge.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True)
class Ask:
    """One image to draw.

    Args:
        prompt: The text (for class-conditional models its name); may be empty.
        seed: Seed of the noise.
        case: Number of the prompt in its list, at least 0.
        labels: What the image shall show: class numbers by axis (``object``, ``style``); may be empty.
        n: Number of the image among those of its case.

    Raises:
        DataError: A negative case, number or label.
    """

    prompt: str
    seed: int
    case: int
    labels: Mapping[str, int] = field(default_factory=dict)
    n: int = 0

    def __post_init__(self) -> None:
        if self.case < 0 or self.n < 0 or any(v < 0 for v in self.labels.values()):
            raise DataError(f"ask: case {self.case}, image {self.n}, labels {dict(self.labels)}: none may be negative")

    @property
    def name(self) -> str:
        """File name, ``{case}_{n}.png``."""
        return f"{self.case}_{self.n}.png"

    @property
    def key(self) -> int:
        """Key of all draws for this image: a function of seed, case and number, and not of the words."""
        return rng.key(self.seed, "generate", self.case, self.n)


def first_noise(asks: Sequence[Ask], shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``[N, *shape]`` float32 on the CPU; row ``i`` is a function of ``asks[i].key`` alone."""
    rows = []
    for ask in asks:
        generator = torch.Generator().manual_seed(ask.key % 2**63)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


def repeated(asks: Iterable[Ask], images: int) -> list[Ask]:
    """Each ask ``images`` times with the numbers 0, 1, 2 ..., which differ in their noise.

    Raises:
        ConfigError: Fewer than one image.
    """
    if images < 1:
        raise ConfigError(f"images per prompt must be at least 1, got {images}")
    return [replace(ask, n=n) for ask in asks for n in range(images)]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a CSV file.

    Args:
        asks: One per row, each the first image of its prompt.
        images: Images that each row asks for.
        names: Names of the labels by axis and number, where the file has them.
    """

    asks: tuple[Ask, ...]
    images: tuple[int, ...]
    names: Mapping[str, Mapping[int, str]]

    def drawn(self, images: int | None = None, limit: int | None = None) -> list[Ask]:
        """One ask per image.

        Args:
            images: Of every prompt, instead of what the file says.
            limit: Only the first prompts.

        Raises:
            ConfigError: Fewer than one image or prompt.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"the limit is {limit}; at least one prompt is needed")
        rows = zip(self.asks[:limit], self.images[:limit], strict=True)
        return [one for ask, own in rows for one in repeated([ask], own if images is None else images)]


def prompts_from_csv(path: str | os.PathLike[str]) -> list[Ask]:
    """Prompts of a CSV file, one ask each; see :func:`read_prompts`."""
    return list(read_prompts(path).asks)


def read_prompts(path: str | os.PathLike[str]) -> PromptFile:
    """Prompts of a CSV file with the columns ``prompt``, ``evaluation_seed`` (or ``seed``) and ``case_number``.

    Without a seed column all seeds are 0; without ``case_number`` cases count from 0. Integer columns called
    ``label_<axis>`` become labels, whose names may stand in a column ``<axis>``; ``images`` says how many images a
    prompt stands for. Other columns are ignored, as the published files have many.

    Raises:
        DataError: Not a readable table, no prompts, a seed, case, label or number of images that is no number, a case
            twice, or a label with two names.
    """
    file = Path(path)
    columns, rows = csv_rows(file)
    if "prompt" not in columns:
        raise DataError(f"{file}: no column 'prompt'{did_you_mean('prompt', columns)}")
    seeds = next((c for c in ("evaluation_seed", "seed") if c in columns), None)
    asks, images = [], []
    names: dict[str, dict[int, str]] = {}
    for i, row in enumerate(rows):
        labels = {c.removeprefix("label_"): _whole(row[c], file, i, c) for c in columns if c.startswith("label_")}
        seed = 0 if seeds is None else _whole(row[seeds], file, i, seeds)
        case = i if "case_number" not in columns else _whole(row["case_number"], file, i, "case_number")
        images.append(1 if "images" not in columns else _whole(row["images"], file, i, "images"))
        if images[-1] < 1:
            raise DataError(f"{file}, row {i + 2}: {images[-1]} images; at least one is needed")
        asks.append(Ask(row["prompt"], seed, case, labels))
        for axis, number in labels.items():
            if axis in columns and names.setdefault(axis, {}).setdefault(number, row[axis]) != row[axis]:
                raise DataError(
                    f"{file}, row {i + 2}: {axis} {number} is {row[axis]!r}, before {names[axis][number]!r}"
                )
    if not asks:
        raise DataError(f"{file}: no prompts")
    distinct(asks, str(file))
    return PromptFile(tuple(asks), tuple(images), names)


def csv_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file with a head line.

    Raises:
        DataError: Not a readable table, or a row of another length.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a readable CSV file: {error}") from None
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise DataError(f"{file}, row {i + 2}: {len(columns)} columns expected")
    return columns, rows


def distinct(asks: Sequence[Ask], where: str) -> None:
    """Refuse asks that share a file name.

    Raises:
        DataError: Names both.
    """
    seen: dict[str, Ask] = {}
    for ask in asks:
        if ask.name in seen:
            raise DataError(
                f"{where}: case {ask.case}, image {ask.n} occurs twice: {about(ask)} and {about(seen[ask.name])}"
            )
        seen[ask.name] = ask


def _whole(text: str, file: Path, row: int, column: str) -> int:
    """A whole number, also when a spreadsheet wrote it as ``12.0``."""
    try:
        value = float(text)
        if not math.isfinite(value) or value != int(value):
            raise ValueError
        return int(text) if text.strip().lstrip("+-").isdigit() else int(value)
    except ValueError:
        raise DataError(f"{file}, row {row + 2}: {column} is {text!r}, not a whole number") from None


def about(ask: Ask) -> str:
    """Case and prompt, for messages."""
    return f"case {ask.case} {ask.prompt[:60]!r}"
