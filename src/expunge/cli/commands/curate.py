"""``data curate``: forget and retain sets of image-text pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.app import complain

if TYPE_CHECKING:
    from expunge.data.curate import Curated, Shard
    from expunge.data.curate.match import Progress, Side

_OF_MODE = {
    "--uncanvas": ("--style", "--object"),
    "--synthesize": ("--prompt", "--n", "--seed", "--steps", "--guidance", "--device"),
}


def curate(
    context: typer.Context,
    name: Annotated[list[str] | None, typer.Option(help="Name to forget; again for each alias.")] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Where to look: tar or Parquet files or folders; '{00000..00010}' and '*' work. Repeatable."),
    ] = None,
    retain_shards: Annotated[
        list[str] | None, typer.Option(help="Where retained pairs come from; by default the same shards.")
    ] = None,
    no_retain: Annotated[bool, typer.Option("--no-retain", help="Write no retain set.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to make, by default curated/<name>.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many forget pairs.")] = None,
    retain_limit: Annotated[int, typer.Option(help="Stop after so many retain pairs.")] = 10_000,
    exclude_key: Annotated[list[str] | None, typer.Option(help="Leave out this key, or shard/key. Repeatable.")] = None,
    max_bad: Annotated[float, typer.Option(help="Largest share of unusable retain pairs.")] = 0.01,
    max_pixels: Annotated[int, typer.Option(help="Larger images are not decoded.")] = 50_000_000,
    image_column: Annotated[str | None, typer.Option(help="Image column of tables.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Caption column of tables.")] = None,
    uncanvas: Annotated[Path | None, typer.Option(help="UnlearnCanvas folder, instead of --shards.")] = None,
    style: Annotated[str | None, typer.Option(help="Style to forget, with --uncanvas.")] = None,
    object_: Annotated[str | None, typer.Option("--object", help="Object to forget, with --uncanvas.")] = None,
    synthesize: Annotated[
        str | None, typer.Option(help="Draw the forget images with this diffusers pipeline (folder or hub name).")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw; also the name to forget if none is given.")] = None,
    n: Annotated[int, typer.Option(help="Images to draw.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    device: Annotated[str | None, typer.Option(help="Where to draw; by default a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier curated set.")] = False,
) -> None:
    """Collect the image-text pairs that mention a name, and as many others that do not, as two tar files and an index.

    Names match whole words in any case; underscores are blanks. Forget images keep their bytes, and each is decoded
    once. A broken pair on the forget side is an error. The same input gives the same bytes.
    """
    from expunge.data.curate import Columns, Rules, find_shards
    from expunge.data.curate import curate as write
    from expunge.data.curate.write import check_target
    from expunge.errors import ConfigError

    modes = {"--shards": shards, "--uncanvas": uncanvas, "--synthesize": synthesize}
    chosen = [option for option, value in modes.items() if value]
    if len(chosen) != 1:
        raise ConfigError(f"give one of {', '.join(modes)}{f', not {len(chosen)} of them' if chosen else ''}")
    _check_options(context, chosen[0])
    if no_retain and retain_shards:
        raise ConfigError("--no-retain and --retain-shards exclude each other")
    if not (shards or retain_shards) and (image_column or caption_column):
        raise ConfigError("columns belong to --shards and --retain-shards and would have no effect")
    columns = Columns(image_column, caption_column)
    names = tuple(name or ())
    facts: dict[str, Any]
    retain: list[Shard] = find_shards(retain_shards, columns) if retain_shards else []
    notes: list[str] = []
    if shards:
        if not names:
            raise ConfigError("give the --name to look for in the captions")
        title, facts, forget = names[0], {"mode": "shards"}, find_shards(shards, columns)
        retain = retain or forget
    elif uncanvas is not None:
        from expunge.data.curate.uncanvas import read_canvas

        if names or (style is None) == (object_ is None):
            raise ConfigError("--uncanvas takes either --style or --object, and no --name")
        canvas = read_canvas(uncanvas, "style" if style is not None else "object", style or object_ or "")
        # Cells divide the canvas exactly; its own captions would not: "Sketch" is also in "Artist Sketch".
        names = (canvas.name,) if retain_shards else ()
        title, forget, notes = canvas.name, [canvas.forget], list(canvas.notes)
        retain = retain or [canvas.retain]
        facts = {"mode": "uncanvas", "style" if style is not None else "object": canvas.name}
    else:
        if prompt is None:
            raise ConfigError("--synthesize needs a --prompt")
        title, names = prompt, names or (prompt,)
        facts = {"mode": "synthesize", "pipeline": synthesize, "prompt": prompt, "n": n, "seed": seed}
        facts |= {"steps": steps, "guidance": guidance, "safety_checker": "off"}
    folder = out or Path("curated") / _slug(title)
    rules = Rules(names, limit, retain_limit, tuple(exclude_key or ()), max_bad, max_pixels)
    check_target(folder, overwrite=overwrite)
    with _Bar() as bar:
        if synthesize is not None and prompt is not None:
            from expunge.data.curate.synthetic import load_pipeline
            from expunge.data.curate.synthetic import synthesize as draw

            complain("the pipeline draws with its safety checker off", "yellow", "note")
            pipeline = load_pipeline(synthesize, device)
            drawn = draw(
                pipeline, prompt, n, seed=seed, steps=steps, guidance=guidance, on_image=lambda i: bar("draw", i, n, i)
            )
            forget = [drawn]
        done = write(
            forget,
            [] if no_retain else retain,
            folder,
            rules,
            facts=facts,
            notes=notes,
            overwrite=overwrite,
            progress=bar,
        )
    _show(done, title)


def _check_options(context: typer.Context, mode: str) -> None:
    from expunge.errors import ConfigError

    for owner, options in _OF_MODE.items():
        for parameter in context.command.params:
            source = context.get_parameter_source(parameter.name or "")
            given = source is not None and source.name == "COMMANDLINE"
            if owner != mode and given and set(parameter.opts) & set(options):
                raise ConfigError(f"{parameter.opts[0]} belongs to {owner} and would have no effect")


def _slug(title: str) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "set"


class _Bar:
    """A progress bar on stderr where that is a terminal."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[kept]}")
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        tasks: dict[str, Any] = {}
        self._bar.start()

        def tell(side: str, done: int, total: int, kept: int) -> None:
            shown = f"{kept} pairs"
            if side not in tasks:
                tasks[side] = self._bar.add_task(side, total=total, kept=shown)
            self._bar.update(tasks[side], completed=done, kept=shown)

        return tell

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _show(done: Curated, title: str) -> None:
    from expunge.cli.show import places, say, table
    from expunge.data.curate.write import FORGET, INDEX, RETAIN

    rows = [_row("forget", done.forget)]
    if done.retain is not None:
        rows.append(_row("retain", done.retain))
    headings = ("side", "pairs", "looked at", "all read", "same key", "names it", "same image", "unusable")
    table(f"curated: {title}", headings, rows)
    for side, found in (("forget", done.forget), ("retain", done.retain)):
        for where, why in found.skipped[:5] if found is not None else ():
            complain(f"{side}: {where}: {why}; left out", "yellow", "note")
    for note in done.notes:
        complain(note, "yellow", "note")
    say("written:")
    places(done.folder, (FORGET, RETAIN, INDEX))


def _row(side: str, found: Side) -> tuple[object, ...]:
    counts = (len(found.taken), found.looked_at, "yes" if found.complete else "no")
    removed = tuple(len(found.removed[k]) if side == "retain" else "" for k in ("key", "caption", "image"))
    return (side, *counts, *removed, len(found.skipped))
