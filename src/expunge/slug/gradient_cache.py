"""Gradients on disk, tied to the weights, the data and the settings that they depend on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from expunge import files
from expunge.digest import json_digest, model_digest, tensor_digest
from expunge.errors import ArtifactError, ResourceError
from expunge.slug.gradients import Gradients

log = logging.getLogger(__name__)
_FORMAT = "expunge_slug_gradients"
#: Rises when the same settings would give other numbers.
VERSION = 1


def gradient_key(model: nn.Module, data: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Digest of everything that the gradients depend on.

    Args:
        model: Its weights and saved buffers.
        data: Digests of the images and texts of both splits, in their order.
        settings: Losses, tensors, batch sizes, weighting ... as JSON data.
    """
    key = {"version": VERSION, "weights": model_digest(model), "data": dict(data), "settings": dict(settings)}
    return json_digest(key)


def save_gradients(path: str | os.PathLike[str], gradients: Gradients, key: str) -> None:
    """Write gradients and facts to a safetensors file, atomically.

    Raises:
        ResourceError: The disk is full.
    """
    tensors = {
        f"{side}.{name}": g
        for side, own in (("forget", gradients.forget), ("retain", gradients.retain))
        for name, g in own.items()
    }
    content = {name: tensor_digest(t) for name, t in tensors.items()}
    head = {"key": key, "facts": gradients.facts, "content": json_digest(content)}
    files.atomic_save_safetensors(path, tensors, {_FORMAT: json.dumps(head)})


def load_gradients(path: str | os.PathLike[str], key: str) -> Gradients:
    """Read what :func:`save_gradients` wrote under this key.

    Raises:
        ArtifactError: Missing, broken, changed, or made for other weights, data or settings.
    """
    tensors, meta = files.read_safetensors(path)
    try:
        head = json.loads(meta[_FORMAT])
        made_for, facts, content = head["key"], head["facts"], head["content"]
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path}: a safetensors file, but not one of SLUG's gradients") from None
    if made_for != key:
        raise ArtifactError(f"{path}: these gradients were made for other weights, data or settings")
    if content != json_digest({name: tensor_digest(t) for name, t in tensors.items()}):
        raise ArtifactError(f"{path}: the gradients are not those that were written")
    found = Gradients({}, {}, facts)
    sides = {"forget": found.forget, "retain": found.retain}
    for full, tensor in tensors.items():
        side, _, name = full.partition(".")
        sides[side][name] = tensor
    return found


def cached_gradients(key: str, compute: Callable[[], Gradients], folder: Path | None = None) -> tuple[Gradients, str]:
    """Gradients from the cache, else computed and kept.

    A broken file is computed anew. A cache that cannot be written is logged and skipped: it saves time, nothing else.

    Args:
        key: From :func:`gradient_key`.
        compute: Makes them.
        folder: By default ``slug/`` in :func:`expunge.files.cache_dir`.

    Returns:
        The gradients (from the cache on the CPU), and ``cached``, ``computed``, or why they were computed again.
    """
    path = (folder or files.cache_dir() / "slug") / f"{key[:32]}.safetensors"
    how = "computed"
    if path.is_file():
        try:
            return load_gradients(path, key), "cached"
        except ArtifactError as error:
            how = f"computed again, because the cached gradients are broken: {error}"
            log.warning("%s", how)
    fresh = compute()
    try:
        save_gradients(path, fresh, key)
    except (OSError, ResourceError) as error:
        log.warning("gradients were not cached: %s", error)
    return fresh, how
