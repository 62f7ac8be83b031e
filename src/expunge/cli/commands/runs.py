"""``run``, ``bench``, ``train``, ``demo``: commands that train."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.app import app, complain

_WORDS = typer.Argument(
    metavar="CONFIG [--KEY VALUE ...]",
    help="A YAML file, then dotted overrides: --recipe.optim.lr 1e-4 or --recipe.optim.lr=1e-4.",
)


class Tour(StrEnum):
    """The demos."""

    digits = "digits"
    clip = "clip"
    diffusion = "diffusion"


Words = Annotated[list[str], _WORDS]
BenchWords = Annotated[list[str] | None, _WORDS]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bars on a terminal.")]
OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True}


def config_and_overrides(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Split the words after a command into the file and the overrides."""
    from expunge.config import parse_overrides
    from expunge.errors import ConfigError

    files, overrides = parse_overrides(words)
    if len(files) != 1:
        given = f"{len(files)} were given: {', '.join(files[:4])}" if files else "none was given"
        raise ConfigError(f"name one configuration file; {given}")
    return files[0], overrides


@app.command(context_settings=OVERRIDES)
def run(words: Words, progress: Progress = True) -> None:
    """Unlearn, run the controls, evaluate: a run folder with patch, report and log. Resumes after a kill."""
    from expunge import experiment
    from expunge.cli.show import console, places, say
    from expunge.config import RunConfig, load_config

    path, overrides = config_and_overrides(words)
    config = load_config(RunConfig, path, overrides)
    result = experiment.run(config, progress=progress)
    console().print(result.report.table())
    for flag in result.report.flags:
        complain(flag, "yellow", "note")
    say("already finished; nothing was run again:" if result.resumed else "written:")
    places(result.folder, ("patch.safetensors", "report.html", "report.json", "log.jsonl", "config.yaml"))
    say("undo:")
    for command in result.report.undo:
        say(f"  {command}")


