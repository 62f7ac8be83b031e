"""Weights in and out: safetensors only, strict, checked completely before the model is touched.

Legacy pickle checkpoints have one explicit way in, :func:`convert_pickle`, which uses torch's restricted unpickler and
never falls back to the unrestricted one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge import files
from expunge.errors import ArtifactError, ConfigError

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th", ".pkl", ".pickle", ".tar")
TORCH_FLOOR = (2, 10)  # earlier restricted unpicklers could be made to run code (CVE-2025-32434, CVE-2026-24747)
TIED_KEY = "expunge.tied"
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
_NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema", "model_ema")
_INPUT_LAYER = ("normalize.mean", "normalize.std")  # an input normalisation layer inside the model
_SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` read.

    Args:
        path: The file.
        sha256: Digest of the file.
        tensors: Number of tensors copied.
        notes: Harmless differences that were normalised, one sentence each.
        metadata: Text metadata of the file.
    """

    path: str
    sha256: str
    tensors: int
    notes: tuple[str, ...]
    metadata: dict[str, str]


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, allow_nonfinite: bool = False, widen: bool = False
) -> LoadReport:
    """Load a safetensors file into a model, all of it or nothing.

    Harmless differences are normalised and reported: the prefixes ``module.`` and ``_orig_mod.``, and tied tensors that
    were stored once. Everything else must match exactly: names, shapes and dtypes.

    Args:
        model: Receives the weights; unchanged if anything is wrong.
        path: A ``.safetensors`` file.
        allow_nonfinite: Accept NaN and infinite values.
        widen: Accept half precision for a model in single precision, which loses nothing.

    Returns:
        What was read and what was normalised.

    Raises:
        ArtifactError: The file is a pickle, broken, non-finite, or belongs to another model.
    """
    file = Path(path)
    refuse_pickle(file)
    stored, metadata = files.read_safetensors(file, allow_nonfinite=allow_nonfinite)
    state, notes = without_prefix(stored, str(file))
    target = model.state_dict()
    state, tied = _with_ties(state, target, file)
    notes += tied
    if widen:
        state, more = _widened(state, target)
        notes += more
    _check_match(state, target, file)
    model.load_state_dict(state, strict=True)
    return LoadReport(str(file), files.sha256_file(file), len(state), tuple(notes), metadata)


def _widened(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    half = (torch.float16, torch.bfloat16)
    wanted = [n for n, t in state.items() if t.dtype in half and n in target and target[n].dtype == torch.float32]
    notes = [f"{len(wanted)} tensors in half precision were widened"] if wanted else []
    return {n: t.float() if n in wanted else t for n, t in state.items()}, notes


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Save a model or state dict as safetensors, atomically.

    Names that are the same tensor (tied weights) are stored once; the metadata key ``expunge.tied`` keeps the others.

    Args:
        model: A module or a mapping from names to tensors.
        path: Target, ending in ``.safetensors``.
        metadata: Text to text.

    Raises:
        ConfigError: Another suffix, or metadata that are not text.
        ArtifactError: An entry is not a tensor.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ConfigError(f"weights are written as .safetensors only, not {file.name!r}")
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    odd = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if odd:
        raise ArtifactError(f"cannot save {file}: entries that are not tensors: {odd[:_SHOWN]}")
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        original = first.setdefault(_identity(tensor), name) if tensor.numel() else name
        if original != name:
            tied[name] = original
    info = dict(metadata or {}) | ({TIED_KEY: json.dumps(tied, sort_keys=True)} if tied else {})
    files.atomic_save_safetensors(file, {k: v for k, v in state.items() if k not in tied}, info)


def convert_pickle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    key: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> list[str]:
    """Convert a pickle checkpoint to safetensors with the restricted unpickler; never retried without restrictions.

    Args:
        src: A file written by ``torch.save``.
        dst: Target, ending in ``.safetensors``.
        key: Entry that holds the weights when there are several (``ema`` next to ``state_dict``, say).
        overwrite: Replace an existing target.
        allow_nonfinite: Accept NaN and infinite values.

    Returns:
        What was normalised or left out, one sentence each.

    Raises:
        ConfigError: The target exists or has another suffix.
        ArtifactError: torch is too old, the file holds more than tensors, or the weights are ambiguous.
    """
    source, target = Path(src), Path(dst)
    check_torch_floor(torch.__version__)
    if target.suffix != ".safetensors":
        raise ConfigError(f"the converted file must end in .safetensors, not {target.name!r}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; remove it or allow overwriting")
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file")
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        # Hostile or damaged pickles raise many types; none of them leads to an unrestricted retry.
        raise ArtifactError(
            f"{source}: refused: not a plain file of tensors ({type(error).__name__}: {str(error)[:200]}); "
            "it is never loaded without restrictions. Save only the state dict with torch.save and convert that"
        ) from None
    state, notes = _find_state(loaded, source, key)
    state, more = without_prefix(state, str(source))
    if not allow_nonfinite:
        bad = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if bad:
            raise ArtifactError(
                f"{source}: NaN or infinite values in {bad[:_SHOWN]}; refused unless allowed explicitly"
            )
    metadata = {"converted_from": source.name, "source_sha256": files.sha256_file(source)}
    for name in _INPUT_LAYER:
        if name in state:
            metadata[name] = json.dumps(state.pop(name).flatten().tolist())
            more.append(f"{source}: '{name}' {metadata[name]} left out, normalisation is applied to the inputs here")
    save_weights(state, target, metadata)
    return notes + more


def refuse_pickle(file: Path) -> None:
    """Raise for suffixes of pickle formats and for anything that is not safetensors.

    Raises:
        ArtifactError: With the command that converts.
    """
    if file.suffix.lower() in PICKLE_SUFFIXES:
        raise ArtifactError(
            f"{file}: pickle checkpoints can run code and are not loaded; convert it once with "
            f"`expunge convert {file} {file.with_suffix('.safetensors')}`"
        )
    if file.suffix != ".safetensors":
        raise ArtifactError(f"{file}: weights are read from .safetensors files only")


def check_torch_floor(version: str) -> None:
    """Make sure that torch's restricted unpickler is one without known holes.

    Raises:
        ArtifactError: torch is older than 2.10.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < TORCH_FLOOR:
        raise ArtifactError(
            f"torch {version} cannot read pickles safely; converting needs {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} or newer"
        )


def without_prefix(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Remove prefixes that wrappers leave on every name, and say so.

    Raises:
        ArtifactError: Removing one would make two names equal.
    """
    out, notes = dict(state), []
    changed = True
    while changed and out:
        changed = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in out):
                out = {name.removeprefix(prefix): value for name, value in out.items()}
                notes.append(f"{where}: prefix '{prefix}' removed from {len(out)} names")
                changed = True
    return out, notes


