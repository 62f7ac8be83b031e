"""The command line: a thin skin over the library. Every expected error is one line and an exit code."""

from __future__ import annotations

from expunge.cli.app import app, main
from expunge.cli.commands import (
    analyze,
    ask,
    catalog,
    data,
    erase,
    evidence,
    generate,
    judge,
    patches,
    plan,
    prompts,
    runs,
    transfer,
)

__all__ = [
    "analyze",
    "app",
    "ask",
    "catalog",
    "data",
    "erase",
    "evidence",
    "generate",
    "judge",
    "main",
    "patches",
    "plan",
    "prompts",
    "runs",
    "transfer",
]
