"""Class statistics written by a training or for a model that exists, and SCAR with them instead of the retain set."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expunge import experiment
from expunge.cli import app
from expunge.config import BenchConfig, RunConfig, TrainConfig, load_config
from expunge.config.load import parse_config
from expunge.config.text import Source
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.features.statistics import ClassStatistics
from expunge.method import build_recipe
from expunge.patch import Patch
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask

TASK: dict[str, Any] = {
    "model": {"name": "mlp", "n_classes": 10, "input_shape": [1, 8, 8]},
    "data": {"name": "digits", "limit": 300},
    "surrogate": {"name": "shapes", "quantity": 100},
}
OPTIM = {"lr": 0.05, "epochs": 3, "milestones": [], "augment": False}
THREE = ForgetRequest.label(3)
SCAR = {"method": "scar", "batch_size": 64, "optim": {"epochs": 2}}


def train(target: Path, overwrite: bool = False, **more: Any) -> experiment.Trained:
    settings = {"name": "w", "task": TASK, "optim": OPTIM, "batch_size": 64, "output": str(target), "statistics": True}
    return experiment.train(parse_config(TrainConfig, Source(settings | more, "test")), overwrite=overwrite)


def load(weights: Path) -> ClassifierTask:
    task = {**TASK, "model": {**TASK["model"], "weights": str(weights)}}
    settings = {"name": "t", "task": task, "request": {"class": 3}, "recipe": "scar"}
    return experiment.make_task(parse_config(RunConfig, Source(settings, "test")).task)


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output


def change(patch: Patch) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t for n, c in patch.changes.items() for k, t in c.tensors().items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> experiment.Trained:
    return train(tmp_path_factory.mktemp("made") / "w.safetensors")


@pytest.fixture
def file(made: experiment.Trained) -> str:
    assert made.statistics is not None
    return str(made.statistics)


@pytest.fixture
def task(made: experiment.Trained) -> ClassifierTask:
    return load(made.weights)


def closed(task: ClassifierTask) -> ClassifierTask:
    """The same task, in which opening the retain set is an error."""

    class Closed(ClassifierTask):
        def load(self, role: str, ids: Any, split: Any, *, augment: int | None = None) -> Any:
            if role == "retain":
                raise AssertionError("the retain images were opened")
            return super().load(role, ids, split, augment=augment)

    task.__class__ = Closed
    return task


def test_a_training_leaves_statistics_of_what_it_trained_on(made: experiment.Trained, task: ClassifierTask) -> None:
    assert made.statistics == made.weights.with_name("w.statistics.safetensors")
    found = ClassStatistics.load(made.statistics)
    assert found.classes.tolist() == list(range(10))
    assert torch.equal(found.count, torch.bincount(task.data.train.labels))
    assert (found.delta, found.rule) == (0.5, "power")
    again = ClassStatistics.fit(task, task.everything(), "retain", task.eval_batch_size)
    assert torch.equal(found.mean, again.mean)
    assert torch.equal(found.covariance, again.covariance)


def test_of_the_kept_classes_they_are_those_of_the_retain_set(file: str, task: ClassifierTask) -> None:
    split = task.split(THREE)
    kept = ClassStatistics.load(file).select([c for c in range(10) if c != 3])
    own = ClassStatistics.fit(task, split)
    assert torch.equal(kept.count, own.count)
    torch.testing.assert_close(kept.mean, own.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.covariance, own.covariance, rtol=1e-5, atol=1e-6)
    sample = ClassStatistics.fit(task, task.split(ForgetRequest.samples(range(40))))
    assert not torch.allclose(ClassStatistics.load(file).mean, sample.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["scar", "scar_self"])
def test_the_patch_is_the_one_from_the_retain_set(method: str, made: experiment.Trained, file: str) -> None:
    settings = {**SCAR, "method": method}
    request = THREE if method == "scar" else _seen(load(made.weights))
    from_file = unlearn(closed(load(made.weights)), request, build_recipe({**settings, "statistics": file}))
    with pytest.raises(AssertionError, match="retain images were opened"):
        unlearn(closed(load(made.weights)), request, build_recipe(settings))
    computed = unlearn(load(made.weights), request, build_recipe(settings))
    a, b = change(from_file), change(computed)
    assert a
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-5)
    assert any("retain set before the run" in n for n in computed.manifest.notes)
    assert not any("retain set" in n for n in from_file.manifest.notes)


def test_other_statistics_give_another_patch(file: str, made: experiment.Trained, tmp_path: Path) -> None:
    own = ClassStatistics.load(file)
    dataclasses.replace(own, mean=own.mean.roll(1, 0)).save(tmp_path / "rolled.safetensors")
    settings = {**SCAR, "statistics": str(tmp_path / "rolled.safetensors")}
    a = change(unlearn(load(made.weights), THREE, build_recipe(settings)))
    b = change(unlearn(load(made.weights), THREE, build_recipe({**SCAR, "statistics": file})))
    assert any(not torch.allclose(a[n], b[n], rtol=1e-3, atol=1e-5) for n in a)


def _seen(task: ClassifierTask) -> ForgetRequest:
    """The class that the model sees in most surrogates."""
    logits, _ = task.logits("surrogate", task.split(THREE))
    return ForgetRequest.label(int(logits.argmax(1).bincount().argmax()))


def test_statistics_of_other_weights_are_refused(file: str, task: ClassifierTask) -> None:
    with torch.no_grad():
        next(task.model.parameters()).mul_(1.01)
    with pytest.raises(ArtifactError, match="other weights"):
        unlearn(task, THREE, build_recipe({**SCAR, "statistics": file}))


def test_excluded_samples_and_classes_are_left_out(tmp_path: Path) -> None:
    short = {**OPTIM, "epochs": 1}
    made = train(tmp_path / "a.safetensors", optim=short, exclude={"class": 3})
    assert made.statistics is not None
    assert ClassStatistics.load(made.statistics).classes.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    half = train(tmp_path / "b.safetensors", optim=short, exclude={"fraction": 0.5, "seed": 0})
    assert half.statistics is not None
    assert int(ClassStatistics.load(half.statistics).count.sum()) == 150


def test_old_statistics_do_not_stay_beside_new_weights(tmp_path: Path) -> None:
    short = {**OPTIM, "epochs": 1}
    first = train(tmp_path / "w.safetensors", optim=short)
    assert first.statistics is not None
    assert first.statistics.is_file()
    second = train(first.weights, overwrite=True, optim=short, statistics=False)
    assert second.statistics is None
    assert not first.statistics.exists()


def test_a_model_without_features_is_refused_before_it_is_trained(
    made: experiment.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = load(made.weights)
    bare.capabilities -= {"features"}
    monkeypatch.setattr(experiment, "make_task", lambda _: bare)
    monkeypatch.setattr(experiment, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(CapabilityError, match="class statistics"):
        train(tmp_path / "w.safetensors")


# -- the command and the paths of a file ---------------------------------------------------------------------------

YAML = """
task:
  model: {name: mlp, input_shape: [1, 8, 8]WEIGHTS}
  data: {name: digits, limit: 300}
  surrogate: {name: shapes, quantity: 100}
