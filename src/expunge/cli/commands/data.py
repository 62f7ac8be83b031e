"""``data``: look at the data a configuration names, and take statistics of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.app import app, complain
from expunge.cli.commands.curate import curate
from expunge.cli.commands.runs import OVERRIDES, Words, config_and_overrides

if TYPE_CHECKING:
    from expunge.config import TrainConfig
    from expunge.config.models import Experiment

data_app = typer.Typer(name="data", help="Look at the data that a configuration names.", no_args_is_help=True)
app.add_typer(data_app)
data_app.command()(curate)


@data_app.command(context_settings=OVERRIDES)
def surrogate(
    words: Words,
    write_index: Annotated[
        Path | None, typer.Option(help="Write the chosen images as JSON, to be read back by task.surrogate.index_file.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Write a contact sheet, a PNG.")] = None,
) -> None:
    """Load the surrogate set of a run, bench or training file and compare it with the training images."""
    from expunge.cli.show import facts, say, table
    from expunge.config.models import TaskConfig
    from expunge.data import load_data
    from expunge.data.surrogate import load_surrogate
    from expunge.data.surrogate_stats import contact_sheet, surrogate_statistics
    from expunge.errors import ConfigError

    if preview is not None and preview.suffix.lower() != ".png":
        raise ConfigError(f"a contact sheet is a .png file, not {preview.name!r}")
    path, overrides = config_and_overrides(words)
    task = _any_config(path, overrides).task
    if not isinstance(task, TaskConfig):
        raise ConfigError(f"{path}: the {task.family} task takes no surrogate images")
    if task.surrogate is None:
        raise ConfigError(f"{path}: no 'task.surrogate'; add one, e.g. --task.surrogate.name shapes")
    train = load_data(task.data).train
    found = load_surrogate(task.surrogate, train.shape)
    statistics = surrogate_statistics(found.images, train)
    facts(
        f"surrogate '{task.surrogate.name}'",
        {
            "source": found.source,
            "images": f"{statistics.n}, {list(found.images.shape)} uint8",
            "digest": found.images.digest,
            "train": f"{task.data.name}, {statistics.n_train} images",
        },
    )
    for note in found.notes:
        complain(note, "yellow", "note")
    rows = [
        (
            c,
            f"{s.mean:.4f}",
            f"{s.std:.4f}",
            f"{s.train_mean:.4f}",
            f"{s.train_std:.4f}",
            f"{s.ks:.3f}",
            f"{s.p:.2g}" if s.p else "< 1e-300",
        )
        for c, s in enumerate(statistics.channels)
    ]
    table(
        "pixels, and a Kolmogorov-Smirnov test on the image means",
        ("channel", "surrogate mean", "std", "train mean", "std", "KS", "p"),
        rows,
    )
    if statistics.p >= 0.001:
        complain(f"the image means do not tell the two sets apart (p = {statistics.p:.2g})", "yellow", "note")
    if statistics.shared:
        complain(f"{statistics.shared} surrogate images are also training images", "yellow", "note")
    if write_index is not None:
        found.write_index(write_index)
        say(f"written: {write_index}")
    if preview is not None:
        contact_sheet(found.images, preview)
        say(f"written: {preview}")


@data_app.command(context_settings=OVERRIDES)
def statistics(
    words: Words,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .safetensors.")],
    delta: Annotated[float, typer.Option(help="Exponent of the features, as in the method.")] = 0.5,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write the class statistics that SCAR needs: one pass over the training set with the weights of a file.

    With `statistics` of a method set to this file, the retain set is never opened. What a training file excludes is
    left out. `statistics: true` in a training file does the same at the end of the training.
    """
    from expunge.cli.show import facts, say
    from expunge.config import TrainConfig
    from expunge.config.experiments import check_index_file
    from expunge.config.models import TaskConfig
    from expunge.errors import ConfigError
    from expunge.experiment import make_task
    from expunge.features.statistics import ClassStatistics
    from expunge.tasks.images import ImageTask

    if output.suffix != ".safetensors":
        raise ConfigError(f"class statistics are a .safetensors file, not {output.name!r}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; remove it or allow overwriting")
    if not delta > 0:
        raise ConfigError(f"--delta must be above 0, got {delta:g}")
    path, overrides = config_and_overrides(words)
    config = _any_config(path, overrides)
    if not isinstance(config.task, TaskConfig):
        raise ConfigError(f"{path}: class statistics are taken of classifiers, not of the {config.task.family} task")
    if config.task.model.weights is None and not config.task.model.pretrained:
        raise ConfigError(f"{path}: 'task.model.weights' names no file: class statistics belong to trained weights")
    task = make_task(config.task)
    assert isinstance(task, ImageTask)
    exclude = config.exclude if isinstance(config, TrainConfig) else None
    if exclude is not None and exclude.index_file is not None:
        check_index_file(exclude.index_file, task.data.train.digest)
    split = task.split(exclude.build()) if exclude is not None else task.everything()
    found = ClassStatistics.fit(task, split, "retain", task.eval_batch_size, delta=delta)
    found.save(output)
    shown = {"classes": len(found.classes), "samples": int(found.count.sum()), "features": found.mean.shape[1]}
    facts("class statistics", {**shown, "power": f"{found.rule}, {delta:g}", "model": found.model})
    say(f"written: {output}")


def _any_config(path: str, overrides: dict[str, Any]) -> Experiment | TrainConfig:
    """A run, bench or training file, told apart by its keys."""
    from expunge.config import BenchConfig, RunConfig, TrainConfig
    from expunge.config.load import parse_config
    from expunge.config.text import read_source

    source = read_source(path, overrides)
    kinds: dict[str, type[Experiment]] = {"methods": BenchConfig, "recipe": RunConfig}
    experiment = next((kind for key, kind in kinds.items() if key in source.data), None)
    return parse_config(experiment, source) if experiment is not None else parse_config(TrainConfig, source)
