"""Cases 8, 18 and 25: options that do not exist or do not fit, stale results, hostile names, texts and paths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expunge import experiment
from expunge.bench import bench
from expunge.cli import app
from expunge.cli.app import one_line
from expunge.config import BenchConfig, RunConfig, Source, TrainConfig, load_config, parse_config, parse_overrides
from expunge.config.text import parse_yaml
from expunge.errors import ConfigError
from expunge.files import read_safetensors
from expunge.models.weights import save_weights

TEXT = """
name: small
task:
  model: {name: mlp, input_shape: [1, 8, 8]}
  data: {name: digits, limit: 200}
request: {class: 3}
recipe: {method: salun}
reference: {method: retrain}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def test_the_file_itself_is_fine(file: Path) -> None:
    assert load_config(RunConfig, file).name == "small"


MISTYPED = {
    "nmae": "did you mean 'name'",
    "task.modle": "did you mean 'model'",
    "task.model.weigths": "did you mean 'weights'",
    "task.data.limt": "did you mean 'limit'",
    "request.clas": "did you mean 'class'",
    "recipe.keeep": "did you mean 'keep'",
    "recipe.optim.lrr": "did you mean 'lr'",
    "reference.batchsize": "did you mean 'batch_size'",
    "reference.optim.epoch": "did you mean 'epochs'",
}


@pytest.mark.parametrize("key", MISTYPED)
def test_an_unknown_key_at_any_depth_names_the_flag_and_the_right_one(file: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=MISTYPED[key]) as caught:
        load_config(RunConfig, file, {key: 1})
    assert f"--{key}: unknown key '{key}'" in str(caught.value)


def test_an_unknown_key_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(TEXT.replace("method: salun", "method: salun, keeep: 0.5"))
    with pytest.raises(ConfigError, match=r"typo\.yaml: unknown key 'recipe\.keeep'; did you mean 'keep'"):
        load_config(RunConfig, path)