"""
RUN = "name: run\nrequest: {class: 3}\nrecipe: {method: scar, statistics: w.statistics.safetensors}\n" + YAML
BENCH = (
    "name: bench\nrequests: [{class: 3}]\nmethods: [salun, {method: scar, statistics: w.statistics.safetensors}]\n"
    + YAML
)
OBJECT = (
    "name: run\nrequest: {class: 3}\n"
    "recipe: {name: own, objective: {kind: scar, statistics: w.statistics.safetensors}, space: {kind: all}}\n" + YAML
)
TRAIN = "name: train\nexclude: {class: 3}\n" + YAML


def write(folder: Path, text: str, weights: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(text.replace("WEIGHTS", f", weights: {weights}"))
    return path


@pytest.mark.parametrize(("text", "n"), [(RUN, 10), (BENCH, 10), (TRAIN, 9)])
def test_the_command_takes_any_file(text: str, n: int, made: experiment.Trained, tmp_path: Path) -> None:
    config, out = write(tmp_path, text, made.weights), tmp_path / "x.safetensors"
    assert f"written: {out}" in call("data", "statistics", config, "-o", out)
    found = ClassStatistics.load(out)
    assert len(found.classes) == n
    assert made.statistics is not None
    trained = ClassStatistics.load(made.statistics).select(found.classes.tolist())
    torch.testing.assert_close(found.mean, trained.mean, rtol=1e-6, atol=1e-6)
    assert found.model == trained.model
    assert "exists" in call("data", "statistics", config, "-o", out, code=2)
    call("data", "statistics", config, "-o", out, "--overwrite", "--delta", 1)
    assert ClassStatistics.load(out).delta == 1


def test_the_command_says_what_is_wrong(made: experiment.Trained, tmp_path: Path) -> None:
    config = write(tmp_path, RUN, made.weights)
    assert ".safetensors file" in call("data", "statistics", config, "-o", tmp_path / "x.pt", code=2)
    out = tmp_path / "x.safetensors"
    assert "above 0" in call("data", "statistics", config, "-o", out, "--delta", 0, code=2)
    config.write_text(RUN.replace("WEIGHTS", ""))
    assert "task.model.weights" in call("data", "statistics", config, "-o", out, code=2)
    assert not out.exists()


@pytest.mark.parametrize("text", [RUN, OBJECT, BENCH])
def test_a_relative_file_is_looked_up_beside_the_configuration(
    text: str, made: experiment.Trained, tmp_path: Path
) -> None:
    config = write(tmp_path, text, made.weights)
    found = tmp_path / "w.statistics.safetensors"
    found.write_bytes(b"")
    if text == BENCH:
        recipe = dict(load_config(BenchConfig, config).recipes())["scar"]
    else:
        recipe = load_config(RunConfig, config).build_recipe()
    assert getattr(recipe.objective, "statistics") == str(found.resolve())  # noqa: B009
    found.unlink()
    missing = load_config(BenchConfig, config) if text == BENCH else load_config(RunConfig, config)
    assert str(tmp_path) not in missing.model_dump_json(exclude={"task"})


def test_a_word_that_is_no_flag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="statistics"):
        train(tmp_path / "w.safetensors", statistics="w.statistics.safetensors")
