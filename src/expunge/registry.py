"""One registry for every part: methods, objectives, spaces, protections, edits, metrics, tasks.

Cards, the compatibility matrix, the command line's lists and the contract tests are generated from it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from expunge.errors import ConfigError, did_you_mean

Kind = Literal["method", "objective", "space", "protection", "edit", "metric", "task"]
KINDS: tuple[Kind, ...] = ("method", "objective", "space", "protection", "edit", "metric", "task")

#: Packages whose modules register parts when imported. A method's file may also hold parts that only it uses.
HOMES: dict[Kind, tuple[str, ...]] = {
    "method": ("expunge.methods",),
    "objective": ("expunge.objectives", "expunge.methods"),
    "space": ("expunge.spaces", "expunge.methods"),
    "protection": ("expunge.protections",),
    "edit": ("expunge.edits", "expunge.methods"),
    "metric": ("expunge.metrics",),
    "task": ("expunge.tasks",),
}

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
T = TypeVar("T")


@dataclass(frozen=True)
class Info:
    """What a card says about a part, and what it needs to run.

    Args:
        summary: One sentence.
        paper: Citation, empty for generic parts.
        upstream: Repository of the reference implementation.
        commit: Commit that golden numbers were recorded from.
        needs: Data roles and task capabilities: ``forget``, ``retain``, ``surrogate``, ``features`` ...
        deviations: Where the part differs from the paper or its code, one sentence each.
        aliases: Other names in use in the field.
    """

    summary: str
    paper: str = ""
    upstream: str = ""
    commit: str = ""
    needs: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A registered part: its kind, name, Python object and Info."""

    kind: Kind
    name: str
    obj: Any
    info: Info


@dataclass
class Registry:
    """Names to parts. Bad or repeated names are refused when the module that registers them is imported."""

    entries: dict[tuple[Kind, str], Entry] = field(default_factory=dict)
    _loaded: set[Kind] = field(default_factory=set)

    def register(self, kind: Kind, name: str, info: Info) -> Callable[[T], T]:
        """Class or function decorator that adds a part.

        Raises:
            ConfigError: The name is malformed or taken.
        """
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of part {kind!r}{did_you_mean(kind, KINDS)}")
        if not _NAME.match(name):
            raise ConfigError(f"{kind} name {name!r} must be lower_snake_case")
        if not info.summary.strip():
            raise ConfigError(f"{kind} {name!r} needs a summary")

        def add(obj: T) -> T:
            taken = self.entries.get((kind, name))
            if taken is not None and getattr(taken.obj, "__qualname__", None) != getattr(obj, "__qualname__", None):
                raise ConfigError(f"{kind} {name!r} is already registered by {taken.obj!r}")
            self.entries[(kind, name)] = Entry(kind, name, obj, info)
            return obj

        return add

    def load(self, kind: Kind) -> None:
        """Import the built-in modules of one kind (once)."""
        if kind in self._loaded:
            return
        self._loaded.add(kind)
        for home in HOMES[kind]:
            for module in pkgutil.iter_modules(importlib.import_module(home).__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{home}.{module.name}")

    def get(self, kind: Kind, name: str) -> Entry:
        """Look a part up by name.

        Raises:
            ConfigError: No such part; the message names close matches.
        """
        self.load(kind)
        if (kind, name) in self.entries:
            return self.entries[(kind, name)]
        for entry in self.list(kind):
            if name in entry.info.aliases:
                return entry
        raise ConfigError(f"no {kind} is called {name!r}{did_you_mean(name, [e.name for e in self.list(kind)])}")

    def list(self, kind: Kind) -> list[Entry]:
        """All parts of one kind, sorted by name."""
        self.load(kind)
        return sorted((e for (k, _), e in self.entries.items() if k == kind), key=lambda e: e.name)

    def __iter__(self) -> Iterator[Entry]:
        for kind in KINDS:
            yield from self.list(kind)


registry = Registry()
