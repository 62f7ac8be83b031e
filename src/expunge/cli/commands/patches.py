"""``apply``, ``revert``, ``info``, ``convert``: commands on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.app import app, complain

Overwrite = Annotated[bool, typer.Option(help="Replace existing files.")]


@app.command(name="apply")
def apply_command(
    model: Annotated[Path, typer.Argument(help="Weights of the base, .safetensors.")],
    patches: Annotated[list[Path], typer.Argument(help="One or several patches made on that base.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Patched weights; OUT.undo.safetensors goes beside.")],
    overwrite: Overwrite = False,
) -> None:
    """Write weights with patches applied, and a small undo file that restores the base exactly."""
    from expunge.cli.show import facts, size
    from expunge.patch.files import apply_files

    result = apply_files(model, patches, output, overwrite=overwrite)
    assert result.undo is not None
    facts(
        "",
        {
            "written": result.path,
            "undo file": f"{result.undo} ({size(result.undo)})",
            "patches": ", ".join(d[:12] for d in result.applied),
            "weights changed": f"{result.changed:,}",
            "digest": result.digest,
        },
    )


@app.command()
def revert(
    model: Annotated[Path, typer.Argument(help="Patched weights that `expunge apply` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the restored weights go.")],
    patch: Annotated[list[Path] | None, typer.Option(help="Take only this patch off; the others stay.")] = None,
    keep: Annotated[list[Path] | None, typer.Option(help="File of a patch that stays, if it lies elsewhere.")] = None,
    undo: Annotated[Path | None, typer.Option(help="The undo file, if it is not beside the weights.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base weights, instead of an undo file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Take patches off again. The result is checked against the digest of the base, bit for bit."""
    from expunge.cli.show import facts
    from expunge.patch.files import revert_file

    result = revert_file(model, output, undo=undo, base=base, drop=patch or (), keep=keep or (), overwrite=overwrite)
    left = ", ".join(d[:12] for d in result.applied)
    note = f"base with {left}" if left else "equal to the base, bit for bit"
    facts("", {"written": result.path, "digest": result.digest, "weights": note})


@app.command()
def info(file: Annotated[Path, typer.Argument(help="A patch, undo file, mask, checkpoint or weights file.")]) -> None:
    """Say what a file is: layers, bytes, digests, recipe, request. Nothing in it is executed."""
    from expunge.files import read_safetensors
    from expunge.models.weights import refuse_pickle
    from expunge.patch.files import APPLIED, UNDO

    refuse_pickle(file)
    tensors, metadata = read_safetensors(file, allow_nonfinite=True)
    if "expunge" in metadata:
        _patch(file)
    elif UNDO in metadata:
        _head(file, "undo file", metadata[UNDO], ("base_digest", "patched_digest", "patches"))
        _layers({k.removesuffix("::values"): t for k, t in tensors.items() if k.endswith("::values")}, "restored")
    elif "expunge_mask" in metadata:
        _head(file, "saliency mask", metadata["expunge_mask"], ("n", "keep", "gamma", "base", "request", "layout"))
    elif "expunge_checkpoint" in metadata:
        _head(
            file, "checkpoint of an unfinished run", metadata["expunge_checkpoint"], ("position", "identity", "notes")
        )
        _layers(tensors, "elements")
    else:
        _weights(file, tensors, metadata, APPLIED)


def _patch(file: Path) -> None:
    from expunge.cli.show import facts, size, table
    from expunge.patch import Patch
    from expunge.request import ForgetRequest

    patch = Patch.load(file)
    m = patch.manifest
    objective, edit = m.recipe.get("objective"), m.recipe.get("edit")
    shown = {
        "file": f"{file} ({size(file)})",
        "digest": patch.digest,
        "base": m.base_digest,
        "request": ForgetRequest(**m.request).title if m.request else "-",
        "request digest": m.request_digest or "-",
        "recipe": m.recipe.get("name", "-"),
        "objective": (objective or edit or {}).get("kind", "-"),
        "space": (m.recipe.get("space") or {}).get("kind", "-"),
        "protections": ", ".join(p.get("kind", "?") for p in m.recipe.get("protections", [])) or "-",
        "optim": ", ".join(f"{k}={v}" for k, v in m.recipe.get("optim", {}).items() if k in _OPTIM) or "-",
        "seed": m.seed,
        "versions": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
    }
    facts("patch", shown)
    for note in m.notes:
        complain(note, "yellow", "note")
    rows = []
    for name, change in patch.changes.items():
        count = int((change.dense() != 0).sum()) if change.additive else change.dense().numel()
        rows.append((name, list(change.shape), change.kind, f"{count:,}", f"{change.nbytes:,}"))
    table(f"{len(rows)} changed tensors", ("tensor", "shape", "kind", "changed", "bytes"), rows)


_OPTIM = ("name", "lr", "epochs", "momentum", "weight_decay", "lr_schedule", "norm", "augment")


def _head(file: Path, what: str, text: str, keys: tuple[str, ...]) -> None:
    from expunge.cli.show import facts, size
    from expunge.errors import ArtifactError

    try:
        data: dict[str, Any] = json.loads(text)
        shown = {k: _short(data[k]) for k in keys if k in data}
    except (json.JSONDecodeError, TypeError) as error:
        raise ArtifactError(f"{file}: malformed header ({error})") from None
    facts(what, {"file": f"{file} ({size(file)})", **shown})


def _short(value: Any) -> str:
    return json.dumps(value)[:300] if isinstance(value, dict | list) else str(value)[:300]


def _layers(tensors: dict[str, Any], counted: str) -> None:
    from expunge.cli.show import table

    rows = [(n, str(t.dtype).removeprefix("torch."), f"{t.numel():,}", f"{t.nbytes:,}") for n, t in tensors.items()]
    table(f"{len(rows)} tensors", ("tensor", "dtype", counted, "bytes"), rows)


def _weights(file: Path, tensors: dict[str, Any], metadata: dict[str, str], applied: str) -> None:
    from expunge.cli.show import facts, size, table
    from expunge.digest import combine, state_digests

    shown: dict[str, Any] = {"file": f"{file} ({size(file)})", "digest": combine(state_digests(tensors))}
    shown |= {"elements": f"{sum(t.numel() for t in tensors.values()):,}"}
    if applied in metadata:
        carried = json.loads(metadata[applied])
        shown |= {"base digest": carried.get("base_digest"), "patches applied": _short(carried.get("patches"))}
    shown |= {k: _short(v) for k, v in metadata.items() if k != applied}
    facts("weights", shown)
    rows = [
        (n, list(t.shape), str(t.dtype).removeprefix("torch."), f"{t.nbytes:,}", bool(t.isfinite().all()))
        for n, t in tensors.items()
    ]
    table(f"{len(rows)} tensors", ("tensor", "shape", "dtype", "bytes", "finite"), rows)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint written by torch.save.")],
    target: Annotated[Path, typer.Argument(help="Where the safetensors file goes.")],
    key: Annotated[str | None, typer.Option(help="Entry that holds the weights, if there are several.")] = None,
    overwrite: Overwrite = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="Accept NaN and infinite weights.")] = False,
) -> None:
    """Convert a pickle checkpoint once, with the restricted unpickler only; never retried without restrictions."""
    from expunge.cli.show import say
    from expunge.models.weights import convert_pickle

    for note in convert_pickle(source, target, key=key, overwrite=overwrite, allow_nonfinite=allow_nonfinite):
        complain(note, "yellow", "note")
    say(f"written: {target}")
