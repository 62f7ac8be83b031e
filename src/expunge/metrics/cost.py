"""What forgetting cost: run time, weights changed, bytes of the patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import ArtifactError, DataError
from expunge.metrics.describe import metric
from expunge.metrics.estimate import Estimate
from expunge.registry import Info

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerChange:
    """How much one tensor changed: ``changed`` of ``total`` elements, ``relative`` = |after - before| / |before|."""

    name: str
    changed: int
    total: int
    relative: float | None


def _bits(x: Tensor) -> Tensor:
    x = x.detach().cpu().contiguous()
    return torch.view_as_real(x).view(torch.int32) if x.is_complex() else x.view(_BITS[x.element_size()])


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[LayerChange]:
    """Compare two sets of weights bit by bit (-0.0 differs from 0.0).

    Raises:
        ArtifactError: Names, shapes or types differ.
    """
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise ArtifactError(f"weights: {len(odd)} tensors are in only one of the two models: {', '.join(odd[:5])}")
    changes = []
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ArtifactError(f"weights: {name} is {old.dtype} {tuple(old.shape)} and {new.dtype} {tuple(new.shape)}")
        changed = int((_bits(old) != _bits(new)).sum()) if old.numel() else 0
        relative = None
        if old.is_floating_point() and float(old.detach().double().norm()) > 0:
            base = old.detach().cpu().double()
            relative = float((new.detach().cpu().double() - base).norm() / base.norm())
        changes.append(LayerChange(name, changed, old.numel(), relative))
    return changes


@metric(
    "weights_changed",
    Info("Share of weights that differ from the base model, bit for bit.", needs=("weights",)),
    label="Weights changed",
    explain="Share of the model's numbers that the patch changes at all. All others are unchanged, bit for bit.",
    direction="lower",
)
def weights_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Estimate:
    """Share of elements that differ in at least one bit, percent; an exact count, so no interval."""
    changes = layer_changes(before, after)
    total = sum(c.total for c in changes)
    if total == 0:
        raise DataError("weights: the model has none")
    return Estimate(100 * sum(c.changed for c in changes) / total, n=total, unit="%", method="exact count")


@metric(
    "patch_bytes",
    Info("Size of the patch file.", needs=("patch",)),
    label="Patch size",
    explain="Size of the file that turns the original model into the changed one.",
    unit="bytes",
    direction="lower",
    bounds=(0.0, None),
)
def patch_bytes(path: str | Path) -> Estimate:
    """Size of the patch file in bytes.

    Raises:
        ArtifactError: The file is missing.
    """
    try:
        return Estimate(Path(path).stat().st_size, unit="bytes", method="file size")
    except OSError as error:
        raise ArtifactError(f"patch {Path(path).name!r} cannot be read: {error.strerror}") from None


@metric(
    "run_time",
    Info("Wall-clock time of forgetting.", needs=("history",)),
    label="Run time",
    explain="Time that forgetting took on this machine, preparation (such as the weight mask) included. "
    "Compare it only with times from the same machine.",
    unit="s",
    direction="lower",
    bounds=(0.0, None),
)
def run_time(seconds: float, *, preparation: float = 0.0) -> Estimate:
    """Wall-clock seconds of the run plus its preparation.

    Raises:
        DataError: Negative time.
    """
    if seconds < 0 or preparation < 0:
        raise DataError(f"run time: {seconds} s and {preparation} s of preparation; neither can be negative")
    note = f"of which {preparation:.1f} s preparation" if preparation else ""
    return Estimate(seconds + preparation, n=1, unit="s", method="wall clock", note=note)
