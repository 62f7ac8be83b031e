"""The tour, reduced: it runs, undo is exact, and it never removes what it did not make."""

from pathlib import Path
from typing import Any

import pytest

from expunge.demo import digits
from expunge.demo.common import fresh_folder
from expunge.demo.digits import DemoResult, run_demo
from expunge.errors import ConfigError


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[Any]]:
    said: list[Any] = []
    return run_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, say=said.append), said


def test_the_class_is_forgotten_and_the_rest_is_kept(tour: tuple[DemoResult, list[Any]]) -> None:
    report = tour[0].reports["class"]
    values = {r.role: {k: e.value for k, e in r.metrics.items()} for r in report.rows}
    assert values["before"]["ua"] < 10
    assert values["after"]["ua"] > 90
    assert values["after"]["ta"] > 90
    assert values["reference"]["ua"] == 100
    assert abs(values["after"]["ra"] - values["reference"]["ra"]) < 10
    lr_zero = next(r for r in report.rows if r.name == "lr = 0")
    assert lr_zero.metrics["ua"].value == values["before"]["ua"]


def test_undo_is_exact_and_said(tour: tuple[DemoResult, list[Any]]) -> None:
    result, said = tour
    assert result.undone
    assert any("bit for bit" in line for line in said if isinstance(line, str))
    for path in result.patches["class"].values():
        assert any(str(path) in line for line in said if isinstance(line, str))
        assert path.is_file()
    assert (result.folder / "class/report.html").is_file()


def test_every_method_of_the_whole_tour_has_valid_settings() -> None:
    from expunge.config import RunConfig, parse_config

    assert "scar" in digits.SETTINGS["class"]
    for kind, methods in digits.SETTINGS.items():
        assert next(iter(methods)) == "salun"
        for item in methods.items():
            assert parse_config(RunConfig, digits._source(kind, digits.TASK, item)).build_recipe().name == item[0]


def test_the_training_leaves_what_scar_needs(tour: tuple[DemoResult, list[Any]]) -> None:
    from expunge.features.statistics import ClassStatistics

    found = ClassStatistics.load(tour[0].folder / "original.statistics.safetensors")
    assert found.classes.tolist() == list(range(10))


def test_the_tour_can_be_repeated_but_not_over_other_things(tour: tuple[DemoResult, list[Any]], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    fresh_folder(tour[0].folder)  # made by a tour: replaced
    assert [p.name for p in tour[0].folder.iterdir()] == ["demo.txt"]
