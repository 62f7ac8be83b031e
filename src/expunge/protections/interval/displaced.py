r"""Mean and covariance of the patches of a stride-1 convolution, from displaced products of the image.

With the zero-padded image ``x~`` the sum over output positions ``o`` of ``x~(o + u) x~(o + v)^T`` is, for taps ``u``
and ``v``, the correlation of the image with itself at displacement ``v - u`` less the pixels that ``o + u`` does not
reach, which form strips along the border. A k x k kernel has ``(k^2 + 1) / 2`` tap pairs per tap, but only
``2 k^2 - 2 k + 1`` displacements up to sign. All displacements along one axis come from one set of products between
coefficients of a discrete Fourier transform that is long enough not to wrap around.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from expunge.protections.interval import rows as rows_of
from expunge.protections.interval.accumulate import compute_dtype

#: Fewest channels per group, and largest share of the direct cost, at which displaced products are used.
MIN_CHANNELS = 16
WORTH = 0.7

Span = tuple[int, int]


def worthwhile(module: nn.Module, x: Tensor, conv: rows_of.ConvRows) -> bool:
    """Whether displaced products apply to a layer and are clearly cheaper than unfolding its input ``x``."""
    if not isinstance(module, nn.Conv2d) or conv != "patches" or module.stride != (1, 1):
        return False
    (kh, kw), c, d = module.kernel_size, module.in_channels // module.groups, rows_of.width(module, conv)
    if c < MIN_CHANNELS or kh * kw == 1:
        return False
    grid = _Grid(module, *x.shape[-2:])
    whole = 1.5 * grid.kh * grid.length * grid.height
    strips = 0
    for ey, ex in grid.displacements():
        strips += sum(b - a for uy in range(grid.kh - ey) for a, b in grid.beyond(0, uy)) * grid.width
        strips += sum(b - a for ux in grid.taps(ex) for a, b in grid.beyond(1, ux)) * grid.height
    direct = (d + 128) / 2 * d * math.prod(grid.out)
    return c * c * (whole + strips) < WORTH * direct


class _Grid:
    """Geometry of a convolution on images of one size, with a kernel that is at least as wide as one column.

    A k x 1 kernel is treated as 1 x k on transposed images: the transform runs along the last axis.
    """

    def __init__(self, module: nn.Conv2d, height: int, width: int) -> None:
        self.turned = module.kernel_size[1] == 1
        left, right, top, bottom = rows_of.padding(module)
        size, kernel, dilation = (height, width), module.kernel_size, module.dilation
        before, after = (top, left), (bottom, right)
        if self.turned:
            size, kernel, dilation, before, after = (t[::-1] for t in (size, kernel, dilation, before, after))  # type: ignore[assignment]
        self.height, self.width = self.size = size
        self.kh, self.kw = kernel
        self.dilation, self.before = dilation, before
        self.out = tuple(
            s + b + a - e * (k - 1) for s, b, a, e, k in zip(size, before, after, dilation, kernel, strict=True)
        )
        self.length = self.width + min(dilation[1] * (self.kw - 1), self.width - 1)

    def displacements(self) -> Iterator[tuple[int, int]]:
        """Displacements in taps, one of each pair of opposite ones."""
        for ey in range(self.kh):
            for ex in range(1 - self.kw if ey else 0, self.kw):
                yield ey, ex

    def taps(self, ex: int) -> range:
        """Columns ``ux`` of the kernel for which ``ux + ex`` is one as well."""
        return range(max(0, -ex), self.kw - max(0, ex))

    def beyond(self, axis: int, tap: int) -> list[Span]:
        """Pixels along an axis that a tap does not reach from any output position."""
        size, start = self.size[axis], self.dilation[axis] * tap - self.before[axis]
        spans = ((0, min(start, size)), (max(start + self.out[axis], 0), size))
        return [(a, b) for a, b in spans if a < b]

    def joint(self, axis: int, like: Tensor) -> Tensor:
        """``[k, k, size]``: 1 where tap ``v`` reaches a pixel from an output position whose tap ``u`` is inside."""
        k, size = (self.kh, self.kw)[axis], self.size[axis]
        pixel = torch.arange(size, device=like.device)
        first = (self.dilation[axis] * torch.arange(k, device=like.device) - self.before[axis])[:, None]
        reached = (pixel >= first) & (pixel < first + self.out[axis])  # [v, size]
        partner = pixel + first[None] - first[:, None]  # [v, u, size]
        return (reached[:, None] & (partner >= 0) & (partner < size)).double()


class PatchScatter:
    """What :class:`expunge.protections.interval.accumulate.Scatter` gives for unfolded patches, without unfolding.

    Pixels are shifted by the channel means of the first chunk, so that large means cost no digits; what the shift
    leaves at the zero padding is added back exactly from sums over pixels and counts. Products are in the precision
    of the rows (float64 when narrow), one block per pair of taps is kept and added up in float64.

    Args:
        module: A convolution of stride 1 with zero padding.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        self.module, self.n = module, 0
        self.channels, self.taps = module.in_channels // module.groups, math.prod(module.kernel_size)
        self.compute: torch.dtype = torch.float64
        self._shift = torch.empty(0)
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._sums = torch.empty(0)  # of tap v where tap u is inside the image, [v, u, c]
        self._counts = torch.empty(0)  # of output positions where both are inside, [v, u]

    def update(self, x: Tensor) -> bool:
        """Add images ``[n, c, H, W]`` of one group; return False when they contain a non-finite number."""
        grid = _Grid(self.module, *x.shape[-2:])
        if not self.n:
            self._start(x)
        self.n += x.shape[0] * math.prod(grid.out)
        per_image = max(1, x[0].numel() * x.element_size())
        finite = True
        for part in x.split(max(1, rows_of.CHUNK_BYTES // per_image)):
            finite = self._add(self._pixels(part, grid), grid) and finite
        return finite

    def _start(self, x: Tensor) -> None:
        self.compute = compute_dtype(x.dtype, self.channels * self.taps)
        self._shift = x.to(self.compute).mean((0, 2, 3))
        self._sums = torch.zeros(self.taps, self.taps, self.channels, dtype=torch.float64, device=x.device)
        self._counts = torch.zeros(self.taps, self.taps, dtype=torch.float64, device=x.device)

    def _pixels(self, x: Tensor, grid: _Grid) -> Tensor:
        """Shifted pixels ``[W, H, n, c]``, contiguous, of images ``[n, c, H, W]``."""
        last = x.new_empty(x.shape[0], x.shape[2] * x.shape[3], x.shape[1])
        for image, to in zip(x, last, strict=True):  # transposing matrices is several times faster than permuting
            to.copy_(image.flatten(1).T)
        order = (1, 2, 0, 3) if grid.turned else (2, 1, 0, 3)
        pixels = last.view(x.shape[0], *x.shape[2:], -1).permute(order)
        return torch.sub(pixels, self._shift, out=torch.empty(pixels.shape, dtype=self.compute, device=x.device))

    def _add(self, pixels: Tensor, grid: _Grid) -> bool:
        """Add shifted ``pixels [W, H, n, c]``."""
        total = pixels.sum(2).double()
        rows, columns = grid.joint(0, total), grid.joint(1, total)
        across = torch.einsum("abw,whc->abhc", columns, total)
        self._sums += torch.einsum("vuh,abhc->vaubc", rows, across).reshape(self._sums.shape)
        inside = torch.einsum("vu,ab->vaub", rows.sum(2), columns.sum(2)).reshape(self._counts.shape)
        self._counts += pixels.shape[2] * inside
        spectrum, back = _transform(grid, pixels)
        waves = (spectrum @ pixels.flatten(1)).view(-1, *pixels.shape[1:])
        planes = pixels.new_empty(back.shape[1], self.channels, self.channels)
        for ey in range(grid.kh):
            drop = grid.dilation[0] * ey
            if drop < grid.height:
                _correlate(waves, drop, planes)
                lags = [ex for y, ex in grid.displacements() if y == ey]
                whole = (back[[ex + grid.kw - 1 for ex in lags]] @ planes.flatten(1)).view(-1, *planes.shape[1:])
                for ex, product in zip(lags, whole, strict=True):
                    self._spread(pixels, grid, ey, ex, product)
        return bool(torch.isfinite(total).all())

    def _spread(self, pixels: Tensor, grid: _Grid, ey: int, ex: int, whole: Tensor) -> None:
        """Add the product of one displacement, less what lies beyond the border, to every tap pair it belongs to."""
        all_rows, all_columns = [(0, grid.height)], [(0, grid.width)]
        by = (grid.dilation[0] * ey, grid.dilation[1] * ex)
        aside = {ux: _strips(pixels, all_rows, grid.beyond(1, ux), by) for ux in grid.taps(ex)}
        for uy in range(grid.kh - ey):
            above = _strips(pixels, grid.beyond(0, uy), all_columns, by)
            for ux in grid.taps(ex):
                pair = (uy * grid.kw + ux, (uy + ey) * grid.kw + ux + ex)
                if pair not in self._blocks:
                    self._blocks[pair] = torch.zeros_like(whole, dtype=torch.float64)
                block = self._blocks[pair]
                block += whole
                for product in (*above, *aside[ux]):
                    block -= product
                for product in _strips(pixels, grid.beyond(0, uy), grid.beyond(1, ux), by):
                    block += product

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the mean ``[d]`` and the covariance (divided by N) ``[d, d]`` in float64, and free the sums."""
        c, t = self.channels, self.taps
        shift = self._shift.double()
        sums, counts = self._sums / self.n, self._counts / self.n
        mean, inside = sums[range(t), range(t)], counts.diagonal()
        mixed = sums.transpose(0, 1) - inside[:, None, None] * mean  # covariance of indicator u and pixel v, [u, v, c]
        counts = counts - torch.outer(inside, inside)
        cov = torch.zeros(c, t, c, t, dtype=torch.float64, device=shift.device)
        for u in range(t):
            for v in range(u, t):
                block = self._blocks.pop((u, v), None)
                block = torch.zeros_like(cov[:, u, :, v]) if block is None else block.div_(self.n)
                block.addr_(mean[u], mean[v], alpha=-1).addr_(shift, mixed[u, v]).addr_(mixed[v, u], shift)
                block.addr_(shift, shift, alpha=float(counts[u, v]))
                cov[:, v, :, u] = block.T
                cov[:, u, :, v] = block
        return (mean + inside[:, None] * shift).T.reshape(-1), cov.view(c * t, c * t)


def _transform(grid: _Grid, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real transform ``[L, W]`` (cosines, then sines) and the way back from planes to lags ``[2 kw - 1, planes]``."""
    length, lags = grid.length, grid.dilation[1] * torch.arange(1 - grid.kw, grid.kw)
    waves = torch.arange(length // 2 + 1)
    paired = (waves > 0) & (2 * waves != length)  # frequencies with a sine

    def angle(f: Tensor, x: Tensor) -> Tensor:
        return (torch.outer(f, x) % length).double() * (2 * math.pi / length)

    forward = angle(waves, torch.arange(grid.width))
    cos, sin = angle(lags, waves).cos(), angle(lags, waves[paired]).sin()
    twice = cos[:, paired] * 2
    # real part p + q and imaginary part r - p + q of the planes p, q, r of a frequency
    cos[:, paired] = twice + 2 * sin
    back = torch.cat([cos, twice - 2 * sin, -2 * sin], 1) / length
    back[lags.abs() >= grid.width] = 0.0
    return torch.cat([forward.cos(), forward[paired].sin()]).to(like), back.to(like)


def _correlate(waves: Tensor, drop: int, planes: Tensor) -> None:
    """Products of rows with those ``drop`` below, for cosines, sines, and (sum, difference) of both, in ``planes``."""
    length, height, _, c = waves.shape
    top, bottom = waves[:, : height - drop].reshape(length, -1, c), waves[:, drop:].reshape(length, -1, c)
    for i in range(length):
        torch.mm(top[i].T, bottom[i], out=planes[i])
    for i in range(length, len(planes)):  # three products in place of four
        sine = i - (len(planes) - length)
        cosine = sine - length // 2
        torch.mm((top[cosine] + top[sine]).T, bottom[cosine] - bottom[sine], out=planes[i])


def _strips(pixels: Tensor, rows: list[Span], columns: list[Span], by: tuple[int, int]) -> list[Tensor]:
    """Products of the pixels in each rectangle with those displaced ``by`` rows and columns."""
    width, height, _, c = pixels.shape
    found = []
    for y0, y1 in rows:
        for x0, x1 in columns:
            top, bottom = max(y0, -by[0]), min(y1, height - by[0])
            left, right = max(x0, -by[1]), min(x1, width - by[1])
            if top < bottom and left < right:
                here = pixels[left:right, top:bottom].reshape(-1, c)
                there = pixels[left + by[1] : right + by[1], top + by[0] : bottom + by[0]].reshape(-1, c)
                found.append(here.T @ there)
    return found
