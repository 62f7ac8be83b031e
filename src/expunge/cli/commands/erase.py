"""``erase``: several concepts out of a text-to-image pipeline, each as a patch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.app import app, complain
from expunge.cli.commands.runs import OVERRIDES, Progress

if TYPE_CHECKING:
    from expunge.diffusion.concept_plan import Room
    from expunge.diffusion.erase import Erased
    from expunge.patch import Patch


class Wordings(StrEnum):
    """Prompts of other concepts that are protected."""

    all = "all"
    first = "first"


class Weights(StrEnum):
    """How concepts count in a run at once."""

    balanced = "balanced"
    equal = "equal"


@app.command(context_settings=OVERRIDES)
def erase(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='CONFIG "CONCEPT; CONCEPT ..." [--KEY VALUE ...]',
            help="A run configuration whose recipe is srs_me, the concepts, then dotted overrides.",
        ),
    ],
    at_once: Annotated[bool, typer.Option("--at-once", help="Train all in one run, in the memory of one.")] = False,
    earlier: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATCH", help="A concept erased before; it is protected.")
    ] = None,
    wordings: Annotated[
        Wordings, typer.Option(help="Protect all prompts of the other concepts, or the first of each.")
    ] = Wordings.all,
    weights: Annotated[
        Weights, typer.Option(help="With --at-once: how concepts count, as in the paper or alike.")
    ] = Weights.balanced,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for everything.")] = None,
    progress: Progress = True,
) -> None:
    """Erase concepts, each into a patch of its own: any of them comes off again. Continues after a kill."""
    from expunge.cli.show import console
    from expunge.config import RunConfig, load_config, parse_overrides
    from expunge.diffusion import erase as erasing
    from expunge.errors import ConfigError

    given, overrides = parse_overrides(words)
    concepts = [c.strip() for word in given[1:] for c in word.split(";") if c.strip()]
    if not concepts:
        raise ConfigError('name a configuration file and the concepts: expunge erase CONFIG "ring; star"')
    if weights is not Weights.balanced and not at_once:
        raise ConfigError("--weights belongs to --at-once; separate runs have none")
    if any(k == "request" or k.startswith("request.") for k in overrides):
        raise ConfigError("--request is for `expunge run`; here the concepts are named after the configuration")
    config = load_config(RunConfig, given[0], {**overrides, "request": {"concept": concepts[0]}})
    result = erasing.erase(
        config,
        concepts,
        at_once=at_once,
        earlier=_earlier(earlier or []),
        wordings=wordings.value,
        weights=weights.value,
        folder=output,
        progress=progress,
        planned=_rooms,
    )
    _effects(result)
    for report in result.reports.values():
        console().print(report.table())
        for flag in report.flags:
            complain(flag, "yellow", "note")
    _where(result)


def _earlier(given: list[str]) -> dict[str, Patch]:
    from expunge.errors import ConfigError
    from expunge.patch import Patch

    found: dict[str, Patch] = {}
    for text in given:
        name, equals, path = (part.strip() for part in text.partition("="))
        if not (name and equals and path):
            raise ConfigError(f"--earlier {text!r}: write it as name=patch.safetensors")
        if name in found:
            raise ConfigError(f"--earlier names '{name}' twice")
        found[name] = Patch.load(path)
    return found


def _rooms(rooms: Mapping[str, Room]) -> None:
    from expunge.cli.show import table

    rows = [
        (name, room.protected, f"{room.directions} of {room.width}", room.used, _percent(room.erasable))
        for name, room in rooms.items()
    ]
    table("before the run", ("concept", "protected prompts", "directions left", "used", "energy in reach"), rows)
    for name, room in rooms.items():
        for note in room.notes:
            complain(f"{name}: {note}", "yellow", "note")


def _effects(result: Erased) -> None:
    from expunge.cli.show import say, table

    names = list(dict.fromkeys(n for pair in result.effects for n in pair))
    rows = [
        (one, *("-" if one == other else _percent(result.effects.get((one, other))) for other in names))
        for one in names
        if any(one == pair[0] for pair in result.effects)
    ]
    if rows:
        say("keys and values of the concept of a column change, when that of a row is erased, by:")
        table("", ("", *names), rows)


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return "0 (rounding)" if share <= 1e-5 else f"{100 * share:.2g} %"


def _where(result: Erased) -> None:
    from expunge.cli.show import say
    from expunge.diffusion.concepts import folder_of
    from expunge.report.words import size

    say("written:")
    for name, patch in result.patches.items():
        own = result.folder / folder_of(name)
        say(f"  {own / 'patch.safetensors'} ({size(patch.nbytes)})")
        if name in result.reports:
            say(f"  {own / 'report.html'}")
    for report in list(result.reports.values())[:1]:
        say(f"apply all, and take one off again (in {result.folder}):")
        for line in report.undo:
            say(f"  {line}")
