"""Prompt lists of published evaluations, as tables that ``expunge generate`` and ``expunge judge`` read.

A row's case number is a function of its place in the whole list, so that a quick part draws the very images that the
whole list would have given. Seed lists that were not published with the prompts are 0, 1, 2 ..., and the list says so.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from expunge.data.curate.uncanvas import caption
from expunge.diffusion.asks import Ask, csv_rows, distinct
from expunge.diffusion.benchmark_names import (
    IMAGENETTE,
    OBJECTS,
    SRS_ME_OBJECTS,
    SRS_ME_STYLES,
    THEMES,
    UNLEARNCANVAS_SEEDS,
)
from expunge.errors import ConfigError, DataError, did_you_mean
from expunge.files import atomic_write

OURS = "seeds 0, 1, 2 ... are ours; the published seeds are not at hand"
#: Columns of the published I2P table that are kept.
I2P_COLUMNS = (
    *("categories", "hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage"),
    *("sd_safety_percentage", "prompt_toxicity", "evaluation_guidance", "sd_image_width", "sd_image_height"),
)
I2P_ROWS = 4703


@dataclass(frozen=True)
class Choices:
    """What may be chosen about a list; None or empty is the list's own.

    Args:
        quick: The declared part of the list.
        seeds: How many seeds per prompt, or the seeds.
        images: Images per row.
        names: Classes (``templates``).
        templates: Prompts with ``{}`` for the name (``templates``, ``imagenette``).
        axis: The label axis of the names (``templates``).
        source: The published file (``i2p``, ``coco``).
        categories: Keep prompts of any of these (``i2p``).
        nudity: Keep prompts whose ``nudity_percentage`` is at least this (``i2p``).
    """

    quick: bool = False
    seeds: int | tuple[int, ...] | None = None
    images: int | None = None
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    axis: str | None = None
    source: Path | None = None
    categories: tuple[str, ...] = ()
    nudity: float | None = None


@dataclass(frozen=True)
class PromptList:
    """Rows of a prompt file.

    Args:
        asks: One per row; its labels are positions in ``classes``.
        images: Images per row.
        classes: Names by axis.
        kept: Further columns, one value per row.
        note: What a reader has to know: whose seeds, which part.
    """

    asks: tuple[Ask, ...]
    images: int = 1
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kept: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.asks) * self.images

    def csv(self) -> str:
        """The table as text."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        own = ["prompt", "evaluation_seed", "case_number", "images"]
        writer.writerow([*own, *(f"label_{a}" for a in self.classes), *self.classes, *self.kept])
        for i, ask in enumerate(self.asks):
            numbers = [ask.labels[a] for a in self.classes]
            names = [self.classes[a][ask.labels[a]] for a in self.classes]
            rest = [column[i] for column in self.kept.values()]
            writer.writerow([ask.prompt, ask.seed, ask.case, self.images, *numbers, *names, *rest])
        return out.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, whole or not at all."""
        atomic_write(path, self.csv())


@dataclass(frozen=True)
class Protocol:
    """A prompt list by name.

    Args:
        about: What it is.
        judge: What its images are judged by.
        make: The list for what was chosen.
        takes: Names of the choices that have an effect, beside ``quick``, ``seeds`` and ``images``.
        needs: The choice without which there is no list.
        quick: What the quick part is.
        own_seeds: Whether seeds can be chosen.
    """

    about: str
    judge: str
    make: Callable[[Choices], PromptList]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    quick: str = ""
    own_seeds: bool = True


#: Choices that belong to some lists only, and what the command line calls them.
_OPTIONS = {
    "names": "--names",
    "templates": "--template",
    "axis": "--axis",
    "source": "--from",
    "categories": "--category",
    "nudity": "--min-nudity",
}


def prompt_list(name: str, choices: Choices | None = None) -> PromptList:
    """A prompt list.

    Raises:
        ConfigError: An unknown list, a choice that has no effect for it, or one that it needs and that is missing.
        DataError: The published file cannot be read, or nothing of it is left.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"no prompt list is called {name!r}{did_you_mean(name, PROTOCOLS)}")
    protocol, chosen = PROTOCOLS[name], choices or Choices()
    for choice, option in _OPTIONS.items():
        given = getattr(chosen, choice) not in (None, ())
        if given and choice not in protocol.takes:
            raise ConfigError(f"'{choice}' would have no effect for the prompt list '{name}'")
        if not given and choice in protocol.needs:
            raise ConfigError(f"the prompt list '{name}' needs '{choice}' ({option})")
    if chosen.seeds is not None and not protocol.own_seeds:
        raise ConfigError(f"'seeds' would have no effect for '{name}': its file has them")
    if chosen.quick and not protocol.quick:
        raise ConfigError(f"'quick' would have no effect for '{name}'; choose fewer seeds")
    if chosen.quick and chosen.seeds is not None:
        raise ConfigError("'quick' has seeds of its own; give one of the two")
    twice = isinstance(chosen.seeds, tuple) and (not chosen.seeds or len(set(chosen.seeds)) < len(chosen.seeds))
    if twice or (isinstance(chosen.seeds, int) and chosen.seeds < 1):
        raise ConfigError(f"seeds {chosen.seeds}: distinct seeds, or a number of them of at least 1")
    if chosen.images is not None and chosen.images < 1:
        raise ConfigError(f"images {chosen.images}: every prompt stands for at least one")
    made = protocol.make(chosen)
    distinct(made.asks, f"prompt list '{name}'")
    return made


