"""Look at the inputs of chosen layers while a model runs, and leave the model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Observe = Callable[[str, nn.Module, Tensor], None]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back, also when an exception passes through."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def observed(layers: Mapping[str, nn.Module], observe: Observe) -> Iterator[None]:
    """Call ``observe(name, module, input)`` before every forward of the layers; hooks are always removed."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            observe(name, module, inputs[0].detach())

        return before

    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    observe: Observe,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    after_batch: Callable[[], None] | None = None,
) -> None:
    """One pass over ``batches`` in evaluation mode, observing the inputs of ``layers``."""
    with evaluation(model), observed(layers, observe):
        for batch in batches:
            forward(batch)
            if after_batch is not None:
                after_batch()
