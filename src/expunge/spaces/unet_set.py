"""The tensors of a U-Net that a concept eraser trains, by the names their repositories use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import field_validator
from torch import nn

from expunge.context import Context
from expunge.diffusion.parameter_sets import parameter_set, select
from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.part import part
from expunge.registry import Info
from expunge.spaces.base import DirectSpace, OpenSpace, Space

#: Short names.
SHORT: Mapping[str, str] = MappingProxyType(
    {
        "x": "esd-x",
        "x-strict": "esd-x-strict",
        "strict": "esd-x-strict",
        "u": "esd-u",
        "all": "esd-all",
        "kv": "cross-attn",
        "every": "full-weight",
    }
)


def named(parameters: str) -> str:
    """The full name of a set.

    Raises:
        ConfigError: There is no such set.
    """
    full = SHORT.get(parameters, parameters)
    try:
        parameter_set(full)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    return full


def unet_parameters(model: nn.Module, unet: nn.Module, name: str, *, sdxl: bool = False) -> dict[str, nn.Parameter]:
    """The parameters of a set under the names they have in the whole model.

    Args:
        model: What is edited; the U-Net is a part of it.
        unet: The U-Net.
        name: A name of :data:`SHORT` or of :mod:`expunge.diffusion.parameter_sets`.
        sdxl: Narrow ``u`` and ``all`` as ESD's script for SDXL does.

    Raises:
        RequestError: Nothing in this U-Net fits the set.
    """
    chosen = {id(unet.get_parameter(n)) for n in select(unet, named(name), sdxl=sdxl)}
    return {n: p for n, p in model.named_parameters() if id(p) in chosen}


@part(
    "unet_set",
    Info(
        "Only a named set of the U-Net's tensors may change: x, x-strict, u, all, selfattn, kv, attn, full-weight ...",
        paper="Gandikota et al., ESD, ICCV 2023; Kumari et al., Ablating Concepts, ICCV 2023",
        needs=("diffusion",),
        deviations=("a name that fits nothing is an error; the public scripts go on with an empty list",),
    ),
)
class UNetSet(Space):
    """A named set of parameters, see :data:`expunge.diffusion.parameter_sets.SETS`.

    Args:
        parameters: ``x`` (cross-attention), ``x-strict`` or ``kv`` (its keys and values), ``u`` (Linear and Conv2d
            outside cross-attention), ``all`` (all Linear and Conv2d), ``selfattn``, ``attn``, ``cross-attn-all``,
            ``full-weight`` (norms too), or another name of the public repositories.
        sdxl: Narrow ``u`` and ``all`` as ESD's script for SDXL does.
    """

    parameters: str = "x"
    sdxl: bool = False

    @field_validator("parameters")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            named(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """The set.

        Raises:
            CapabilityError: The task has no U-Net.
            RequestError: Nothing in this U-Net fits the set.
        """
        unet = getattr(ctx.task, "unet", None)
        if not isinstance(unet, nn.Module):
            raise CapabilityError(f"the space 'unet_set' needs a U-Net; the {ctx.task.name} task has none")
        return unet_parameters(ctx.model, unet, self.parameters, sdxl=self.sdxl)

    def open(self, ctx: Context) -> OpenSpace:
        """Open on the set."""
        return DirectSpace(self.masters(ctx))
