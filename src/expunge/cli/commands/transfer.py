"""``transfer``: a patch made on CLIP, for the same CLIP in the other library or a model that contains its tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.app import app, complain

if TYPE_CHECKING:
    from expunge.patch import Patch


@app.command()
def transfer(
    patch: Annotated[Path, typer.Argument(help="A patch made on the CLIP.")],
    source: Annotated[
        str, typer.Option("--from", help="The CLIP that the patch was made on: a folder, a hub name, an architecture.")
    ],
    target: Annotated[
        str,
        typer.Option(
            "--to",
            help="A LLaVA-style model or a diffusion pipeline: its folder or hub name; or the same CLIP in the other "
            "library.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new patch, .safetensors.")],
    pretrained: Annotated[str | None, typer.Option(help="Tag of open_clip's weights, with an architecture.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the CLIP in a file of their own.")] = None,
    tower: Annotated[str | None, typer.Option(help="Carry over this tower only: vision or language.")] = None,
    at: Annotated[str | None, typer.Option(help="Where the tower sits in the model, if it has several.")] = None,
    subfolder: Annotated[str, typer.Option(help="Of a pipeline: which encoder.")] = "text_encoder",
    clip_skip: Annotated[int | None, typer.Option(help="Of a pipeline: blocks that it skips when it is used.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as in the files), float32, float16 or bfloat16.")] = "auto",
    edited_only: Annotated[bool, typer.Option(help="Compare the changed tensors only, not the whole tower.")] = False,
    patched: Annotated[Path | None, typer.Option(help="Also write the patched model to this new folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing patch.")] = False,
) -> None:
    """Carry a patch over to the other CLIP library or to a model that contains the tower. Needs equal weights."""
    from expunge.consumers.load import is_two_tower, load_consumer, precision, save_patched
    from expunge.consumers.transfer import transfer as carry
    from expunge.errors import ConfigError
    from expunge.models.clip import ClipSpec, load_clip
    from expunge.models.clip_names import translate
    from expunge.models.towers import TOWERS
    from expunge.patch import Patch

    if tower is not None and tower not in TOWERS:
        raise ConfigError(f"--tower is vision or language, not {tower!r}")
    if output.suffix != ".safetensors":
        raise ConfigError(f"a patch is a .safetensors file, not {output.name!r}")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; remove it or pass --overwrite")
    loaded = Patch.load(patch)
    spec = ClipSpec(name=source, pretrained=pretrained, weights=None if weights is None else str(weights))
    towers = load_clip(spec)
    if is_two_tower(target):
        given = {"--tower": tower, "--at": at, "--clip-skip": clip_skip, "--patched": patched}
        lost = [name for name, value in given.items() if value is not None] + (["--edited-only"] if edited_only else [])
        if lost:
            raise ConfigError(f"{', '.join(lost)} would have no effect: {target} is a CLIP itself")
        other = load_clip(ClipSpec(name=target, pretrained=pretrained))
        both = {"libraries": f"{towers.library} -> {other.library}"}
        _written(translate(loaded, towers, other), loaded, output, both)
        return
    consumer = load_consumer(target, dtype=precision(dtype), subfolder=subfolder, clip_skip=clip_skip)
    side = next((t for t in TOWERS if t == tower), None)
    moved = carry(loaded, towers, consumer.module, tower=side, at=at, reads=consumer.reads, whole=not edited_only)
    more = {} if patched is None else {"patched model": str(save_patched(consumer, moved, patched))}
    _written(moved, loaded, output, more)


def _written(moved: Patch, loaded: Patch, output: Path, more: dict[str, str]) -> None:
    from expunge.cli.show import facts, size

    moved.save(output)
    shown = {"written": f"{output} ({size(output)})", "digest": moved.digest, "tensors": ", ".join(moved)}
    facts("", shown | more)
    for note in moved.manifest.notes[len(loaded.manifest.notes) :]:
        complain(note, "yellow", "note")
