"""Patches on files: write a patched weights file, and take patches off again from a small undo file.

The undo file holds the original bits of the touched elements only (one bit per element says which, deflated), so it is
about as large as the patch. Nothing is ever subtracted, and every result is checked against its digest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.digest import combine, state_digests
from expunge.errors import ArtifactError, ConfigError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.patch.apply import stack
from expunge.patch.changes import pack_mask, unpack_mask
from expunge.patch.patch import Patch

APPLIED, UNDO = "expunge.applied", "expunge.undo"
FORMAT = 1


@dataclass(frozen=True)
class FileResult:
    """What was written.

    Args:
        path: The weights file.
        digest: Digest of its weights.
        applied: Digests of the patches it now carries.
        undo: The undo file, if patches are applied.
        changed: Elements whose bits differ from the base.
    """

    path: Path
    digest: str
    applied: tuple[str, ...] = ()
    undo: Path | None = None
    changed: int = 0


def undo_path(path: str | Path) -> Path:
    """``OUT.safetensors`` -> ``OUT.undo.safetensors``."""
    return Path(path).with_suffix(".undo.safetensors")


def apply_files(
    model: str | Path, patches: Sequence[str | Path], out: str | Path, *, overwrite: bool = False
) -> FileResult:
    """Write the weights of ``model`` with patches applied, and an undo file beside them.

    Args:
        model: Weights of the base.
        patches: Patch files made on that base; their order does not matter.
        out: Target; the undo file is ``OUT.undo.safetensors``.
        overwrite: Replace existing files.

    Returns:
        What was written.

    Raises:
        ArtifactError: Broken file, wrong base, conflicting or repeated patches.
        ConfigError: No patch, the target exists, or has another suffix.
    """
    target = _target(out, overwrite)
    undo = undo_path(target)
    if undo.exists() and not overwrite:
        raise ConfigError(f"{undo} exists; remove it or allow overwriting")
    if not patches:
        raise ConfigError("name at least one patch file")
    stored, metadata = _weights(model)
    if APPLIED in metadata:
        known = ", ".join(d[:12] for d in _json(metadata[APPLIED], model)["patches"])
        raise ArtifactError(
            f"{model} already carries patches ({known}); apply all patches to the base in one command, or revert first"
        )
    loaded = [(Path(p), Patch.load(p)) for p in patches]
    base, prefix = _plain_names(stored)
    try:
        patched = stack(base, *(p for _, p in loaded))
    except ArtifactError as error:
        raise ArtifactError(f"{model}: {error}") from None
    first = loaded[0][1].manifest
    names = [n for n in base if n in first.base_tensors]
    digest = combine(state_digests(patched, names))
    kept: dict[str, Tensor] = {}
    changed = 0
    for name in base:
        moved = _differs(base[name], patched[name])
        if bool(moved.any()):
            kept[f"{prefix}{name}::mask"] = pack_mask(moved)
            kept[f"{prefix}{name}::values"] = base[name].reshape(-1)[moved.reshape(-1)]
            changed += int(moved.sum())
    record = {p.digest: path.name for path, p in loaded}
    header = {
        "format": FORMAT,
        "base_digest": first.base_digest,
        "patched_digest": digest,
        "names": names,
        "patches": record,
        "shapes": {n: list(t.shape) for n, t in stored.items()},
        "metadata": metadata,
    }
    applied = {"base_digest": first.base_digest, "patches": record, "names": names}
    atomic_save_safetensors(undo, kept, {UNDO: json.dumps(header, sort_keys=True)})  # first: no result without undo
    full = {f"{prefix}{n}": t for n, t in patched.items()}
    atomic_save_safetensors(target, full, {**metadata, APPLIED: json.dumps(applied, sort_keys=True)})
    return FileResult(target, digest, tuple(record), undo, changed)


def revert_file(
    model: str | Path,
    out: str | Path,
    *,
    undo: str | Path | None = None,
    base: str | Path | None = None,
    drop: Sequence[str | Path] = (),
    keep: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> FileResult:
    """Take patches off a weights file and write the result.

    Args:
        model: The patched weights.
        out: Target.
        undo: The undo file; by default the one beside ``model``.
        base: The base weights, instead of an undo file.
        drop: Patch files to take off; all of them by default.
        keep: Files of the patches that stay. Those lying beside ``model`` or a dropped patch are found by themselves.
        overwrite: Replace existing files.

    Returns:
        What was written. Without ``drop`` its weights equal the base bit for bit.

    Raises:
        ArtifactError: Not a patched file, another undo file or base, or weights modified since.
        ConfigError: The target exists, or a patch that stays cannot be found.
    """
    target = _target(out, overwrite)
    stored, metadata = _weights(model)
    if APPLIED not in metadata:
        raise ArtifactError(f"{model}: carries no patch that expunge applied (no '{APPLIED}' entry)")
    applied = _json(metadata[APPLIED], model)
    tensors, prefix = _plain_names(stored)
    if base is not None:
        original, original_metadata = _weights(base)
        plain, prefix = _plain_names(original)
        source = str(base)
    else:
        source = str(undo if undo is not None else undo_path(model))
        plain, original_metadata = _restore(tensors, prefix, Path(source), model)
    expected = str(applied["base_digest"])
    missing = [n for n in applied["names"] if n not in plain]
    if missing:
        raise ArtifactError(f"{source}: is not the base of {model}: no tensor '{missing[0]}'")
    found = combine(state_digests(plain, applied["names"]))
    if found != expected:
        raise ArtifactError(
            f"{source}: gives weights with digest {found[:12]}, but the base was {expected[:12]}; nothing was written"
        )
    staying = _staying(applied["patches"], drop, keep, Path(model).parent)
    if staying:
        with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=".expunge-") as folder:
            restored = Path(folder) / "base.safetensors"
            atomic_save_safetensors(restored, {f"{prefix}{n}": t for n, t in plain.items()}, original_metadata)
            return apply_files(restored, staying, target, overwrite=overwrite)
    atomic_save_safetensors(target, {f"{prefix}{n}": t for n, t in plain.items()}, original_metadata)
    return FileResult(target, found)


def _restore(
    tensors: Mapping[str, Tensor], prefix: str, undo: Path, model: str | Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The base tensors from patched ones and an undo file."""
    if not undo.is_file():
        raise ArtifactError(f"{model}: no undo file at {undo}; name it with --undo, or give the base file with --base")
    kept, header = read_safetensors(undo, allow_nonfinite=True)
    if UNDO not in header:
        raise ArtifactError(f"{undo}: a safetensors file, but not an undo file")
    facts = _json(header[UNDO], undo)
    try:
        if int(facts["format"]) > FORMAT:
            raise ArtifactError(f"{undo}: format {facts['format']} is newer than this version reads: update expunge")
        names = [str(n) for n in facts["names"]]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise ArtifactError(f"{undo}: belongs to another model: no tensor '{missing[0]}' in {model}")
        digest = combine(state_digests(tensors, names))
        if digest != facts["patched_digest"]:
            raise ArtifactError(
                f"{model}: its weights (digest {digest[:12]}) are not those that {undo.name} was written for "
                f"({str(facts['patched_digest'])[:12]}): modified since, or another undo file"
            )
        plain = {n: t.clone() for n, t in tensors.items()}
        for key in [k for k in kept if k.endswith("::mask")]:
            stored_name = key.removesuffix("::mask")
            tensor = plain[stored_name.removeprefix(prefix)]
            mask = unpack_mask(kept[key], tuple(tensor.shape)).reshape(-1)
            values = kept[f"{stored_name}::values"]
            if values.dtype != tensor.dtype or values.numel() != int(mask.sum()):
                raise ArtifactError(f"{undo}: the values of '{stored_name}' do not fit")
            tensor.reshape(-1)[mask] = values
        metadata = {str(k): str(v) for k, v in facts["metadata"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{undo}: malformed undo file ({error!r})") from None
    return plain, metadata


def _staying(
    patches: Mapping[str, str], drop: Sequence[str | Path], keep: Sequence[str | Path], beside: Path
) -> list[Path]:
    """Files of the patches that are applied again after the base is restored."""
    if not drop:
        return []
    dropped = {Patch.load(p).digest for p in drop}
    unknown = sorted(dropped - set(patches))
    if unknown:
        raise ArtifactError(f"patch {unknown[0][:12]} is not applied; applied: {', '.join(d[:12] for d in patches)}")
    given = {Patch.load(p).digest: Path(p) for p in keep}
    found = []
    for digest, name in patches.items():
        if digest in dropped:
            continue
        near = [folder / Path(name).name for folder in (beside, *(Path(p).parent for p in drop))]
        path = given.get(digest) or next((p for p in near if p.is_file() and Patch.load(p).digest == digest), None)
        if path is None:
            raise ConfigError(f"patch {digest[:12]} ('{name}') stays applied; name its file with --keep")
        found.append(path)
    return found


def _weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from expunge.models.weights import refuse_pickle

    refuse_pickle(Path(path))
    return read_safetensors(path)


def _plain_names(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names without a wrapper's prefix; the file keeps it."""
    prefix = "module." if stored and all(n.startswith("module.") for n in stored) else ""
    return {n.removeprefix(prefix): t for n, t in stored.items()}, prefix


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype and shape differ in any bit (so -0.0 differs from 0.0)."""
    if a.numel() == 0:
        return torch.zeros(a.shape, dtype=torch.bool)
    width = a.element_size()
    bits = [t.contiguous().reshape(-1).view(torch.uint8).reshape(-1, width) for t in (a, b)]
    return (bits[0] != bits[1]).any(1).reshape(a.shape)


def _target(out: str | Path, overwrite: bool) -> Path:
    target = Path(out)
    if target.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors only, not {target.name!r}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; remove it or allow overwriting")
    return target


def _json(text: str, where: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where}: malformed header ({error})") from None
    wanted = {"base_digest": str, "patches": dict, "names": list}
    if not isinstance(data, dict) or not all(isinstance(data.get(k), t) for k, t in wanted.items()):
        raise ArtifactError(f"{where}: malformed header (needs {', '.join(wanted)})")
    return data
