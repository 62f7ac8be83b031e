"""The tour of text-to-image models, reduced: concepts go, the rest stays, revoking gives back the bits."""

import pytest

from expunge.config import RunConfig, Source, parse_config
from expunge.demo import diffusion
from expunge.demo.diffusion import run_diffusion_demo
from expunge.errors import ConfigError


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    said = []
    return run_diffusion_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, say=said.append), said


@pytest.mark.parametrize("axis", ["object", "style"])
def test_the_concept_goes_and_the_rest_stays(tour, axis):
    report = tour[0].reports[axis]
    values = {r.name: {k: e.value for k, e in r.metrics.items()} for r in report.rows}
    before, after, still = values["untouched"], values["srs_me"], values["lr = 0"]
    assert before["gen_ua"] < 35
    assert after["gen_ua"] > 60
    assert after["gen_ira"] > before["gen_ira"] - 12
    assert after["gen_cra"] > before["gen_cra"] - 12
    assert still["gen_ua"] == before["gen_ua"]
    assert "ra" not in after  # what it draws says nothing about accuracy on retained samples


def test_the_report_shows_images(tour):
    result, _ = tour
    section = result.reports["object"].samples
    assert any(row.forgotten for row in section.rows)
    text = (result.folder / "object/report.html").read_text("utf-8")
    assert "What the model draws" in text
    assert "How sure the model is" not in text
    assert any((result.folder / "object/figures").iterdir())


def test_revoking_and_undo_are_exact(tour):
    result, said = tour
    assert result.recovered
    assert result.undone
    assert any("equal bit for bit" in line for line in said if isinstance(line, str))


def test_capacity_is_told_before_the_run(tour):
    notes = tour[0].reports["object"].not_shown
    assert any("directions left" in note for note in notes)


@pytest.mark.parametrize("axis", diffusion.CONCEPTS)
def test_every_method_of_the_whole_tour_has_valid_settings(axis):
    for name, settings in diffusion.methods_of(axis).items():
        task = {"family": "text_to_image", "data": {"name": "canvas"}, "axis": axis}
        body = {"name": name, "task": task, "request": {"concept": diffusion.CONCEPTS[axis]}}
        config = parse_config(RunConfig, Source({**body, "recipe": {"method": name, **settings}}, "test"))
        assert config.build_recipe().name == name


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_diffusion_demo(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
