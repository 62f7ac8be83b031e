"""Whether a single-file checkpoint holds its whole text encoder: readers fill what is missing with random numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from expunge.errors import ArtifactError

#: Where text encoders stand in checkpoints: transformers' names, and open_clip's.
_OWN = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_OPEN = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
_BLOCK = (
    *(f"{part}.{end}" for part in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for end in ("weight", "bias")),
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
)


def check_text(path: str | os.PathLike[str], encoders: Mapping[str, Any]) -> None:
    """Make sure that every tensor of the text encoders is in the file.

    Args:
        path: A safetensors file.
        encoders: The text encoders built from it, by name.

    Raises:
        ArtifactError: Names what is missing.
    """
    names = tensor_names(path)
    for part, encoder in encoders.items():
        own = next((p for p in _OWN if part == "text_encoder" and any(n.startswith(p) for n in names)), None)
        if own is not None:
            there = {n.removeprefix(own).removeprefix("text_model.") for n in names if n.startswith(own)}
            missing = sorted(set(encoder.state_dict()) - there)
        else:
            second = part == "text_encoder_2"
            prefix = next((p for p in _OPEN if any(n.startswith(p) for n in names)), _OPEN[0])
            there = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
            missing = sorted(_open_names(encoder, projection=second) - there)
        if missing:
            shown = ", ".join(missing[:4])
            raise ArtifactError(f"{path}: {len(missing)} tensors of the {part} are missing ({shown})")


def tensor_names(path: str | os.PathLike[str]) -> frozenset[str]:
    """Names of the tensors in a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return frozenset(handle.keys())


def is_xl(names: frozenset[str]) -> bool:
    """Whether a checkpoint has the second text encoder of XL."""
    return any(n.startswith("conditioner.embedders.1.") for n in names)


def _open_names(encoder: Any, *, projection: bool) -> set[str]:
    layers = int(encoder.config.num_hidden_layers)
    blocks = {f"transformer.resblocks.{i}.{n}" for i in range(layers) for n in _BLOCK}
    ends = {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"}
    return blocks | ends | ({"text_projection"} if projection else set())
