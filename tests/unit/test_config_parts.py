"""Settings inside settings: schedules of a kind, stop rules, and the surrogates of a benchmark's entries."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from expunge.bench import bench
from expunge.config import BenchConfig, RunConfig, Source, load_config, parse_config, resolved_yaml
from expunge.config.schema import json_schema
from expunge.data.spec import SurrogateSpec
from expunge.errors import ConfigError
from expunge.objectives.stopping import StopBelow
from expunge.patch import Patch
from expunge.schedule import Nested, Paired

TASK: dict[str, Any] = {
    "model": {"name": "small_cnn", "input_shape": [1, 8, 8]},
    "data": {"name": "digits", "limit": 100},
}


def run_file(folder: Path, objective: dict[str, Any]) -> Path:
    recipe = {"name": "own", "objective": objective, "space": "all", "optim": {"lr": 0.1}}
    data = {"name": "r", "task": TASK, "request": {"class": 3}, "recipe": recipe}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


# ---- a recipe spelled out

SPELLED: list[tuple[str, dict[str, Any], Any]] = [
    (
        "random_label",
        {"kind": "paired", "streams": ["forget", "retain"], "batch_sizes": {"retain": 9}, "batch_size": 5},
        Paired(streams=("forget", "retain"), batch_sizes={"retain": 9}, batch_size=5),
    ),
    (
        "scar",
        {"kind": "nested", "lead": "forget", "inner": "surrogate", "repeats": 2, "inner_batch_size": 7},
        Nested(repeats=2, inner_batch_size=7),
    ),
]


@pytest.mark.parametrize(("part", "schedule", "wanted"), SPELLED, ids=["paired", "nested"])
def test_a_schedule_is_read_by_its_kind(tmp_path: Path, part: str, schedule: dict[str, Any], wanted: Any) -> None:
    objective = {"kind": part, "schedule": schedule, "until": {"target": 0.1, "every": 2}}
    config = load_config(RunConfig, run_file(tmp_path, objective))
    found = config.build_recipe().objective
    assert found is not None
    assert found.schedule == wanted
    assert found.until == StopBelow(target=0.1, every=2)
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    assert load_config(RunConfig, tmp_path / "again.yaml").build_recipe() == config.build_recipe()


@pytest.mark.parametrize(("part", "schedule", "wanted"), SPELLED, ids=["paired", "nested"])
def test_an_unknown_key_inside_is_named(tmp_path: Path, part: str, schedule: dict[str, Any], wanted: Any) -> None:
    wrong = {"kind": part, "schedule": {**schedule, "batch_sise": 3}}
    with pytest.raises(ConfigError, match=r"recipe\.objective\.schedule\.batch_sise'; did you mean 'batch_size"):
        load_config(RunConfig, run_file(tmp_path, wrong))
    wrong = {"kind": part, "schedule": schedule, "until": {"targett": 0.1}}
    with pytest.raises(ConfigError, match=r"recipe\.objective\.until\.targett'; did you mean 'target'"):
        load_config(RunConfig, run_file(tmp_path, wrong))


def test_a_key_of_another_kind_is_unknown(tmp_path: Path) -> None:
    wrong = {"kind": "random_label", "schedule": {"kind": "paired", "repeats": 2}}
    with pytest.raises(ConfigError, match=r"unknown key 'recipe\.objective\.schedule\.repeats'"):
        load_config(RunConfig, run_file(tmp_path, wrong))


@pytest.mark.parametrize("schedule", [{"kind": "nestd"}, {"batch_size": 3}])
def test_a_schedule_of_no_known_kind_is_refused(tmp_path: Path, schedule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"schedule.*kind"):
        load_config(RunConfig, run_file(tmp_path, {"kind": "random_label", "schedule": schedule}))


# ---- surrogates of an entry's own

SCAR: dict[str, Any] = {
    "method": "scar",
    "batch_size": 16,
    "n_ret": 1,
    "optim": {"lr": 0.01, "epochs": 1, "max_steps": 2},
}
NOISE: dict[str, Any] = {"name": "noise", "quantity": 50}


def config(*methods: Any, **changes: Any) -> BenchConfig:
    base = {"name": "b", "task": TASK, "requests": [{"class": 3}], "methods": list(methods), "controls": False}
    return parse_config(BenchConfig, Source({**base, "attacks": [], **changes}, "test"))


def entry(label: str, **surrogate: Any) -> dict[str, Any]:
    return {**SCAR, "label": label, **({"surrogate": {**NOISE, **surrogate}} if surrogate else {})}


def test_entries_bring_surrogates_of_their_own() -> None:
    found = config(entry("a", seed=1), entry("b"), {**SCAR, "label": "c", "surrogate": "shapes"}, "salun")
    assert found.surrogates() == {"a": SurrogateSpec(**NOISE, seed=1), "c": SurrogateSpec(name="shapes")}
    assert [label for label, _ in found.recipes()] == ["a", "b", "c", "salun"]
    assert parse_config(BenchConfig, Source(yaml.safe_load(resolved_yaml(found)), "again")).digest == found.digest


def test_the_digest_changes_with_them() -> None:
    found = {config(entry("a", **s)).digest for s in ({}, {"seed": 0}, {"seed": 1}, {"seed": 0, "quantity": 49})}
    assert len(found) == 4
    assert config(entry("a", seed=0)).digest == config({**SCAR, "label": "a", "surrogate": NOISE}).digest


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ({**NOISE, "quantty": 3}, r"unknown key 'methods\.1\.surrogate\.quantty'; did you mean 'quantity'"),
        ({**NOISE, "quantity": 0}, r"methods\.1\.surrogate.*quantity"),
        ({"name": "nois"}, r"methods\.1\.surrogate.*'nois'"),
        ("nois", r"methods\.1\.surrogate.*'nois'"),
        ([NOISE], r"methods\.1\.surrogate"),
    ],
)
def test_what_is_wrong_with_them_is_said_before_anything_runs(surrogate: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("salun", {**SCAR, "surrogate": surrogate})
    assert config("salun", {**SCAR, "surrogate": NOISE}).surrogates() == {"scar": SurrogateSpec(**NOISE)}


def test_entries_with_other_surrogates_are_other_cells(tmp_path: Path) -> None:
    shared = {**TASK, "surrogate": {**NOISE, "seed": 0}}
    methods = (entry("first", seed=0), entry("second", seed=1), entry("shared"))
    result = bench(config(*methods, task=shared, output=str(tmp_path)))
    assert result.failed == []
    cells = {c.label: c for c in result.cells}
    facts = dict(zip(cells, result.facts, strict=True))
    patches = {k: Patch.load(tmp_path / c.folder / "patch.safetensors") for k, c in cells.items() if k != "untouched"}
    values = {label: {n: p[n].dense() for n in p} for label, p in patches.items()}
    assert all((values["first"][n] == values["shared"][n]).all() for n in values["shared"])
    assert any((values["first"][n] != values["second"][n]).any() for n in values["second"])
    assert facts["first"]["data_digest"] == facts["shared"]["data_digest"] != facts["second"]["data_digest"]
    assert facts["first"]["recipe_digest"] == facts["second"]["recipe_digest"]
    # another quantity is another cell, the rest is taken over
    again = bench(config(methods[0], entry("second", seed=1, quantity=40), task=shared, output=str(tmp_path)))
    assert {c.label: c.reused for c in again.cells} == {"untouched": True, "first": True, "second": False}


def test_the_schema_knows_them() -> None:
    definitions = json_schema("bench")["$defs"]
    scar = next(d for d in definitions.values() if d.get("properties", {}).get("method", {}).get("const") == "scar")
    accepted = scar["properties"]["surrogate"]["anyOf"]
    assert {"type": "string"} in accepted
    (ref,) = (a["$ref"].removeprefix("#/$defs/") for a in accepted if "$ref" in a)
    assert set(definitions[ref]["properties"]) == set(SurrogateSpec.model_fields)
    in_a_run = json_schema("run")["$defs"]
    scar = next(d for d in in_a_run.values() if d.get("properties", {}).get("method", {}).get("const") == "scar")
    assert "surrogate" not in scar["properties"]
