"""The stop rule: when it measures, what it compares, and where a run ends."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.context import Context
from expunge.data.base import MemoryImages, Splits
from expunge.errors import CapabilityError, ConfigError
from expunge.objectives.cross_entropy import GradientAscent, RandomLabel
from expunge.objectives.stopping import ACCURACY, TARGET, StopBelow
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.base import Split
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier, tiny_images

REQUEST = ForgetRequest.label("ant")
OPTIM: dict[str, Any] = {"lr": 2e-4, "momentum": 0.0, "epochs": 4}
ASCENT: dict[str, Any] = {"kind": "gradient_ascent", "schedule": {"kind": "single", "batch_size": 8}}
LABELS: dict[str, Any] = {"kind": "random_label", "schedule": {"kind": "sequential", "batch_size": 20}}
NEVER = -1.0


@pytest.fixture(scope="module")
def task() -> ClassifierTask:
    """On images noisier than the model learnt from, so that samples are forgotten one after another."""
    train, test = tiny_images(40, 0, "train", noise=0.6), tiny_images(20, 0, "test", noise=0.6)
    return ClassifierTask(tiny_classifier().model, Splits("noisy", train, test))


def recipe(objective: dict[str, Any], until: dict[str, Any] | None, **optim: Any) -> Recipe:
    return Recipe(name="t", objective={**objective, "until": until}, space="all", optim={**OPTIM, **optim})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def trajectory(task: ClassifierTask, objective: dict[str, Any]) -> list[float]:
    """Exact accuracy on the whole forget set after every step, measured by hand."""
    split, found = task.split(REQUEST), []

    def on_step(number: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        logits, labels = task.logits("forget", split)
        found.append(float((logits.argmax(1) == labels).double().mean()))

    unlearn(task, REQUEST, recipe(objective, None), on_step=on_step)
    return found


# ---- settings


def test_exactly_one_target_is_given() -> None:
    for settings in ({}, {"target": 0.1, "below_test": 0.1}):
        with pytest.raises(ConfigError, match="exactly one of 'target' and 'below_test'"):
            StopBelow(**settings)
    assert StopBelow(target=0.0).below_test is None
    assert StopBelow(below_test=0.0).target is None


@pytest.mark.parametrize("bad", [{"target": 1.1}, {"below_test": -0.1}, {"target": 0.1, "every": 0}, {"taget": 0.1}])
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(bad))):
        StopBelow(**bad)


@pytest.mark.parametrize("kind", [GradientAscent, RandomLabel])
def test_an_unused_rule_is_left_out_of_the_description(kind: Any) -> None:
    without, rule = kind(), StopBelow(below_test=0.1, every=3)
    assert "until" not in without.describe()
    described = kind(until=rule).describe()
    assert described["until"] == {"target": None, "below_test": 0.1, "every": 3, "after_epochs": 0}
    again = kind(**{k: v for k, v in described.items() if k != "kind"})
    assert again.until == rule
    assert recipe(ASCENT, None).digest == Recipe(name="t", objective=ASCENT, space="all", optim=OPTIM).digest
    assert recipe(ASCENT, {"target": 0.5}).digest != recipe(ASCENT, None).digest


# ---- the rule by itself


def test_the_comparison_is_strict() -> None:
    rule = StopBelow(target=0.5)
    row = {"epoch": 0, ACCURACY: 0.5, TARGET: 0.5}
    assert rule.reason([row]) is None
    assert rule.reason([{**row, ACCURACY: 0.75}]) is None
    assert rule.reason([{**row, ACCURACY: math.nextafter(0.5, 0)}]) is not None
    assert rule.reason([{**row, ACCURACY: 0.25}]) == "forget accuracy 25.00 % is below 50.00 %"


def test_only_the_last_row_counts_and_only_if_measured() -> None:
    low = {"epoch": 0, ACCURACY: 0.0, TARGET: 0.5}
    assert StopBelow(target=0.5).reason([low, {"epoch": 0}]) is None
    assert StopBelow(target=0.5).reason([{"epoch": 0}, low]) is not None


def test_whole_epochs_pass_before_the_rule_may_stop() -> None:
    rule = StopBelow(target=0.5, after_epochs=2)
    stops = [rule.reason([{"epoch": e, ACCURACY: 0.0, TARGET: 0.5}]) is not None for e in range(4)]
    assert stops == [False, False, True, True]


# ---- the target


def with_wrong_labels(task: ClassifierTask, share: int) -> ClassifierTask:
    """A task whose validation labels are wrong for one sample in ``share``."""
    val = tiny_images(10, 0, "val")
    labels = val.labels.clone()
    labels[::share] = (labels[::share] + 1) % 4
    val = MemoryImages(val.x, labels, val.classes)
    return ClassifierTask(task.model, Splits("tiny", task.data.train, task.data.test, val))


def test_the_target_is_below_validation_samples_where_there_are_any(task: ClassifierTask) -> None:
    other = with_wrong_labels(task, 4)
    ctx = Context(other, other.split(REQUEST))
    StopBelow(below_test=0.25).prepare(ctx)
    logits, labels = other.logits("val", ctx.split)
    wanted = float((logits.argmax(1) == labels).double().mean()) - 0.25
    assert float(ctx.state[TARGET]) == wanted
    assert ctx.notes == []
    plain = Context(task, task.split(REQUEST))
    StopBelow(below_test=0.25).prepare(plain)
    logits, labels = task.logits("test", plain.split)
    assert float(plain.state[TARGET]) == float((logits.argmax(1) == labels).double().mean()) - 0.25 != wanted
    assert len(plain.notes) == 1
    assert "test labels" in plain.notes[0]


def test_without_held_out_samples_there_is_no_such_target(task: ClassifierTask) -> None:
    whole = task.split(REQUEST)
    ctx = Context(task, Split({r: whole[r] for r in ("forget", "retain")}))
    with pytest.raises(CapabilityError, match=r"below_test.*give a 'target'"):
        StopBelow(below_test=0.1).prepare(ctx)
    StopBelow(target=0.1).prepare(ctx)
    assert float(ctx.state[TARGET]) == 0.1


def test_the_note_about_test_labels_reaches_the_patch(task: ClassifierTask) -> None:
    noted = unlearn(task, REQUEST, recipe(ASCENT, {"below_test": 0.5}, epochs=1)).manifest.notes
    assert any("test labels" in n for n in noted)
    silent = unlearn(task, REQUEST, recipe(ASCENT, {"target": 0.5}, epochs=1)).manifest.notes
    assert not any("test labels" in n for n in silent)


# ---- in a run


@pytest.mark.parametrize("objective", [ASCENT, LABELS], ids=lambda o: o["kind"])
def test_a_run_stops_after_the_first_measured_step_below(
    task: ClassifierTask, tmp_path: Path, objective: dict[str, Any]
) -> None:
    exact = trajectory(task, objective)
    target = min(exact) + 1e-9
    stop = next(i for i, a in enumerate(exact) if a < target)
    assert stop + 1 < len(exact)
    patch = unlearn(task, REQUEST, recipe(objective, {"target": target, "every": 1}), run_dir=tmp_path)
    logged = rows(tmp_path)
    assert [r[ACCURACY] for r in logged] == exact[: stop + 1]
    assert {r[TARGET] for r in logged} == {target}
    assert any(n.startswith(f"stopped after step {stop + 1} of {len(exact)}: forget") for n in patch.manifest.notes)


def test_equality_with_the_target_does_not_stop_a_run(task: ClassifierTask, tmp_path: Path) -> None:
    exact = trajectory(task, ASCENT)
    lowest = min(exact)
    assert lowest < max(exact)
    unlearn(task, REQUEST, recipe(ASCENT, {"target": lowest, "every": 1}), run_dir=tmp_path / "equal")
    assert len(rows(tmp_path / "equal")) == len(exact)
    above = math.nextafter(lowest, 1)
    unlearn(task, REQUEST, recipe(ASCENT, {"target": above, "every": 1}), run_dir=tmp_path / "above")
    assert len(rows(tmp_path / "above")) == exact.index(lowest) + 1


@pytest.mark.parametrize(("every", "measured"), [(None, {4, 9, 14, 19}), (3, {2, 4, 5, 8, 9, 11, 14, 17, 19})])
def test_measurements_come_at_stated_steps_and_epoch_ends(
    task: ClassifierTask, tmp_path: Path, every: int | None, measured: set[int]
) -> None:
    unlearn(task, REQUEST, recipe(ASCENT, {"target": NEVER, "every": every}), run_dir=tmp_path)
    logged = rows(tmp_path)
    assert len(logged) == 20
    assert {r["step"] for r in logged if ACCURACY in r} == measured


def test_a_guarded_run_goes_on_until_its_epochs_are_over(task: ClassifierTask, tmp_path: Path) -> None:
    for epochs, steps in ((0, 1), (2, 11)):
        until = {"target": 1.0, "every": 1, "after_epochs": epochs}
        unlearn(task, REQUEST, recipe(ASCENT, until, lr=1e-3), run_dir=tmp_path / str(epochs))
        assert len(rows(tmp_path / str(epochs))) == steps


@pytest.mark.parametrize("objective", [ASCENT, LABELS], ids=lambda o: o["kind"])
def test_measuring_leaves_no_trace_in_the_run(task: ClassifierTask, objective: dict[str, Any]) -> None:
    """Dropout, train mode and statistics go on as if nothing had been measured."""
    settings = {"norm": "train", "epochs": 2}
    plain = unlearn(task, REQUEST, recipe(objective, None, **settings))
    measured = unlearn(task, REQUEST, recipe(objective, {"target": NEVER, "every": 1}, **settings))
    assert set(plain) == set(measured)
    assert all(torch.equal(plain[n].dense(), measured[n].dense()) for n in plain)
    stopped = unlearn(task, REQUEST, recipe(objective, {"target": 1.0, "every": 1}, **settings))
    assert any(not torch.equal(plain[n].dense(), stopped[n].dense()) for n in plain)


class Fault(Exception):  # noqa: N818
    """Ends a run from outside."""


def interrupt(at: int) -> Any:
    def on_step(number: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == at:
            raise Fault

    return on_step


@pytest.mark.parametrize("settings", [{"target": 0.7, "every": 1}, {"below_test": 0.3, "every": 2}], ids=str)
def test_an_interrupted_run_stops_at_the_same_step(
    task: ClassifierTask, tmp_path: Path, settings: dict[str, Any]
) -> None:
    wanted = recipe(ASCENT, settings)
    whole = unlearn(task, REQUEST, wanted, run_dir=tmp_path / "whole")
    length = len(rows(tmp_path / "whole"))
    assert 2 <= length < 20
    for at in range(1, length + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Fault):
            unlearn(task, REQUEST, wanted, run_dir=folder, checkpoint_every=1, on_step=interrupt(at))
        resumed = unlearn(task, REQUEST, wanted, run_dir=folder, checkpoint_every=1)
        assert resumed.digest == whole.digest
        assert resumed.manifest.notes == whole.manifest.notes
        assert [r.get(ACCURACY) for r in rows(folder)] == [r.get(ACCURACY) for r in rows(tmp_path / "whole")]


def test_the_target_of_a_resumed_run_is_the_one_it_began_with(
    task: ClassifierTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(ASCENT, {"target": 0.7, "every": 1})
    whole = unlearn(task, REQUEST, wanted)
    with pytest.raises(Fault):
        unlearn(task, REQUEST, wanted, run_dir=tmp_path, checkpoint_every=1, on_step=interrupt(2))
    real = StopBelow.prepare

    def other(self: StopBelow, ctx: Context) -> None:
        real(self, ctx)
        ctx.state[TARGET] = ctx.state[TARGET] - 5

    monkeypatch.setattr(StopBelow, "prepare", other)
    assert unlearn(task, REQUEST, wanted, run_dir=tmp_path, checkpoint_every=1).digest == whole.digest
    assert unlearn(task, REQUEST, wanted).digest != whole.digest
