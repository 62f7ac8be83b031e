"""Text encoders of diffusion pipelines: loading, and what a pipeline reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from expunge.consumers.llava import check_complete, check_folder, loading, needs
from expunge.consumers.reads import Reads
from expunge.errors import ArtifactError, ConfigError


def text_reads(depth: int, *, pipeline: str = "", encoder: str = "text_encoder", clip_skip: int | None = None) -> Reads:
    """What a pipeline reads of a CLIP text encoder.

    * Stable Diffusion 1 and 2: the normed output of the last block that the encoder has (SD 2.x ships 23 of 24).
      With ``clip_skip`` k the last k blocks are left out; the final norm is used all the same.
    * Stable Diffusion XL: the output of the last but one block, without the norm; with ``clip_skip`` k of k blocks
      before. Only its second encoder also gives the pooled embedding, for which everything is used.
    * Stable Diffusion 3, Flux: pooled embeddings, everything is used.

    Args:
        depth: Blocks that the encoder has.
        pipeline: Class name of the pipeline, as in ``model_index.json``; empty: a Stable Diffusion 1 or 2 pipeline.
        encoder: Name of the encoder in the pipeline.
        clip_skip: As the pipeline is called.

    Raises:
        ConfigError: ``clip_skip`` is negative or leaves no block.
    """
    skip = 0 if clip_skip is None else clip_skip
    last_but_one = "StableDiffusionXL" in pipeline and encoder == "text_encoder"
    blocks = depth - skip - int(last_but_one)
    if skip < 0 or blocks < 1:
        raise ConfigError(f"clip_skip {clip_skip}: the text encoder has {depth} blocks")
    if "StableDiffusion3" in pipeline or "Flux" in pipeline or (encoder != "text_encoder" and "XL" in pipeline):
        return Reads("language", depth, True, True, f"the pooled embedding (all {depth} blocks)")
    name = pipeline or "a diffusion pipeline"
    words = f"the output of text block {blocks - 1}, of {depth} blocks ({name}, clip_skip {clip_skip})"
    return Reads("language", blocks, not last_but_one, False, words)


def load_text_encoder(
    where: str | Path, subfolder: str = "text_encoder", *, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> Any:
    """The CLIP text encoder of a diffusion pipeline, in eval mode; the rest of the pipeline is not loaded.

    Args:
        where: Folder or hub name of the pipeline, or with ``subfolder=""`` of the encoder itself.
        subfolder: Folder of the encoder in the pipeline.
        dtype: ``"auto"`` keeps the precision of the file.
        device: Where the encoder goes.

    Returns:
        A ``CLIPTextModel``, or ``CLIPTextModelWithProjection`` if the configuration says so.

    Raises:
        ArtifactError: No such encoder, pickled weights, missing tensors, or no CLIP text encoder.
        CapabilityError: ``transformers`` is not installed.
    """
    transformers = needs("transformers")
    check_folder(Path(where) / subfolder)
    with loading(where):
        config = transformers.AutoConfig.from_pretrained(str(where), subfolder=subfolder)
    if config.model_type not in ("clip_text_model", "clip"):
        raise ArtifactError(f"{where}: '{subfolder}' is a {config.model_type}, not a CLIP text encoder")
    projected = "CLIPTextModelWithProjection" in (config.architectures or ())
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    with loading(where):
        model, facts = cls.from_pretrained(
            str(where), subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete(where, facts)
    return model.to(device).eval()


def pipeline_class(where: str | Path) -> str:
    """Class name that the ``model_index.json`` of a pipeline's folder gives; empty if there is none.

    Raises:
        ArtifactError: The file is broken.
    """
    path = Path(where) / "model_index.json"
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text("utf-8"))["_class_name"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not an index of a pipeline ({error!r})") from None
