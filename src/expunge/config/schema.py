"""JSON schema of the configuration files, so that an editor completes and checks every method's settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, create_model
from pydantic.json_schema import models_json_schema

from expunge.config.models import BenchConfig, RunConfig, TrainConfig
from expunge.errors import ConfigError, did_you_mean
from expunge.method import settings_model
from expunge.recipe import Optim
from expunge.registry import Kind, registry

MODELS: dict[str, type[BaseModel]] = {"run": RunConfig, "bench": BenchConfig, "train": TrainConfig}
_PARTS: tuple[Kind, ...] = ("objective", "edit", "space", "protection")


def json_schema(kind: str = "run") -> dict[str, Any]:
    """Schema (draft 2020-12) of one kind of configuration file.

    ``recipe`` is a method name, a method with its own settings (told apart by ``method``), or parts spelled out.

    Args:
        kind: ``run``, ``bench`` or ``train``.

    Raises:
        ConfigError: Another kind.
    """
    if kind not in MODELS:
        raise ConfigError(f"no configuration is called {kind!r}{did_you_mean(kind, MODELS)}")
    methods = {e.name: _tagged(settings_model(e.name), "method", e.name) for e in registry.list("method")}
    parts = {k: {e.name: _tagged(e.obj, "kind", e.name) for e in registry.list(k)} for k in _PARTS}
    models: list[type[BaseModel]] = [
        MODELS[kind],
        Optim,
        *methods.values(),
        *(m for group in parts.values() for m in group.values()),
    ]
    inputs: list[tuple[type[BaseModel], Literal["validation"]]] = [(m, "validation") for m in models]
    refs, schema = models_json_schema(inputs, ref_template="#/$defs/{model}")
    defs: dict[str, Any] = schema.get("$defs", {})

    def choice(tag: str, group: dict[str, type[BaseModel]]) -> dict[str, Any]:
        one_of = [refs[(m, "validation")] for m in group.values()]
        return {"oneOf": one_of, "discriminator": {"propertyName": tag}} if one_of else {"type": "null"}

    names = sorted({n for e in registry.list("method") for n in (e.name, *e.info.aliases)})
    name: dict[str, Any] = {"type": "string", "enum": names}
    part = {k: {"anyOf": [{"enum": sorted(parts[k])}, choice("kind", parts[k])]} for k in _PARTS if parts[k]}
    nothing = {"type": "null"}
    custom: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["space"],
        "properties": {
            "name": {"type": "string"},
            "objective": {"anyOf": [part.get("objective", nothing), nothing]},
            "edit": {"anyOf": [part.get("edit", nothing), nothing]},
            "space": part["space"],
            "protections": {"type": "array", "items": part["protection"]},
            "optim": refs[(Optim, "validation")],
            "from_scratch": {"type": "boolean"},
        },
    }
    recipe = {"anyOf": [name, choice("method", methods), custom]}
    top = dict(defs.pop(MODELS[kind].__name__))
    properties = dict(top["properties"])
    if kind == "run":
        properties["recipe"] = recipe
    if kind == "bench":
        properties["methods"] = {**properties["methods"], "items": recipe}
        label: dict[str, Any] = {"type": "string"}
        own: dict[str, Any] = {"anyOf": [label, {"$ref": "#/$defs/SurrogateSpec"}]}
        for settings in (custom, *(defs[model.__name__] for model in methods.values())):
            settings["properties"] |= {"label": label, "surrogate": own}
    if kind == "train":
        properties["optim"] = refs[(Optim, "validation")]
    if "reference" in properties:
        files: dict[str, Any] = {
            "type": "object",
            "properties": {"patch": {"type": "string"}, "weights": {"type": "string"}},
        }
        files |= {"additionalProperties": False, "minProperties": 1, "maxProperties": 1}
        properties["reference"] = {"anyOf": [name, choice("method", methods), files, nothing], "default": None}
        defs.pop("Reference", None)
    top["properties"] = properties
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": defs}


def _tagged(model: type[BaseModel], tag: str, name: str) -> type[BaseModel]:
    field: Any = (Literal[name], ...)
    return create_model(f"{tag}_{model.__name__}", __base__=model, **{tag: field})
