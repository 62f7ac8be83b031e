"""Vision-language models of the LLaVA kind: loading, and what they read of their vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expunge.consumers.reads import Reads
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models.quiet import no_progress_bars


def vision_reads(config: Any, depth: int) -> Reads | None:
    """What a model with the setting ``vision_feature_layer`` reads of its vision tower.

    Hidden state 0 is the input of block 0 and hidden state k the output of block k - 1; negative numbers count from
    the end. LLaVA-1.5 reads -2: the last block, the norm after it and the projection have no influence. Of several
    layers the deepest one counts.

    Args:
        config: Configuration of the whole model.
        depth: Number of blocks of the vision tower.

    Returns:
        ``None`` if the configuration has no such setting.

    Raises:
        ConfigError: A layer that the tower does not have.
    """
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        return None
    wanted = [layers] if isinstance(layers, int) else list(layers)
    states = []
    for layer in wanted:
        state = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= state <= depth:
            raise ConfigError(f"vision_feature_layer {layer}: the vision tower has {depth} blocks")
        states.append(state)
    used = max(states)
    what = f"output of block {used - 1}" if used else "input of block 0"
    return Reads("vision", used, False, False, f"vision hidden state {layers} ({what}, of {depth} blocks)")


def load_llava(where: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A vision-language model with its processor, from a folder or the hub; safetensors only, in eval mode.

    Args:
        where: Folder that ``save_pretrained`` wrote (model and processor), or a name on the hub.
        dtype: ``"auto"`` keeps the precision of the file.
        device: Where the model goes.

    Returns:
        ``(model, processor)``.

    Raises:
        ArtifactError: No such model, pickled weights, or tensors that are missing.
        CapabilityError: ``transformers`` is not installed.
    """
    transformers = needs("transformers")
    check_folder(where)
    with loading(where):
        model, facts = transformers.AutoModelForImageTextToText.from_pretrained(
            str(where), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        processor = transformers.AutoProcessor.from_pretrained(str(where))
    check_complete(where, facts)
    return model.to(device).eval(), processor


def needs(name: str) -> Any:
    """A library of the optional extra ``clip``.

    Raises:
        CapabilityError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CapabilityError(f'{name} is needed ({error}): pip install "expunge[clip]"') from None


def check_folder(where: str | Path) -> None:
    """Refuse a folder that has pickled weights only.

    Raises:
        ArtifactError: It has ``.bin`` or ``.pt`` files and no ``.safetensors``.
    """
    folder = Path(where)
    if not folder.is_dir():
        return
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ArtifactError(
            f"{folder}: holds {pickled[0]} but no .safetensors; pickles are not read. Use a release with safetensors, "
            "or convert the file (`expunge convert`)"
        )


def check_complete(where: str | Path, facts: dict[str, Any]) -> None:
    """Refuse a model of which the library would have made up tensors.

    Raises:
        ArtifactError: Tensors are missing in the file; the first ones are named.
    """
    missing = sorted(facts["missing_keys"])
    if missing:
        raise ArtifactError(
            f"{where}: {len(missing)} tensors of the architecture are not in the file, first '{missing[0]}'; they "
            "would be random numbers. Is the folder complete?"
        )


@contextmanager
def loading(where: str | Path) -> Iterator[None]:
    """Without progress bars; the library's errors become ours."""
    try:
        with no_progress_bars():
            yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{where}: cannot be loaded ({reason}). Give a folder that `save_pretrained` wrote, with config.json and "
            "safetensors, or download the model first"
        ) from None
