"""Forget images of what has no photographs: a text-to-image pipeline draws the concept that it is to forget.

Source: SLUG, ``notebooks/experiment_stable_diffusion.ipynb``.

Deviates: image ``i`` is a function of (seed, i) alone, whatever the number of images; files are PNG (there: converted
to JPEG).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import torch

from expunge import rng
from expunge.data.curate.pairs import Pair, Shard
from expunge.errors import CapabilityError, ConfigError, DataError


def load_pipeline(name: str, device: str | None = None) -> Any:
    """Load a diffusers pipeline, from safetensors only and without its safety checker.

    The checker replaces what it flags by black images, which would be forgotten in place of the concept.

    Args:
        name: A folder or a name on the hub.
        device: Where to run; by default a GPU if there is one.

    Raises:
        CapabilityError: diffusers or transformers is not installed.
        DataError: The pipeline cannot be loaded.
    """
    try:
        import transformers  # noqa: F401
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise CapabilityError('drawing forget images needs diffusers: pip install "expunge[diffusion]"') from error
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(name, use_safetensors=True, safety_checker=None)
    except Exception as error:
        # Many types here: not found, offline, gated, no safetensors, malformed ...
        raise DataError(f"pipeline {name!r} could not be loaded: {type(error).__name__}: {str(error)[:300]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def synthesize(
    pipeline: Any,
    prompt: str,
    n: int,
    *,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 7.5,
    on_image: Callable[[int], None] | None = None,
) -> Shard:
    """Draw ``n`` images of a prompt.

    Args:
        pipeline: A text-to-image pipeline.
        prompt: The concept; also the caption of every image.
        n: Number of images; the first images of a larger number are those of a smaller one.
        seed: Seed of the noise.
        steps: Denoising steps.
        guidance: Guidance scale.
        on_image: Told the number of images drawn so far.

    Returns:
        The pairs, with PNG bytes in memory.

    Raises:
        ConfigError: ``n`` or ``steps`` below 1, or an empty prompt.
        DataError: The pipeline has a safety checker, or does not return one image.
    """
    if n < 1 or steps < 1 or not prompt.strip():
        raise ConfigError(f"drawing needs a prompt, n >= 1 and steps >= 1, got {prompt!r}, {n} and {steps}")
    if getattr(pipeline, "safety_checker", None) is not None:
        raise DataError("the pipeline has a safety checker, which blackens images; load it without")
    pairs = []
    with rng.preserved(), torch.no_grad():
        for i in range(n):
            key = rng.key(seed, "synthesize", i)
            rng.seed_everything(key % 2**32)  # for pipelines that draw beside the generator
            noise = torch.Generator("cpu").manual_seed(key % 2**63)
            drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
            if len(drawn) != 1:
                raise DataError(f"the pipeline returned {len(drawn)} images for one prompt")
            stream = io.BytesIO()
            drawn[0].save(stream, "PNG")
            pairs.append(Pair("synthetic", f"{'_'.join(prompt.split())}_{i:05d}", prompt, _reader(stream.getvalue())))
            if on_image is not None:
                on_image(i + 1)
    return Shard("synthetic", lambda: pairs, chosen=True)


def _reader(data: bytes) -> Callable[[], bytes]:
    return functools.partial(bytes, data)
