"""``data``: look at the images a configuration names, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app, complain
from expunge.cli.commands.runs import OVERRIDES, Words, config_and_overrides

data_app = typer.Typer(name="data", help="Look at the images that a configuration names.", no_args_is_help=True)
app.add_typer(data_app)


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
    from expunge.config import BenchConfig, RunConfig, TrainConfig
    from expunge.config.load import parse_config
    from expunge.config.models import Experiment
    from expunge.config.text import read_source
    from expunge.data import load_data
    from expunge.data.surrogate import load_surrogate
    from expunge.data.surrogate_stats import contact_sheet, surrogate_statistics
    from expunge.errors import ConfigError

    if preview is not None and preview.suffix.lower() != ".png":
        raise ConfigError(f"a contact sheet is a .png file, not {preview.name!r}")
    path, overrides = config_and_overrides(words)
    source = read_source(path, overrides)
    kinds: dict[str, type[Experiment]] = {"methods": BenchConfig, "recipe": RunConfig}
    experiment = next((kind for key, kind in kinds.items() if key in source.data), None)
    task = (parse_config(experiment, source) if experiment is not None else parse_config(TrainConfig, source)).task
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
