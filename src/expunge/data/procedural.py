"""Images that are computed: figures of no class, and Gaussian noise. Nothing to download, nothing to license.

Image ``index`` of seed ``seed`` is a pure function of the two: it depends neither on how many images are drawn nor on
their order. Geometry is drawn in units of the image, so the same index shows the same figure at every size and with any
number of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from expunge import rng
from expunge.data.base import MemoryImages
from expunge.errors import DataError

#: Changes whenever the rules below change the pixels; part of every index file.
DRAW_VERSION = 1

#: Pixel centres: y ``[H, 1]`` and x ``[1, W]``; the longer side of the image spans 0 to 1.
Grid = tuple[np.ndarray, np.ndarray]
#: Layers of coverage ``[H, W]`` in [0, 1], painted one over the other.
Figure = Callable[[np.random.Generator, Grid], Iterator[np.ndarray]]


def draw_shapes(indices: Tensor, shape: tuple[int, int, int], seed: int = 0) -> MemoryImages:
    """Lines, discs, polygons, gradients, stripes and textures in random colours; kind = index modulo 6.

    Args:
        indices: int64 ``[N]``, not negative.
        shape: Channels, height, width.
        seed: Seed of all images.

    Returns:
        uint8 images ``[N, C, H, W]``, labelled by kind.

    Raises:
        DataError: An index is negative, or a size is not positive.
    """
    grid, pixels = _canvas(indices, shape)
    painters = list(KINDS.values())
    for row, i in enumerate(indices.tolist()):
        geometry = _generator(rng.key(seed, "shapes geometry", i))
        colours = _generator(rng.key(seed, "shapes colours", i))
        image = _paint(painters[i % len(painters)], geometry, colours, grid, shape)
        pixels[row] = np.floor(image * 255 + 0.5)
    return MemoryImages(torch.from_numpy(pixels), shape_kinds(indices), list(KINDS))


def shape_kinds(indices: Tensor) -> Tensor:
    """Number of the kind of figure of each index, int64."""
    return indices % len(KINDS)


def draw_noise(indices: Tensor, shape: tuple[int, int, int], seed: int = 0, std: float = 0.25) -> MemoryImages:
    """Independent Gaussian pixels around 0.5, clipped to [0, 1]: the control that is known not to work.

    Deviates: SCAR's released noise set is N(0, 1) fed to the network without normalisation, which is no image. In image
    space that is ``mean + std_data * N(0, 1)``; with a spread of about 0.25 per channel, as natural images have, the
    default is the closest set that stays within [0, 1] (4.6 % of the values are clipped).

    Args:
        indices: int64 ``[N]``, not negative.
        shape: Channels, height, width.
        seed: Seed of all images.
        std: Standard deviation before clipping.

    Returns:
        uint8 images ``[N, C, H, W]`` of one class, ``noise``.

    Raises:
        DataError: As :func:`draw_shapes`.
    """
    _, pixels = _canvas(indices, shape)
    for row, i in enumerate(indices.tolist()):
        values = 0.5 + std * _generator(rng.key(seed, "noise", i)).standard_normal(shape)
        pixels[row] = np.floor(values.clip(0, 1) * 255 + 0.5)
    return MemoryImages(torch.from_numpy(pixels), torch.zeros_like(indices), ["noise"])


def _canvas(indices: Tensor, shape: tuple[int, int, int]) -> tuple[Grid, np.ndarray]:
    if indices.ndim != 1 or indices.dtype != torch.int64 or (len(indices) and int(indices.min()) < 0):
        raise DataError(f"indices of drawn images are int64, not negative; got {indices.dtype} {indices[:5].tolist()}")
    c, h, w = shape
    if min(c, h, w) < 1:
        raise DataError(f"drawn images need a positive size, got {list(shape)} [channels, height, width]")
    longest = max(h, w)
    y = (np.arange(h)[:, None] + 0.5 + (longest - h) / 2) / longest
    x = (np.arange(w)[None, :] + 0.5 + (longest - w) / 2) / longest
    return (y, x), np.empty((len(indices), c, h, w), dtype=np.uint8)


def _generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key & (2**63 - 1)))


def _paint(
    figure: Figure, geometry: np.random.Generator, colours: np.random.Generator, grid: Grid, shape: tuple[int, int, int]
) -> np.ndarray:
    """A background, and over it every layer of the figure in a colour of its own."""
    image = np.broadcast_to(colours.random(shape[0])[:, None, None], shape)
    for cover in figure(geometry, grid):
        image = image + cover * (colours.random(shape[0])[:, None, None] - image)
    return image


def _soft(distance: np.ndarray, grid: Grid) -> np.ndarray:
    """Coverage of a figure from the signed distance to its edge: a ramp one pixel wide, so that edges do not alias."""
    return np.clip(0.5 - distance * max(grid[0].shape[0], grid[1].shape[1]), 0.0, 1.0)


def _lines(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    y, x = grid
    for _ in range(int(draw.integers(2, 7))):
        y0, x0, y1, x1 = draw.random(4)
        dy, dx, width = y1 - y0, x1 - x0, draw.uniform(0.02, 0.08)
        along = np.clip(((y - y0) * dy + (x - x0) * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
        yield _soft(np.hypot(y - y0 - along * dy, x - x0 - along * dx) - width, grid)


def _discs(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    for _ in range(int(draw.integers(1, 6))):
        cy, cx, radius = *draw.random(2), draw.uniform(0.08, 0.35)
        distance = np.hypot(grid[0] - cy, grid[1] - cx) - radius
        ring, width = draw.random() < 0.4, draw.uniform(0.03, 0.08)
        yield _soft(np.abs(distance) - width if ring else distance, grid)


def _polygons(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    """Convex: the intersection of half-planes whose normals go round."""
    for _ in range(int(draw.integers(1, 5))):
        cy, cx, turn = *draw.random(2), draw.uniform(0, 2 * np.pi)
        sides = int(draw.integers(3, 8))
        far = draw.uniform(0.08, 0.3, sides)
        angle = turn + 2 * np.pi * np.arange(sides) / sides
        edges = np.sin(angle)[:, None, None] * (grid[0] - cy) + np.cos(angle)[:, None, None] * (grid[1] - cx)
        yield _soft((edges - far[:, None, None]).max(axis=0), grid)


def _gradients(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    for _ in range(int(draw.integers(1, 4))):
        cy, cx, angle = *draw.random(2), draw.uniform(0, 2 * np.pi)
        if draw.random() < 0.5:
            slope = 0.5 + np.sin(angle) * (grid[0] - cy) + np.cos(angle) * (grid[1] - cx)
        else:
            slope = np.hypot(grid[0] - cy, grid[1] - cx) / draw.uniform(0.4, 1.0)
        yield np.clip(slope, 0, 1)


def _stripes(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    """Parallel stripes, soft or sharp; two layers cross."""
    for _ in range(int(draw.integers(1, 3))):
        angle, phase = draw.uniform(0, np.pi), draw.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * draw.uniform(1.5, 6) * (np.sin(angle) * grid[0] + np.cos(angle) * grid[1]) + phase)
        yield np.clip(0.5 + wave * draw.uniform(0.5, 4), 0, 1)


def _textures(draw: np.random.Generator, grid: Grid) -> Iterator[np.ndarray]:
    """Random values on coarse grids, interpolated and thresholded more or less softly."""
    for _ in range(int(draw.integers(1, 4))):
        cells = int(draw.integers(2, 9))
        values = draw.random((cells + 2, cells + 2))
        (y0, fy), (x0, fx) = (_cell(g * cells) for g in grid)
        top = values[y0, x0] * (1 - fx) + values[y0, x0 + 1] * fx
        bottom = values[y0 + 1, x0] * (1 - fx) + values[y0 + 1, x0 + 1] * fx
        yield np.clip(0.5 + (top * (1 - fy) + bottom * fy - 0.5) * draw.uniform(1, 6), 0, 1)


def _cell(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = np.floor(at).astype(np.int64)
    return whole, at - whole


#: Kinds of figures in the order of their labels.
KINDS: dict[str, Figure] = {
    "lines": _lines,
    "discs": _discs,
    "polygons": _polygons,
    "gradients": _gradients,
    "stripes": _stripes,
    "textures": _textures,
}
