"""Shapes of text-to-image pipelines: their configurations without weights, and what one pass of the U-Net costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from expunge.diffusion.recompute import recomputing
from expunge.errors import ArtifactError, CapabilityError
from expunge.models.pipelines import CANVAS, FOLDER, INSTALL, TextToImage
from expunge.models.quiet import quiet

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Configurations of a pipeline.

    Args:
        name: What to call it.
        unet: Of diffusers' ``UNet2DConditionModel``.
        text: Of transformers' ``CLIPTextModel``; for XL of both encoders.
        autoencoder: Number of its weights; by default that of Stable Diffusion 1.x, 2.x and XL.
        factor: Pixels per latent cell, along one side.
    """

    name: str
    unet: Config
    text: tuple[Config, ...]
    autoencoder: int = 83_653_863
    factor: int = 8

    @property
    def width(self) -> int:
        """Width of the text states."""
        return int(self.unet["cross_attention_dim"])

    @property
    def tokens(self) -> int:
        """Tokens of a prompt, padding included."""
        return int(self.text[0].get("max_position_embeddings", 77))

    def build(self) -> TextToImage:
        """U-Net and text encoders on the meta device: shapes without weights.

        Raises:
            CapabilityError: diffusers or transformers is missing.
        """
        try:
            from diffusers import UNet2DConditionModel
            from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
        except ImportError:
            raise CapabilityError(f"this needs diffusers and transformers: {INSTALL}") from None
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)[: len(self.text)]
        with quiet(), torch.device("meta"):
            unet: Any = UNet2DConditionModel(**_own(self.unet))
            encoders = [kind(CLIPTextConfig(**_own(c))) for kind, c in zip(kinds, self.text, strict=True)]
        return TextToImage(unet.eval(), *encoders).eval()


def _own(config: Config) -> dict[str, Any]:
    return {n: v for n, v in config.items() if not n.startswith("_")}


_SD1: Config = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD2: Config = {
    **_SD1,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_XL: Config = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _text(width: int, layers: int, heads: int) -> Config:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    }


#: Shapes that need no file, by short name.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "sd-1": Shape("Stable Diffusion 1.x", _SD1, (_text(768, 12, 12),)),
        "sd-2": Shape("Stable Diffusion 2.x, 512 pixels", _SD2, (_text(1024, 23, 16),)),
        "sd-2-768": Shape("Stable Diffusion 2.x, 768 pixels", {**_SD2, "sample_size": 96}, (_text(1024, 23, 16),)),
        "sd-xl": Shape("Stable Diffusion XL", _XL, (_text(768, 12, 12), _text(1280, 32, 20))),
    }
)
#: Hub ids whose shape is known.
KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "CompVis/stable-diffusion-v1-4": "sd-1",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd-1",
        "stabilityai/stable-diffusion-2-base": "sd-2",
        "stabilityai/stable-diffusion-2-1-base": "sd-2",
        "stabilityai/stable-diffusion-2": "sd-2-768",
        "stabilityai/stable-diffusion-2-1": "sd-2-768",
        "stabilityai/stable-diffusion-xl-base-1.0": "sd-xl",
    }
)


def shape_of(name: str) -> Shape:
    """The shape of a pipeline: a name of :data:`SHAPES` or :data:`KNOWN`, ``canvas``, or a local folder.

    Only configuration files are read.

    Raises:
        ArtifactError: Neither a known name nor a folder of a pipeline.
    """
    if name in SHAPES or name in KNOWN:
        return SHAPES[KNOWN.get(name, name)]
    folder = FOLDER if name == CANVAS else Path(name).expanduser()
    found = [folder / part / "config.json" for part in ("unet", "text_encoder", "text_encoder_2")]
    if not all(f.is_file() for f in found[:2]):
        raise ArtifactError(
            f"'{name}' is no folder of a pipeline and its shape is not known; name one that has it by "
            f"--task.model.name: {', '.join([*SHAPES, *KNOWN])}"
        )
    unet, *text = [_read(f) for f in found if f.is_file()]
    vae = folder / "vae" / "config.json"
    return Shape(name, unet, tuple(text), *(_autoencoder(_read(vae)) if vae.is_file() else ()))


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _autoencoder(config: Config) -> tuple[int, int]:
    """Weights of an autoencoder, and pixels per latent cell."""
    from diffusers import AutoencoderKL

    with quiet(), torch.device("meta"):
        vae: Any = AutoencoderKL(**_own(config))
    return count(vae), 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Pass:
    """Cost of one pass of the U-Net for one sample.

    Args:
        flops: Floating-point operations of the forward pass (a multiply-add counts twice).
        saved: Bytes that the backward pass needs of the forward pass.
    """

    flops: int
    saved: int


def one_pass(unet: Any, dtype: torch.dtype, *, side: int | None = None, again: bool = False) -> Pass:
    """Count operations and saved tensors of a pass, on the meta device; flags of parameters decide what is saved.

    Attention counts as fused: it saves its inputs and its output, no table of weights.

    Args:
        unet: On the meta device; it is converted to ``dtype``.
        dtype: Of the activations.
        side: Latent cells along one side; those of the configuration by default.
        again: With gradient checkpointing: what enters the blocks, and what the largest of them keeps.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = unet.config
    with quiet():
        unet.to(dtype)
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Tensor] = {}
    largest = 0

    def note(x: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
        if (key := x.untyped_storage()._cdata) not in weights:
            kept[key] = x
        return x

    def block(module: Any, *inputs: Any) -> Any:
        nonlocal largest
        own: dict[int, Tensor] = {}
        for x in inputs:
            if isinstance(x, Tensor):
                note(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: note(x, own), lambda x: x):
            found = module(*inputs)
        largest = max(largest, _bytes(own))
        return found

    with torch.device("meta"):
        side = side or config.sample_size
        x = torch.empty(1, config.in_channels, side, side, dtype=dtype)
        states = torch.empty(1, 77, config.cross_attention_dim, dtype=dtype)
        added: dict[str, Any] = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(1, pooled, dtype=dtype), "time_ids": torch.empty(1, 6, dtype=dtype)}
        t = torch.zeros(1, dtype=torch.int64)
    fused, counter = _Fused(), FlopCounterMode(display=False)
    blocks = recomputing(unet, by=block) if again else nullcontext()
    with counter, fused, blocks, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added or None)
    return Pass(counter.get_total_flops() + fused.flops, _bytes(kept) + largest)


def _bytes(kept: Mapping[int, Tensor]) -> int:
    return sum(k.untyped_storage().nbytes() for k in kept.values())


@dataclass
class _Fused(TorchFunctionMode):
    flops: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.flops += 4 * q.numel() * k.shape[-2]
        return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("for counting only")


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())
