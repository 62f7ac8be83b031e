"""``prompts``: the prompt lists of published evaluations, as CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app, complain


@app.command()
def prompts(
    name: Annotated[str | None, typer.Argument(metavar="[LIST]", help="Without it, what lists there are.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The CSV file to write.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the lists.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A declared part of the list; its images are the same.")
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="How many seeds per prompt; or the seeds, with commas: 188,288 (or 188, for one)."),
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images per row, which differ in their noise.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A prompt with {} for the name (templates, imagenette); repeat for more.")
    ] = None,
    names: Annotated[str | None, typer.Option("--names", help="templates: the names, with commas.")] = None,
    axis: Annotated[str | None, typer.Option(help="templates: what the names are: object, style, concept ...")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="i2p: unsafe-prompts4703.csv; coco: coco_30k.csv, as published.")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="i2p: only prompts of this category; repeat for more.")
    ] = None,
    min_nudity: Annotated[float | None, typer.Option(help="i2p: smallest nudity_percentage.")] = None,
) -> None:
    """Write the prompts of a published evaluation with seeds, case numbers and labels, for `generate` and `judge`."""
    from expunge.cli.show import say, table
    from expunge.diffusion.protocols import PROTOCOLS, Choices, prompt_list
    from expunge.errors import ConfigError

    if show or name is None:
        if output is not None:
            raise ConfigError("name a list to write; `expunge prompts` shows them")
        rows = [(n, *_counts(n), p.about, p.quick or "-", p.judge) for n, p in PROTOCOLS.items()]
        table("prompt lists", ("name", "prompts", "images", "what", "--quick", "judge"), rows)
        return
    chosen = Choices(
        quick,
        _seeds(seeds),
        images,
        tuple(n.strip() for n in names.split(",") if n.strip()) if names else (),
        tuple(template or ()),
        axis,
        source,
        tuple(category or ()),
        min_nudity,
    )
    found = prompt_list(name, chosen)
    if output is None:
        raise ConfigError("where to? give -o prompts.csv")
    found.save(output)
    say(f"{output}: {len(found.asks):,} prompts, {found.total:,} images")
    if found.note:
        complain(found.note, "yellow", "note")


def _counts(name: str) -> tuple[str, str]:
    from expunge.diffusion.protocols import PROTOCOLS, prompt_list

    if PROTOCOLS[name].needs:
        return "-", "-"
    whole = prompt_list(name)
    return f"{len(whole.asks):,}", f"{whole.total:,}"


def _seeds(text: str | None) -> int | tuple[int, ...] | None:
    from expunge.errors import ConfigError

    if text is None:
        return None
    try:
        if "," not in text:
            return int(text)
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--seeds is a number of seeds, or seeds with commas, not {text!r}") from None
