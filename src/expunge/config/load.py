"""From a file and flags to validated settings; messages name the file or flag, the key and the closest valid one."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from expunge.config.models import Experiment, RunConfig, TrainConfig
from expunge.config.text import Source, read_source, resolve_paths, write_yaml
from expunge.data.spec import SurrogateSpec
from expunge.errors import ConfigError, did_you_mean
from expunge.method import settings_model
from expunge.part import Frozen, explain
from expunge.recipe import Optim, Recipe
from expunge.registry import Kind, registry

T = TypeVar("T", bound=Frozen)

_PATHS: tuple[tuple[str, ...], ...] = (
    ("task", "model", "weights"),
    ("task", "data", "path"),
    ("task", "data", "test_path"),
    ("task", "data", "identities"),
    ("task", "data", "names"),
    ("task", "model", "name"),
    ("task", "prompts"),
    ("task", "judge", "*", "model", "weights"),
    ("judge", "*", "model", "weights"),
    *((*at, "figures", name) for at in (("task",), ()) for name in ("lpips", "style", "inception")),
    ("task", "surrogate", "path"),
    ("task", "surrogate", "index_file"),
    ("request", "index_file"),
    ("exclude", "index_file"),
    ("reference", "patch"),
    ("reference", "weights"),
    ("recipe", "mask_file"),
    ("recipe", "space", "file"),
    ("recipe", "statistics"),
    ("recipe", "objective", "statistics"),
)


def load_config(model: type[T], path: str | Path, overrides: dict[str, Any] | None = None) -> T:
    """Read a configuration file with dotted overrides.

    Relative paths in the file are looked up from the working directory, then from the file's folder.

    Args:
        model: :class:`RunConfig`, :class:`BenchConfig` or :class:`TrainConfig`.
        path: YAML file.
        overrides: ``{"recipe.optim.lr": 1e-4}``.

    Raises:
        ConfigError: Names the file or flag, the dotted key, and the closest valid one.
    """
    return parse_config(model, read_source(path, overrides))


def parse_config(model: type[T], source: Source) -> T:
    """Validate raw settings; see :func:`load_config`."""
    try:
        unknown = list(_unknown(model, source.data, ""))
    except ConfigError as error:
        raise ConfigError(f"{source.origin('recipe')}: {error}") from None
    if unknown:
        raise ConfigError("; ".join(f"{source.origin(k)}: unknown key '{k}'{hint}" for k, hint in unknown))
    resolve_paths(source.data, _PATHS, source.folder)
    several = source.data.get("requests")
    for item in several if isinstance(several, list) else []:
        resolve_paths(item, [("index_file",)], source.folder)
    methods = source.data.get("methods")
    for item in methods if isinstance(methods, list) else []:
        own = [("surrogate", "path"), ("surrogate", "index_file")]
        resolve_paths(item, [*own, *(steps[1:] for steps in _PATHS if steps[0] == "recipe")], source.folder)
    config = _build(model, source.data, "", source)
    try:
        if isinstance(config, RunConfig):
            config.build_recipe()
        if isinstance(config, TrainConfig):
            config.build_optim()
    except ConfigError as error:
        raise ConfigError(f"{source.origin('recipe')}: {error}") from None
    return config


def resolved_yaml(config: Frozen) -> str:
    """A configuration with every default written out, readable by :func:`load_config`."""
    data = config.model_dump(mode="json", by_alias=True)
    if isinstance(config, RunConfig):
        data["recipe"] = config.build_recipe().describe()
    if isinstance(config, Experiment) and config.reference is not None:
        kept = {k: v for k, v in data["reference"].items() if v is not None and k != "settings"}
        data["reference"] = {**kept, **config.reference.settings}
    for key in ("data", "surrogate"):
        spec = getattr(config.task, key, None) if hasattr(config, "task") else None
        if spec is not None and "channels" not in spec.model_fields_set:
            del data["task"][key][
                "channels"
            ]  # naming it says that images are decoded, which is refused for stored sets
    for request in [data.get("request"), data.get("exclude"), *data.get("requests", ())]:
        if request is not None:
            drawn = request["fraction"] is not None
            unset = [k for k, v in request.items() if v is None or (k in ("stratified", "seed") and not drawn)]
            for key in unset:
                del request[key]
    return write_yaml(data)


def _names(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _inner(annotation: Any, value: Any = None) -> type[BaseModel] | None:
    """The settings model that a mapping under this annotation is read as; among several, the one of its ``kind``."""
    if get_origin(annotation) is Annotated:
        return _inner(get_args(annotation)[0], value)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        found = [m for m in (_inner(a, value) for a in get_args(annotation)) if m is not None]
        if len(found) > 1 and isinstance(value, dict):
            if "family" in found[0].model_fields:
                families = {f: m for m in found for f in get_args(m.model_fields["family"].annotation)}
                return families.get(value.get("family", "classifier"))
            kinds = {m.model_fields["kind"].default: m for m in found if "kind" in m.model_fields}
            return kinds.get(value.get("kind"))
        return found[0] if found else None
    return None


def _unknown(model: type[BaseModel], data: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, list | tuple):
        for i, item in enumerate(data):
            yield from _unknown(model, item, f"{where}.{i}")
        return
    if not isinstance(data, dict):
        return
    names = _names(model)
    for key, value in data.items():
        at = f"{where}.{key}" if where else str(key)
        if key not in names:
            yield at, did_you_mean(str(key), names)
        elif key in ("recipe", "reference"):
            yield from _unknown_recipe(value, at)
        elif key == "methods" and isinstance(value, list):
            for i, item in enumerate(value):
                own = ("label", "surrogate")
                spec = {k: v for k, v in item.items() if k not in own} if isinstance(item, dict) else item
                yield from _unknown_recipe(spec, f"{at}.{i}")
                if isinstance(item, dict) and "surrogate" in item:
                    yield from _unknown(SurrogateSpec, item["surrogate"], f"{at}.{i}.surrogate")
        elif model is TrainConfig and key == "optim":
            yield from _unknown(Optim, value, at)
        elif (inner := _inner(names[key], value)) is not None and not isinstance(value, BaseModel):
            yield from _unknown(inner, value, at)


def _unknown_recipe(spec: Any, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(spec, dict):
        return
    if "method" in spec:
        rest = {k: v for k, v in spec.items() if k != "method"}
        yield from _unknown(settings_model(registry.get("method", str(spec["method"])).name), rest, where)
        return
    if "patch" in spec or "weights" in spec:
        files = ("patch", "weights")
        yield from ((f"{where}.{k}", did_you_mean(k, files)) for k in spec if k not in files)
        return
    for key, value in spec.items():
        at = f"{where}.{key}"
        if key not in Recipe.model_fields:
            yield at, did_you_mean(key, ["method", *Recipe.model_fields])
        elif key == "optim":
            yield from _unknown(Optim, value, at)
        elif key in ("objective", "edit", "space", "protections"):
            kind: Kind = "protection" if key == "protections" else key
            for i, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, dict) and "kind" in item:
                    part = registry.get(kind, str(item["kind"])).obj
                    rest = {k: v for k, v in item.items() if k != "kind"}
                    yield from _unknown(part, rest, f"{at}.{i}" if isinstance(value, list) else at)


def _build(model: type[T], data: Any, where: str, source: Source) -> T:
    """Validate from the inside out, so that every message carries the full dotted key and its origin."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source.origin(where)}: '{where}' is a mapping of keys to values, got {str(data)[:80]!r}")
    ready = dict(data)
    for key, annotation in _names(model).items():
        value = data.get(key)
        inner = _inner(annotation, value)
        if inner is None or not issubclass(inner, Frozen) or key == "reference":
            continue
        at = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            ready[key] = _build(inner, value, at, source)
        elif isinstance(value, list) and get_origin(annotation) is tuple:
            ready[key] = tuple(_build(inner, v, f"{at}.{i}", source) for i, v in enumerate(value))
    made = model.__new__(model)
    try:
        BaseModel.__init__(made, **ready)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]["loc"]
        key = ".".join(filter(None, [where, *map(str, first)]))
        raise ConfigError(f"{source.origin(key)}: {explain(error, model, where)}") from None
    except ConfigError as error:
        raise ConfigError(f"{source.origin(where)}: {error}") from None
    return made
