"""Which modules a list of patterns selects for protection."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from expunge.errors import RequestError

if TYPE_CHECKING:
    from expunge.context import Context

MatchRule = Literal["as_published", "as_intended"]

#: Layers whose drift the interval penalty can measure.
SUPPORTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Match:
    """Result of :func:`find`.

    Args:
        layers: Selected modules by qualified name, in registration order.
        unsupported: Modules that a pattern names but that cannot be protected; always empty as published, where
            they are simply selected.
    """

    layers: dict[str, nn.Module]
    unsupported: dict[str, nn.Module]

    def parameter_names(self) -> list[str]:
        """Names of the weights and biases that belong to the selected modules themselves."""
        names = []
        for prefix, module in self.layers.items():
            own = [n for n in ("weight", "bias") if isinstance(getattr(module, n, None), nn.Parameter)]
            names += [f"{prefix}.{n}" if prefix else n for n in own]
        return names


def unwrap(model: nn.Module) -> nn.Module:
    """Remove data-parallel wrappers, so that names carry no ``module.`` prefix."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def selects(pattern: str, name: str, module: nn.Module) -> bool:
    """The published rule: equal to the class name, or a substring of the qualified name whatever the case."""
    return type(module).__name__ == pattern or pattern.lower() in name.lower()


def _selects_strict(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return selects(pattern, name, module)


def find(model: nn.Module, targets: Sequence[str], rule: MatchRule = "as_intended") -> Match:
    r"""Select modules by patterns.

    A pattern is a class name (``Linear``), a part of a qualified name in any case (``attn2.to_k``), an anchored glob
    (``blocks.*.attn2.to_?``) or an anchored regular expression (``re:blocks\.[0-3]\..*``).

    Deviates:
        ``as_intended`` keeps only ``Linear`` and ``Conv2d`` leaves, lists everything else that was named, and refuses
        an empty result. The published rule (``as_published``) knows neither globs nor expressions, also selects
        containers, activations and normalisation layers, and is silent when nothing matches.

    Raises:
        RequestError: ``as_intended`` and no supported layer is selected.
    """
    model = unwrap(model)
    test = selects if rule == "as_published" else _selects_strict
    named = {n: m for n, m in model.named_modules() if any(test(p, n, m) for p in targets)}
    if rule == "as_published":
        return Match(named, {})
    layers = {n: m for n, m in named.items() if isinstance(m, SUPPORTED)}
    rest = {n: m for n, m in named.items() if n not in layers}
    if not layers:
        raise RequestError(_nothing(model, targets, rest))
    return Match(layers, rest)


def find_in(ctx: Context, targets: Sequence[str], rule: MatchRule = "as_intended") -> Match:
    """:func:`find` in the model of a context; of a text-to-image pipeline in its U-Net, by whole names.

    Raises:
        RequestError: As :func:`find`; or a pattern selects layers of a text encoder only, whose states are computed
            once per prompt: there is nothing to measure while the U-Net is passed.
    """
    unet = getattr(ctx.task, "unet", None)
    found = find(ctx.model, targets, rule)
    if unet is None or unet is ctx.model:
        return found
    inside = {id(m) for m in unet.modules()}
    outside = {n for n, m in found.layers.items() if id(m) not in inside}
    test = selects if rule == "as_published" else _selects_strict
    for pattern in targets:
        hit = [n for n, m in found.layers.items() if test(pattern, n, m)]
        if hit and outside.issuperset(hit):
            raise RequestError(
                f"'{pattern}' selects layers of a text encoder only, such as '{hit[0]}'; name layers of the U-Net"
            )
    layers, rest = ({n: m for n, m in part.items() if id(m) in inside} for part in (found.layers, found.unsupported))
    return Match(layers, rest)


def _nothing(model: nn.Module, targets: Sequence[str], rest: dict[str, nn.Module]) -> str:
    usable = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, SUPPORTED)}
    counts = ", ".join(f"{k}: {v}" for k, v in sorted(Counter(usable.values()).items())) or "none at all"
    close: list[str] = []
    for pattern in targets:
        close += difflib.get_close_matches(pattern, list(usable), n=3, cutoff=0.3)
    close = list(dict.fromkeys(close)) or list(usable)[:5]
    named = (
        "; they do name " + ", ".join(f"'{n}' ({type(m).__name__})" for n, m in list(rest.items())[:3]) if rest else ""
    )
    return (
        f"targets {list(targets)} select no Linear or Conv2d layer of {type(model).__name__}{named}. "
        f"It has {counts}. Closest names: {', '.join(close) or 'none'}"
    )
