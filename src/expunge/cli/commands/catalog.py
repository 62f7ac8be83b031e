"""``list`` and ``schema``: what there is."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.app import app

if TYPE_CHECKING:
    from expunge.registry import Kind

_KINDS: dict[str, Kind] = {
    "methods": "method",
    "objectives": "objective",
    "spaces": "space",
    "protections": "protection",
    "edits": "edit",
    "metrics": "metric",
    "tasks": "task",
}
_ALL = (*_KINDS, "models", "data", "normalizations")


@app.command(name="list")
def list_command(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=" | ".join(_ALL))] = None,
    pattern: Annotated[str, typer.Argument(help="Names with wildcards: 'deep*'.")] = "*",
) -> None:
    """List parts by kind, with what each needs. A name with wildcards alone searches every kind."""
    from expunge.cli.show import say, table
    from expunge.errors import ConfigError, did_you_mean

    kinds: tuple[str, ...] = _ALL
    if kind is not None and any(c in kind for c in "*?["):
        if pattern != "*":
            raise ConfigError(f"{kind!r}: wildcards go into the name, after the kind")
        pattern = kind
    elif kind is not None:
        singular = {v: k for k, v in _KINDS.items()} | {"model": "models"}
        wanted = singular.get(kind, kind)
        if wanted not in _ALL:
            raise ConfigError(f"nothing is called {kind!r}{did_you_mean(kind, _ALL)}")
        kinds = (wanted,)
    hits = 0
    for name in kinds:
        rows = [r for r in _rows(name, pattern) if fnmatch.fnmatchcase(r[0], pattern)]
        hits += len(rows)
        if rows:
            table(name, ("name", "summary", "needs", "paper"), rows)
    if hits == 0:
        if pattern != "*":
            raise ConfigError(f"no name matches {pattern!r} among {', '.join(kinds)}")
        say(f"no {' or '.join(kinds)} yet")


def _rows(name: str, pattern: str) -> list[tuple[str, str, str, str]]:
    if name == "models":
        from expunge.models import MODEL_NAMES

        own = [(n, "defined here", "", "") for n in MODEL_NAMES]
        return own + (
            _timm(pattern) if pattern.startswith("timm:") else [("timm:NAME", "any image model of timm", "", "")]
        )
    if name == "data":
        from expunge.data.spec import NAMES

        needs = dict.fromkeys(("folder", "parquet", "hub"), "path")
        return [(n, "image data", needs.get(n, ""), "") for n in NAMES]
    if name == "normalizations":
        from expunge.models import MEAN_STD

        return [(n, f"mean {m}, std {s}", "", "") for n, (m, s) in MEAN_STD.items()]
    from expunge.registry import registry

    return [(e.name, e.info.summary, ", ".join(e.info.needs), e.info.paper) for e in registry.list(_KINDS[name])]


def _timm(pattern: str) -> list[tuple[str, str, str, str]]:
    from expunge.models.timm_models import timm_names

    return [(f"timm:{n}", "timm", "", "") for n in timm_names()]


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="run | bench | train")] = "run",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")] = None,
) -> None:
    """Write the JSON schema of a configuration file, for completion and checks in an editor."""
    from expunge.config import json_schema
    from expunge.files import atomic_write

    text = json.dumps(json_schema(kind), indent=1) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        atomic_write(output, text)
        typer.echo(f"written: {output}")
