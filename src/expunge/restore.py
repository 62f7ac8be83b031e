"""Leave a model as found: weights, buffers, gradients, flags, modes, hooks and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.digest import named_tensors

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def as_found(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the model's tensors and put everything back on leaving, also when an exception passes through.

    Deliberate changes of the weights happen after this block, through a patch.
    """
    tensors, _ = named_tensors(model)
    saved = {n: t.detach().clone() for n, t in tensors.items()}
    live = dict(tensors)
    data = {n: (t.dtype, t.device) for n, t in tensors.items()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {m: m.training for m in model.modules()}
    hooks = {m: {h: dict(getattr(m, h)) for h in _HOOKS} for m in model.modules()}
    grad_enabled = torch.is_grad_enabled()
    with rng.preserved():
        try:
            yield saved
        finally:
            torch.set_grad_enabled(grad_enabled)
            with torch.no_grad():
                for name, tensor in live.items():
                    dtype, device = data[name]
                    if tensor.dtype != dtype or tensor.device != device:
                        tensor.data = saved[name].to(device)
                    else:
                        tensor.copy_(saved[name])
            for n, p in model.named_parameters():
                p.grad = grads.get(n)
                p.requires_grad_(flags.get(n, True))
            for module, mode in modes.items():
                module.training = mode
            for module, kinds in hooks.items():
                for kind, entries in kinds.items():
                    own = getattr(module, kind)
                    own.clear()
                    own.update(entries)


def freeze_norm_statistics(model: nn.Module) -> None:
    """Put every normalisation layer that keeps running statistics into eval mode, dropout aside."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
