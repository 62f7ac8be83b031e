"""Methods: functions from a few named settings to a :class:`Recipe`, registered under the names used in papers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from expunge.errors import ConfigError
from expunge.part import explain
from expunge.recipe import Optim, Recipe
from expunge.registry import Info, registry

MethodFn = Callable[..., Recipe]


def method(name: str, info: Info) -> Callable[[MethodFn], MethodFn]:
    """Register a function with keyword-only, typed, defaulted settings that returns a recipe.

    One of the settings is ``optim: Optim``; in a configuration its fields may be given singly and replace the defaults
    of the method one by one.

    Raises:
        ConfigError: The function takes positional or untyped settings, or settings without a default.
    """

    def add(function: MethodFn) -> MethodFn:
        hints = get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.default is inspect.Parameter.empty:
                raise ConfigError(f"method {name!r}: setting '{parameter.name}' must be keyword-only with a default")
            if parameter.name not in hints:
                raise ConfigError(f"method {name!r}: setting '{parameter.name}' has no type")
        if "optim" not in hints:
            raise ConfigError(f"method {name!r} needs a setting 'optim: Optim'")
        return registry.register("method", name, info)(function)

    return add


@cache
def settings_model(name: str) -> type[BaseModel]:
    """The settings of a method as a pydantic model; ``optim`` holds the fields that replace the method's defaults."""
    function = registry.get("method", name).obj
    hints = get_type_hints(function)
    fields: dict[str, Any] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        fields[key] = (hints[key], parameter.default)
    title = "".join(word.capitalize() for word in name.split("_"))
    return create_model(title, __config__=ConfigDict(extra="forbid", frozen=True), __doc__=function.__doc__, **fields)


def build_recipe(spec: str | dict[str, Any]) -> Recipe:
    """Build a recipe from a method name, or from ``{"method": name, **settings}``, or from a full recipe mapping.

    Raises:
        ConfigError: Unknown method or setting, with the closest names.
    """
    if isinstance(spec, str):
        spec = {"method": spec}
    if "method" not in spec:
        if "objective" in spec or "edit" in spec:
            return Recipe(**{"name": "custom", **spec})
        raise ConfigError("a recipe names a 'method', or spells out 'objective' (or 'edit') and 'space'")
    settings = {k: v for k, v in spec.items() if k != "method"}
    name = registry.get("method", str(spec["method"])).name
    model = settings_model(name)
    given = settings.get("optim")
    if isinstance(given, dict):
        default: Optim = model.model_fields["optim"].default
        settings["optim"] = Optim(**{**default.model_dump(), **given})
    try:
        checked = model(**settings)
    except ValidationError as error:
        raise ConfigError(explain(error, model, f"recipe ({name})")) from None
    function: MethodFn = registry.get("method", name).obj
    return function(**{k: getattr(checked, k) for k in model.model_fields})