def _find_state(loaded: Any, source: Path, key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    if not isinstance(loaded, Mapping):
        raise ArtifactError(f"{source}: holds a {type(loaded).__name__}, not a mapping from names to tensors")
    if key is not None:
        if not _is_state(loaded.get(key)):
            raise ArtifactError(f"{source}: entry {key!r} holds no tensors; entries: {sorted(map(str, loaded))[:20]}")
        return dict(loaded[key]), [f"{source}: weights taken from entry '{key}'"]
    if _is_state(loaded):
        return dict(loaded), []
    found = [name for name in _NESTS if _is_state(loaded.get(name))]
    if len(found) == 1:
        left = sorted(str(k) for k in loaded if k != found[0])
        return dict(loaded[found[0]]), [f"{source}: weights taken from entry '{found[0]}'; left out: {left[:20]}"]
    if found:
        raise ArtifactError(f"{source}: several entries hold weights: {found}; choose one with key")
    raise ArtifactError(
        f"{source}: no entry holds weights; entries: {sorted(map(str, loaded))[:20]}; name one with key"
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _with_ties(
    state: dict[str, Tensor], target: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Fill in names that are the same tensor in the model; stored copies of one tensor must agree."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in target.items():
        if tensor.numel() and not tensor.is_meta:
            groups.setdefault(_identity(tensor), []).append(name)
    notes = []
    state = dict(state)
    for names in groups.values():
        present = [n for n in names if n in state]
        if len(names) < 2 or not present:
            continue
        for other in present[1:]:
            if not torch.equal(state[present[0]], state[other]):
                raise ArtifactError(f"{file}: {present[0]!r} and {other!r} are one tensor in the model but differ here")
        absent = [n for n in names if n not in state]
        if absent:
            state |= dict.fromkeys(absent, state[present[0]])
            notes.append(f"{file}: {absent} tied to '{present[0]}'")
    return state, notes


def _check_match(state: Mapping[str, Tensor], target: Mapping[str, Tensor], file: Path) -> None:
    missing, unexpected = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    if missing or unexpected:
        raise ArtifactError(
            f"{file} is not from this model: {len(missing)} tensors missing{_some(missing)}, "
            f"{len(unexpected)} unexpected{_some(unexpected)}"
        )
    for name, tensor in target.items():
        if state[name].shape != tensor.shape:
            raise ArtifactError(f"{file}: {name!r} is {list(state[name].shape)}, the model has {list(tensor.shape)}")
        if state[name].dtype != tensor.dtype:
            raise ArtifactError(f"{file}: {name!r} is {state[name].dtype}, the model has {tensor.dtype}")


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return f" ({', '.join(shown[:_SHOWN])}{' ...' if len(shown) > _SHOWN else ''})" if shown else ""
