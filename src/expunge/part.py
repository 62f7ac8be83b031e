"""Base of all configurable parts: frozen, validated, serialisable, strict about unknown keys."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from expunge.errors import ConfigError, did_you_mean
from expunge.registry import Info, Kind, registry

#: How pydantic calls the branch of a union in the place of a problem.
_BRANCH = re.compile(r"(literal|dict|list|tuple|union|function-\w+)\[")


def explain(error: ValidationError, model: type[BaseModel] | None, where: str) -> str:
    """Turn pydantic's report into one line per problem, with the closest valid key for unknown ones."""
    lines: list[str] = []
    either: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors(include_url=False):
        loc = [str(x) for x in problem["loc"] if not _BRANCH.match(str(x))]
        path = ".".join([where, *loc] if where else loc)
        if problem["type"] == "extra_forbidden":
            fields = list(model.model_fields) if model is not None and len(problem["loc"]) == 1 else []
            lines.append(f"unknown key '{path}'{did_you_mean(str(problem['loc'][-1]), fields)}")
        elif len(loc) < len(problem["loc"]):
            either.setdefault((path, repr(problem.get("input"))), []).append(problem["msg"])
        else:
            lines.append(f"'{path}': {problem['msg']} (got {problem.get('input')!r})"[:400])
    for (path, given), wanted in either.items():
        lines.append(f"'{path}': {', or '.join(dict.fromkeys(wanted))} (got {given})"[:400])
    return "; ".join(lines)


class Frozen(BaseModel):
    """Immutable settings; any unknown key is an error that suggests the right one."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), type(self).__name__)) from None


class Part(Frozen):
    """A registered part. Subclasses are final: register them with :func:`part`."""

    kind_of_part: ClassVar[Kind]
    part_name: ClassVar[str] = ""
    info: ClassVar[Info]

    def describe(self) -> dict[str, Any]:
        """Return ``{"kind": name, **fields}``, the form used in configs and manifests."""
        return {"kind": self.part_name, **self.model_dump(mode="json")}

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Build a part of this kind from a name, a ``{"kind": ..., ...}`` mapping or an instance.

        Raises:
            ConfigError: Unknown name or key, or a value of the wrong type or range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict) or "kind" not in value:
            raise ConfigError(f"a {cls.kind_of_part} is a name or a mapping with the key 'kind', got {value!r}")
        fields = {k: v for k, v in value.items() if k != "kind"}
        return registry.get(cls.kind_of_part, str(value["kind"])).obj(**fields)


def part(name: str, info: Info) -> Any:
    """Class decorator: name a :class:`Part` and register it."""

    def add(cls: type[Part]) -> type[Part]:
        cls.part_name, cls.info = name, info
        return registry.register(cls.kind_of_part, name, info)(cls)

    return add
