"""``expunge erase``: concepts from a configuration to patches, effects and reports; undo on files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from expunge.cli import app
from expunge.config import RunConfig, load_config
from expunge.diffusion import erase as erasing
from expunge.metrics.judge import canvas_judge
from expunge.patch import Dense, Manifest, Patch
from expunge.report.model import Report
from expunge.request import ForgetRequest
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

CONFIG = Path(__file__).parents[2] / "configs/canvas_t2i_concepts_srs_me.yaml"
TEXT = """
name: several
task: {family: text_to_image, model: {name: canvas}, data: {name: canvas, limit: 48, test_limit: 48}, judge: canvas}
request: {concept: star}
recipe:
  method: srs_me
  prompts: ["a {}"]
  protect_others: false
  beta: 0.05
  batch_size: 2
  threshold: null
  optim: {max_steps: 3, epochs: 5}
controls: false
attacks: []
"""


@pytest.fixture(scope="module")
def made():
    found = tiny_text_to_image(n_train=32, n_test=16)
    found.judge = canvas_judge()
    found.asks = found.asks[::3]
    return found


@pytest.fixture
def tiny(monkeypatch, made, tmp_path):
    """The command with a tiny pipeline in place of the one that is configured."""
    monkeypatch.setattr(erasing.experiment, "make_task", lambda _: made)
    (tmp_path / "c.yaml").write_text(TEXT)
    return tmp_path


def command(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def erase(folder, *words):
    return command("erase", folder / "c.yaml", *words, "--no-progress")


@pytest.mark.parametrize("at_once", [True, False])
def test_patches_effects_and_reports(tiny, monkeypatch, at_once):
    out = tiny / "out"
    words = ("ring; star", "-o", out, *(["--at-once"] if at_once else []))
    result = erase(tiny, *words)
    assert result.exit_code == 0, result.output
    assert "33 of 64" in result.stdout
    assert result.stdout.index("directions left") < result.stdout.index("keys and values of the concept")
    assert "0 (rounding)" in result.stdout
    patches = {n: Patch.load(out / n / "patch.safetensors") for n in ("ring", "star")}
    assert patches["ring"].manifest.recipe["objective"]["prompts"] == ["a ring"]
    assert patches["ring"].manifest.findings["concept_shift"]["protected"] == ["", "a star"]
    for name, patch in patches.items():
        report = Report.load_json(out / name / "report.json")
        assert [r.name for r in report.rows] == ["untouched", "own patch", "all patches", "recovered"]
        assert report.digests["patch"] == patch.digest
        assert len(report.history) == 3
        assert {"correlation", "energy"} <= set(report.history[0])
        assert (out / name / "report.html").exists()
    assert (out / "run.json").exists() == at_once
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/report.json")}
    assert erase(tiny, *words).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/report.json")} == stamps, "nothing is measured twice"

    monkeypatch.chdir(out)  # the commands that the report names
    for line in Report.load_json(out / "ring/report.json").undo:
        assert command(*line.split()[1:]).exit_code == 0
    assert command("apply", "base.safetensors", "star/patch.safetensors", "-o", "star.safetensors").exit_code == 0
    recovered, alone, both = (load_file(f"{n}.safetensors") for n in ("with_ring", "star", "forgotten"))
    assert all(torch.equal(recovered[n], alone[n]) for n in alone)
    assert not all(torch.equal(both[n], alone[n]) for n in alone)


def test_earlier_concepts_are_protected(tiny):
    assert erase(tiny, "ring", "-o", tiny / "first").exit_code == 0
    patch = tiny / "first/ring/patch.safetensors"
    report = Report.load_json(tiny / "first/ring/report.json")
    assert [r.name for r in report.rows] == ["untouched", "own patch"]
    result = erase(tiny, "star", "--earlier", f"ring={patch}", "-o", tiny / "second")
    assert result.exit_code == 0, result.output
    facts = Patch.load(tiny / "second/star/patch.safetensors").manifest.findings
    assert facts["concept_shift"]["protected"] == ["", "a ring"]
    later = {(e["erased"], e["on"]): e for e in facts["effects"]}
    assert later["ring", "star"]["later"]
    assert later["star", "ring"]["protected"]
    assert any("came later" in line for line in Report.load_json(tiny / "second/star/report.json").not_shown)
    again = erase(tiny, "ring", "--earlier", f"ring={patch}", "-o", tiny / "third")
    assert "an earlier patch of 'ring' already" in again.stderr
    manifest = Manifest(base_digest="0", base_tensors={"w": "0"}, request=ForgetRequest.concept("ring").model_dump())
    Patch({"w": Dense(torch.ones(1))}, manifest).save(tiny / "foreign.safetensors")
    foreign = erase(tiny, "star", "--earlier", f"ring={tiny / 'foreign.safetensors'}", "-o", tiny / "fourth")
    assert "the earlier patch of 'ring': the model has another architecture" in foreign.stderr
    assert not (tiny / "fourth").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name a configuration file and the concepts"),
        (("ring; ring",), "'ring' is named twice"),
        (("ring; rong",), "did you mean"),
        (("ring", "--weights", "equal"), "--weights belongs to --at-once"),
        (("ring", "--request.concept", "star"), "the concepts are named after the configuration"),
        (("ring", "--earlier", "ring"), "write it as name=patch.safetensors"),
        (("ring", "--recipe.prompts", "[a ring]"), "write {} for its name"),
        (("ring; star; moon; heart; cross; circle",), "leaves no direction of 64"),
        (("ring", "--recipe", "uce"), "need the space 'concept_shift'"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(tiny, monkeypatch, words, told):
    monkeypatch.setattr(erasing, "erase_concepts", lambda *_, **__: pytest.fail("work began"))
    result = erase(tiny, *words, "-o", tiny / "out")
    assert result.exit_code not in (0, 1)
    assert told in result.stderr
    assert not (tiny / "out").exists()


def test_the_shipped_configuration_is_valid():
    config = load_config(RunConfig, CONFIG)
    assert config.build_recipe().space.part_name == "concept_shift"
    assert json.loads(config.model_dump_json())["task"]["judge"] == "canvas"