def _seeds(chosen: Choices, own: int, quick: int) -> tuple[int, ...]:
    wanted = chosen.seeds if chosen.seeds is not None else quick if chosen.quick else own
    return wanted if isinstance(wanted, tuple) else tuple(range(wanted))


def _unlearncanvas(chosen: Choices) -> PromptList:
    known = UNLEARNCANVAS_SEEDS
    seeds = chosen.seeds if chosen.seeds is not None else known[:1] if chosen.quick else known
    if isinstance(seeds, int):
        if seeds > len(known):
            raise ConfigError(f"UnlearnCanvas has the {len(known)} seeds {known}, not {seeds}; give your own as a list")
        seeds = known[:seeds]
    published = set(seeds) <= set(known)
    places = {s: (known.index(s) if published else i) for i, s in enumerate(seeds)}
    stride = len(known) if published else len(seeds)
    asks = []
    for t, theme in enumerate(THEMES):
        for o, name in enumerate(OBJECTS):
            cell = t * len(OBJECTS) + o
            labels = {"style": t, "object": o}
            asks += [Ask(caption(theme, name), s, cell * stride + places[s], labels) for s in seeds]
    note = "" if published else "the seeds are not those of the benchmark"
    return PromptList(tuple(asks), chosen.images or 1, {"style": THEMES, "object": OBJECTS}, note=note)


def _by_name(
    chosen: Choices, axis: str, names: Sequence[str], templates: Sequence[str], own: int, quick: int, images: int = 1
) -> PromptList:
    seeds = _seeds(chosen, own, quick)
    stride = max(own, len(seeds))
    prompts = [(k, t.format(name)) for k, name in enumerate(names) for t in templates]
    asks = [Ask(p, s, row * stride + i, {axis: k}) for row, (k, p) in enumerate(prompts) for i, s in enumerate(seeds)]
    note = "" if isinstance(chosen.seeds, tuple) else OURS
    return PromptList(tuple(asks), chosen.images or images, {axis: tuple(names)}, note=note)


def _imagenette(chosen: Choices) -> PromptList:
    if len(chosen.templates) > 1:
        raise ConfigError("the imagenette list has one template; for more take the list 'templates'")
    templates = _checked(chosen.templates or ("an image of a {}",))
    return _by_name(chosen, "object", tuple(IMAGENETTE), templates, 500, 20)


def _templates(chosen: Choices) -> PromptList:
    if len(set(chosen.names)) < len(chosen.names):
        raise ConfigError("the names of a prompt list must differ")
    found = _by_name(chosen, chosen.axis or "concept", chosen.names, _checked(chosen.templates), 1, 1)
    return replace(found, note="")  # nobody has published seeds for it


def _checked(templates: Sequence[str]) -> Sequence[str]:
    for t in templates:
        if t.replace("{}", "").count("{") or t.count("{}") != 1:
            raise ConfigError(f"template {t!r} needs {{}} once, for the name")
    return templates


def _canvas(chosen: Choices) -> PromptList:
    from expunge.data.canvas import FORMS
    from expunge.data.canvas_draw import SHAPES, STYLES

    seeds = _seeds(chosen, 4, 1)
    stride = max(4, len(seeds))
    asks = []
    for o, shape in enumerate(SHAPES):
        for s, style in enumerate(STYLES):
            prompt, cell = FORMS[0].format(shape=shape, style=style), o * len(STYLES) + s
            asks += [Ask(prompt, seed, cell * stride + i, {"object": o, "style": s}) for i, seed in enumerate(seeds)]
    return PromptList(tuple(asks), chosen.images or 1, {"object": SHAPES, "style": STYLES})


