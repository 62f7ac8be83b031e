"""Any model that contains a CLIP tower, by the files in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.consumers.diffusion_text import load_text_encoder, pipeline_class, text_reads
from expunge.consumers.llava import load_llava, loading, needs
from expunge.consumers.match import homes
from expunge.consumers.reads import Reads
from expunge.errors import ArtifactError, ConfigError
from expunge.patch import Patch, apply, revert


@dataclass(frozen=True)
class Consumer:
    """A loaded model.

    Args:
        module: The part that holds the tower: the whole of a LLaVA, the text encoder of a pipeline.
        processor: Of a LLaVA; ``None`` otherwise.
        reads: What a pipeline uses of its text encoder; ``None``: told from the module.
    """

    module: Any
    processor: Any | None = None
    reads: Reads | None = None


def load_consumer(
    where: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    subfolder: str = "text_encoder",
    clip_skip: int | None = None,
) -> Consumer:
    """Load a vision-language model, or the text encoder of a diffusion pipeline, from its folder or the hub.

    A folder with ``model_index.json`` is a pipeline; otherwise ``config.json`` tells.

    Args:
        where: Folder, or a name on the hub (then a vision-language model, or a CLIP text model).
        dtype: ``"auto"`` keeps the precision of the files.
        device: Where the model goes.
        subfolder: Of a pipeline: which encoder.
        clip_skip: Of a pipeline: as it is called.

    Raises:
        ArtifactError: The folder has neither, or loading fails.
        ConfigError: ``clip_skip`` without a text encoder.
    """
    folder = Path(where)
    pipeline = pipeline_class(folder)
    if not pipeline:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder}: neither a model (config.json) nor a pipeline (model_index.json)")
        with loading(where):
            config = needs("transformers").AutoConfig.from_pretrained(str(where))
        if config.model_type not in ("clip_text_model", "clip"):
            if clip_skip is not None:
                raise ConfigError("clip_skip belongs to text encoders of diffusion pipelines")
            return Consumer(*load_llava(where, dtype, device))
        subfolder = ""
    encoder = load_text_encoder(where, subfolder, dtype=dtype, device=device)
    if not pipeline and clip_skip is None:
        return Consumer(encoder)
    found = homes(dict(encoder.named_parameters()))
    return Consumer(
        encoder,
        reads=text_reads(found[0].depth, pipeline=pipeline, encoder=subfolder or "text_encoder", clip_skip=clip_skip),
    )


def is_two_tower(where: str | Path) -> bool:
    """Whether this names a whole CLIP: the bundled one, a form of open_clip, or a folder with both towers."""
    from expunge.models.clip import CANVAS

    name, folder = str(where), Path(where)
    if name == CANVAS or name.startswith(("hf-hub:", "local-dir:")):
        return True
    if not folder.is_dir():
        return "/" not in name
    if pipeline_class(folder):
        return False
    if (folder / "open_clip_config.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "clip" and {"text_config", "vision_config"} <= set(config)


def precision(name: str) -> torch.dtype | str:
    """A dtype by its name on the command line.

    Raises:
        ConfigError: Another word than ``auto``, ``float32``, ``float16``, ``bfloat16``.
    """
    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if name not in known:
        raise ConfigError(f"dtype is one of {', '.join(known)}, not {name!r}")
    return known[name]


def save_patched(consumer: Consumer, patch: Patch, folder: str | Path) -> Path:
    """Write the patched model as a folder that ``from_pretrained`` reads; the model in memory is as before.

    The tensors have other names in such a folder than in memory, so `expunge apply` cannot write it from the file.

    Args:
        consumer: The model.
        patch: Made on it.
        folder: New or empty folder. Of a pipeline only the encoder is written.

    Raises:
        ConfigError: The folder has files.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty")
    apply(consumer.module, patch)
    try:
        with loading(folder):
            consumer.module.save_pretrained(str(target))
            if consumer.processor is not None:
                consumer.processor.save_pretrained(str(target))
    finally:
        revert(consumer.module, patch)
    return target
