"""``ask``: what a vision-language model answers about images, before and after patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="A LLaVA-style model: its folder, or its hub name.")],
    images: Annotated[Path, typer.Option(help="Folders named by the right answer: IMAGES/Ada_Byron/1.png ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for answers.json and answers.html.")],
    patch: Annotated[
        list[Path] | None, typer.Option("--patch", "-p", help="A patch made on the model, or by `expunge transfer`.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about every image.")] = None,
    forget: Annotated[
        list[str] | None, typer.Option(help="A name to forget; by default the concept in the patch's request.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images per call.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (as in the files), float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace existing answers.")] = False,
) -> None:
    """Ask a model who is in the images, without and with patches, and count the right names."""
    from expunge.cli.show import console, places
    from expunge.consumers.ask import WHO, Question, interview, named_images
    from expunge.consumers.llava import load_llava
    from expunge.consumers.load import precision
    from expunge.errors import ConfigError
    from expunge.patch import Patch

    if (output / "answers.json").exists() and not overwrite:
        raise ConfigError(f"{output / 'answers.json'} exists; remove it or allow overwriting")
    pictures, names, files = named_images(images)
    patches = [Patch.load(p) for p in patch or ()]
    loaded, processor = load_llava(model, precision(dtype), device)
    result = interview(
        loaded,
        processor,
        pictures,
        names,
        WHO if question is None else Question(text=question),
        patches=patches,
        forget=[n.replace("_", " ") for n in forget or ()],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    console().print(result.table())
    result.save(output, pictures, files)
    places(output, ("answers.html", "answers.json"))
