"""Class-conditional pixel diffusion models: diffusers' ``UNet2DModel`` with a null class, and its noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from expunge import rng
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models.weights import load_weights, refuse_pickle
from expunge.part import Frozen

#: Folders of a diffusers pipeline.
_UNET, _SCHEDULER = "unet", "scheduler"


class DdpmSpec(Frozen):
    """A U-Net that predicts the noise of an image, given its class.

    The classes of the data are numbers ``0 .. classes - 1``; number ``classes`` is the null class, which says nothing.
    The defaults are a network of 0.70 million weights for 8 x 8 digits. The network of the published CIFAR-10
    experiments has ``size=32, channels=3, widths=(128, 256, 256, 256), attention=(False, True, False, False),
    layers_per_block=2, dropout=0.1, groups=32, heads_of=None``.

    Args:
        name: ``unet``, built from the fields below, or a local folder in diffusers' layout (``unet/``, ``scheduler/``).
        size: Height and width of the images.
        channels: Channels of the images.
        classes: Classes of the data, the null class not counted.
        widths: Channels at each resolution; every further one halves height and width.
        attention: Which of them have self-attention; by default all but the first.
        layers_per_block: Residual blocks at each resolution.
        groups: Groups of the group normalisation.
        heads_of: Channels of an attention head; ``None`` for a single head.
        dropout: Of the residual blocks.
        steps: Noise levels ``T``.
        betas: How the noise grows.
        weights: A safetensors file of the network's weights.
        seed: Seed of the initial weights.
    """

    name: str = _UNET
    size: int = Field(default=8, ge=1)
    channels: int = Field(default=1, ge=1)
    classes: int = Field(default=10, ge=2)
    widths: tuple[int, ...] = Field(default=(32, 64), min_length=1)
    attention: tuple[bool, ...] | None = None
    layers_per_block: int = Field(default=1, ge=1)
    groups: int = Field(default=8, ge=1)
    heads_of: int | None = Field(default=8, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    steps: int = Field(default=1000, ge=2)
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    weights: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> DdpmSpec:
        if self.attention is not None and len(self.attention) != len(self.widths):
            raise ValueError(f"'attention' has {len(self.attention)} entries but 'widths' has {len(self.widths)}")
        halved = 2 ** (len(self.widths) - 1)
        if self.size % halved:
            raise ValueError(f"images of size {self.size} cannot be halved {len(self.widths) - 1} times")
        odd = [w for w in self.widths if w % self.groups]
        if odd:
            raise ValueError(f"{odd[0]} channels cannot be normalised in {self.groups} groups")
        return self


def build_ddpm(spec: DdpmSpec) -> tuple[nn.Module, Any]:
    """Build or load the network, in eval mode, and its diffusers scheduler.

    Raises:
        CapabilityError: diffusers is missing.
        ConfigError: A loaded network does not fit the fields of the spec.
        ArtifactError: Files are missing, broken or pickles.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError:
        raise CapabilityError('this needs diffusers: pip install "expunge[diffusion]"') from None
    if spec.weights is not None:
        refuse_pickle(Path(spec.weights))
    if spec.name == _UNET:
        with rng.preserved():
            rng.seed_everything(spec.seed)
            unet: Any = UNet2DModel(**_settings(spec))
        scheduler: Any = DDPMScheduler(num_train_timesteps=spec.steps, beta_schedule=spec.betas)
    else:
        unet, scheduler = _load(Path(spec.name), UNet2DModel, DDPMScheduler)
    _check(unet, spec)
    if spec.weights is not None:
        load_weights(unet, spec.weights)
    return unet.eval(), scheduler


def _settings(spec: DdpmSpec) -> dict[str, Any]:
    attention = spec.attention or tuple(i > 0 for i in range(len(spec.widths)))
    return {
        "sample_size": spec.size,
        "in_channels": spec.channels,
        "out_channels": spec.channels,
        "layers_per_block": spec.layers_per_block,
        "block_out_channels": spec.widths,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "num_class_embeds": spec.classes + 1,
        "norm_num_groups": spec.groups,
        "attention_head_dim": spec.heads_of,
        "dropout": spec.dropout,
    }


def _load(folder: Path, unet: Any, scheduler: Any) -> tuple[Any, Any]:
    for part in (_UNET, _SCHEDULER):
        if not (folder / part).is_dir():
            raise ArtifactError(
                f"{folder}: no folder '{part}'; a diffusers pipeline with unet/ and scheduler/ is expected"
            )
    try:
        model = unet.from_pretrained(
            str(folder / _UNET), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        return model, scheduler.from_pretrained(str(folder / _SCHEDULER), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder}: cannot be loaded as a class-conditional U-Net ({error})") from None


def _check(unet: Any, spec: DdpmSpec) -> None:
    rows = unet.config.num_class_embeds
    if rows != spec.classes + 1:
        raise ConfigError(
            f"{spec.name}: the network knows {rows or 'no'} classes; {spec.classes} classes and the null class, which "
            f"guidance needs, are {spec.classes + 1}"
        )
    shape = (unet.config.in_channels, unet.config.sample_size)
    if shape != (spec.channels, spec.size):
        raise ConfigError(
            f"{spec.name}: the network draws images of {shape[0]} channels and size {shape[1]}, not of {spec.channels} "
            f"and {spec.size}"
        )
