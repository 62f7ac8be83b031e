"""Configurations: strict reading, overrides, resolution, schema, and every shipped file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from expunge.config import (
    BenchConfig,
    RunConfig,
    Source,
    TrainConfig,
    json_schema,
    load_config,
    parse_config,
    parse_overrides,
    resolved_yaml,
)
from expunge.config.text import parse_yaml
from expunge.errors import ConfigError
from expunge.method import settings_model
from expunge.registry import registry

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = """
name: small
task:
  model: {name: mlp, input_shape: [1, 8, 8]}
  data: {name: digits, limit: 200}
request: {class: 3}
recipe: {method: salun, on: random_label, optim: {lr: 1e-3}}
reference: {method: retrain, optim: {epochs: 2, milestones: []}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def run(file: Path, **overrides: Any) -> RunConfig:
    return load_config(RunConfig, file, {k.replace("__", "."): v for k, v in overrides.items()})


def test_scientific_notation_is_a_number_and_words_stay_words() -> None:
    read = parse_yaml("a: 1e-4\nb: 5\nc: on\nd: null\ne: no\nf: true\ng: '1e-4'\nh: 2026-01-01\non: 1", "x")
    assert read == {
        "a": 1e-4,
        "b": 5,
        "c": "on",
        "d": None,
        "e": "no",
        "f": True,
        "g": "1e-4",
        "h": "2026-01-01",
        "on": 1,
    }
    assert yaml.safe_load("a: 1e-4") == {"a": "1e-4"}  # what plain YAML 1.1 makes of it


@pytest.mark.parametrize(
    "words", [["--recipe.optim.lr", "1e-4"], ["--recipe.optim.lr=1e-4"]], ids=["two words", "one word"]
)
def test_both_forms_of_an_override_set_the_value(file: Path, words: list[str]) -> None:
    rest, overrides = parse_overrides([str(file), *words])
    assert rest == [str(file)]
    assert load_config(RunConfig, file, overrides).build_recipe().optim.lr == 1e-4
    assert load_config(RunConfig, file).build_recipe().optim.lr == 1e-3


def test_overrides_take_yaml_values(file: Path) -> None:
    _, overrides = parse_overrides(
        ["--reference", "null", "--attacks=[mia]", "--request", "{classes: [1, 2]}", "--seed", "-1", "--controls=false"]
    )
    config = load_config(RunConfig, file, overrides)
    assert (config.reference, config.attacks, config.request.classes) == (None, ("mia",), (1, 2))
    assert (config.seed, config.controls) == (-1, False)


def test_an_override_reaches_into_a_recipe_given_by_name(file: Path) -> None:
    config = load_config(
        RunConfig, file, {"recipe": "random_label", "recipe.optim.lr": 0.5, "reference.optim.lr": 0.25}
    )
    assert config.build_recipe().optim.lr == 0.5
    assert config.reference is not None
    assert config.reference.recipe().optim.lr == 0.25


def test_an_override_reaches_into_a_list(file: Path) -> None:
    recipe = {
        "objective": "fine_tune",
        "space": "all",
        "protections": [{"kind": "l1", "weight": 0.5}],
    }
    config = load_config(RunConfig, file, {"recipe": recipe, "recipe.protections.0.weight": 0.25})
    assert config.build_recipe().protections[0].describe()["weight"] == 0.25
    with pytest.raises(ConfigError, match="not a position in a list of 1"):
        load_config(RunConfig, file, {"recipe": recipe, "recipe.protections.3.weight": 0.25})


def test_a_resolved_configuration_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = run(file)
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    again = load_config(RunConfig, tmp_path / "again.yaml")
    assert again.digest == config.digest
    assert again.build_recipe() == config.build_recipe()
    assert resolved_yaml(again) == resolved_yaml(config)


def test_the_digest_covers_what_a_result_depends_on(file: Path) -> None:
    base = run(file).digest
    assert run(file, name="other", output="elsewhere", trackers=["tensorboard"]).digest == base
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"recipe.keep": 0.4},
        {"recipe.optim.lr": 2e-3},
        {"request": {"class": 4}},
        {"task.data.limit": 201},
        {"attacks": ["mia"]},
        {"controls": False},
    ]
    assert len({base, *(load_config(RunConfig, file, c).digest for c in changes)}) == len(changes) + 1


def test_relative_paths_are_found_beside_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.chdir(folder)
    found = run(file, **{"task.model.weights": "w.safetensors"})
    assert found.task.model.weights == str((tmp_path / "w.safetensors").resolve())
    (folder / "w.safetensors").write_bytes(b"")  # the working directory comes first
    assert run(file, **{"task.model.weights": "w.safetensors"}).task.model.weights == "w.safetensors"
    assert run(file, **{"task.model.weights": "absent.safetensors"}).task.model.weights == "absent.safetensors"


def test_requests_build(file: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[5, 7]")
    titles = {
        "class 3": {"class": 3},
        "classes 1, 2": {"classes": [1, 2]},
        "10 % random samples": {"fraction": 0.1, "stratified": False},
        "2 samples": {"samples": [1, 4]},
        "ids": {"index_file": "ids.json"},
        "mine": {"class": "3", "name": "mine"},
    }
    for title, request in titles.items():
        assert load_config(RunConfig, file, {"request": request}).request.build().title == title


def test_bench_labels_are_distinct() -> None:
    base: dict[str, Any] = {
        "name": "b",
        "task": {"model": {"name": "mlp"}, "data": {"name": "digits"}},
        "requests": [{"class": 0}],
    }
    ok = parse_config(
        BenchConfig, Source({**base, "methods": ["salun", {"method": "salun", "keep": 0.1, "label": "s"}]})
    )
    assert [label for label, _ in ok.recipes()] == ["salun", "s"]
    with pytest.raises(ConfigError, match="give 'label'"):
        parse_config(BenchConfig, Source({**base, "methods": ["salun", {"method": "salun", "keep": 0.1}]}))
    with pytest.raises(ConfigError, match="one seed twice"):
        parse_config(BenchConfig, Source({**base, "methods": ["salun"], "seeds": [1, 1]}))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_file_loads_and_builds(path: Path) -> None:
    head = path.read_text().splitlines()
    assert any(f"configs/{path.name}" in line and line.startswith("# expunge ") for line in head[:3])
    if path.stem.startswith("bench"):
        assert all(r.optim.lr > 0 for _, r in load_config(BenchConfig, path).recipes())
    elif path.stem.endswith("train"):
        assert load_config(TrainConfig, path).build_optim().epochs > 1
    else:
        config = load_config(RunConfig, path)
        assert config.name == path.stem
        assert config.build_recipe().optim.lr > 0
        assert config.request.build().title


def test_shipped_files_are_there() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) >= 20


@pytest.mark.parametrize("kind", ["run", "bench", "train"])
def test_the_schema_knows_every_method_and_setting(kind: str) -> None:
    schema = json_schema(kind)
    assert schema["additionalProperties"] is False
    refs = [r for r in _refs(schema) if r.removeprefix("#/$defs/") not in schema["$defs"]]
    assert refs == []
    for entry in registry.list("method"):
        settings = set(settings_model(entry.name).model_fields)
        found = [
            d for d in schema["$defs"].values() if d.get("properties", {}).get("method", {}).get("const") == entry.name
        ]
        assert len(found) == 1
        assert settings <= set(found[0]["properties"])
        assert "method" in found[0]["required"]


def _refs(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [r for v in node.values() for r in _refs(v)]
    return [r for v in node for r in _refs(v)] if isinstance(node, list) else []
