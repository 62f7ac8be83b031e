"""The tour of two towers, reduced: both concepts go, the rest stays, patches stack in any order, undo is exact."""

import pytest

from expunge.config import RunConfig, Source, parse_config
from expunge.demo import clip
from expunge.demo.clip import run_clip_demo
from expunge.errors import ConfigError


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    said = []
    return run_clip_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, say=said.append), said


@pytest.mark.parametrize("axis", ["object", "style"])
def test_the_concept_goes_and_the_rest_stays(tour, axis):
    report = tour[0].reports[axis]
    values = {r.name: {k: e.value for k, e in r.metrics.items()} for r in report.rows}
    before, after, control = values["untouched"], values["slug"], values["random layer"]
    assert before["fa1"] > 90
    assert after["fa1"] < 10
    assert after["zs_top1"] > before["zs_top1"] - 6
    assert after["cross_axis"] > before["cross_axis"] - 6
    # a layer drawn at random forgets less, or harms more
    assert control["fa1"] > after["fa1"] + 5 or control["zs_top1"] < after["zs_top1"] - 3


def test_the_report_shows_search_neighbours_and_pictures(tour):
    section = tour[0].reports["object"].contrastive
    assert len(section.findings["chosen"]) == 1
    names = {"circle", "square", "triangle", "star", "cross", "heart", "moon"}
    assert {r.name for r in section.neighbours.rows} == names
    assert sum(p.forgotten for p in section.gallery) == 8
    assert all(p.after != "ring" for p in section.gallery if p.forgotten)
    folder = tour[0].folder / "object"
    assert {p.name for p in (folder / "figures").iterdir()} >= {"pareto.svg", "search.svg", "cosines.svg"}
    assert "Before and after" in (folder / "report.html").read_text("utf-8")


def test_both_patches_on_one_model(tour):
    result, said = tour
    assert result.together["ring"] < 10
    assert result.together["neon"] < 30  # of 40 images
    assert result.together["other objects"] > 85
    assert any("the same weights, bit for bit" in line for line in said if isinstance(line, str))


def test_undo_is_exact_and_patches_are_small(tour):
    result, _ = tour
    assert result.undone
    patch = result.patches["object"]["slug"]
    assert patch.stat().st_size < 60_000  # the tensors are under 1 kB; the record of the search is the rest


def test_every_method_of_the_whole_tour_has_valid_settings():
    for name, settings in clip.METHODS.items():
        body = {"name": name, "task": {"family": "clip", "data": {"name": "canvas"}}, "request": {"concept": "ring"}}
        config = parse_config(RunConfig, Source({**body, "recipe": {"method": name, **settings}}, "test"))
        assert config.build_recipe().name == name


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_clip_demo(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
