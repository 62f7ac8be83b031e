"""What a metric means: direction, bounds, unit, needs and a plain explanation, registered beside its function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from expunge.errors import ConfigError
from expunge.registry import Info, registry

Direction = Literal["higher", "lower", "reference"]
ARROWS: dict[str, str] = {
    "higher": "higher is better",
    "lower": "lower is better",
    "reference": "closer to the retrained model is better",
}

#: Figures of classifiers that the judge's own stand for, where images are drawn and judged.
_OF_CLASSIFIERS = frozenset({"ua", "ta", "aus"})


def shown(names: Iterable[str]) -> list[str]:
    """Of measured figures those that a table has, in order: each thing once."""
    found = list(names)
    return [n for n in found if n not in _OF_CLASSIFIERS] if "gen_ua" in found else found


@dataclass(frozen=True)
class Metric:
    """A registered metric; calling it calls its function.

    Args:
        name: Registered name, the key used in reports.
        label: Short name shown to people.
        unit: Unit of the value.
        direction: Which way is better; ``"reference"`` means close to a model that never saw the data.
        bounds: Smallest and largest possible value (None: unbounded).
        needs: Data roles or extras it is computed from.
        explain: One or two sentences for a reader who has never met the metric.
        version: Raised when the definition changes; reports with different versions are not compared.
        function: The pure function.
    """

    name: str
    label: str
    unit: str
    direction: Direction
    bounds: tuple[float | None, float | None]
    needs: tuple[str, ...]
    explain: str
    version: int
    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def definition(self) -> dict[str, Any]:
        """What a report stores about the metric, so that it stays readable without the library."""
        return {
            "label": self.label,
            "unit": self.unit,
            "direction": self.direction,
            "explain": self.explain,
            "version": self.version,
        }


def metric(
    name: str,
    info: Info,
    *,
    label: str,
    explain: str,
    unit: str = "%",
    direction: Direction = "reference",
    bounds: tuple[float | None, float | None] = (0.0, 100.0),
    version: int = 1,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a pure function as a metric and return it unchanged.

    Raises:
        ConfigError: The name is malformed or taken by another function.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        taken = registry.entries.get(("metric", name))
        if taken is not None and taken.obj.function.__qualname__ != function.__qualname__:
            raise ConfigError(f"metric {name!r} is already registered by {taken.obj.function.__qualname__}")
        described = Metric(name, label, unit, direction, bounds, info.needs, explain, version, function)
        registry.register("metric", name, info)(described)
        return function

    return add


def definitions(names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Definitions of the registered metrics, or of the named ones that are registered."""
    known = {e.name: e.obj.definition() for e in registry.list("metric")}
    return known if names is None else {n: known[n] for n in names if n in known}
