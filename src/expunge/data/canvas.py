"""A drawn, captioned image set of two axes: eight objects in six styles. Nothing to download, any number of images.

Image ``i`` of a part and a seed is always the same image, of the same object and style, with the same caption: a set
of more images begins with the set of fewer. The objects take turns, and so do the styles: 48 images in a row have one
of each combination.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from expunge import rng
from expunge.data.base import Splits
from expunge.data.canvas_draw import SHAPES, STYLES, draw_canvas
from expunge.data.captions import Axis, CaptionedImages, captioned
from expunge.errors import DataError

#: Forms of the captions. The article does not follow the sound ("a outline star"), so that a prompt with the name
#: filled in is the very caption that images have.
FORMS = (
    "a {shape} in {style} style",
    "a {style} {shape}",
    "an image of a {shape} in {style} style",
    "a picture of a {style} {shape}",
)
N_COMBINATIONS = len(SHAPES) * len(STYLES)
#: Prompts per name: every object in each style, every style on each object.
OBJECT_TEMPLATES = tuple(FORMS[0].format(shape="{}", style=style) for style in STYLES)
STYLE_TEMPLATES = tuple(FORMS[0].format(shape=shape, style="{}") for shape in SHAPES)

Part = Literal["train", "test"]


def canvas(n_train: int = 4800, n_test: int = 960, seed: int = 0, side: int = 32) -> Splits:
    """Draw a training and a test set, both balanced over the 48 combinations of object and style.

    Args:
        n_train: Training images; a multiple of 48 has the same number of each combination.
        n_test: Test images, from a stream of their own.
        seed: Seed of all draws.
        side: Height and width in pixels.

    Returns:
        Splits whose parts are :class:`~expunge.data.captions.CaptionedImages` with the axes ``object`` (the main one)
        and ``style``.

    Raises:
        DataError: A size is not positive.
    """
    train, test, source = load_canvas(n_train, n_test, seed, side)
    return Splits("canvas", train, test, source=source)


def load_canvas(
    n_train: int = 4800, n_test: int = 960, seed: int = 0, side: int = 32
) -> tuple[CaptionedImages, CaptionedImages, str]:
    """The same as train images, test images and where they come from, one sentence."""
    train = draw_part("train", torch.arange(_counted(n_train)), seed, side)
    test = draw_part("test", torch.arange(_counted(n_test)), seed, side)
    return train, test, f"canvas: {len(SHAPES)} shapes in {len(STYLES)} styles, drawn, seed {seed}"


def draw_part(part: Part, indices: Tensor, seed: int = 0, side: int = 32) -> CaptionedImages:
    """Draw the given images of a part.

    Args:
        part: ``train`` or ``test``: independent streams.
        indices: int64 ``[N]``, not negative.
        seed: Seed of all draws.
        side: Height and width in pixels.

    Raises:
        DataError: No indices, negative ones, or a side under 8.
    """
    shapes, styles = indices % len(SHAPES), (indices // len(SHAPES) + indices % len(SHAPES)) % len(STYLES)
    x = draw_canvas(indices, shapes, styles, rng.key(seed, f"canvas {part} figures"), side)
    forms = rng.randint(rng.key(seed, f"canvas {part} captions"), indices, len(FORMS))
    rows = zip(forms.tolist(), shapes.tolist(), styles.tolist(), strict=True)
    captions = [FORMS[form].format(shape=SHAPES[shape], style=STYLES[style]) for form, shape, style in rows]
    axes = {"object": Axis(shapes, SHAPES, OBJECT_TEMPLATES), "style": Axis(styles, STYLES, STYLE_TEMPLATES)}
    return captioned(x, captions, axes)


def canvas_captions(form: int = 0) -> list[str]:
    """The 48 captions of one form, in the order of :func:`combinations`.

    >>> canvas_captions(1)[:2], len({c for form in range(4) for c in canvas_captions(form)})
    (['a flat circle', 'a outline circle'], 192)
    """
    return [FORMS[form].format(shape=shape, style=style) for shape in SHAPES for style in STYLES]


def combinations(images: CaptionedImages) -> Tensor:
    """Number of the combination of each image, object by object: ``6 * object + style``, int64 ``[N]``."""
    return images.axes["object"].labels * len(STYLES) + images.axes["style"].labels


def contact_sheet(seed: int = 0, side: int = 32, scale: int = 2, gap: int = 4) -> Tensor:
    """One image of each combination: a row per style, a column per object, on white.

    Args:
        seed: Seed of the draws.
        side: Height and width of one image in pixels.
        scale: Every pixel becomes so many pixels each way.
        gap: Pixels between and around the images.

    Returns:
        uint8 ``[3, H, W]``.
    """
    images = draw_part("train", torch.arange(N_COMBINATIONS), seed, side)
    tiles = (images.images(combinations(images).argsort()) * 255).round().to(torch.uint8)
    tiles = tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    tiles = torch.nn.functional.pad(tiles, (gap, 0, gap, 0), value=255)
    grid = tiles.reshape(len(SHAPES), len(STYLES), 3, *tiles.shape[-2:]).permute(2, 1, 3, 0, 4)
    sheet = grid.reshape(3, len(STYLES) * tiles.shape[-2], len(SHAPES) * tiles.shape[-1])
    return torch.nn.functional.pad(sheet, (0, gap, 0, gap), value=255)


def _counted(n: int) -> int:
    if n < 1:
        raise DataError(f"a drawn set needs at least one image, got {n}")
    return n
