"""What a larger model uses of the CLIP tower inside it: an edit of anything else changes no output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.digest import tensor_digest
from expunge.errors import CapabilityError, InvariantError
from expunge.models.towers import Tower

_BLOCK = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Reads:
    """What a consumer reads of one tower.

    Args:
        tower: ``vision`` or ``language``.
        blocks: It uses the output of the first ``blocks`` transformer blocks.
        norm: Whether the norm after the last block is used.
        projection: Whether the projection into the joint space is used.
        words: What it reads, for messages, such as "vision hidden state -2, the output of block 22".
    """

    tower: Tower
    blocks: int
    norm: bool
    projection: bool
    words: str

    def uses(self, name: str) -> bool:
        """Whether the tensor ``name`` (any prefix, names of transformers) has an influence on the consumer.

        >>> reads = Reads("vision", 23, False, False, "hidden state -2")
        >>> reads.uses("encoder.layers.22.mlp.fc1.weight"), reads.uses("encoder.layers.23.mlp.fc1.weight")
        (True, False)
        """
        found = block_of(name)
        if found is not None:
            return found < self.blocks
        if "post_layernorm." in name or "final_layer_norm." in name:
            return self.norm
        if "visual_projection." in name or "text_projection." in name:
            return self.projection
        return True

    def check(self, name: str) -> None:
        """Refuse a change that could have no effect.

        Raises:
            CapabilityError: The consumer does not use ``name``.
        """
        if not self.uses(name):
            raise CapabilityError(
                f"'{name}' has no effect here: the model reads {self.words}. Choose a layer of block "
                f"{self.blocks - 1} or below when making the patch"
            )


def block_of(name: str) -> int | None:
    """Number of the block that a tensor belongs to, ``None`` outside the stack.

    >>> block_of("model.vision_tower.encoder.layers.3.mlp.fc1.weight"), block_of("embeddings.class_embedding")
    (3, None)
    """
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


@torch.no_grad()
def influences(call: Callable[[], Tensor], tensor: Tensor, *, seed: int = 0) -> bool:
    """Whether a tensor has any influence on an output: it is perturbed, and the bits of the output are compared.

    The tensor has its old bits afterwards. One input can miss an influence that another one shows.

    Args:
        call: Computes the output, the same on every call.
        tensor: A live weight of the model that ``call`` runs.
        seed: Seed of the perturbation: normal noise as large as the weights themselves.

    Raises:
        CapabilityError: The tensor holds integers (a quantised weight).
        InvariantError: Two calls without a change differ, so nothing can be concluded.
    """
    if not tensor.is_floating_point():
        raise CapabilityError(f"a tensor of {tensor.dtype} cannot be perturbed; load the model without quantisation")
    before = tensor_digest(call())
    if tensor_digest(call()) != before:
        raise InvariantError("two calls of the same model differ: put it in eval mode and fix its seeds")
    kept = tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)
    try:
        tensor.add_(noise * kept.float().abs().mean().clamp(min=0.01).to(tensor))
        return tensor_digest(call()) != before
    finally:
        tensor.copy_(kept)
