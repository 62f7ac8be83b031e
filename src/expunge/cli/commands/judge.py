"""``judge`` and ``summary``: what images on disk show, and the mean over several targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app, complain


@app.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Images of the model after forgetting, by any tool.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="A .yaml file with the blocks `judge` and `figures`.")],
    prompts: Annotated[
        Path | None, typer.Option(help="What was asked for, a CSV file; a folder of `generate` knows it itself.")
    ] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="What was to be forgotten: object=ring. Repeat for more.")
    ] = None,
    original: Annotated[Path | None, typer.Option(help="Images of the untouched model for the same prompts.")] = None,
    real: Annotated[Path | None, typer.Option(help="Real images of what stays, for FID and KID to them.")] = None,
    files: Annotated[
        str | None, typer.Option(help="How files are named: '{case}_{n}.png', '{style}_{object}_seed{seed}.jpg' ...")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images per prompt; the file's column, or 1, by default.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("judged"),
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bars on a terminal.")] = True,
) -> None:
    """Say what images on disk show: UA, IRA, CRA, distances to the original's, per class; a page and JSON."""
    from expunge.cli.commands.generate import _is_terminal
    from expunge.cli.show import console, places, say, table
    from expunge.config import load_config
    from expunge.config.judging import JudgingConfig
    from expunge.diffusion.generate import progress_bar
    from expunge.experiment import save_report
    from expunge.files import check_writable
    from expunge.judging import ask_question, judge_folder

    settings = load_config(JudgingConfig, config)
    check_writable(output)
    question = ask_question(settings, folder, prompts, forget or (), images)
    shown = progress and _is_terminal()
    report = judge_folder(
        settings,
        folder,
        question,
        original=original,
        real=real,
        pattern=files,
        device=device,
        bar=lambda title, total: progress_bar(total, shown, what=title),
    )
    console().print(report.table())
    before, after = (report.class_accuracy.get(k, {}) for k in ("before", "after"))
    if after:
        heads = ("class", *(["original"] if before else []), "judged")
        marked = {n: f"{n} (forgotten)" if n in report.forgotten_classes else n for n in after}
        table("recognised", heads, ([marked[n], *([before[n]] if before else []), after[n]] for n in after))
    for flag in report.flags:
        complain(flag, "yellow", "note")
    save_report(report, output)
    say("written:")
    places(output, ("report.html", "report.json"))


@app.command()
def summary(
    reports: Annotated[list[Path], typer.Argument(help="report.json of every target.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures as JSON.")] = None,
) -> None:
    """Average UA, IRA, CRA and distances over several targets, as UnlearnCanvas' tables do."""
    import json

    from expunge.cli.show import say, table
    from expunge.errors import ConfigError
    from expunge.files import atomic_write
    from expunge.metrics.describe import definitions
    from expunge.report.model import Report
    from expunge.report.targets import summarise

    read = [Report.load_json(p) for p in reports]
    names = [
        str(r.request.get("forgotten") or "") or p.parent.name or p.stem for r, p in zip(read, reports, strict=True)
    ]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"two reports are about {twice[0]!r}")
    found = summarise(dict(zip(names, read, strict=True)))
    keys = list(found.means)
    labels = definitions(keys)
    rows = [(n, *(f"{m[k].value:.1f}" for k in keys)) for n, m in found.targets.items()]
    rows.append((f"mean of {len(names)}", *(str(found.means[k]) for k in keys)))
    table("targets", ("target", *(str(labels[k]["label"]) for k in keys)), rows)
    if output is not None:
        body = {
            "judge": found.judge,
            "targets": {n: {k: e.to_dict() for k, e in m.items()} for n, m in found.targets.items()},
            "means": {k: e.to_dict() for k, e in found.means.items()},
        }
        atomic_write(output, json.dumps(body, indent=1) + "\n")
        say(f"written: {output}")
