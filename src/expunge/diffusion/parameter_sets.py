"""Which tensors of a diffusers ``UNet2DConditionModel`` the concept erasers train, by the names their repositories use.

Rules by module (ESD) pick every parameter of the Linear and Conv2d modules whose name fits; rules by parameter pick any
tensor whose name fits, the norms' included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from expunge.errors import CapabilityError, RequestError, did_you_mean

Fits = Callable[[str], bool]

_KEY_VALUE = ("attn2.to_k", "attn2.to_v")
_PROJECTIONS = (".to_q.", ".to_k.", ".to_v.", ".to_out.")


@dataclass(frozen=True)
class ParameterSet:
    """A named rule of selection.

    Args:
        name: Its name here.
        summary: What it picks, in words.
        fits: Whether a module's (or parameter's) name belongs to it.
        modules: The rule looks at the names of Linear and Conv2d modules; otherwise at the names of parameters.
        narrowed_on_sdxl: The SDXL script of ESD leaves out modules outside the blocks and embeddings.
    """

    name: str
    summary: str
    fits: Fits
    modules: bool = False
    narrowed_on_sdxl: bool = False

    def names(self, unet: nn.Module, *, sdxl: bool = False) -> list[str]:
        """Names of the parameters that the rule picks, in the model's order; possibly none."""
        if not self.modules:
            return [n for n, _ in unet.named_parameters() if self.fits(n)]
        narrow = sdxl and self.narrowed_on_sdxl
        found = []
        for name, module in unet.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d) or not self.fits(name):
                continue
            if not narrow or ("emb" not in name and "block" in name):
                found += [f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)]
        return found


def _key_value(name: str) -> bool:
    return any(part in name for part in _KEY_VALUE)


def _output_or_time(name: str) -> bool:
    return name.startswith(("conv_norm_out.", "conv_out.", "time_embedding."))


def _all(name: str) -> bool:
    return True


SETS: Mapping[str, ParameterSet] = MappingProxyType(
    {
        s.name: s
        for s in (
            ParameterSet("esd-x", "query, key, value and output of cross-attention", lambda n: "attn2" in n, True),
            ParameterSet("esd-x-strict", "key and value of cross-attention", _key_value, True),
            ParameterSet("esd-u", "Linear and Conv2d outside cross-attention", lambda n: "attn2" not in n, True, True),
            ParameterSet("esd-all", "all Linear and Conv2d", _all, True, True),
            ParameterSet("selfattn", "query, key, value and output of self-attention", lambda n: "attn1" in n, True),
            ParameterSet("cross-attn", "key and value of cross-attention", _key_value),
            ParameterSet("cross-attn-all", "every tensor of cross-attention", lambda n: "attn2" in n),
            ParameterSet(
                "attn",
                "query, key, value and output of all attention",
                lambda n: any(a in n for a in ("attn1.", "attn2.")) and any(p in n for p in _PROJECTIONS),
            ),
            ParameterSet(
                "attn-qkv",
                "query, key and value of all attention",
                lambda n: any(a in n for a in ("attn1.", "attn2.")) and any(p in n for p in _PROJECTIONS[:3]),
            ),
            ParameterSet("full-weight", "every tensor of the U-Net, norms included", _all),
            ParameterSet(
                "compvis-noxattn",
                "every tensor but cross-attention, the output layers and the time embedding",
                lambda n: "attn2" not in n and not _output_or_time(n),
            ),
            ParameterSet(
                "compvis-notime",
                "every tensor but the output layers and the time embedding",
                lambda n: not _output_or_time(n),
            ),
        )
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "xattn": "esd-x",
        "xattn-strict": "esd-x-strict",
        "noxattn": "esd-u",
        "full": "esd-all",
        "esd-a": "esd-all",
        "crossattn-kv": "cross-attn",
        "crossattn": "attn-qkv",
        "uce": "cross-attn",
        "only_optimize_ca": "cross-attn-all",
    }
)

#: What the options of the public scripts select. The current ESD scripts know these four names and give an empty list
#: for all others; ``xattn-strict`` of ``utils.py`` asks for ``to_q`` and ``to_k`` in one name and finds none.
_SCRIPTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "esd_sd.py": {n: n for n in ("esd-x", "esd-x-strict", "esd-u", "esd-all")},
        "esd_sdxl.py": {n: n for n in ("esd-x", "esd-x-strict", "esd-u", "esd-all")},
        "utils.py FineTunedModel": {n: n for n in ("xattn", "noxattn", "selfattn", "full")},
        "concept-ablation": {"cross-attn": "cross-attn", "attn": "attn", "full-weight": "full-weight"},
        "forget-me-not": {"only_optimize_ca": "cross-attn-all"},
        "uce": {"modules": "cross-attn"},
    }
)


def parameter_set(name: str) -> ParameterSet:
    """The rule of this name or alias.

    Raises:
        RequestError: There is none. The public scripts go on with an empty list here.
    """
    known = ALIASES.get(name, name)
    if known not in SETS:
        raise RequestError(f"unknown set of parameters {name!r}{did_you_mean(name, [*SETS, *ALIASES])}")
    return SETS[known]


def select(unet: nn.Module, name: str, *, sdxl: bool = False) -> list[str]:
    """Names of the parameters of a set, in the model's order.

    Args:
        unet: The U-Net; its tensors may lie on the meta device.
        name: A name of :data:`SETS` or :data:`ALIASES`.
        sdxl: Narrow ``esd-u`` and ``esd-all`` as the SDXL script does.

    Raises:
        RequestError: The name is unknown, or nothing in this model fits it.

    Deviates: ``xattn-strict`` means key and value of cross-attention, as its help text says; the public
        ``utils/utils.py`` selects nothing under that name.
    """
    rule = parameter_set(name)
    found = rule.names(unet, sdxl=sdxl)
    if not found:
        raise RequestError(f"the set {name!r} ({rule.summary}) fits no parameter of this {type(unet).__name__}")
    return found


def published_names(unet: nn.Module, script: str, option: str) -> list[str]:
    """What a public script selects for an option, an empty list included.

    Args:
        unet: The U-Net.
        script: ``esd_sd.py``, ``esd_sdxl.py``, ``utils.py FineTunedModel``, ``concept-ablation``, ``forget-me-not`` or
            ``uce``.
        option: The value of its option.

    Raises:
        RequestError: The script is not one of these.
    """
    if script not in _SCRIPTS:
        raise RequestError(f"unknown script {script!r}{did_you_mean(script, _SCRIPTS)}")
    name = _SCRIPTS[script].get(option)
    return parameter_set(name).names(unet, sdxl=script == "esd_sdxl.py") if name else []


def size(model: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    """Number of tensors and of weights of a selection."""
    counts = [model.get_parameter(n).numel() for n in names]
    return len(counts), sum(counts)


def token_tables(text_encoder: nn.Module) -> list[str]:
    """Name of the token table of a text encoder: the ``embedding`` option of Ablating Concepts.

    Raises:
        CapabilityError: There is not exactly one module called ``token_embedding``.
    """
    found = [
        f"{n}.weight"
        for n, m in text_encoder.named_modules()
        if isinstance(m, nn.Embedding) and n.rpartition(".")[2] == "token_embedding"
    ]
    if len(found) != 1:
        raise CapabilityError(f"{type(text_encoder).__name__} has {len(found)} token tables, not one: {found}")
    return found
