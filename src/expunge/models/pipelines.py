"""Text-to-image pipelines from folders, single files, hubs and the package: diffusers' parts, safetensors only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from expunge import files
from expunge.diffusion.canvas import FOLDER
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models.quiet import quiet
from expunge.models.single_file import check_text, is_xl, tensor_names
from expunge.models.weights import refuse_pickle
from expunge.part import Frozen

CANVAS = "canvas"
INSTALL = 'pip install "expunge[diffusion]"'
Kind = Literal["sd", "xl"]
#: Pipelines by the class that ``model_index.json`` names.
KINDS: dict[str, Kind] = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "xl"}
_ENCODERS = {"sd": ("",), "xl": ("", "_2")}


class PipelineSpec(Frozen):
    """Which text-to-image pipeline of the Stable Diffusion 1.x, 2.x or XL kind.

    Args:
        name: ``canvas`` (the small pipeline that comes with this package), a folder as diffusers saves it, a single
            ``.safetensors`` checkpoint, or a hub id (``CompVis/stable-diffusion-v1-4``).
        dtype: Precision of U-Net and text encoders in memory, whatever the stored one. The autoencoder is always kept
            in float32: it is not trained, and that of XL overflows in half precision.
        sampler: ``ddim`` (deterministic, whatever scheduler comes with the pipeline) or ``own``.
        revision: Branch, tag or commit on the hub.
        variant: Of the stored files, such as ``fp16``.
        config: For a single file: folder or hub id with the configuration files.
    """

    name: str = CANVAS
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    sampler: Literal["ddim", "own"] = "ddim"
    revision: str | None = None
    variant: str | None = None
    config: str | None = None


class TextToImage(nn.Module):
    """The editable half of a pipeline: its tensors are called ``unet.*`` and ``text_encoder.*`` (and ``_2`` for XL).

    The autoencoder is not in it: concepts are not erased there.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        if text_encoder_2 is not None:
            self.text_encoder_2 = text_encoder_2

    def masters(self, wanted: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What has to be float32 for training in half precision to be the same as with all weights in float32.

        Autocast rounds the matrices and kernels of the U-Net at every use, so those that are not trained may as well
        stay rounded. Its vectors (of norms, and biases: a thousandth of it) may not: norms would take their statistics
        in half precision. A text encoder of which something is trained is taken as a whole, for its tables' sake;
        the others run in the precision in which they were loaded.

        Args:
            wanted: Parameters that are trained, or are to be float32 for another reason.
        """
        own, found = {id(p) for p in wanted}, []
        for part in self.children():
            vectors = part is self.unet
            whole = not vectors and any(id(p) in own for p in part.parameters())
            found += [p for p in part.parameters() if whole or id(p) in own or (vectors and p.ndim < 2)]
        return found


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a pipeline, all in eval mode.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        text_encoder: transformers' ``CLIPTextModel``.
        tokenizer: Of ``text_encoder``.
        vae: diffusers' ``AutoencoderKL``.
        scheduler: Samples with predicted noise (``prediction_type`` is ``epsilon`` whatever the U-Net predicts).
        text_encoder_2: XL: ``CLIPTextModelWithProjection``.
        tokenizer_2: Of ``text_encoder_2``.
        predicts: What the U-Net itself predicts: ``epsilon`` or ``v_prediction``.
        zero_unconditional: The empty prompt is conditioned on zeros (XL).
        name: Where it came from.
    """

    unet: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    predicts: Literal["epsilon", "v_prediction"] = "epsilon"
    zero_unconditional: bool = False
    name: str = ""

    @property
    def kind(self) -> Kind:
        """``sd`` with one text encoder, ``xl`` with two."""
        return "sd" if self.text_encoder_2 is None else "xl"

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def side(self) -> int:
        """Pixels along one side of the images that the U-Net was trained for."""
        return int(self.unet.config.sample_size) * self.factor

    def model(self) -> TextToImage:
        """U-Net and text encoders as one module."""
        return TextToImage(self.unet, self.text_encoder, self.text_encoder_2)

    def pipeline(self) -> Any:
        """The same parts as diffusers' pipeline, for its own ways of sampling and saving; no safety checker.

        Raises:
            CapabilityError: The U-Net predicts velocities, which the pipeline would have to be told again.
        """
        import diffusers

        if self.predicts != "epsilon":
            raise CapabilityError("only pipelines that predict noise can be put together again")
        own = {n: getattr(self, n) for n in ("unet", "text_encoder", "tokenizer", "vae", "scheduler")}
        if self.kind == "xl":
            own |= {"text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2}
            return diffusers.StableDiffusionXLPipeline(
                **own, force_zeros_for_empty_prompt=self.zero_unconditional, add_watermarker=False
            )
        return diffusers.StableDiffusionPipeline(
            **own, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


def load_pipeline(spec: PipelineSpec | str) -> Parts:
    """Load a pipeline's parts, in eval mode, on the CPU. A safety checker is neither needed nor loaded.

    Args:
        spec: What to load, or just its name.

    Raises:
        CapabilityError: diffusers is missing, or the pipeline is of another kind.
        ConfigError: Options that do not go together.
        ArtifactError: Files cannot be had, are pickles, or do not match their configuration.
    """
    spec = PipelineSpec(name=spec) if isinstance(spec, str) else spec
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise CapabilityError(f"this needs diffusers and transformers: {INSTALL}") from None
    if spec.name == CANVAS and not (FOLDER / "model_index.json").is_file():
        raise ArtifactError(f"the bundled pipeline is not where it belongs ({FOLDER}); install the package again")
    name = str(FOLDER) if spec.name == CANVAS else spec.name
    path = Path(name).expanduser()
    if path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") or path.is_file():
        refuse_pickle(path)
        return _from_single_file(path, spec)
    if spec.config is not None:
        raise ConfigError("`config` is for single files; a folder or hub id has its own")
    if path.is_dir():
        _check_folder(path)
    return _from_folder(str(path) if path.is_dir() else name, spec)


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise ArtifactError(f"{folder}: no model_index.json in it; give a folder as diffusers saves it")
    for part in ("unet", "text_encoder", "vae"):
        if any((folder / part).glob("*.safetensors")):
            continue
        for other in sorted((folder / part).glob("*")):
            if other.suffix in (".bin", ".pt", ".pth", ".ckpt"):
                refuse_pickle(other)
        raise ArtifactError(f"{folder / part}: no safetensors file in it")


def _from_folder(name: str, spec: PipelineSpec) -> Parts:
    """Part by part, so that what a file lacks is seen and nothing else is fetched."""
    import diffusers
    import transformers

    where: dict[str, Any] = {} if spec.revision is None else {"revision": spec.revision}
    weights = {**where, "use_safetensors": True, "output_loading_info": True}
    if spec.variant is not None:
        weights["variant"] = spec.variant
    dtype = getattr(torch, spec.dtype)
    try:
        index = diffusers.DiffusionPipeline.load_config(name, **where)
        kind = _kind(name, index)
        own: dict[str, Any] = {}
        reads: list[tuple[str, Any, torch.dtype]] = [
            ("unet", diffusers.UNet2DConditionModel, dtype),
            ("vae", diffusers.AutoencoderKL, torch.float32),
            ("text_encoder", transformers.CLIPTextModel, dtype),
        ]
        if kind == "xl":
            reads.append(("text_encoder_2", transformers.CLIPTextModelWithProjection, dtype))
        with quiet():
            for part, cls, precision in reads:
                model, info = cls.from_pretrained(name, subfolder=part, dtype=precision, **weights)
                _complete(f"{name}/{part}", info)
                own[part] = model.eval()
            for end in _ENCODERS[kind]:
                own[f"tokenizer{end}"] = transformers.AutoTokenizer.from_pretrained(
                    name, subfolder=f"tokenizer{end}", **where
                )
        stated = diffusers.DDIMScheduler.load_config(name, subfolder="scheduler", **where)
        scheduler = _scheduler_class(name, index["scheduler"][1]).from_config(stated)
    except (ArtifactError, CapabilityError, ConfigError):
        raise
    except Exception as error:  # network, cache, missing and broken files arrive as many types
        raise _unavailable(name, error) from error
    zero = kind == "xl" and bool(index.get("force_zeros_for_empty_prompt", True))
    return _put_together(own, scheduler, spec, zero)


def _from_single_file(path: Path, spec: PipelineSpec) -> Parts:
    import diffusers

    files.read_safetensors(path, names=())
    options: dict[str, Any] = {"config": spec.config} if spec.config is not None else {}
    dtype = getattr(torch, spec.dtype)
    kind: Kind = "xl" if is_xl(tensor_names(path)) else "sd"
    cls: Any = diffusers.StableDiffusionXLPipeline if kind == "xl" else diffusers.StableDiffusionPipeline
    if kind == "sd":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet():
            found = cls.from_single_file(str(path), torch_dtype=dtype, use_safetensors=True, **options)
    except Exception as error:  # as above
        raise _unavailable(str(path), error) from error
    own = {n: getattr(found, n) for n in ("unet", "vae", "text_encoder", "tokenizer")}
    if kind == "xl":
        own |= {n: getattr(found, n) for n in ("text_encoder_2", "tokenizer_2")}
    for model in own.values():
        if isinstance(model, nn.Module):
            model.eval()
    check_text(path, {n: m for n, m in own.items() if n.startswith("text_encoder")})
    with quiet():
        own["vae"].to(torch.float32)
    zero = kind == "xl" and bool(found.config.get("force_zeros_for_empty_prompt", True))
    return _put_together(own, found.scheduler, spec, zero)


def _put_together(own: Mapping[str, Any], scheduler: Any, spec: PipelineSpec, zero: bool) -> Parts:
    import diffusers

    predicts = scheduler.config.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise CapabilityError(f"'{spec.name}' predicts '{predicts}'; noise and velocities are supported")
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise CapabilityError(f"'{spec.name}' has a noise level without signal, at which noise says nothing")
    cls = diffusers.DDIMScheduler if spec.sampler == "ddim" else type(scheduler)
    with quiet():  # a scheduler of one kind warns about the settings of another
        sampler = cls.from_config(scheduler.config, prediction_type="epsilon")
        if spec.sampler == "ddim":
            sampler = cls.from_config(
                sampler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1, thresholding=False
            )
    for model in own.values():
        if isinstance(model, nn.Module):
            _owned(model)
    parts = Parts(**own, scheduler=sampler, predicts=predicts, zero_unconditional=zero, name=spec.name)
    check_parts(parts)
    return parts


def _owned(model: nn.Module) -> None:
    """Weights in torch's own memory instead of mapped files, so that a run copies only what it changes."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def check_parts(parts: Parts) -> None:
    """The parts fit each other.

    Raises:
        CapabilityError: A pipeline of a kind that is not supported.
        ArtifactError: Tokenizer and text encoder do not belong together.
    """
    config = parts.unet.config
    if config.in_channels != parts.vae.config.latent_channels:
        raise CapabilityError(
            f"'{parts.name}': the U-Net takes {config.in_channels} channels, the autoencoder gives "
            f"{parts.vae.config.latent_channels}; inpainting and other conditioned pipelines are not supported"
        )
    if not isinstance(config.sample_size, int):
        raise CapabilityError(f"'{parts.name}': only square images are supported, not {config.sample_size}")
    if config.addition_embed_type not in (None, "text_time"):
        raise CapabilityError(f"'{parts.name}': the condition '{config.addition_embed_type}' is not supported")
    pairs = [(parts.tokenizer, parts.text_encoder)]
    if parts.text_encoder_2 is not None:
        pairs.append((parts.tokenizer_2, parts.text_encoder_2))
        width = 6 * config.addition_time_embed_dim + parts.text_encoder_2.config.projection_dim
        if config.projection_class_embeddings_input_dim != width:
            raise CapabilityError(f"'{parts.name}': only base models of XL are supported, no refiner")
    for tokenizer, encoder in pairs:
        if len(tokenizer) > encoder.config.vocab_size:
            raise ArtifactError(
                f"'{parts.name}': the tokenizer has {len(tokenizer)} tokens, the text encoder "
                f"{encoder.config.vocab_size}; wrong tokenizer"
            )


def _kind(name: str, index: Mapping[str, Any]) -> Kind:
    cls = str(index.get("_class_name"))
    if cls not in KINDS:
        raise CapabilityError(f"'{name}' is a {cls}; supported are {' and '.join(KINDS)}")
    return KINDS[cls]


def _scheduler_class(name: str, stated: str) -> Any:
    import diffusers

    found = getattr(diffusers, stated, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise CapabilityError(f"'{name}': diffusers has no scheduler called {stated!r}")
    return found


def _complete(name: str, info: Mapping[str, Any]) -> None:
    """The libraries fill what a file lacks with random numbers; here that is an error."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        shown = sorted(str(k) for k in info.get(kind) or () if not str(k).endswith("position_ids"))
        if shown:
            raise ArtifactError(f"'{name}': {len(shown)} {kind.replace('_keys', '')} tensors ({', '.join(shown[:4])})")


def _unavailable(name: str, error: Exception) -> ArtifactError:
    text = " ".join(str(error).split())[:200]
    return ArtifactError(
        f"'{name}' could not be had ({type(error).__name__}: {text}). Without a network, download it once where "
        "there is one and give the folder as `name`; safetensors files are needed, pickles are not read"
    )
