"""Two-tower models from folders, hubs and names: transformers or open_clip, safetensors only."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import expunge
from expunge import files
from expunge.errors import ArtifactError, CapabilityError, ConfigError, did_you_mean
from expunge.models.quiet import no_progress_bars
from expunge.models.towers import Towers
from expunge.models.towers_hf import OPENAI_MEAN, OPENAI_STD, HFTowers
from expunge.models.towers_open_clip import OpenClipTowers
from expunge.models.weights import load_weights, refuse_pickle
from expunge.part import Frozen

Library = Literal["transformers", "open_clip"]
CANVAS = "canvas"
_HF_CONFIG, _OPEN_CONFIG = "config.json", "open_clip_config.json"
_OPEN_WEIGHTS = "open_clip_model.safetensors"
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_INSTALL = 'pip install "expunge[clip]"'
_log = logging.getLogger(__name__)


class ClipSpec(Frozen):
    """Which two-tower model.

    Args:
        name: ``canvas`` (the small model that comes with this package), a folder, a hub id
            (``openai/clip-vit-base-patch32``), an open_clip architecture (``ViT-B-32``), or open_clip's ``hf-hub:`` /
            ``local-dir:`` forms.
        library: ``auto`` decides by the form of the name, or by the files of the folder.
        pretrained: open_clip's tag of weights, with an architecture name.
        weights: A safetensors file of the same architecture instead of the model's own weights.
        dtype: Precision in memory, whatever the stored one.
        revision: Branch, tag or commit on the hub.
    """

    name: str = CANVAS
    library: Literal["auto", "transformers", "open_clip"] = "auto"
    pretrained: str | None = None
    weights: str | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    revision: str | None = None


def load_clip(spec: ClipSpec | str) -> Towers:
    """Load a two-tower model with its tokenizer, in eval mode, on the CPU.

    Args:
        spec: What to load, or just its name.

    Raises:
        ConfigError: An unknown architecture or tag, or options that do not go together.
        CapabilityError: A library is missing, or the model is of a kind that is not supported.
        ArtifactError: Files cannot be had, are pickles, or do not match the architecture.
    """
    spec = ClipSpec(name=spec) if isinstance(spec, str) else spec
    library = library_of(spec)
    if spec.weights is not None:
        refuse_pickle(Path(spec.weights))
    if spec.pretrained and library == "transformers":
        raise ConfigError("`pretrained` is a tag of open_clip; transformers models are chosen by `name` alone")
    return _load_transformers(spec) if library == "transformers" else _load_open_clip(spec)


def library_of(spec: ClipSpec) -> Library:
    """The library that loads a model.

    Raises:
        ArtifactError: A folder holds neither library's configuration.
        ConfigError: The name has no form that is known.
    """
    if spec.library != "auto":
        return spec.library
    if spec.name == CANVAS:
        return "transformers"
    if spec.pretrained or spec.name.startswith((_HUB, _LOCAL)):
        return "open_clip"
    folder = Path(spec.name)
    if folder.is_dir():
        if (folder / _HF_CONFIG).is_file() and (spec.weights or _safetensors(folder, "model*.safetensors")):
            return "transformers"
        if (folder / _OPEN_CONFIG).is_file():
            return "open_clip"
        if (folder / _HF_CONFIG).is_file():
            return "transformers"
        raise ArtifactError(f"{folder}: neither {_HF_CONFIG} (transformers) nor {_OPEN_CONFIG} (open_clip) is in it")
    if spec.name in _architectures():
        return "open_clip"
    if spec.name.count("/") == 1 and not spec.name.startswith((".", "/", "~")):
        return "transformers"
    raise ConfigError(
        f"no folder, hub id or open_clip architecture '{spec.name}'{did_you_mean(spec.name, _architectures())}"
    )


def _architectures() -> list[str]:
    try:
        import open_clip
    except ImportError:
        return []
    return list(open_clip.list_models())


def _safetensors(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    return sorted(folder.glob(pattern))


def _canvas() -> Path:
    folder = Path(expunge.__file__).parent / "assets" / "canvas_clip"
    if not (folder / _HF_CONFIG).is_file():
        raise ArtifactError(f"the bundled model is not where it belongs ({folder}); install the package again")
    return folder


def _unavailable(name: str, error: Exception) -> ArtifactError:
    text = " ".join(str(error).split())[:200]
    return ArtifactError(
        f"'{name}' could not be had ({type(error).__name__}: {text}). Without a network, download it once where "
        "there is one and give the folder as `name`; safetensors files are needed, pickles are not read"
    )


def _read_in(model: nn.Module, file: Path, dtype: torch.dtype) -> None:
    """Load strictly at the stored precision, then convert: the only difference that is allowed."""
    refuse_pickle(file)
    stored, _ = files.read_safetensors(file)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored and stored[name].is_floating_point():
            tensor.data = tensor.data.to(stored[name].dtype)
    load_weights(model, file)
    model.to(dtype)


def _load_transformers(spec: ClipSpec) -> Towers:
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel
    except ImportError:
        raise CapabilityError(f"this needs transformers: {_INSTALL}") from None
    name = str(_canvas()) if spec.name == CANVAS else spec.name
    dtype = getattr(torch, spec.dtype)
    where: dict[str, Any] = {} if spec.revision is None else {"revision": spec.revision}
    folder = Path(name)
    if folder.is_dir() and spec.weights is None and not _safetensors(folder):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if found:
            refuse_pickle(folder / found[0])
        raise ArtifactError(f"{folder}: no model.safetensors in it")
    try:
        config = AutoConfig.from_pretrained(name, **where)
        if not isinstance(config, CLIPConfig):
            raise CapabilityError(
                f"'{name}' is a {config.model_type} model; of transformers' two-tower models only clip works"
            )
        if spec.weights is None:
            reader: Any = CLIPModel  # its annotation leaves the pair out
            with no_progress_bars():
                model, info = reader.from_pretrained(
                    name, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
                )
            _complete(name, info)
        else:
            model = CLIPModel(config)
        _need_words(name, where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (ArtifactError, CapabilityError):
        raise
    except Exception as error:  # network, cache, missing and broken files arrive as many types
        raise _unavailable(name, error) from error
    if spec.weights is not None:
        _read_in(model, Path(spec.weights), dtype)
    rows = model.text_model.embeddings.token_embedding.num_embeddings
    if len(tokenizer) > rows:
        raise ArtifactError(
            f"'{name}': the tokenizer has {len(tokenizer)} tokens, the text tower {rows}; wrong tokenizer"
        )
    mean, std = _hf_statistics(name, where)
    return HFTowers(model.eval(), tokenizer, mean=mean, std=std)


def _need_words(name: str, where: Mapping[str, Any]) -> None:
    """Without its files a tokenizer comes back empty and turns every word into the end token, silently."""
    from transformers.utils import cached_file

    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, **where}
    if not any(cached_file(name, file, **options) for file in ("tokenizer.json", "vocab.json")):
        raise ArtifactError(
            f"'{name}' has no tokenizer.json (or vocab.json and merges.txt); save the tokenizer beside it"
        )


def _complete(name: str, info: Mapping[str, Any]) -> None:
    """The library fills what a file lacks with random numbers; here that is an error."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            shown = sorted(map(str, info[kind]))
            raise ArtifactError(f"'{name}': {len(shown)} {kind.replace('_keys', '')} tensors ({', '.join(shown[:4])})")


