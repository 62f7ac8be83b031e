"""Random crop and flip as a pure function of (key, sample id): independent of batch order and of what ran before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expunge import rng
from expunge.errors import DataError


@dataclass(frozen=True)
class Augment:
    """Shift by up to ``pad`` pixels (zero padding, then a random crop of the old size) and mirror half of the images.

    Args:
        pad: Padding in pixels on each side; 0 for no shift.
        flip: Mirror left and right with probability one half.
    """

    pad: int = 0
    flip: bool = False

    def __call__(self, x: Tensor, ids: Tensor, key: int) -> Tensor:
        """Apply to a batch, see :func:`crop_flip`."""
        return crop_flip(x, ids, key, pad=self.pad, flip=self.flip)


#: Customary training augmentation by data set; mirrored digits would be other symbols, so those sets have none.
AUGMENT: dict[str, Augment] = {
    "cifar10": Augment(pad=4, flip=True),
    "cifar100": Augment(pad=4, flip=True),
    "svhn": Augment(),
    "digits": Augment(),
}


def crop_flip(x: Tensor, ids: Tensor, key: int, *, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding, then a random horizontal flip, each drawn per sample.

    Args:
        x: Images ``[B, C, H, W]``.
        ids: Sample ids, int64 ``[B]``; together with ``key`` they decide the draw.
        key: Key from :func:`expunge.rng.key`, one per epoch.
        pad: Padding in pixels on each side; the shift is uniform on ``-pad..pad`` in both directions.
        flip: Mirror with probability one half.

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        DataError: Shapes do not match or ``pad`` is negative.
    """
    if x.ndim != 4 or ids.shape != x.shape[:1] or pad < 0:
        raise DataError(
            f"crop_flip needs [B, C, H, W] images, B ids and pad >= 0; got {list(x.shape)}, {len(ids)}, {pad}"
        )
    if not pad and not flip:
        return x
    b, c, h, w = x.shape
    rows = torch.arange(h).expand(b, h)
    columns = torch.arange(w).expand(b, w)
    if flip:
        mirrored = rng.randint(key, ids, 2, stream=2).bool()
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if pad:
        rows = rows + rng.randint(key, ids, 2 * pad + 1, stream=0)[:, None]
        columns = columns + rng.randint(key, ids, 2 * pad + 1, stream=1)[:, None]
        x = functional.pad(x, (pad, pad, pad, pad))
    sample = torch.arange(b, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    return x[sample, channel, rows.to(x.device)[:, None, :, None], columns.to(x.device)[:, None, None, :]]
