"""A tiny random text-to-image pipeline in memory, with drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

import expunge
from expunge.data.canvas import canvas
from expunge.diffusion.sample import stable_diffusion_scheduler
from expunge.errors import CapabilityError
from expunge.metrics.judge import canvas_judge
from expunge.models.pipelines import INSTALL, Parts, check_parts
from expunge.models.quiet import quiet
from expunge.tasks.text_to_image import TextToImageTask

SIDE = 32


def tiny_parts(
    seed: int = 0, *, kind: Literal["sd", "xl"] = "sd", predicts: Literal["epsilon", "v_prediction"] = "epsilon"
) -> Parts:
    """A pipeline of 1.3 million random weights that draws 32 x 32 pixels from 8 x 8 x 4 latents.

    Args:
        seed: Of the weights; torch's own random state is left alone.
        kind: ``sd`` with one text encoder, ``xl`` with two and their pooled text.
        predicts: What the U-Net is taken to predict.

    Raises:
        CapabilityError: diffusers or transformers is missing.
    """
    try:
        import diffusers
        import transformers
    except ImportError:
        raise CapabilityError(f"this needs diffusers and transformers: {INSTALL}") from None
    words = transformers.AutoTokenizer.from_pretrained(str(Path(expunge.__file__).parent / "assets" / "canvas_clip"))
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": words.model_max_length,
        "projection_dim": 64,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    blocks = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "sample_size": SIDE // 4,
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 64,
    }
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        width = 64 if kind == "sd" else 128
        unet: Any = diffusers.UNet2DConditionModel(
            **blocks, cross_attention_dim=width, **(added if kind == "xl" else {})
        )
        vae: Any = diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=SIDE,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
        config = transformers.CLIPTextConfig(**text)
        encoder: Any = transformers.CLIPTextModel(config)
        second: Any = transformers.CLIPTextModelWithProjection(config) if kind == "xl" else None
        with torch.no_grad():  # biases of zero and norms of one would hide mistakes
            for model in (unet, encoder, second) if second is not None else (unet, encoder):
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.02 * torch.randn_like(parameter)
    scheduler = stable_diffusion_scheduler()
    parts = Parts(
        unet.eval(),
        encoder.eval(),
        words,
        vae.eval(),
        scheduler,
        text_encoder_2=None if second is None else second.eval(),
        tokenizer_2=None if second is None else words,
        predicts=predicts,
        zero_unconditional=kind == "xl",
        name="tiny",
    )
    check_parts(parts)
    return parts


def tiny_text_to_image(
    seed: int = 0,
    *,
    n_train: int = 48,
    n_test: int = 48,
    images: bool = True,
    judged: bool = False,
    kind: Literal["sd", "xl"] = "sd",
    predicts: Literal["epsilon", "v_prediction"] = "epsilon",
    axis: str | None = None,
) -> TextToImageTask:
    """The tiny pipeline with a few images of ``canvas``: objects (the main axis) in styles.

    Args:
        seed: Of weights and images.
        n_train: Training images.
        n_test: Test images.
        images: Without them the task has prompts alone.
        judged: With the judge of drawn figures, so that it can be evaluated: one image of each object.
        kind: See :func:`tiny_parts`.
        predicts: See :func:`tiny_parts`.
        axis: The label axis whose classes may be forgotten.

    Raises:
        CapabilityError: diffusers or transformers is missing.
    """
    parts = tiny_parts(seed, kind=kind, predicts=predicts)
    data = canvas(n_train, n_test, seed, SIDE)
    axes: Any = None if images else data.train.axes  # type: ignore[attr-defined]
    task = TextToImageTask(parts, data if images else None, axis, axes, steps=4, guidance=3.0)
    if judged:
        task.judge = canvas_judge()
        task.asks = task.asks[:: len(task.prompts()[0])]
    return task
