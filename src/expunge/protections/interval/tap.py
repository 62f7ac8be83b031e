"""Look at the inputs of chosen layers while a model runs, and leave the model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from expunge.restore import evaluating

Observe = Callable[[str, nn.Module, Tensor], None]


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


class _Enough(BaseException):
    """Every input of this batch has been seen; not an ``Exception``, so that no model swallows it."""


class _Counter:
    """Decides when the rest of a forward pass cannot matter any more.

    The first batch, and then the 2nd, 4th, 8th ..., run to their end and fix how many calls a pass makes; in between
    a pass stops before the last observed layer computes.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.batch, self.calls, self.expected = enabled, 0, 0, -1

    def begin(self) -> None:
        self.batch, self.calls = self.batch + 1, 0

    def called(self) -> None:
        self.calls += 1
        if self.enabled and self.batch & (self.batch - 1) and self.calls == self.expected:
            raise _Enough

    def end(self) -> None:
        if self.expected not in (-1, self.calls):
            self.enabled = False
        self.expected = self.calls


def run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    observe: Observe,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    after_batch: Callable[[], None] | None = None,
    *,
    stop_early: bool = False,
) -> bool:
    """One pass over ``batches`` in evaluation mode, observing the inputs of ``layers``.

    Args:
        model: Put back into its modes afterwards.
        layers: Modules by name.
        observe: Called with name, module and input.
        batches: What to pass.
        forward: Runs the model on one batch.
        after_batch: Called after each.
        stop_early: Leave out what follows the last observed layer, as long as every checked pass makes the same calls.

    Returns:
        False if passes made different numbers of calls although some were cut short: the caller has to start again
        with ``stop_early=False``.
    """
    counter = _Counter(stop_early)

    def observe_and_count(name: str, module: nn.Module, x: Tensor) -> None:
        observe(name, module, x)
        counter.called()

    with evaluating(model), observed(layers, observe_and_count):
        for batch in batches:
            counter.begin()
            with suppress(_Enough):
                forward(batch)
            counter.end()
            if after_batch is not None:
                after_batch()
            if stop_early and not counter.enabled:
                return False
    return True
