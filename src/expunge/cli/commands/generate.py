"""``generate``: images for a list of prompts, by the original and by the patched model, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.app import app

ORIGINAL, ERASED = "original", "erased"
#: Options that a configuration settles itself.
_OF_PIPELINE = ("steps", "guidance", "side", "dtype", "sampler", "revision")


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|PIPELINE",
            help="A run's .yaml file; or a pipeline: a folder, a .safetensors file, a hub id, or 'canvas'.",
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(help="CSV with the columns prompt, evaluation_seed, case_number; others are ignored.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; original/ and erased/ are made in it.")],
    patch: Annotated[list[Path] | None, typer.Option("--patch", "-p", help="Patches of the erased model.")] = None,
    images: Annotated[
        int | None, typer.Option(help="Images per prompt, each from other noise; the file's column, or 1, by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    original: Annotated[bool, typer.Option(help="Also draw with the untouched model.")] = True,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    side: Annotated[int | None, typer.Option(help="Pixels along one side; the pipeline's own by default.")] = None,
    sampler: Annotated[str, typer.Option(help="ddim, or own: the pipeline's.")] = "ddim",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bars on a terminal.")] = True,
) -> None:
    """Draw images for prompts into folders that a killed run continues, with equal noise before and after patches."""
    from expunge.cli.show import say
    from expunge.diffusion.generate import drawing_facts, generate_files, read_prompts
    from expunge.diffusion.image_folder import ImageFolder
    from expunge.errors import ConfigError
    from expunge.files import check_writable
    from expunge.guards import check_device
    from expunge.patch import Patch, apply, revert

    if not original and not patch:
        raise ConfigError("--no-original without a --patch leaves nothing to draw")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: at least one image at a time")
    check_device(device)
    check_writable(output)
    asks = read_prompts(prompts).drawn(images, limit)
    patches = [Patch.load(p) for p in patch or ()]
    if model.endswith((".yaml", ".yml")):
        _refuse_options(context)
        task = _from_config(model)
    else:
        spec = {"name": model, "dtype": dtype, "sampler": sampler, "revision": revision}
        task = _from_pipeline(spec, steps, guidance, side, batch_size)
    task.model.to(device)
    facts: dict[str, dict[str, Any]] = {}
    if patches:  # patches and folders that do not fit are refused before the first image
        apply(task.model, *patches)
        facts[ERASED] = drawing_facts(task) | {"patches": [p.digest for p in patches]}
        revert(task.model)
    if original:
        facts[ORIGINAL] = drawing_facts(task) | {"patches": []}
    names = [n for n in (ORIGINAL, ERASED) if n in facts]
    for name in names:
        ImageFolder(output / name, asks, facts[name])
    for name in names:
        if name == ERASED:
            apply(task.model, *patches)
        made = generate_files(
            task.sample,
            asks,
            output / name,
            batch_size=batch_size,
            facts=facts[name],
            progress=progress and _is_terminal(),
        )
        say(f"{name}: {len(made)} images in {output / name}")


def _from_config(path: str) -> Any:
    from expunge.config import RunConfig, load_config
    from expunge.errors import CapabilityError
    from expunge.experiment import make_task

    task = make_task(load_config(RunConfig, path).task)
    if not hasattr(task, "sample"):
        raise CapabilityError(f"{path}: the {task.name} task draws no images; diffusion tasks do")
    return task


def _from_pipeline(spec: dict[str, Any], steps: int, guidance: float, side: int | None, batch_size: int) -> Any:
    import torch

    from expunge.data.captions import Axis
    from expunge.errors import ConfigError
    from expunge.models.pipelines import PipelineSpec, load_pipeline
    from expunge.tasks.text_to_image import TextToImageTask

    if steps < 1 or guidance < 0:
        raise ConfigError(f"--steps {steps} --guidance {guidance}: at least one step and no negative guidance")
    wanted = PipelineSpec(**spec)
    nothing = {"prompt": Axis(torch.zeros(1, dtype=torch.int64), ("nothing",), ("{}",))}  # the file has the prompts
    return TextToImageTask(
        load_pipeline(wanted), axes=nothing, steps=steps, guidance=guidance, side=side, sample_batch=batch_size
    )


def _refuse_options(context: typer.Context) -> None:
    from expunge.errors import ConfigError

    given = [
        name
        for name in _OF_PIPELINE
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(f"--{given[0]} would have no effect: the configuration has it under `task`")


def _is_terminal() -> bool:
    from rich.console import Console

    return Console(stderr=True).is_terminal