def _hf_statistics(name: str, where: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        stated, _ = ImageProcessingMixin.get_image_processor_dict(name, **where)
    except OSError:
        _log.warning(
            "'%s' has no preprocessor_config.json; images are normalised with the mean and std of OpenAI's CLIP", name
        )
        return OPENAI_MEAN, OPENAI_STD
    return tuple(stated.get("image_mean") or OPENAI_MEAN), tuple(stated.get("image_std") or OPENAI_STD)


@dataclass(frozen=True)
class _OpenSource:
    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    tokenizer: str


def _load_open_clip(spec: ClipSpec) -> Towers:
    try:
        import open_clip
    except ImportError:
        raise CapabilityError(f"this needs open_clip: {_INSTALL}") from None
    try:
        source = _open_source(spec, open_clip)
        tokenizer = open_clip.get_tokenizer(source.tokenizer)
        model = _build_open(spec.name, dict(source.model), open_clip)
    except (ArtifactError, CapabilityError, ConfigError):
        raise
    except Exception as error:  # as above
        raise _unavailable(spec.name, error) from error
    _read_in(model, source.weights, getattr(torch, spec.dtype))
    if source.preprocess.get("resize_mode", "shortest") != "shortest":
        _log.warning(
            "'%s' was trained with resize mode '%s'; here the shorter side is resized and the centre cropped",
            spec.name,
            source.preprocess["resize_mode"],
        )
    mean, std = source.preprocess.get("mean") or OPENAI_MEAN, source.preprocess.get("std") or OPENAI_STD
    return OpenClipTowers(model.eval(), tokenizer, mean=mean, std=std)


def _open_source(spec: ClipSpec, open_clip: Any) -> _OpenSource:
    """Where the parts of an open_clip model lie."""
    own = None if spec.weights is None else Path(spec.weights)
    if spec.name.startswith(_HUB):
        repo = spec.name.removeprefix(_HUB)
        folder = _fetch(repo, _OPEN_CONFIG, spec.revision).parent
        return _from_folder(folder, own or _fetch(repo, _OPEN_WEIGHTS, spec.revision), spec.name)
    if Path(spec.name.removeprefix(_LOCAL)).is_dir():
        folder = Path(spec.name.removeprefix(_LOCAL))
        return _from_folder(folder, own or _weights_in(folder), f"{_LOCAL}{folder}")
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise ConfigError(
            f"open_clip has no architecture '{spec.name}'{did_you_mean(spec.name, open_clip.list_models())}"
        )
    tag: dict[str, Any] = {}
    if spec.pretrained:
        tag = open_clip.get_pretrained_cfg(spec.name, spec.pretrained)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(spec.name)
            raise ConfigError(f"'{spec.name}' has no weights '{spec.pretrained}'{did_you_mean(spec.pretrained, tags)}")
        # The activation belongs to the weights; open_clip itself only warns when the architecture says otherwise.
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
    if own is None and not tag:
        raise ConfigError(f"'{spec.name}' needs `pretrained` (a tag) or `weights` (a safetensors file)")
    return _OpenSource(config, tag, own or _tagged(spec, tag), spec.name)


def _from_folder(folder: Path, weights: Path, tokenizer: str) -> _OpenSource:
    if not (folder / _OPEN_CONFIG).is_file():
        raise ArtifactError(f"{folder}: no {_OPEN_CONFIG} in it")
    stated = json.loads((folder / _OPEN_CONFIG).read_text(encoding="utf-8"))
    if "model_cfg" not in stated:
        raise ArtifactError(f"{folder / _OPEN_CONFIG}: no 'model_cfg'")
    return _OpenSource(stated["model_cfg"], stated.get("preprocess_cfg", {}), weights, tokenizer)


def _weights_in(folder: Path) -> Path:
    found = _safetensors(folder)
    chosen = next((p for p in found if p.name == _OPEN_WEIGHTS), found[0] if len(found) == 1 else None)
    if chosen is None:
        for other in sorted(folder.iterdir()):
            if other.suffix in (".bin", ".pt", ".pth") and not found:
                refuse_pickle(other)
        raise ArtifactError(
            f"{folder}: no {_OPEN_WEIGHTS} in it (found: {[p.name for p in found]}); name one with `weights`"
        )
    return chosen


def _tagged(spec: ClipSpec, tag: Mapping[str, Any]) -> Path:
    """The safetensors file behind a tag of open_clip."""
    repo, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not repo:
        raise ArtifactError(
            f"the weights '{spec.pretrained}' of '{spec.name}' are a pickle only ({tag.get('url') or 'no address'}); "
            "convert them once with `expunge convert` and give the result as `weights`"
        )
    return _fetch(repo, f"{Path(file).stem}.safetensors" if file else _OPEN_WEIGHTS, spec.revision)


def _fetch(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, revision=revision))


def _build_open(name: str, config: dict[str, Any], open_clip: Any) -> nn.Module:
    """The architecture with fresh weights; ``create_model`` would look for weights on its own."""
    if "multimodal_cfg" in config:
        raise CapabilityError(f"'{name}' is a CoCa model with a third tower; only two-tower models work")
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    vision, text = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model: nn.Module = kind(vision_cfg=vision, text_cfg=text, **config)
    return model
