"""Draws figures of eight shapes in six styles: signed distances, colouring rules, averaged down from twice the size.

Image ``index`` of a stream is a pure function of the stream's key and the index. On the pixels only exactly rounded
operations are used (no sine, no exponential), so that the same image comes out of any batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from expunge import rng
from expunge.errors import DataError

#: Changes whenever the rules below change the pixels.
DRAW_VERSION = 1
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
STYLES = ("flat", "outline", "striped", "dotted", "neon", "pastel")

#: Half the extent of a figure; the image spans -1 to 1.
SIZE = (0.50, 0.72)
#: Largest turn either way, in radians.
TURN = 0.3
#: Between a figure and the edge of the image: room for half an outline.
_MARGIN = 0.1
_PERIOD = 0.5
_CHUNK = 480

Plane = Tensor


def draw_canvas(indices: Tensor, shapes: Tensor, styles: Tensor, stream: int, side: int = 32) -> Tensor:
    """Draw figures at random places, sizes and turns in two random colours.

    Args:
        indices: int64 ``[N]``, not negative.
        shapes: Numbers in :data:`SHAPES`, int64 ``[N]``.
        styles: Numbers in :data:`STYLES`, int64 ``[N]``.
        stream: Key of the random draws, as :func:`expunge.rng.key` makes them.
        side: Height and width in pixels.

    Returns:
        uint8 ``[N, 3, side, side]``.

    Raises:
        DataError: Indices are not int64 or negative, numbers out of range, lengths differ, ``side`` is under 8.
    """
    if indices.ndim != 1 or indices.dtype != torch.int64 or (len(indices) and int(indices.min()) < 0):
        raise DataError(f"indices of drawn images are int64, not negative; got {indices.dtype} {indices[:5].tolist()}")
    for what, numbers, names in (("shapes", shapes, SHAPES), ("styles", styles, STYLES)):
        known = (numbers >= 0) & (numbers < len(names))
        if numbers.shape != indices.shape or not bool(known.all()):
            raise DataError(f"{what} must be {len(indices)} numbers from 0 to {len(names) - 1}")
    if side < 8:
        raise DataError(f"figures need a side of at least 8 pixels, got {side}")
    pixels = torch.empty(len(indices), 3, side, side, dtype=torch.uint8)
    for start in range(0, len(indices), _CHUNK):
        rows = slice(start, start + _CHUNK)
        pixels[rows] = _draw(indices[rows], shapes[rows], styles[rows], stream, side)
    return pixels


def _draw(indices: Tensor, shapes: Tensor, styles: Tensor, stream: int, side: int) -> Tensor:
    at = (torch.arange(2 * side, dtype=torch.float32) + 0.5) / side - 1
    y, x = at[None, :, None], at[None, None, :]

    def draw(number: int, low: float, high: float) -> Tensor:
        bits = rng.uniform_bits(stream, indices, number) >> np.uint64(11)
        return (low + (high - low) * torch.from_numpy(bits.astype(np.float64) * 2.0**-53))[:, None, None]

    size, turn = draw(0, *SIZE), draw(1, -TURN, TURN)
    room = 1 - _MARGIN - size
    left, top = (draw(2, -1, 1) * room).float(), (draw(3, -1, 1) * room).float()
    cos, sin = (turn.cos() / size).float(), (turn.sin() / size).float()
    # u to the right and v upwards, the figure within -1 to 1.
    u, v = cos * (x - left) + sin * (y - top), sin * (x - left) - cos * (y - top)
    distance = torch.empty(len(indices), 2 * side, 2 * side)
    for number, name in enumerate(SHAPES):
        rows = (shapes == number).nonzero().flatten()
        if len(rows):
            distance[rows] = _DISTANCE[name](u[rows], v[rows])
    distance *= size.float()
    hue, apart, light = draw(4, 0, 1), draw(5, 0.3, 0.7), draw(6, 0, 1)
    image = torch.empty(len(indices), 3, 2 * side, 2 * side)
    for number, name in enumerate(STYLES):
        rows = (styles == number).nonzero().flatten()
        if len(rows):
            paint = _Paint(distance[rows][:, None], x[None], y[None], 2.0 / side)
            image[rows] = _STYLE[name](paint, hue[rows], (hue + apart)[rows], light[rows])
    quarters = image[..., ::2, ::2] + image[..., 1::2, ::2] + image[..., ::2, 1::2] + image[..., 1::2, 1::2]
    return (quarters * (255 / 4) + 0.5).floor().clamp(0, 255).to(torch.uint8)


# --- distances to the edge, negative inside -------------------------------------------------------------------------


def _disc(u: Plane, v: Plane, radius: float, right: float = 0.0, up: float = 0.0) -> Plane:
    return ((u - right) ** 2 + (v - up) ** 2).sqrt() - radius


def _box(u: Plane, v: Plane, width: float, height: float) -> Plane:
    return torch.maximum(u.abs() - width, v.abs() - height)


def _square(u: Plane, v: Plane) -> Plane:
    return _box(u, v, 0.78, 0.78)


def _triangle(u: Plane, v: Plane) -> Plane:
    return torch.maximum(0.8660254 * u.abs() + 0.5 * (v + 0.15), -(v + 0.15)) - 0.46


def _star(u: Plane, v: Plane) -> Plane:
    """Five points: folded onto one half of one point, then the distance to its edge."""
    u = u.abs()
    for right, up in ((0.809016994, -0.587785252), (-0.809016994, -0.587785252)):
        beyond = 2 * (right * u + up * v).clamp(min=0)
        u, v = u - beyond * right, v - beyond * up
    u, v = u.abs(), v - 1
    # The edge runs from the tip to the notch, whose radius is 0.45 of the tip's.
    edge_u, edge_v = 0.45 * 0.587785252, 0.45 * 0.809016994 - 1
    along = ((u * edge_u + v * edge_v) / (edge_u**2 + edge_v**2)).clamp(0, 1)
    off = ((u - along * edge_u) ** 2 + (v - along * edge_v) ** 2).sqrt()
    return torch.where(v * edge_u > u * edge_v, off, -off)


def _cross(u: Plane, v: Plane) -> Plane:
    return torch.minimum(_box(u, v, 0.92, 0.32), _box(u, v, 0.32, 0.92))


def _ring(u: Plane, v: Plane) -> Plane:
    return _disc(u, v, 0.68).abs() - 0.24


def _heart(u: Plane, v: Plane) -> Plane:
    """A turned square with a half disc on each upper side."""
    u, v = u.abs() / 1.5, v / 1.5 + 0.58
    lobe = _disc(u, v, 0.353553391, 0.25, 0.75)
    middle = 0.5 * (u + v).clamp(min=0)
    to_notch, to_side = u**2 + (v - 1) ** 2, (u - middle) ** 2 + (v - middle) ** 2
    below = torch.minimum(to_notch, to_side).sqrt()
    return 1.5 * torch.where(u + v > 1, lobe, torch.where(u > v, below, -below))


def _moon(u: Plane, v: Plane) -> Plane:
    return torch.maximum(_disc(u, v, 0.95, 0.28), -_disc(u, v, 0.9, 0.83))


_DISTANCE: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda u, v: _disc(u, v, 0.9),
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}


# --- styles -----------------------------------------------------------------------------------------------------------


class _Paint:
    """Coverages ``[N, 1, H, W]`` of one group of figures; ``soft`` is the width of a ramp between two colours."""

    def __init__(self, distance: Tensor, x: Tensor, y: Tensor, soft: float) -> None:
        self.distance, self.x, self.y, self.soft = distance, x, y, soft

    def inside(self, soft: float | None = None) -> Tensor:
        return (0.5 - self.distance / (soft or self.soft)).clamp(0, 1)

    def stroke(self, width: float) -> Tensor:
        return (0.5 - (self.distance.abs() - width / 2) / self.soft).clamp(0, 1)

    def stripes(self) -> Tensor:
        phase = (self.x + self.y) / (_PERIOD * 2**0.5)
        return (0.5 - ((phase - phase.floor() - 0.5).abs() - 0.25) * _PERIOD / self.soft).clamp(0, 1)

    def dots(self) -> Tensor:
        x, y = (a / _PERIOD - (a / _PERIOD).floor() - 0.5 for a in (self.x, self.y))
        return (0.5 - ((x**2 + y**2).sqrt() - 0.31) * _PERIOD / self.soft).clamp(0, 1)

    def glow(self, reach: float) -> Tensor:
        return 1 / (1 + (self.distance / reach) ** 2)


def _colour(hue: Tensor, saturation: Tensor | float, value: Tensor | float) -> Tensor:
    """RGB ``[N, 3, 1, 1]`` of hue ``[N, 1, 1]`` (in turns), saturation and value."""
    offset = torch.tensor([1.0, 2 / 3, 1 / 3], dtype=torch.float64)[:, None, None]
    turns = hue[:, None] + offset
    channel = ((turns - turns.floor()) * 6 - 3).abs().sub(1).clamp(0, 1)
    spread = [a[:, None] if isinstance(a, Tensor) else a for a in (saturation, value)]
    return (spread[1] * (1 - spread[0] * (1 - channel))).float()


def _over(below: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    return below + cover * (colour - below)


def _flat(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    return _over(_colour(other, 0.75, 0.3 + 0.15 * light), p.inside(), _colour(hue, 0.85, 0.95))


def _outline(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    return _over(_colour(other, 0.12, 0.9 + 0.1 * light), p.stroke(0.15), _colour(hue, 0.9, 0.4))


def _striped(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    fill = _over(_colour(hue, 0.85, 0.95), p.stripes(), _colour(hue, 0.15, 1.0))
    return _over(_colour(other, 0.75, 0.3 + 0.15 * light), p.inside(), fill)


def _dotted(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    fill = _over(_colour(hue, 0.85, 0.95), p.dots(), _colour(hue, 0.15, 1.0))
    return _over(_colour(other, 0.75, 0.3 + 0.15 * light), p.inside(), fill)


def _neon(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    dark = _over(_colour(other, 0.7, 0.06 + 0.08 * light), 0.8 * p.glow(0.09), _colour(hue, 1.0, 0.9))
    return _over(dark, p.stroke(0.1), _colour(hue, 0.35, 1.0))


def _pastel(p: _Paint, hue: Tensor, other: Tensor, light: Tensor) -> Tensor:
    return _over(_colour(other, 0.14, 0.94 + 0.06 * light), p.inside(0.16), _colour(hue, 0.4, 0.92))


_STYLE: dict[str, Callable[[_Paint, Tensor, Tensor, Tensor], Tensor]] = {
    "flat": _flat,
    "outline": _outline,
    "striped": _striped,
    "dotted": _dotted,
    "neon": _neon,
    "pastel": _pastel,
}