@app.command(context_settings=OVERRIDES)
def bench(
    words: BenchWords = None,
    experiments: Annotated[
        Path | None, typer.Option(help="A JSON list of experiments (keys of the DeepDive study) instead of a CONFIG.")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="With --experiments: repetitions of every entry, 4 by default.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="With --experiments: YAML file with data and model.", metavar="CONFIG")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="With --experiments: as_intended (default) or as_published.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Run methods x seeds x requests, or a list of experiments; resumes, goes on after a failure, saves the table."""
    from expunge.bench_table import lines, terminal
    from expunge.cli.show import console, places, say

    with _bar("cells", progress) as advance:
        result = _bench(words or [], experiments, runs, task, profile, advance)
    rows = lines(result.cells)
    for request in dict.fromkeys(r.request for r in rows):
        console().print(terminal(rows, request))
    reused = sum(c.reused for c in result.cells)
    say(f"{len(result.cells)} cells, {reused} of them from earlier runs; written:")
    tables = ("table.md", "table.csv", "results.json", "results.csv", "results.parquet", "config.yaml")
    places(result.folder, tables)
    for cell in result.failed:
        complain(f"{cell.request}, {cell.label}, seed {cell.seed}: {cell.error}")
    if result.failed:
        raise typer.Exit(result.exit_code)


def _bench(
    words: list[str], experiments: Path | None, runs: int | None, task: str | None, profile: str | None, advance: Any
) -> Any:
    from expunge import bench as benches
    from expunge.config import BenchConfig, load_config, parse_overrides
    from expunge.config.experiments import load_experiments
    from expunge.errors import ConfigError, did_you_mean

    def on_cell(done: int, total: int, cell: Any) -> None:
        advance(done, total, f"{cell.label} s{cell.seed}")

    if experiments is None:
        if runs is not None or profile is not None:
            given = "--runs" if runs is not None else "--profile"
            raise ConfigError(f"{given} belongs to --experiments; a CONFIG has 'seeds' and the settings of its methods")
        path, overrides = config_and_overrides([*words, *(["--task", task] if task is not None else [])])
        return benches.bench(load_config(BenchConfig, path, overrides), on_cell=on_cell)
    rest, overrides = parse_overrides(words)
    if rest:
        raise ConfigError(f"--experiments takes the place of a CONFIG; {rest[0]!r} was given, too")
    known = {"as_intended": "as_intended", "as_published": "as_published"}
    if profile is not None and profile not in known:
        raise ConfigError(f"--profile: no profile is called {profile!r}{did_you_mean(profile, known)}")
    chosen: Any = profile or "as_intended"
    count = 4 if runs is None else runs
    listed = load_experiments(experiments, runs=count, task=task, profile=chosen, overrides=overrides)
    return benches.bench_experiments(listed, on_cell=on_cell)


@app.command(context_settings=OVERRIDES)
def train(
    words: Words,
    exclude_class: Annotated[list[str] | None, typer.Option(help="Leave a class out, by number or name.")] = None,
    exclude_fraction: Annotated[float | None, typer.Option(help="Leave a random share of the samples out.")] = None,
    exclude_file: Annotated[Path | None, typer.Option(help="Leave out the indices in a JSON file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing weights.")] = False,
    progress: Progress = True,
) -> None:
    """Train an original, or a retrained model that never sees the excluded samples. Weights are safetensors."""
    from expunge import experiment
    from expunge.cli.show import facts, say
    from expunge.config import TrainConfig, load_config
    from expunge.errors import ConfigError

    path, overrides = config_and_overrides(words)
    classes = [int(c) if c.isdigit() else c for c in exclude_class or []]
    given = {
        "classes": classes or None,
        "fraction": exclude_fraction,
        "index_file": str(exclude_file) if exclude_file else None,
    }
    named = {k: v for k, v in given.items() if v is not None}
    if len(named) > 1:
        raise ConfigError("use one of --exclude-class, --exclude-fraction and --exclude-file")
    if named:
        overrides["exclude"] = named
    config = load_config(TrainConfig, path, overrides)
    result = experiment.train(config, overwrite=overwrite, progress=progress)
    if result.accuracy:
        facts("accuracy, %", {k: f"{v:.2f}" for k, v in result.accuracy.items()})
    say(f"weights: {result.weights}")
    if result.excluded is not None:
        say(f"excluded samples: {result.excluded}")
    if result.statistics is not None:
        say(f"class statistics: {result.statistics}")


@app.command()
def demo(
    which: Annotated[
        Tour, typer.Argument(help="digits: a classifier. clip: a small CLIP. diffusion: text to image.")
    ] = Tour.digits,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for everything; runs/demo, runs/demo-clip or runs/demo-diffusion."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer methods and epochs; figures mean less.")] = False,
    progress: Progress = True,
) -> None:
    """A tour without downloads: digits (a class, 10 % of the samples); clip or diffusion (an object and a style)."""
    from expunge.cli.show import console, say

    def show(x: Any) -> None:
        say(x) if isinstance(x, str) else console().print(x)

    if which is Tour.clip:
        from expunge.demo.clip import run_clip_demo

        run_clip_demo(output or Path("runs/demo-clip"), quick=quick, progress=progress, say=show)
    elif which is Tour.diffusion:
        from expunge.demo.diffusion import run_diffusion_demo

        run_diffusion_demo(output or Path("runs/demo-diffusion"), quick=quick, progress=progress, say=show)
    else:
        from expunge.demo.digits import run_demo

        run_demo(output or Path("runs/demo"), quick=quick, progress=progress, say=show)


def _bar(title: str, wanted: bool) -> Any:
    import sys
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        if not (wanted and sys.stderr.isatty()):
            yield lambda done, total, text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task(title, total=None)
            yield lambda done, total, text: shown.update(task, completed=done, total=total, description=text)

    return bar()
