"""``evaluate`` and ``report``: evidence for a patch, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app, complain
from expunge.cli.commands.runs import OVERRIDES, Progress, Words, config_and_overrides


@app.command(context_settings=OVERRIDES)
def evaluate(
    words: Words,
    patch: Annotated[Path, typer.Option("--patch", "-p", help="The patch to evaluate.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the report; 'audit' beside the patch by default.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Measure a given patch with controls and reference, as an auditor would: nothing its author reported is used."""
    from expunge import experiment
    from expunge.cli.show import console, places, say
    from expunge.config import RunConfig, load_config

    path, overrides = config_and_overrides(words)
    config = load_config(RunConfig, path, overrides)
    folder = out if out is not None else patch.parent / "audit"
    report = experiment.audit(config, patch, folder, progress=progress)
    console().print(report.table())
    for flag in report.flags:
        complain(flag, "yellow", "note")
    say("written:")
    places(folder, ("report.html", "report.json"))


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A report.json.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; beside the JSON by default.")] = None,
) -> None:
    """Print a stored report and render its page again."""
    from expunge.cli.show import console, say
    from expunge.errors import ConfigError
    from expunge.report.model import Report

    target = output if output is not None else source.with_suffix(".html")
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"the page is an .html file, not {target.name!r}")
    stored = Report.load_json(source)
    console().print(stored.table())
    stored.save_html(target)
    say(f"written: {target}")