@pytest.mark.parametrize("key", ["objective", "space", "protections.0"])
def test_an_unknown_key_of_a_part_is_found_too(file: Path, key: str) -> None:
    recipe: dict[str, Any] = {
        "objective": {"kind": "random_label"},
        "space": {"kind": "saliency_mask"},
        "protections": [{"kind": "l1"}],
    }
    load_config(RunConfig, file, {"recipe": recipe, "reference": None})
    with pytest.raises(ConfigError, match=f"unknown key 'recipe.{key}.odd'"):
        load_config(RunConfig, file, {"recipe": recipe, f"recipe.{key}.odd": 1})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("recipe.keep", 0, "keep"),
        ("recipe.optim.lr", "fast", "lr"),
        ("recipe.optim.lr", ".nan", "lr"),
        ("recipe.optim.epochs", 0, "epochs"),
        ("recipe.method", "salum", "did you mean 'salun'"),
        ("task.data.name", "digts", "did you mean 'digits'"),
        ("task.normalize", "cifar11", "did you mean 'cifar10'"),
        ("seed", "one", "seed"),
        ("seed.deep", 1, "seed"),
        ("task", 3, "task"),
        ("task.model", 3, "task.model"),
        ("request.fraction", 0.1, "exactly one of class"),
        ("request", {"fraction": 2}, "less than 1"),
        ("request.seed", 4, "belongs to 'fraction'"),
        ("reference", "salun", "starts from the original"),
        ("attacks", ["mai"], "attacks"),
        ("name", "../../x", "must stay inside"),
        ("name", "a\x1b[2Jb", "control characters"),
        ("name", "/etc/passwd", "must stay inside"),
        ("name", "", "name"),
    ],
)
def test_a_wrong_value_names_its_key(file: Path, key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(RunConfig, file, {key: value}).request.build()


def test_percentiles_in_the_wrong_order(file: Path) -> None:
    recipe = {
        "objective": {"kind": "random_label"},
        "space": "all",
        "protections": [{"kind": "interval", "targets": ["fc"], "lower_percentile": 0.9, "upper_percentile": 0.1}],
    }
    with pytest.raises(ConfigError, match="must be below"):
        load_config(RunConfig, file, {"recipe": recipe})


def test_the_training_settings_are_checked_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("name: t\ntask: {model: {name: mlp}, data: {name: digits}}\noptim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"'optim\.lrr'; did you mean 'lr'"):
        load_config(TrainConfig, path)
    path.write_text("name: t\ntask: {model: {name: mlp}, data: {name: digits}}\noptim: {lr: -1}\n")
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        load_config(TrainConfig, path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "line 2: key 'a' is given twice"),
        ("x: {b: 1, b: 2}", "key 'b' is given twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: [1, 2", "not valid YAML"),
        ("1: x", "keys are words"),
        ("a: " + "[" * 5000, "YAML|nested"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_broken_or_hostile_yaml(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith("f.yaml: ")


def test_files_that_are_no_configurations(tmp_path: Path) -> None:
    for content, says in ((b"\xff\xfe\x00", "UTF-8"), (b"- 1\n- 2\n", "mapping"), (b"#" * (1 << 21), "too large")):
        path = tmp_path / "x.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            load_config(RunConfig, path)
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(RunConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--a"], "needs a value"),
        (["--a", "--b=1"], "needs a value"),
        (["--a=1", "--a=2"], "given twice"),
        (["--=1"], "an override is"),
        (["--a..b=1"], "an override is"),
        (["--a=[1"], "--a: .*not valid YAML"),
    ],
)
def test_malformed_overrides(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_overrides(words)


def test_an_error_is_one_escaped_line_with_its_exit_code(file: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(file), "--recipe.method", "\x1b[31mred\nsecond"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "\x1b" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_escaping_makes_control_and_direction_characters_visible() -> None:
    assert one_line("a\x1b[0m\u202eb\nc") == "a\\x1b[0m\\u202eb c"
    assert one_line("plain") == "plain"


# ---- case 18: results are tied to everything that they depend on


def _weights(path: Path, seed: int) -> None:
    from expunge.models import ModelSpec, build_model

    save_weights(build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), seed=seed)), path)


def test_weights_exchanged_under_the_same_name_are_noticed_by_a_benchmark(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    data: dict[str, Any] = {
        "name": "b",
        "task": {
            "model": {"name": "mlp", "input_shape": [1, 8, 8], "weights": str(weights)},
            "data": {"name": "digits", "limit": 100},
        },
        "requests": [{"class": 3}],
        "methods": [{"method": "fine_tune", "optim": {"epochs": 1}}],
        "controls": False,
        "attacks": ["mia"],
        "output": str(tmp_path / "out"),
    }
    config = parse_config(BenchConfig, Source(data))
    _weights(weights, 0)
    assert [c.reused for c in bench(config).cells] == [False, False]
    assert [c.reused for c in bench(config).cells] == [True, True]
    _weights(weights, 1)
    assert [c.reused for c in bench(config).cells] == [False, False]


@pytest.mark.parametrize("damage", ["{", '{"key": 1}', "[]", ""])
def test_a_damaged_cell_is_run_again(tmp_path: Path, damage: str) -> None:
    data: dict[str, Any] = {
        "name": "b",
        "task": {"model": {"name": "mlp", "input_shape": [1, 8, 8]}, "data": {"name": "digits", "limit": 100}},
        "requests": [{"class": 3}],
        "methods": [{"method": "fine_tune", "optim": {"epochs": 1}}],
        "controls": False,
        "attacks": ["mia"],
        "output": str(tmp_path / "out"),
    }
    config = parse_config(BenchConfig, Source(data))
    first = bench(config)
    (first.folder / first.cells[1].folder / "cell.json").write_text(damage)
    again = bench(config)
    assert [c.reused for c in again.cells] == [True, False]
    assert again.cells[1].value("ra") == first.cells[1].value("ra")


def test_a_run_on_exchanged_weights_is_refused_and_a_stale_report_is_not_shown(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    _weights(weights, 0)
    data: dict[str, Any] = {
        "name": "r",
        "task": {
            "model": {"name": "mlp", "input_shape": [1, 8, 8], "weights": str(weights)},
            "data": {"name": "digits", "limit": 100},
        },
        "request": {"class": 3},
        "recipe": {"method": "fine_tune", "optim": {"epochs": 1}},
        "controls": False,
        "attacks": ["mia"],
        "output": str(tmp_path / "out"),
    }
    config = parse_config(RunConfig, Source(data))
    assert not experiment.run(config).resumed
    assert experiment.run(config).resumed
    stored = tmp_path / "out/report.json"
    stored.write_text(stored.read_text().replace('"patch": "', '"patch": "0'))
    assert not experiment.run(config).resumed
    _weights(weights, 1)
    with pytest.raises(ConfigError, match="other settings: base"):
        experiment.run(config)


def test_an_index_file_that_changes_is_another_request(tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    data = {
        "name": "r",
        "task": {"model": {"name": "mlp", "input_shape": [1, 8, 8]}, "data": {"name": "digits", "limit": 100}},
        "request": {"index_file": str(ids)},
        "recipe": {"method": "fine_tune", "optim": {"epochs": 1}},
        "controls": False,
        "output": str(tmp_path / "out"),
    }
    ids.write_text("[1, 2, 3]")
    config = parse_config(RunConfig, Source(data))
    experiment.run(config)
    ids.write_text("[1, 2, 4]")
    with pytest.raises(ConfigError, match="other settings: request"):
        experiment.run(config)


def test_a_model_that_does_not_fit_the_data_is_named(tmp_path: Path) -> None:
    for change, says in (({"input_shape": [3, 32, 32]}, "input_shape"), ({"n_classes": 9}, "n_classes")):
        model = {"name": "mlp", "input_shape": [1, 8, 8], **change}
        data = {"name": "r", "task": {"model": model, "data": {"name": "digits"}}, "request": {"class": 3}}
        config = parse_config(RunConfig, Source({**data, "recipe": "fine_tune"}))
        with pytest.raises(ConfigError, match=says):
            experiment.run(config)
    assert not (tmp_path / "runs").exists()


# ---- case 25: where results may go


def test_a_symlinked_output_file_is_replaced_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious.safetensors"
    save_weights({"w": torch.ones(1)}, precious)
    link = tmp_path / "out.json"
    link.symlink_to(precious)
    result = CliRunner().invoke(app, ["schema", "-o", str(link)])
    assert result.exit_code == 0
    assert not link.is_symlink()
    assert read_safetensors(precious)[0]["w"].tolist() == [1.0]


def test_hostile_titles_stay_inside_the_benchmark_folder(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "name": "b",
        "task": {"model": {"name": "mlp", "input_shape": [1, 8, 8]}, "data": {"name": "digits", "limit": 100}},
        "requests": [{"class": 3, "name": "../../<script>\x1b[2J"}],
        "methods": [{"method": "fine_tune", "label": "../../up", "optim": {"epochs": 1}}],
        "controls": False,
        "attacks": ["mia"],
        "output": str(tmp_path / "deep/deeper/out"),
    }
    result = bench(parse_config(BenchConfig, Source(data)))
    assert result.failed == []
    assert {p.name for p in tmp_path.iterdir()} == {"deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"deeper"}
    text = (result.folder / "table.md").read_text()
    assert "\x1b" not in text
    assert "<script>" not in text
