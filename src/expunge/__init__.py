"""Expunge: make trained models forget, with a patch, the evidence and exact undo."""

from __future__ import annotations

from expunge import _compat

_compat.install()

__version__ = "0.1.0"
