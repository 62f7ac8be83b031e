"""Benchmarks: cells that resume, failures that do not stop the rest, the table."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from typer.testing import CliRunner

from expunge.bench import BenchResult, bench, control_recipes
from expunge.bench_table import Cell, lines, markdown
from expunge.cli import app
from expunge.config import BenchConfig, Source, parse_config
from expunge.method import build_recipe

BASE: dict[str, Any] = {
    "name": "tiny",
    "task": {"model": {"name": "mlp", "input_shape": [1, 8, 8]}, "data": {"name": "digits", "limit": 100}},
    "requests": [{"class": 3}],
    "seeds": [0, 1],
    "methods": [
        {"method": "salun", "batch_size": 64, "optim": {"lr": 0.05, "epochs": 1}},
        {"method": "fine_tune", "batch_size": 64, "optim": {"lr": 0.05, "epochs": 1}},
    ],
    "reference": {"method": "retrain", "batch_size": 64, "optim": {"epochs": 1, "milestones": []}},
    "attacks": ["mia"],
}


def config(folder: Path, **changes: Any) -> BenchConfig:
    return parse_config(BenchConfig, Source({**BASE, "output": str(folder), **changes}, "test"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return bench(config(tmp_path_factory.mktemp("bench") / "out"))


def test_every_cell_ran(done: BenchResult) -> None:
    assert done.failed == []
    assert done.exit_code == 0
    named = [(c.label, c.role, c.seed) for c in done.cells]
    assert named == [
        ("untouched", "before", 0),
        ("retrained", "reference", 0),
        ("retrained", "reference", 1),
        ("salun", "after", 0),
        ("salun", "after", 1),
        ("salun, lr = 0", "control", 0),
        ("salun, random mask", "control", 0),
        ("fine_tune", "after", 0),
        ("fine_tune", "after", 1),
        ("fine_tune, lr = 0", "control", 0),
    ]
    assert all((done.folder / c.folder / "cell.json").exists() for c in done.cells)
    patched = [c for c in done.cells if c.role != "before"]
    assert all((done.folder / c.folder / "patch.safetensors").exists() for c in patched)


def test_the_table_is_mean_and_deviation_over_seeds(done: BenchResult) -> None:
    values = [c.value("ra") for c in done.cells if c.label == "salun"]
    assert None not in values
    numbers = [float(v) for v in values if v is not None]
    rows = list(csv.DictReader((done.folder / "table.csv").read_text().splitlines()))
    row = next(r for r in rows if r["model"] == "salun")
    assert float(row["ra"]) == pytest.approx(mean(numbers))
    assert float(row["ra_std"]) == pytest.approx(stdev(numbers))
    assert row["ra_n"] == row["runs"] == "2"
    assert next(r for r in rows if r["model"] == "untouched")["ra_std"] == ""
    text = (done.folder / "table.md").read_text()
    assert f"{mean(numbers):.2f} ± {stdev(numbers):.2f}" in text
    stored = json.loads((done.folder / "results.json").read_text())
    assert len(stored["cells"]) == len(done.cells)


def test_the_gap_is_to_the_reference_with_the_same_seed(done: BenchResult) -> None:
    keys = ("ua", "ra", "ta", "mia")
    by = {(c.label, c.seed): c for c in done.cells}
    for seed in (0, 1):
        ours, theirs = by["fine_tune", seed], by["retrained", seed]
        measured = [(ours.value(k), theirs.value(k)) for k in keys]
        if any(None in pair for pair in measured):  # too few samples for the attack: no gap, and it is not made up
            assert ours.value("avg_gap") is None
        else:
            expected = mean(abs(a - b) for a, b in measured if a is not None and b is not None)
            assert ours.value("avg_gap") == pytest.approx(expected)
    assert by["retrained", 0].value("avg_gap") is None


def test_finished_cells_are_taken_over_and_changed_ones_are_not(done: BenchResult) -> None:
    again = bench(config(done.folder))
    assert all(c.reused for c in again.cells)
    assert [c.metrics for c in again.cells] == [c.metrics for c in done.cells]
    more = bench(config(done.folder, seeds=[0, 1, 2], controls=False, reference=None))
    assert [(c.label, c.seed) for c in more.cells if not c.reused] == [("salun", 2), ("fine_tune", 2)]
    methods = [{**BASE["methods"][0], "keep": 0.25}]
    changed = bench(config(done.folder, methods=methods, seeds=[0], controls=False, reference=None))
    assert [c.label for c in changed.cells if not c.reused] == ["salun"]


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    import yaml

    bad = {"method": "random_label", "label": "explodes", "optim": {"lr": 1e30, "epochs": 2}}
    data = {**BASE, "methods": [bad, BASE["methods"][1]], "seeds": [0], "reference": None, "controls": False}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(data))
    result = CliRunner().invoke(app, ["bench", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 4
    assert "explodes" in result.stderr
    assert "DivergedError" in result.stderr
    cells = {c["label"]: c for c in json.loads((tmp_path / "out/results.json").read_text())["cells"]}
    assert cells["explodes"]["error"].startswith("DivergedError")
    assert cells["fine_tune"]["error"] == ""
    assert "| explodes | 0 (1 failed) | failed |" in (tmp_path / "out/table.md").read_text()
    # the failed one is tried again, the finished one is not
    fixed = {**data, "methods": [{**bad, "optim": {"lr": 0.01, "epochs": 1}}, BASE["methods"][1]]}
    path.write_text(yaml.safe_dump(fixed))
    result = CliRunner().invoke(app, ["bench", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "3 cells, 2 of them from earlier runs" in result.stdout


def test_an_interrupted_benchmark_continues_where_it_stopped(tmp_path: Path, done: BenchResult) -> None:
    def stop(number: int, total: int, cell: Cell) -> None:
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(config(tmp_path / "out"), on_cell=stop)
    assert not (tmp_path / "out/table.md").exists()
    resumed = bench(config(tmp_path / "out"))
    assert [c.reused for c in resumed.cells] == [True] * 4 + [False] * 6
    for mine, theirs in zip(resumed.cells, done.cells, strict=True):
        assert mine.value("ua") == theirs.value("ua")


def test_controls_are_shortened_only_where_nothing_accumulates() -> None:
    frozen = dict(control_recipes(build_recipe({"method": "salun", "optim": {"epochs": 7}})))
    moving = dict(control_recipes(build_recipe({"method": "salun", "optim": {"epochs": 7, "norm": "train"}})))
    assert (frozen["lr = 0"].optim.epochs, moving["lr = 0"].optim.epochs) == (1, 7)
    assert frozen["random mask"].optim.epochs == 7
    assert "random mask" not in dict(control_recipes(build_recipe("fine_tune")))


def test_names_cannot_break_the_table() -> None:
    cell = Cell("a|b\x1b[31m<script>", "after", "class 0", 0, "x", {"ua": {"value": 1.0}})
    text = markdown(lines([cell]), "t", "0" * 64)
    assert "\x1b" not in text
    assert "<script>" not in text
    assert "a\\|b" in text
