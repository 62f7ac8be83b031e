"""The four ways a tensor can change, and how each is stored.

Additive changes (:class:`Dense`, :class:`Sparse`, :class:`LowRank`) hold ``new - base`` and stack in any order.
:class:`Replace` holds the new tensor itself (integer or statistics buffers) and tolerates no second change.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from expunge.digest import tensor_bytes
from expunge.errors import ArtifactError


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are formed in float32, or float64 where the weights are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """A change of one tensor. Shapes and dtypes are those of the base tensor."""

    kind: ClassVar[str]
    additive: ClassVar[bool] = True

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is changed."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by part name."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The change as a full tensor (``new - base``; for :class:`Replace` the new tensor)."""

    @abstractmethod
    def scale(self, factor: float) -> Change:
        """The change times a factor."""

    def meta(self) -> dict[str, Any]:
        """Facts that the manifest keeps beside the tensors."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass(frozen=True, eq=False)
class Dense(Change):
    """``new - base`` for every element."""

    delta: Tensor
    kind: ClassVar[str] = "dense"

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    @override
    def dense(self) -> Tensor:
        return self.delta

    @override
    def scale(self, factor: float) -> Dense:
        return Dense(self.delta * factor)


@dataclass(frozen=True, eq=False)
class Sparse(Change):
    """``new - base`` at the coordinates of a mask, zero elsewhere.

    Stored as one bit per element, deflated where that is smaller, and the values in row-major order: close to the
    entropy of the mask plus the values themselves.

    Args:
        mask: Bool, shape of the tensor.
        values: ``[mask.sum()]``.
    """

    mask: Tensor
    values: Tensor
    kind: ClassVar[str] = "sparse"

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @cached_property
    def _packed(self) -> Tensor:
        return pack_mask(self.mask)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self._packed, "values": self.values}

    @override
    def dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        out[self.mask.to(out.device)] = self.values
        return out

    @override
    def scale(self, factor: float) -> Sparse:
        return Sparse(self.mask, self.values * factor)


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """``up @ down``, reshaped to the tensor.

    Args:
        up: ``[out, r]``.
        down: ``[r, in * kernel]``.
        full_shape: Shape of the tensor.
    """

    up: Tensor
    down: Tensor
    full_shape: tuple[int, ...]
    kind: ClassVar[str] = "low_rank"

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self.full_shape)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    @override
    def dense(self) -> Tensor:
        acc = accumulate_dtype(self.up.dtype)
        return (self.up.to(acc) @ self.down.to(acc)).reshape(self.full_shape)

    @override
    def scale(self, factor: float) -> LowRank:
        return LowRank(self.up * factor, self.down, self.full_shape)


@dataclass(frozen=True, eq=False)
class Replace(Change):
    """The new tensor itself."""

    new: Tensor
    kind: ClassVar[str] = "replace"
    additive: ClassVar[bool] = False

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self.new.shape)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"new": self.new}

    @override
    def dense(self) -> Tensor:
        return self.new

    @override
    def scale(self, factor: float) -> Replace:
        if factor != 1.0:
            raise ArtifactError(
                "a patch that replaces a tensor cannot be scaled; restrict it to its other tensors first"
            )
        return self


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask to bits, deflated where that is smaller. uint8, first byte 0 = raw, 1 = deflated."""
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little").tobytes()
    small = zlib.compress(bits, 9)
    coded = b"\x01" + small if len(small) < len(bits) else b"\x00" + bits
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_mask`; never inflates beyond the size that ``shape`` implies."""
    numel = int(np.prod(shape, dtype=np.int64))
    expected = (numel + 7) // 8
    raw = bytes(tensor_bytes(packed))
    if not raw or raw[0] > 1:
        raise ArtifactError("a stored mask has an unknown encoding")
    bits = raw[1:]
    if raw[0] == 1:
        try:
            bits = zlib.decompressobj().decompress(raw[1:], expected + 1)
        except zlib.error as error:
            raise ArtifactError(f"a stored mask cannot be inflated: {error}") from None
    if len(bits) != expected:
        raise ArtifactError(f"a stored mask has {len(bits)} bytes where its shape {shape} needs {expected}")
    flat = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=numel, bitorder="little").astype(bool)
    return torch.from_numpy(flat).reshape(shape)


def smallest(delta: Tensor) -> Change | None:
    """The smallest exact form of a difference: ``None`` if it is zero, else :class:`Sparse` or :class:`Dense`."""
    mask = delta != 0
    nonzero = int(mask.sum())
    if nonzero == 0:
        return None
    if nonzero * delta.element_size() + delta.numel() / 8 < delta.numel() * delta.element_size():
        return Sparse(mask.cpu(), delta[mask].cpu())
    return Dense(delta.cpu())


def decode(meta: dict[str, Any], parts: dict[str, Tensor]) -> Change:
    """Rebuild a change from its manifest entry and its stored tensors.

    Raises:
        ArtifactError: A part is missing or does not fit the stated shape.
    """
    shape = tuple(int(n) for n in meta["shape"])
    kind = meta["kind"]
    try:
        if kind == "dense":
            change: Change = Dense(parts["delta"])
        elif kind == "sparse":
            change = Sparse(unpack_mask(parts["mask"], shape), parts["values"])
            if int(change.mask.sum()) != change.values.numel():
                raise ArtifactError("a sparse change has a different number of values than mask bits")
        elif kind == "low_rank":
            change = LowRank(parts["up"], parts["down"], shape)
            rank_fits = change.up.ndim == change.down.ndim == 2 and change.up.shape[1] == change.down.shape[0]
            if not rank_fits or change.up.shape[0] * change.down.shape[1] != int(np.prod(shape)):
                raise ArtifactError("the factors of a low-rank change do not fit its shape")
        elif kind == "replace":
            change = Replace(parts["new"])
        else:
            raise ArtifactError(f"unknown kind of change {kind!r}; this file may come from a newer version")
    except KeyError as error:
        raise ArtifactError(f"a {kind} change lacks its part {error}") from None
    if change.shape != shape:
        raise ArtifactError(f"a {kind} change has shape {change.shape} where the manifest says {shape}")
    return change