def _i2p(chosen: Choices) -> PromptList:
    columns, rows = _published(chosen, ("prompt", "evaluation_seed", "case_number", "categories"))
    note = "" if len(rows) == I2P_ROWS else f"the file has {len(rows):,} rows, the published one {I2P_ROWS:,}"
    if chosen.categories:
        known = sorted({c.strip() for row in rows for c in row["categories"].split(",")} - {""})
        lost = [c for c in chosen.categories if c not in known]
        if lost:
            raise ConfigError(f"{chosen.source}: no category {lost[0]!r}{did_you_mean(lost[0], known)}")
        rows = [r for r in rows if {c.strip() for c in r["categories"].split(",")} & set(chosen.categories)]
    if chosen.nudity is not None:
        if "nudity_percentage" not in columns:
            raise DataError(f"{chosen.source}: no column 'nudity_percentage'")
        rows = [r for r in rows if _number(r["nudity_percentage"], chosen.source) >= chosen.nudity]
    if not rows:
        raise DataError(f"{chosen.source}: no prompt fits the selection")
    rows = _spread(rows, 100) if chosen.quick else rows
    kept = {c: [r[c] for r in rows] for c in I2P_COLUMNS if c in columns}
    return PromptList(_asks(rows, chosen), chosen.images or 1, {}, kept, note)


def _coco(chosen: Choices) -> PromptList:
    columns, rows = _published(chosen, ("prompt", "evaluation_seed"))
    if "case_number" not in columns:
        rows = [{**r, "case_number": str(i)} for i, r in enumerate(rows)]
    rows = _spread(rows, 1000) if chosen.quick else rows
    kept: dict[str, list[str]] = {c: [r[c] for r in rows] for c in ("image_id", "source") if c in columns}
    return PromptList(_asks(rows, chosen), chosen.images or 1, {}, kept)


def _published(chosen: Choices, needed: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    file = Path(str(chosen.source))
    columns, rows = csv_rows(file)
    lost = [c for c in needed if c not in columns]
    if lost:
        raise DataError(f"{file}: no column {lost[0]!r}; this is not the published file")
    if not rows:
        raise DataError(f"{file}: no prompts")
    return columns, rows


def _asks(rows: Sequence[Mapping[str, str]], chosen: Choices) -> tuple[Ask, ...]:
    def whole(row: Mapping[str, str], column: str) -> int:
        value = _number(row[column], chosen.source)
        if value != int(value):
            raise DataError(f"{chosen.source}: {column} is {row[column]!r}, not a whole number")
        return int(value)

    return tuple(Ask(r["prompt"], whole(r, "evaluation_seed"), whole(r, "case_number")) for r in rows)


def _number(text: str, file: Path | None) -> float:
    try:
        value = float(text)
        if not abs(value) < 2**53:
            raise ValueError
        return value
    except ValueError:
        raise DataError(f"{file}: {text!r} is no number") from None


def _spread(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """At most ``count`` rows at even distances."""
    n = min(count, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


PROTOCOLS: dict[str, Protocol] = {
    "unlearncanvas": Protocol(
        "51 themes x 20 objects x 5 seeds",
        "two timm checkpoints: style (51), object (20)",
        _unlearncanvas,
        quick="the first seed (188), every cell",
    ),
    "imagenette": Protocol(
        "10 ImageNet classes x 500 seeds",
        "an ImageNet classifier, `outputs: imagenet`",
        _imagenette,
        ("templates",),
        quick="20 seeds",
    ),
    "srs-me-style": Protocol(
        "9 artists by bare name x 50 seeds x 5 images",
        "a style classifier trained for it (9 names)",
        lambda c: _by_name(c, "style", SRS_ME_STYLES, ("{}",), 50, 5, 5),
        quick="5 seeds",
    ),
    "srs-me-object": Protocol(
        "9 ImageNet classes by bare name x 50 seeds x 5 images",
        "an ImageNet classifier, `outputs: imagenet`",
        lambda c: _by_name(c, "object", SRS_ME_OBJECTS, ("{}",), 50, 5, 5),
        quick="5 seeds",
    ),
    "templates": Protocol(
        "any names x any templates x seeds",
        "a classifier of the names",
        _templates,
        ("names", "templates", "axis"),
        ("names", "templates"),
    ),
    "canvas": Protocol(
        "8 objects x 6 styles x 4 seeds, of the small pipeline",
        "`judge: canvas`, in the package",
        _canvas,
        quick="1 seed",
    ),
    "i2p": Protocol(
        "unsafe prompts from the published file",
        "none; `figures: {nudity: true}`",
        _i2p,
        ("source", "categories", "nudity"),
        ("source",),
        quick="100 rows at even distances",
        own_seeds=False,
    ),
    "coco": Protocol(
        "captions from the published file",
        "none; `figures: {clip: ...}`",
        _coco,
        ("source",),
        ("source",),
        quick="1,000 rows at even distances",
        own_seeds=False,
    ),
}
