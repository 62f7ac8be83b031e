"""Digests: which weights, which data, which settings. Everything cached or compared is keyed by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Elements that are hashed at a time.
_PIECE = 1 << 22


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, row-major, on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_digest(tensor: Tensor) -> str:
    """Sixteen hex digits over dtype, shape and bits (so -0.0 differs from 0.0, and NaN payloads count)."""
    h = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for piece in tensor.detach().reshape(-1).split(_PIECE):  # copies of pieces: torch takes an array for a write
        h.update(tensor_bytes(piece.to("cpu", copy=True)))
    return h.hexdigest()[:16]


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces, no NaN)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """One digest for a set of named tensor digests; the order of the names does not matter."""
    return json_digest(dict(digests))


#: What data-parallel wrappers put before every name.
WRAPPER = "module."


def is_wrapped(model: nn.Module) -> bool:
    """Whether all saved names of a model start with ``module.``."""
    names = list(model.state_dict(keep_vars=True))
    return bool(names) and all(n.startswith(WRAPPER) for n in names)


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """All saved tensors of a model, each once, and the other names of those that are shared.

    A leading ``module.`` that all names share (a data-parallel wrapper) is dropped.

    Returns:
        ``(tensors, aliases)``: live parameters and buffers under their first name, and for tied tensors the
        remaining names.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    first: dict[int, str] = {}
    prefix = WRAPPER if is_wrapped(model) else ""
    for full_name, tensor in model.state_dict(keep_vars=True).items():
        name = full_name.removeprefix(prefix)
        if not isinstance(tensor, Tensor):
            continue
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor
        else:
            aliases[known] = (*aliases.get(known, ()), name)
    return tensors, aliases


def state_digests(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, str]:
    """Digest of each named tensor."""
    return {n: tensor_digest(tensors[n]) for n in (tensors if names is None else names)}


def model_digest(model: nn.Module) -> str:
    """Digest of all weights and saved buffers of a model."""
    return combine(state_digests(named_tensors(model)[0]))
