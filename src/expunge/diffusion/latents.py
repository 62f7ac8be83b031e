"""Latents of images, computed once: blocks of safetensors, keyed by the autoencoder and the data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import files
from expunge.data.base import ImageSet
from expunge.digest import json_digest
from expunge.errors import ArtifactError, DataError

#: Images that are encoded and stored together.
BLOCK = 256
#: Latents that stay in memory, in bytes.
KEPT = 1 << 30


class Latents:
    """Scaled means of the autoencoder's posterior, ``mode(E(2 x - 1)) * scaling_factor``, for an image set.

    A block of images is encoded when one of its images is first asked for, in batches that depend on nothing else, so
    that every latent is a function of the data and the autoencoder alone.

    Args:
        vae: diffusers' ``AutoencoderKL``, in float32.
        images: Square images whose sides are a multiple of what one latent cell covers.
        digest: Of the autoencoder's weights.
        folder: Where blocks are stored; in memory only without it.
        batch_size: Images that are encoded at once.

    Deviates:
        The mean, not a draw of the posterior: its standard deviation is a hundredth of that of the latents, and a
        stored draw would be the same one in every epoch anyway.
    """

    def __init__(
        self, vae: Any, images: ImageSet, digest: str, folder: Path | None = None, batch_size: int = 16
    ) -> None:
        self.vae, self.images, self.batch_size = vae, images, batch_size
        key = json_digest(["latents", digest, images.digest, float(vae.config.scaling_factor), BLOCK, batch_size])
        self.folder = None if folder is None else folder / key[:32]
        self._blocks: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, ids: Tensor, device: torch.device) -> Tensor:
        """Latents ``[B, C, h, w]`` in float32 on the CPU.

        Args:
            ids: int64 ``[B]``.
            device: Where to encode what is not there yet.

        Raises:
            DataError: An image cannot be read or has the wrong size.
        """
        self.images.require(ids)
        numbers = (ids // BLOCK).tolist()
        found = {n: self._block(n, device) for n in sorted(set(numbers))}
        rows = (ids % BLOCK).tolist()
        return torch.stack([found[n][r] for n, r in zip(numbers, rows, strict=True)])

    def _block(self, number: int, device: torch.device) -> Tensor:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        file = None if self.folder is None else self.folder / f"{number:06d}.safetensors"
        if file is not None and file.is_file():
            block = files.read_safetensors(file, names=["latents"])[0]["latents"]
        else:
            block = self._encoded(number, device)
            if file is not None:
                files.atomic_save_safetensors(file, {"latents": block})
        self._blocks[number] = block
        while len(self._blocks) > 1 and sum(b.nbytes for b in self._blocks.values()) > KEPT:
            self._blocks.popitem(last=False)
        return block

    @torch.no_grad()
    def _encoded(self, number: int, device: torch.device) -> Tensor:
        """A block; rows of unreadable images stay zero and are never given out."""
        ids = torch.arange(number * BLOCK, min(len(self.images), (number + 1) * BLOCK))
        readable = ids[~torch.isin(ids, torch.tensor(list(self.images.unreadable), dtype=torch.int64))]
        block: Tensor | None = None
        with lent(self.vae, device):
            for chunk in torch.split(readable, self.batch_size):
                encoded = encode(self.vae, self.images.images(chunk).to(device)).cpu()
                if block is None:
                    block = torch.zeros(len(ids), *encoded.shape[1:])
                block[chunk - ids[0]] = encoded
        if block is None:
            raise DataError(f"none of the images {int(ids[0])} to {int(ids[-1])} can be read")
        if not bool(torch.isfinite(block).all()):
            raise ArtifactError("the autoencoder gives latents that are not finite; its weights are damaged")
        return block


def encode(vae: Any, x: Tensor) -> Tensor:
    """Scaled latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [0, 1]."""
    with torch.autocast(x.device.type, enabled=False):  # in half precision that of XL overflows
        found: Tensor = vae.encode(2 * x.to(vae.dtype) - 1).latent_dist.mode() * vae.config.scaling_factor
    return found


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1] of scaled latents."""
    with torch.autocast(latents.device.type, enabled=False):
        x: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return (x / 2 + 0.5).clamp(0, 1)


@contextmanager
def lent(vae: Any, device: torch.device) -> Iterator[Any]:
    """The autoencoder on another device for a while: beside a U-Net in training it would only take memory."""
    home = next(vae.parameters()).device
    try:
        yield vae.to(device)
    finally:
        vae.to(home)
