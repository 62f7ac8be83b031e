"""Turn a layer's input into rows, one per application of its weight matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import RequestError

ConvRows = Literal["patches", "channels"]

#: Bytes of unfolded patches made at a time.
CHUNK_BYTES = 16 << 20


def groups(module: nn.Module, conv: ConvRows) -> int:
    """Number of row blocks a layer has: its groups for patches of a convolution, else 1."""
    return int(module.groups) if isinstance(module, nn.Conv2d) and conv == "patches" else 1


def signature(module: nn.Module, conv: ConvRows) -> tuple[object, ...]:
    """Layers with the same input tensor and the same signature have the same rows."""
    if isinstance(module, nn.Conv2d) and conv == "patches":
        return ("patches", module.kernel_size, module.stride, str(module.padding), module.dilation, module.groups)
    return ("conv",) if isinstance(module, nn.Conv2d) else ("linear",)


def width(module: nn.Module, conv: ConvRows) -> int:
    """Length d of one row (per group)."""
    if isinstance(module, nn.Conv2d):
        taps = module.kernel_size[0] * module.kernel_size[1] if conv == "patches" else 1
        return module.in_channels // groups(module, conv) * taps
    if isinstance(module, nn.Linear):
        return module.in_features
    raise RequestError(f"{type(module).__name__} cannot be protected; choose Linear or Conv2d layers")


def padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros added left, right, above and below.

    Raises:
        RequestError: The layer pads with something else.
    """
    if module.padding_mode != "zeros":
        raise RequestError(f"interval protection does not support padding_mode={module.padding_mode!r}; use zeros")
    if module.padding == "valid":
        return 0, 0, 0, 0
    if module.padding == "same":
        down, across = (dil * (k - 1) for k, dil in zip(module.kernel_size, module.dilation, strict=True))
        return across // 2, across - across // 2, down // 2, down - down // 2
    ph, pw = (int(p) for p in module.padding)
    return pw, pw, ph, ph


def patches_at(x: Tensor, module: nn.Conv2d, group: int, index: Tensor) -> Tensor:
    """Single patches of one group, ``[m, d]``, as :func:`iterate` numbers them over all of ``x [n, C, H, W]``."""
    left, right, top, bottom = padding(module)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    height, width = x.shape[-2:]
    down = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
    across = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    index = index.to(x.device)
    image, place = index // (down * across), index % (down * across)
    y = (place // across * sh - top)[:, None] + dh * torch.arange(kh, device=x.device)
    z = (place % across * sw - left)[:, None] + dw * torch.arange(kw, device=x.device)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((z >= 0) & (z < width))[:, None]
    part = x.chunk(module.groups, 1)[group]
    picked = part[image[:, None, None], :, y.clamp(0, height - 1)[:, :, None], z.clamp(0, width - 1)[:, None]]
    return torch.where(inside[..., None], picked, 0.0).permute(0, 3, 1, 2).reshape(len(index), -1)


def iterate(x: Tensor, module: nn.Module, conv: ConvRows) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(group, rows [n, d])`` in bounded chunks.

    Args:
        x: Input of the layer, ``[..., d]`` for Linear and ``[B, C, H, W]`` (or ``[C, H, W]``) for Conv2d.
        module: The layer.
        conv: ``patches``: zero-padded unfolded receptive fields in (C, kH, kW) order, groups apart. ``channels``: one
            row of all channels per input pixel, whatever the kernel (what the published code records).
    """
    if not isinstance(module, nn.Conv2d):
        yield 0, x.reshape(-1, x.shape[-1])
        return
    if x.dim() == 3:
        x = x[None]
    if conv == "channels":
        yield 0, x.movedim(1, -1).reshape(-1, x.shape[1])
        return
    sides = padding(module)
    x = F.pad(x, sides) if any(sides) else x
    (sh, sw), g = module.stride, module.groups
    if module.kernel_size == (1, 1):
        x = x[:, :, ::sh, ::sw]
        for i, part in enumerate(x.chunk(g, 1)):
            yield i, part.movedim(1, -1).reshape(-1, part.shape[1])
        return
    d = width(module, conv)
    per_sample = max(1, x[0].numel() * x.element_size() * module.kernel_size[0] * module.kernel_size[1] // (sh * sw))
    for part in x.split(max(1, CHUNK_BYTES // per_sample)):
        patches = F.unfold(part, module.kernel_size, module.dilation, 0, module.stride)
        for i in range(g):
            yield i, patches[:, i * d : (i + 1) * d].transpose(1, 2).reshape(-1, d)


def drift_matrix(module: nn.Module, drift: Tensor, conv: ConvRows) -> Tensor:
    """Weight drift as ``[g, o/g, d]``, matching the rows of :func:`iterate`."""
    g = groups(module, conv)
    return drift.reshape(g, drift.shape[0] // g, -1)


def as_finite(x: Tensor) -> Tensor:
    """Non-finite entries replaced by zero, as the published collection does."""
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))
