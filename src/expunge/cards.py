"""Method cards, metric list and compatibility matrix, written from the registry: ``python -m expunge.cards [--check]``.

The files are never edited by hand. With ``--check`` nothing is written; the exit code is 1 if a file is missing, stale
or left over.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from expunge.files import atomic_write
from expunge.method import build_recipe, settings_model
from expunge.metrics.describe import ARROWS
from expunge.part import Part
from expunge.recipe import Optim, Recipe
from expunge.registry import Entry, Kind, registry

#: Kinds that have a card each, with the heading of the index.
CARDED: dict[Kind, str] = {
    "method": "Methods",
    "objective": "Objectives",
    "edit": "Edits",
    "space": "Spaces",
    "protection": "Protections",
    "task": "Tasks",
}
#: What every task has: roles of its split, and the two functions of the base class.
ALWAYS = frozenset({"forget", "retain", "test", "loss", "predict"})
_MADE = "<!-- Written by `python -m expunge.cards` from the registry. Change the source instead. -->"
_LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}
_ARG = re.compile(r"^ {4}(\w+): (.*)$")


def pages() -> dict[str, str]:
    """Every generated file: path below ``docs/`` to its text."""
    found = {f"methods/{card_name(e)}.md": card(e) for kind in CARDED for e in registry.list(kind)}
    return {**found, "methods/README.md": _index(), "metrics.md": _metrics(), "compatibility.md": _matrix()}


def card_name(entry: Entry) -> str:
    """File name of a card without suffix: methods by name, other parts as ``kind-name``."""
    return entry.name if entry.kind == "method" else f"{entry.kind}-{entry.name}"


def card(entry: Entry) -> str:
    """The card of one method or part, as Markdown."""
    info, (prose, meanings) = entry.info, split_docstring(inspect.getdoc(entry.obj) or "")
    facts = [
        ("Kind", entry.kind),
        ("Also called", ", ".join(info.aliases)),
        ("Needs", _codes(sorted(needs(entry)))),
        ("Paper", info.paper),
        ("Reference code", f"{info.upstream} @ `{info.commit}`" if info.commit else info.upstream),
    ]
    lines = [_MADE, f"# {entry.name}", "", info.summary, "", *_table(("", ""), [f for f in facts if f[1]])]
    if prose:
        lines += ["", "## What it computes", "", prose]
    if entry.kind == "method":
        lines += ["", "## What it is made of", "", *_composition(build_recipe(entry.name))]
    rows = [
        (f"`{n}`", t, f"`{d}`" if d not in ("", "required") else d, meanings.get(n, "")) for n, t, d in _settings(entry)
    ]
    if rows:
        lines += ["", "## Settings", "", *_table(("Name", "Type", "Default", "Meaning"), rows)]
    if info.deviations:
        lines += ["", "## Where it differs from the paper or its code", "", *[f"* {d}" for d in info.deviations]]
    if entry.kind == "method":
        python = f'expunge.build_recipe("{entry.name}")'
        lines += ["", "## Use", "", f"In Python `{python}`, in a configuration `recipe: {{method: {entry.name}}}`."]
    return "\n".join(lines) + "\n"


def needs(entry: Entry) -> frozenset[str]:
    """Roles and capabilities that a method (with its default settings) or part needs."""
    own = frozenset(entry.info.needs)
    return own | build_recipe(entry.name).needs() if entry.kind == "method" else own


def fits(entry: Entry, task: type[Any]) -> str:
    """Matrix cell: ``yes``, ``if given: ...`` for what a task has only with more data, or ``no: ...``."""
    missing = needs(entry) - ALWAYS - frozenset(task.capabilities)
    optional = frozenset(getattr(task, "optional_capabilities", ()))
    if missing - optional:
        return "no: " + ", ".join(sorted(missing - optional))
    return "if given: " + ", ".join(sorted(missing)) if missing else "yes"


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    r"""Separate the prose of a Google-style docstring from the meanings of its arguments.

    >>> split_docstring("Short.\n\nArgs:\n    keep: A share.\n        More.\n\nRaises:\n    X: never.")
    ('Short.', {'keep': 'A share. More.'})
    """
    prose: list[str] = []
    meanings: dict[str, str] = {}
    section, current = "", ""
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Example|Deviates):", line):
            section = line[:-1]
            prose += [f"**{section}.**"] if section == "Deviates" else []
            continue
        if line and not line.startswith(" "):
            section = ""
        if section in ("Args", "Attributes"):
            hit = _ARG.match(line)
            if hit:
                current = hit[1]
                meanings[current] = hit[2].strip()
            elif line.strip() and current:
                meanings[current] += " " + line.strip()
        elif section in ("", "Deviates"):
            prose.append(line.strip() if section else line)
    return _plain("\n".join(prose)).strip(), {k: _plain(v) for k, v in meanings.items()}


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\n{3,}", "\n\n", text)


def _settings(entry: Entry) -> list[tuple[str, str, str]]:
    if entry.kind == "method":
        return [_field(n, f) for n, f in settings_model(entry.name).model_fields.items()]
    if issubclass(entry.obj, Part):
        return [_field(n, f) for n, f in entry.obj.model_fields.items()]
    parameters = list(inspect.signature(entry.obj).parameters.values())
    empty = inspect.Parameter.empty
    return [(p.name, _cell(p.annotation), "" if p.default is empty else show(p.default)) for p in parameters]


def _field(name: str, field: FieldInfo) -> tuple[str, str, str]:
    default = field.get_default(call_default_factory=True)
    limits = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in _LIMITS.items() if hasattr(m, key)]
    kind = ", ".join([type_text(field.annotation), *limits])
    return name, _cell(kind), "required" if default is PydanticUndefined else show(default)


def type_text(kind: Any) -> str:
    """A type as a reader writes it.

    >>> type_text(Literal["a", "b"] | None), type_text(tuple[str, ...]), type_text(float)
    ('"a" or "b" or None', 'tuple of str', 'float')
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_text(args[0])
    if origin is Literal:
        return " or ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin in (Union, UnionType):
        return " or ".join(type_text(a) for a in args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"tuple of {type_text(args[0])}"
    if origin is not None:
        return f"{origin.__name__} of {', '.join(type_text(a) for a in args)}"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def show(value: Any) -> str:
    """A default as code; settings objects show only what differs from their own defaults."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        given = {n: getattr(value, n) for n, f in fields.items() if f.default != getattr(value, n)}
        return f"{type(value).__name__}({', '.join(f'{n}={show(v)}' for n, v in given.items())})"
    return repr(value).replace("'", '"')


def _composition(recipe: Recipe) -> list[str]:
    rows = []
    for label, parts in (
        ("Objective", [recipe.objective]),
        ("Edit", [recipe.edit]),
        ("Space", [recipe.space]),
        ("Protections", list(recipe.protections)),
    ):
        shown = [f"[`{show(p)}`]({p.kind_of_part}-{p.part_name}.md)" for p in parts if p is not None]
        rows += [(label, ", ".join(shown))] if shown else []
    if recipe.objective is not None:
        rows += [("Schedule", f"`{show(recipe.objective.schedule)}`"), ("Optimiser", _optimiser(recipe.optim))]
    if recipe.from_scratch:
        rows += [("Start", "a fresh initialisation, not the original weights")]
    return _table(("", "With default settings"), rows)


def _optimiser(optim: Optim) -> str:
    plain = {n: getattr(optim, n) for n, f in Optim.model_fields.items() if getattr(optim, n) != f.default}
    rest = [f"{n}={show(v)}" for n, v in plain.items() if n not in ("name", "lr", "epochs")]
    return "`" + ", ".join([optim.name, f"lr={optim.lr:g}", f"epochs={optim.epochs}", *rest]) + "`"


def _index() -> str:
    lines = [_MADE, "# Methods and parts", "", "A method is a named recipe: an objective (or an edit), a space and"]
    lines += ["protections. See [the compatibility matrix](../compatibility.md) and [the metrics](../metrics.md)."]
    for kind, heading in CARDED.items():
        rows = [(f"[{e.name}]({card_name(e)}.md)", e.info.summary, e.info.paper) for e in registry.list(kind)]
        if rows:
            lines += ["", f"## {heading}", "", *_table(("Name", "What it does", "Paper"), rows)]
    return "\n".join(lines) + "\n"


def _matrix() -> str:
    tasks = registry.list("task")
    lines = [_MADE, "# What works with what", ""]
    lines += [
        "*yes*: the task has everything that the part needs. *if given*: it has, once the named data are supplied."
    ]
    lines += ["*no*: refused before any work, with the missing capability named."]
    for kind in ("method", "objective", "edit", "space", "protection"):
        rows = [
            (f"[{e.name}](methods/{card_name(e)}.md)", _codes(sorted(needs(e))), *[fits(e, t.obj) for t in tasks])
            for e in registry.list(kind)
        ]
        if rows:
            lines += ["", f"## {CARDED[kind]}", "", *_table(("", "Needs", *[t.name for t in tasks]), rows)]
    return "\n".join(lines) + "\n"


def _metrics() -> str:
    lines = [
        _MADE,
        "# Metrics",
        "",
        "Definitions as reports store them. For how to read them see [evidence](evidence.md).",
    ]
    for entry in registry.list("metric"):
        m, info = entry.obj, entry.info
        low, high = (("" if b is None else f"{b:g}") for b in m.bounds)
        facts = [
            ("Key", f"`{m.name}`, definition {m.version}"),
            ("Unit", m.unit),
            ("Reading", ARROWS[m.direction]),
            ("Bounds", f"{low or '−∞'} to {high or '∞'}"),
            ("Computed from", _codes(m.needs)),
            ("Paper", info.paper),
            ("Reference code", f"{info.upstream} @ `{info.commit}`" if info.commit else ""),
            ("Deviates", " ".join(info.deviations)),
        ]
        rows = [f for f in facts if f[1]]
        lines += ["", f"## {m.label}", "", f"{info.summary} {m.explain}", "", *_table(("", ""), rows)]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    made = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return made + ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]


def _cell(text: Any) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", str(text)).replace("\n", " ")


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def stale(docs: Path) -> list[str]:
    """Generated files that are missing, differ, or belong to nothing that is registered any more."""
    wanted = pages()
    wrong = [n for n, text in wanted.items() if not (docs / n).is_file() or (docs / n).read_text("utf-8") != text]
    left = [f"methods/{p.name}" for p in sorted((docs / "methods").glob("*.md")) if f"methods/{p.name}" not in wanted]
    return wrong + left


def write(docs: Path) -> list[str]:
    """Bring every generated file up to date and remove left-over cards; return what was touched."""
    changed, wanted = stale(docs), pages()
    for name in changed:
        if name in wanted:
            atomic_write(docs / name, wanted[name])
        else:
            (docs / name).unlink()
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expunge.cards", description="Write the generated pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages (default: docs)")
    options = parser.parse_args(arguments)
    found = stale(options.docs) if options.check else write(options.docs)
    word = "out of date" if options.check else "written"
    sys.stdout.write("".join(f"{word}: {options.docs / name}\n" for name in found))
    if found and options.check:
        sys.stdout.write("run `make docs`\n")
    return int(bool(found) and options.check)


if __name__ == "__main__":
    sys.exit(main())
