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


def snapshot(tensor: Tensor) -> Tensor:
    """A copy of a tensor, without gradients, that takes memory of its own only once either of the two is written to.

    So what a run never touches exists once, however many parts keep its first value. Where the storage is not torch's
    own (a mapped file, an array of numpy, shared memory) it is a plain copy.
    """
    try:
        lazy: Tensor = torch._lazy_clone(tensor.detach())
    except (AttributeError, NotImplementedError, RuntimeError):
        return tensor.detach().clone()
    return lazy


@contextmanager
def as_found(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the model's tensors as they are, and put everything back on leaving, also when an exception passes through.

    Only tensors that are written to within the block exist twice. Inside it no parameter holds a gradient, so a
    caller's ``.grad`` is never added to. Deliberate changes of the weights happen after the block, through a patch.
    """
    live = named_tensors(model)[0]
    saved = {n: snapshot(t) for n, t in live.items()}
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
                        tensor.data = saved[name].to(device)
                    elif not same_bits(tensor, saved[name]):
                        tensor.copy_(saved[name])
            for p, grad, flag in parameters:
                p.grad = grad
                p.requires_grad_(flag)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type, shape and device hold the same bits; -0.0 is not 0.0."""
    return torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    """A tensor as integers of the same bits, without gradients; integers and truth values as they are."""
    found = tensor.detach()
    if found.dtype.is_complex:
        found = torch.view_as_real(found)
    if not found.dtype.is_floating_point:
        return found
    return found.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[found.element_size()])


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
