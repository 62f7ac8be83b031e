"""Configuration as text: strict YAML, dotted overrides, and where each value came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from expunge.errors import ConfigError

_MAX_BYTES = 1 << 20
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*\Z")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalar rules of YAML 1.2: ``1e-4`` is a number, ``on`` and ``no`` are words.

    Repeated keys and aliases are errors: a value that silently wins, or a short file that expands without end.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(f"line {mark.line + 1}: aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"line {line}: keys are words, not {str(key)[:60]!r}")
            if key in seen:
                raise ConfigError(f"line {line}: key '{key}' is given twice (first in line {seen[key]})")
            seen[key] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)\Z", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: The document.
        where: File or flag, for messages.

    Raises:
        ConfigError: Malformed, repeated keys, aliases, tags, or nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(f"{where}: {line}not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file: a mapping.

    Raises:
        ConfigError: Missing, too large, not text, or not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes is too large for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is {type(data).__name__}")
    return data


def write_yaml(data: Any) -> str:
    """Write plain values so that :func:`parse_yaml` reads the same values back."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def parse_overrides(tokens: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into positional words and dotted overrides.

    Both ``--a.b value`` and ``--a.b=value`` are understood; values are YAML.

    >>> parse_overrides(["c.yaml", "--recipe.optim.lr", "1e-4", "--seed=3"])
    (['c.yaml'], {'recipe.optim.lr': 0.0001, 'seed': 3})

    Raises:
        ConfigError: A flag without a value, given twice, or malformed.
    """
    words: list[str] = []
    found: dict[str, Any] = {}
    rest = iter(tokens)
    for token in rest:
        if not token.startswith("--"):
            if re.match(r"-[A-Za-z]", token):
                more = "; the folder is --output FOLDER here" if token.startswith("-o") else ""
                raise ConfigError(f"{token!r}: an override is --dotted.key value{more}")
            words.append(token)
            continue
        key, equals, text = token[2:].partition("=")
        if not _KEY.match(key):
            raise ConfigError(f"{token!r}: an override is --dotted.key value")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
            text = following
        if key in found:
            raise ConfigError(f"--{key} is given twice")
        found[key] = parse_yaml(text, f"--{key}")
    return words, found


@dataclass
class Source:
    """Raw settings with the file and the flags that they came from.

    Args:
        data: The merged mapping.
        file: Name of the file, for messages.
        folder: Where relative paths are looked up after the working directory.
        flags: Dotted keys that a flag has set.
    """

    data: dict[str, Any]
    file: str = "configuration"
    folder: Path | None = None
    flags: list[str] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """The flag that set a dotted key (or something inside or around it), else the file."""
        for flag in self.flags:
            if key == flag or key.startswith(flag + ".") or flag.startswith(key + "."):
                return f"--{flag}"
        return self.file


def read_source(path: str | Path, overrides: dict[str, Any] | None = None) -> Source:
    """Read a file and put overrides on top.

    Raises:
        ConfigError: The file is unreadable, or an override does not fit its structure.
    """
    file = Path(path)
    source = Source(read_yaml(file), str(path), file.resolve().parent)
    return with_overrides(source, overrides or {})


def with_overrides(source: Source, overrides: dict[str, Any]) -> Source:
    """A copy with dotted keys replaced, longer keys last, so that the order of flags does not matter."""
    data = deepcopy(source.data)
    for key in sorted(overrides, key=lambda k: (k.count("."), k)):
        _put(data, key.split("."), overrides[key], key)
    return Source(data, source.file, source.folder, [*source.flags, *overrides])


def _put(node: Any, steps: list[str], value: Any, key: str) -> None:
    for i, step in enumerate(steps[:-1]):
        if isinstance(node, list):
            node = node[_position(node, step, key)]
            continue
        inner = node.get(step)
        if inner is None:
            inner = node[step] = {}
        elif isinstance(inner, str) and step in _SHORT:
            inner = node[step] = {_SHORT[step]: inner}
        elif not isinstance(inner, dict | list):
            at = ".".join(steps[: i + 1])
            raise ConfigError(f"--{key}: '{at}' is {inner!r}, which has no keys")
        node = inner
    if isinstance(node, list):
        node[_position(node, steps[-1], key)] = value
    else:
        node[steps[-1]] = value


#: Keys whose text value is short for a mapping: ``recipe: salun`` means ``recipe: {method: salun}``.
_SHORT = {"recipe": "method", "reference": "method", "objective": "kind", "space": "kind", "edit": "kind"}


def _position(items: list[Any], step: str, key: str) -> int:
    if not step.isdigit() or int(step) >= len(items):
        raise ConfigError(f"--{key}: '{step}' is not a position in a list of {len(items)}")
    return int(step)


def resolve_paths(data: Any, keys: Iterable[Sequence[str]], folder: Path | None) -> None:
    """Turn relative paths into existing ones, in place: as given from the working directory, else from ``folder``.

    ``*`` in a key stands for every key at its place.
    """
    if folder is None:
        return
    for steps in keys:
        nodes = [data]
        for step in steps[:-1]:
            below = [n for n in nodes if isinstance(n, dict)]
            nodes = [n.get(key) for n in below for key in (n if step == "*" else (step,))]
        for node in nodes:
            value = node.get(steps[-1]) if isinstance(node, dict) else None
            if not isinstance(value, str) or Path(value).is_absolute() or Path(value).exists():
                continue
            if (folder / value).exists():
                node[steps[-1]] = str((folder / value).resolve())
