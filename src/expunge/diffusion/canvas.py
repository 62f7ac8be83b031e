"""The small text-to-image pipeline that comes with the package, and its prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge.data.canvas import FORMS
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models.quiet import BOTH, no_progress_bars

FOLDER = Path(expunge.__file__).parent / "assets" / "canvas_diffusion"
#: Settings of the pipeline call at which the figures of the folder's README were measured.
STEPS, GUIDANCE = 10, 3.0


@dataclass(frozen=True)
class CanvasPrompt:
    """A caption and what an image of it shows.

    Args:
        text: The caption.
        object: Number of the object in ``SHAPES``.
        style: Number of the style in ``STYLES``.
    """

    text: str
    object: int
    style: int


def canvas_prompts(form: int = 0) -> list[CanvasPrompt]:
    """The captions of all 48 combinations in one of the four forms, object by object.

    Args:
        form: Number in :data:`expunge.data.canvas.FORMS`.

    Raises:
        ConfigError: There is no such form.

    >>> canvas_prompts()[7]
    CanvasPrompt(text='a square in outline style', object=1, style=1)
    """
    if not 0 <= form < len(FORMS):
        raise ConfigError(f"captions have the forms 0 to {len(FORMS) - 1}, not {form}")
    return [
        CanvasPrompt(FORMS[form].format(shape=shape, style=style), i, k)
        for i, shape in enumerate(SHAPES)
        for k, style in enumerate(STYLES)
    ]


def load_canvas_pipeline(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Any:
    """The pipeline in the package as a diffusers ``StableDiffusionPipeline``, its progress bar switched off.

    Args:
        dtype: Of the loaded weights, which are stored in half precision.
        folder: Another folder of the same layout.

    Raises:
        CapabilityError: diffusers or transformers is missing.
        ArtifactError: The folder is not there.
    """
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError:
        raise CapabilityError('this needs diffusers: pip install "expunge[diffusion]"') from None
    source = folder or FOLDER
    if not (source / "model_index.json").is_file():
        raise ArtifactError(f"the bundled pipeline is not where it belongs ({source}); install the package again")
    with no_progress_bars(*BOTH):
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source), dtype=dtype, use_safetensors=True, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
