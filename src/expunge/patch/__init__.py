"""Patches: what every method returns."""

from expunge.patch.apply import applied, apply, base_state, revert, settle, stack
from expunge.patch.changes import Change, Dense, LowRank, Replace, Sparse
from expunge.patch.patch import Manifest, Patch

__all__ = [
    "Change",
    "Dense",
    "LowRank",
    "Manifest",
    "Patch",
    "Replace",
    "Sparse",
    "applied",
    "apply",
    "base_state",
    "revert",
    "settle",
    "stack",
]
