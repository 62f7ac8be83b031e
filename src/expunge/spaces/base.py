"""Spaces: where a change may live. They project weights, not only gradients."""

from __future__ import annotations

import fnmatch
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.context import Context
from expunge.digest import named_tensors
from expunge.errors import RequestError, did_you_mean
from expunge.part import Part
from expunge.patch.changes import Change, accumulate_dtype, smallest
from expunge.registry import Kind
from expunge.restore import snapshot


class OpenSpace(ABC):
    """A space opened on a model for one run.

    Attributes:
        parameters: What the optimiser moves, by name.
        base: Copies of every tensor that may change, taken before the run.
    """

    parameters: dict[str, nn.Parameter]
    base: dict[str, Tensor]

    def mask(self, name: str) -> Tensor | None:
        """Bool mask of the elements of a parameter that may change; ``None`` means all."""
        return None

    def before_step(self) -> None:  # noqa: B027
        """Called after the backward pass, before clipping and the optimiser's step."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called after the optimiser's step: project the weights back into the space."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint beyond the parameters."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what :meth:`state` returned."""

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """The difference to the base as changes of the model's own tensors."""

    def close(self) -> None:  # noqa: B027
        """Remove whatever the space attached to the model; called also when the run fails."""


class DirectSpace(OpenSpace):
    """A space whose parameters are the model's own: the difference is read off at the end."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.base = {n: snapshot(p) for n, p in parameters.items()}

    def changes(self) -> dict[str, Change]:
        """``new - base`` per parameter, rounded to its precision, in the smallest form.

        Where a weight changes by more than half its size, base plus difference may miss the trained value by one unit
        in the last place of the base. The patch, not the loop's last state, is what is evaluated and shipped.
        """
        found = {}
        for name, parameter in self.parameters.items():
            acc = accumulate_dtype(parameter.dtype)
            change = smallest(parameter.detach().to(acc) - self.base[name].to(acc))
            if change is not None:
                found[name] = change
        return found


class Space(Part):
    """Settings of a space; :meth:`open` makes it work on a model."""

    kind_of_part: ClassVar[Kind] = "space"

    def masters(self, ctx: Context) -> Mapping[str, nn.Parameter] | None:
        """The model's own parameters that this space needs in float32 where a run computes in half precision.

        Those that it moves, and those that :meth:`open` takes figures of. ``None`` (not known) means all.

        Raises:
            RequestError: A selector matches nothing.
        """
        del ctx
        return None

    @abstractmethod
    def open(self, ctx: Context) -> OpenSpace:
        """Attach to the model of the context.

        Raises:
            RequestError: A selector matches nothing.
        """


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters whose name, or whose module's name, matches a glob pattern, each tied tensor once.

    ``fc`` selects ``fc.weight`` and ``fc.bias``; ``layer3.*`` everything below; ``*.bias`` all biases. A tied tensor
    selected under some of its names only is a warning that gives the others.

    Raises:
        RequestError: A pattern matches no parameter; close names are suggested.
    """
    tensors, aliases = named_tensors(model)
    own = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    chosen: dict[str, nn.Parameter] = {}
    named: dict[str, set[str]] = {}
    for pattern in patterns:
        hits = {}
        for name, parameter in own.items():
            matched = {n for n in (name, *aliases.get(name, ())) if _matches(n, pattern)}
            if matched:
                hits[name] = parameter
                named.setdefault(name, set()).update(matched)
        if not hits:
            modules = sorted({n.rpartition(".")[0] for n in own} | set(own))
            raise RequestError(f"'{pattern}' matches none of {len(own)} parameters{did_you_mean(pattern, modules)}")
        chosen.update(hits)
    for name, matched in named.items():
        others = {name, *aliases.get(name, ())} - matched
        if others:
            warnings.warn(
                f"'{sorted(matched)[0]}' is shared with {', '.join(sorted(others))}: they change together", stacklevel=2
            )
    return {n: p for n, p in own.items() if n in chosen}


def editable(ctx: Context, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """:func:`select_parameters`, where ``*`` alone stands for the network that predicts.

    Of a pipeline that is the U-Net: its text encoders change only if they are named, as in ``text_encoder.*``.
    """
    unet = getattr(ctx.task, "unet", None)
    if tuple(patterns) == ("*",) and unet is not None and unet is not ctx.model:
        patterns = [f"{name}.*" for name, module in ctx.model.named_children() if module is unet]
    return select_parameters(ctx.model, patterns)


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(p, pattern) for p in prefixes)
