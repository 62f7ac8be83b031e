"""Leave a model as found: weights, buffers, gradients, flags, modes, hooks, structure and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.digest import named_tensors

#: Hook tables of a module, and the tables that make it a tree. Parametrisations and adapters live in the latter.
_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_parameters",
    "_buffers",
    "_modules",
)


@contextmanager
def as_found(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the model's tensors and put everything back on leaving, also when an exception passes through.

    Inside the block no parameter holds a gradient, so a caller's ``.grad`` is never added to. Deliberate changes of the
    weights happen after the block, through a patch.
    """
    live = named_tensors(model)[0]
    saved = {n: t.detach().clone() for n, t in live.items()}
    data = {n: (t.dtype, t.device) for n, t in live.items()}
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modules = [(m, type(m), m.training, _tables(m)) for m in model.modules()]
    grad_enabled = torch.is_grad_enabled()
    with rng.preserved():
        try:
            for p, _, _ in parameters:
                p.grad = None
            yield saved
        finally:
            torch.set_grad_enabled(grad_enabled)
            for module, kind, training, tables in modules:
                module.__class__ = kind  # a parametrised module has a class of its own
                module.training = training
                for name, entries in tables.items():
                    own = getattr(module, name)
                    own.clear()
                    own.update(entries)
            with torch.no_grad():
                for name, tensor in live.items():
                    dtype, device = data[name]
                    if tensor.dtype != dtype or tensor.device != device:
                        tensor.grad = None
                        tensor.data = saved[name].to(device, copy=True)
                    else:
                        tensor.copy_(saved[name])
            for p, grad, flag in parameters:
                p.grad = grad
                p.requires_grad_(flag)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back, also when an exception passes through."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(getattr(module, name)) for name in _TABLES if hasattr(module, name)}


def freeze_norm_statistics(model: nn.Module) -> None:
    """Put every normalisation layer that keeps running statistics into eval mode, dropout aside."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
