"""Gradient checkpointing of a U-Net: half the memory of a step or less, for one more forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from expunge.errors import CapabilityError

_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


@contextmanager
def recomputing(unet: nn.Module, by: Any = None) -> Iterator[None]:
    """Graded passes within keep what enters the blocks of the U-Net only; the backward pass runs the blocks again.

    The backward pass may come after the block. Forward hooks and attention processors are then those of the forward
    pass, also where they have been taken off since. The U-Net's own switches are put back at the end.

    Args:
        unet: A diffusers U-Net.
        by: Runs a block instead of this function's own way: ``(block, *inputs) -> outputs``.

    Raises:
        CapabilityError: The network has no blocks that can be run again.
    """
    blocks: list[Any] = [m for m in unet.modules() if hasattr(m, _SWITCH)]
    if not blocks:
        raise CapabilityError(f"{type(unet).__name__} offers no gradient checkpointing; set it to false")
    before = [{n: vars(m)[n] for n in (_SWITCH, _FUNCTION) if n in vars(m)} for m in blocks]
    for block in blocks:
        setattr(block, _SWITCH, True)
        setattr(block, _FUNCTION, by or _again)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop(_FUNCTION, None)
            vars(block).update(own)


def _again(block: nn.Module, *inputs: Any) -> Any:
    hooks = [(m, dict(m._forward_hooks)) for m in block.modules()]
    processors = [(m, m.processor) for m in block.modules() if hasattr(m, "processor")]

    @contextmanager
    def as_then() -> Iterator[None]:
        now = [(m, dict(m._forward_hooks)) for m, _ in hooks], [(m, m.processor) for m, _ in processors]
        _put(hooks, processors)
        try:
            yield
        finally:
            _put(*now)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), as_then()))


def _put(hooks: list[tuple[nn.Module, dict[int, Any]]], processors: list[tuple[Any, Any]]) -> None:
    for module, own in hooks:
        module._forward_hooks.clear()
        module._forward_hooks.update(own)
    for module, processor in processors:
        if module.processor is not processor:
            module.set_processor(processor)
