"""``plan``: what a run on a text-to-image pipeline will cost, without loading a weight."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.app import app, complain
from expunge.cli.commands.runs import OVERRIDES, Words, config_and_overrides


@app.command(context_settings=OVERRIDES)
def plan(
    words: Words,
    protected: Annotated[int | None, typer.Option(help="SRS-ME: prompts that stay beside the empty one.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a run on the CPU.")] = False,
    teraflops: Annotated[float | None, typer.Option(help="What the device reaches in such a model.")] = None,
) -> None:
    """Predict size, passes, peak memory and time of a run from configurations alone; nothing is loaded."""
    from expunge.cli.show import console
    from expunge.config import RunConfig, load_config
    from expunge.config.tasks import TextToImageTaskConfig
    from expunge.diffusion.plan import plan as predict
    from expunge.diffusion.plan import table
    from expunge.diffusion.shapes import shape_of
    from expunge.errors import ConfigError
    from expunge.spaces.concept_shift import ConceptShift

    path, overrides = config_and_overrides(words)
    config = load_config(RunConfig, path, overrides)
    if not isinstance(config.task, TextToImageTaskConfig):
        raise ConfigError(f"{path}: plans are made for text-to-image pipelines, not for the {config.task.family} task")
    if teraflops is not None and not teraflops > 0:
        raise ConfigError(f"--teraflops must be above 0, got {teraflops:g}")
    recipe, spec = config.build_recipe(), config.task.model
    if protected is None and isinstance(recipe.space, ConceptShift) and recipe.space.protect_others:
        others = len(config.task.classes or ()) - 1
        protected = len(recipe.space.protect) + len(recipe.space.watermarks) + max(0, others)
    stored = 4 if spec.dtype == "float32" else 2
    speed = None if teraflops is None else teraflops * 1e12
    shape = shape_of(spec.name)
    found = predict(
        recipe,
        shape,
        protected=protected,
        speed=speed,
        stored=stored,
        side=None if config.task.side is None else config.task.side // shape.factor,
        checkpointing=config.task.gradient_checkpointing,
        on_cpu=cpu,
    )
    console().print(table(found))
    for note in found.notes:
        complain(note, "yellow", "note")
