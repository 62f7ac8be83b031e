"""``translate``: a patch of one CLIP library for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.app import app

_FORMS = "A folder, a hub id, an open_clip form (hf-hub:..., local-dir:...), or canvas."


@app.command()
def translate(
    patch: Annotated[Path, typer.Argument(help="A patch made on a two-tower model (CLIP).")],
    source: Annotated[str, typer.Option("--from", help=f"The model it was made on. {_FORMS}")],
    target: Annotated[str, typer.Option("--to", help=f"The same weights in the other library. {_FORMS}")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the translated patch goes.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Rewrite a CLIP patch from transformers to open_clip or back. Needs equal weights."""
    from expunge.cli.show import facts, size
    from expunge.errors import ConfigError
    from expunge.models.clip import load_clip
    from expunge.models.clip_names import translate as rewrite
    from expunge.patch import Patch

    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; remove it or pass --overwrite")
    loaded = Patch.load(patch)
    made_on, wanted = load_clip(source), load_clip(target)
    result = rewrite(loaded, made_on, wanted)
    result.save(output)
    shown = {
        "written": f"{output} ({size(output)})",
        "libraries": f"{made_on.library} -> {wanted.library}",
        "tensors": f"{len(loaded)} -> {len(result)}",
        "digest": result.digest,
    }
    facts("", shown)
