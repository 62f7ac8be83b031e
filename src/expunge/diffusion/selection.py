"""The matrices that SRS-ME changes: keys and values of cross-attention, the only layers that see nothing but the text.

Everything goes by the names of diffusers' ``UNet2DConditionModel``; tensors may lie on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from expunge.errors import CapabilityError, RequestError

#: Suffixes of the projections that read the text states.
KEY, VALUE = "attn2.to_k", "attn2.to_v"


@dataclass(frozen=True)
class Matrix:
    """Shape of one projection of the text states.

    Args:
        rows: Width of the attention block.
        columns: Width of the text states.
    """

    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def key_value_modules(unet: nn.Module) -> dict[str, nn.Linear]:
    """The key and value projections of every cross-attention block, by module name, in the model's order.

    Raises:
        RequestError: The model has none.
        CapabilityError: One of them is no plain Linear layer (an adapter or a fused projection is in the way), or they
            read states of different widths: then some of them attend to the image.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if not f".{name}".endswith((f".{KEY}", f".{VALUE}")):
            continue
        if type(module) is not nn.Linear:
            raise CapabilityError(
                f"'{name}' is a {type(module).__name__}, not a plain Linear layer; merge or unload adapters first"
            )
        found[name] = module
        block = unet.get_submodule(name.rpartition(".")[0])
        if getattr(block, "fused_projections", False):
            raise CapabilityError(f"'{name}' is fused with its neighbour; call unfuse_qkv_projections() first")
    if not found:
        raise RequestError(f"no cross-attention key or value projection in this {type(unet).__name__}")
    widths = {m.in_features: n for n, m in found.items()}
    if len(widths) > 1:
        where = ", ".join(f"'{n}' reads {w}" for w, n in sorted(widths.items()))
        raise CapabilityError(f"the cross-attention blocks read states of different widths: {where}")
    return found


def key_value(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of :func:`key_value_modules`, by parameter name: the layers called II in the paper (section 1).

    Stable Diffusion 1.x has 32 of them with 19,169,280 weights. Errors as there.
    """
    return {f"{n}.weight": m.get_parameter("weight") for n, m in key_value_modules(unet).items()}


def cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the cross-attention blocks, biases included: what the irreversible variant trains.

    Stable Diffusion 1.x has 80 of them with 43,962,560 weights.

    Raises:
        RequestError: The model has none.
    """
    found = {n: p for n, p in unet.named_parameters() if "attn2" in n.split(".")}
    if not found:
        raise RequestError(f"no cross-attention parameter in this {type(unet).__name__}")
    return found


def matrices(parameters: Mapping[str, nn.Parameter]) -> dict[str, Matrix]:
    """Shapes of weights.

    Raises:
        RequestError: One of them is no matrix.
    """
    odd = {n: list(p.shape) for n, p in parameters.items() if p.ndim != 2}
    if odd:
        name, shape = next(iter(odd.items()))
        raise RequestError(f"'{name}' has shape {shape}; a shift of K and V needs matrices")
    return {n: Matrix(*p.shape) for n, p in parameters.items()}


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of weights."""
    return sum(p.numel() for p in parameters)
