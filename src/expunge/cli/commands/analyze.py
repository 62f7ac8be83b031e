"""``analyze embed | tsne | wasserstein``: embeddings of several models, and pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.app import app
from expunge.cli.commands.runs import OVERRIDES, Words, config_and_overrides

analyze = typer.Typer(
    help="Embeddings of several models: t-SNE maps and Wasserstein distances between classes.", no_args_is_help=True
)
app.add_typer(analyze, name="analyze")

Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `analyze embed` wrote, or above.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Root of the pictures; the folders are laid out alike.")]
Parquet = Annotated[bool, typer.Option("--parquet", help="Write Parquet files, too (needs pyarrow).")]


@analyze.command(name="embed", context_settings=OVERRIDES)
def embed_command(
    words: Words,
    patch: Annotated[list[str] | None, typer.Option("--patch", "-p", help="A patch, as FILE or NAME=FILE.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option("--weights", "-w", help="Other weights, such as a retrained model's.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of samples, the same for every model.")] = 200,
    role: Annotated[str, typer.Option(help="train or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    balanced: Annotated[bool, typer.Option(help="As many samples of every class as possible.")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="embeddings/NAME by default.")] = None,
    parquet: Parquet = False,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Write embeddings, labels and class prototypes of the base and of patched or other weights, a file each."""
    from expunge.analysis import embed, embed_weights
    from expunge.cli.show import say
    from expunge.config import RunConfig, load_config
    from expunge.errors import ConfigError
    from expunge.experiment import make_task
    from expunge.files import confined
    from expunge.patch import Patch

    path, overrides = config_and_overrides(words)
    config = load_config(RunConfig, path, overrides)
    folder = output if output is not None else Path("embeddings") / config.name
    models: dict[str, tuple[str, Path | None]] = {"base": ("base", None)}
    for kind, given in (("patch", patch), ("weights", weights)):
        for text in given or ():
            name, file = named(text)
            if name in models:
                raise ConfigError(f"two models are called '{name}'; name one by NAME={file}")
            models[name] = (kind, file)
    for name in models:
        target = confined(folder, f"{name}.safetensors")
        if target.exists() and not overwrite:
            raise ConfigError(f"{target} exists; remove it or allow overwriting")
    patches = {n: Patch.load(f) for n, (kind, f) in models.items() if kind == "patch" and f is not None}
    task, request = make_task(config.task), config.request.build()
    split = task.split(request)
    options: dict[str, Any] = {"role": role, "samples": samples, "seed": seed, "balanced": balanced, "request": request}
    for name, (kind, source) in models.items():
        if kind == "weights" and source is not None:
            found = embed_weights(task, source, split, name=name, **options)
        else:
            found = embed(task, split, patches.get(name), name=name, **options)
        target = confined(folder, f"{name}.safetensors")
        found.save(target)
        if parquet:
            found.save_parquet(target.with_suffix(".parquet"))
        say(f"written: {target} ({len(found)} samples, {found.features.shape[1]} features)")


def named(text: str) -> tuple[str, Path]:
    """``NAME=FILE``, or a file: its stem, or its folder's name for ``patch.safetensors``."""
    name, sign, rest = text.partition("=")
    if sign and name and "/" not in name:
        return name, Path(rest)
    path = Path(text)
    return (path.resolve().parent.name if path.stem == "patch" else path.stem), path


@analyze.command(name="tsne")
def tsne_command(
    folders: Folders,
    dims: Annotated[str, typer.Option(help="2, 3 or animated.")] = "2",
    perplexity: Annotated[float | None, typer.Option(help="50 in two dimensions, 30 in three by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="234 in two dimensions, 42 in three by default.")] = None,
    metric: Annotated[str, typer.Option(help="Distance between features.")] = "cosine",
    engine: Annotated[str, typer.Option(help="sklearn, or opentsne if it is installed.")] = "sklearn",
    init: Annotated[str, typer.Option(help="Start from pca or random places.")] = "pca",
    form: Annotated[str, typer.Option("--format", help="Of the animated map: gif, html or both.")] = "gif",
    output: Output = Path("images"),
    parquet: Parquet = False,
) -> None:
    """Project all models of a folder together and write one picture per model with common axes."""
    from expunge.analysis.outputs import write_tsne
    from expunge.cli.show import say

    settings: Any = {"dims": dims, "metric": metric, "engine": engine, "init": init, "form": form, "parquet": parquet}
    for file in write_tsne(folders, output, perplexity=perplexity, seed=seed, **settings):
        say(f"written: {file}")


@analyze.command(name="wasserstein")
def wasserstein_command(
    folders: Folders,
    unit: Annotated[bool, typer.Option("--unit", help="Scale features to length one first.")] = False,
    solver: Annotated[str, typer.Option(help="auto, assignment, pot or lp; all are exact.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise floor's halves.")] = 0,
    output: Output = Path("images"),
    parquet: Parquet = False,
) -> None:
    """Exact Wasserstein distances between classes in every model, between models, and their differences."""
    from expunge.analysis.outputs import write_wasserstein
    from expunge.cli.show import say

    settings: Any = {"unit": unit, "solver": solver, "seed": seed, "parquet": parquet}
    for file in write_wasserstein(folders, output, **settings):
        say(f"written: {file}")
