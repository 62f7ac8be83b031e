"""Captions that name a concept, and pictures placed with a mask, as the concept erasers build them.

Every choice is a function of a key (from :func:`expunge.rng.key`: seed, purpose, step, sample), so a resumed run builds
the same captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from expunge import rng
from expunge.errors import ConfigError, DataError, RequestError

Variant = Literal["as_intended", "diffusers", "compvis"]
T = TypeVar("T")

#: What the 2023 script of UCE moderates together.
MODERATION = (
    "hate",
    "harassment",
    "violence",
    "suffering",
    "humiliation",
    "harm",
    "suicide",
    "sexual",
    "nudity",
    "bodily fluids",
    "blood",
)

_EXPANSIONS = {
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}


def style_caption(caption: str, style: str, key: int, variant: Variant = "as_intended") -> str:
    """A caption in a style.

    Args:
        caption: ``"a house by a lake"``.
        style: ``"van gogh"``.
        key: Of this draw.
        variant: ``as_intended`` = two forms, equally likely. ``diffusers`` = the second form twice as likely (the
            public code has that branch twice). ``compvis`` = a third form, and the name doubled half of the time.
    """
    after, before, inspired = "{1}, in the style of {0}", "in {0}'s style, {1}", "{0} inspired painting, {1}"
    forms = {"as_intended": (after, before), "diffusers": (after, before, before), "compvis": (after, before, inspired)}
    if variant == "compvis" and choose((False, True), key, 1):
        style = f"{style} {style}"
    return choose(forms[variant], key).format(style, caption)


def replaced_caption(caption: str, anchor: str, target: str, *, lower: bool = False, published: bool = False) -> str:
    """A caption with the anchor's name replaced by the target's (objects and instances).

    Args:
        caption: Names the anchor.
        anchor: ``"cat"``.
        target: ``"grumpy cat"``.
        lower: Lower-case the caption first, as the CompVis code does.
        published: Replace any substring and let captions without the anchor pass, as the public code does: "cattle"
            becomes "grumpy cattle", and a caption that stays as it is has a loss of zero.

    Raises:
        DataError: The caption does not name the anchor as whole words.
    """
    caption = caption.lower() if lower else caption
    if published:
        return caption.replace(anchor, target)
    words = rf"(?<!\w){re.escape(anchor)}(?!\w)"
    changed, count = re.subn(words, lambda _: target, caption, flags=re.IGNORECASE)
    if not count:
        raise DataError(f"the caption {caption!r} does not name the anchor {anchor!r}, so there is nothing to replace")
    return changed


def content_caption(caption: str, targets: Sequence[str], index: int, key: int) -> str:
    """A caption with unwanted content named; several targets take turns with the samples.

    Args:
        caption: Of an image generated with the targets as the negative prompt.
        targets: ``["nudity"]``.
        index: Number of the sample.
        key: Of this draw.
    """
    forms = ("{0}, {1}", "in {0} style, {1}", "{1}, {0}")
    return choose(forms, key).format(targets[index % len(targets)], caption)


def parse_target(text: str) -> tuple[str, str]:
    """``anchor+target`` as the options of Ablating Concepts write it; ``*+caption`` for a memorised caption.

    >>> parse_target("cat+grumpy cat")
    ('cat', 'grumpy cat')

    Raises:
        RequestError: There is no ``+``, or a side is empty.
    """
    anchor, plus, target = (part.strip() for part in text.partition("+"))
    if not plus or not anchor or not target:
        raise RequestError(f"expected 'anchor+target', got {text!r}")
    return anchor, target


def expanded(concept: str, kind: Literal["art", "object"]) -> list[str]:
    """The concept and the five templates that ``--expand_prompts`` of UCE adds.

    >>> expanded("Monet", "art")[:2]
    ['Monet', 'painting by Monet']
    """
    return [concept, *(form.format(concept) for form in _EXPANSIONS[kind])]


def concepts_of(text: str) -> list[str]:
    """Concepts separated by ``;``, in order and without blanks around them.

    Raises:
        RequestError: None is left, or one is empty.
    """
    parts = [p.strip() for p in text.split(";")]
    if not all(parts):
        raise RequestError(f"expected concepts separated by ';', got {text!r}")
    return parts


@dataclass(frozen=True, eq=False)
class Placed:
    """A picture after :func:`place`.

    Args:
        image: ``[C, S, S]``.
        mask: Valid latent cells, float ``[1, L, L]``.
        prefix: What the caption begins with, ``""`` or a phrase with a blank after it.
    """

    image: Tensor
    mask: Tensor
    prefix: str


def place(image: Tensor, key: int, latent_side: int, *, probability: float = 2 / 3, fill: float = 0.0) -> Placed:
    """Shrink a picture and paste it somewhere, or zoom into it, and say so in the caption.

    With ``probability`` the side becomes an even number of ``S/3 .. S`` pixels, pasted at random on a plain ground; the
    mask is the pasted area without a border of one latent cell. Otherwise the picture is enlarged 1.2 to 1.4 times and
    cropped at random, all of it valid.

    Args:
        image: ``[C, S, S]``.
        key: Of this draw.
        latent_side: ``L``, a divisor of ``S``.
        probability: Of shrinking.
        fill: Value of the ground.

    Raises:
        ConfigError: ``image`` is not square, or ``latent_side`` does not divide its side.

    Deviates: Where so small a picture would leave no valid cell, its whole area counts; the public code then divides
        zero by zero.
    """
    side = image.shape[-1]
    if image.ndim != 3 or image.shape[-2] != side or side % latent_side:
        raise ConfigError(f"cannot place an image {list(image.shape)} with {latent_side} latent cells a side")
    if uniform(key, 0) >= probability:
        new = _between(int(1.2 * side), int(1.4 * side), key, 1)
        y, x = (_between(0, new - side, key, s) for s in (2, 3))
        crop = _resized(image, new)[:, y : y + side, x : x + side]
        return Placed(crop, torch.ones(1, latent_side, latent_side), choose(("zoomed in ", "close up "), key, 4))
    new = min(side, -(-_between(-(-side // 3), side, key, 1) // 2) * 2)
    y, x = (_between(0, side - new, key, s) for s in (2, 3))
    canvas = torch.full_like(image, fill)
    canvas[:, y : y + new, x : x + new] = _resized(image, new)
    cell = side // latent_side
    mask = torch.zeros(1, latent_side, latent_side)
    rows, columns = (_cells(start, new, cell, latent_side) for start in (y, x))
    mask[:, rows, columns] = 1.0
    prefix = choose(("a far away ", "very small "), key, 4) if new < 0.6 * side else ""
    return Placed(canvas, mask, prefix)


def one_place(text: str, key: str, what: str) -> str:
    """A prompt with one place to fill in.

    Args:
        text: Holds ``{}``.
        key: Name of the setting, for the message.
        what: What goes there.

    Raises:
        ValueError: There is none, or more than one.
    """
    if text.count("{}") != 1:
        raise ValueError(f"'{key}' holds {{}} once, where {what}, not {text!r}")
    return text


def choose(options: Sequence[T], key: int, stream: int = 0) -> T:
    """One of the options, uniformly."""
    return options[int(rng.randint(key, torch.zeros(1, dtype=torch.int64), len(options), stream))]


def uniform(key: int, stream: int = 0) -> float:
    """A number of ``[0, 1)``."""
    return int(rng.uniform_bits(key, torch.zeros(1, dtype=torch.int64), stream)[0] >> 11) / 2**53


def _between(low: int, high: int, key: int, stream: int) -> int:
    """An integer of ``low..high``, both included."""
    return low + choose(range(high - low + 1), key, stream)


def _resized(image: Tensor, side: int) -> Tensor:
    return functional.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0]


def _cells(start: int, length: int, cell: int, count: int) -> slice:
    """Latent cells wholly inside the pixels, less one at each end if any are left."""
    first, last = -(-start // cell), (start + length) // cell
    if first + 1 < last - 1:
        return slice(first + 1, last - 1)
    if first < last:
        return slice(first, last)
    return slice(start // cell, min(count, start // cell + 1))
