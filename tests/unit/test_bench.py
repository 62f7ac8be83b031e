"""Benchmarks: cells that resume, failures that do not stop the rest, the table."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from typer.testing import CliRunner

from expunge.bench import BenchResult, bench, control_recipes, save
from expunge.bench_files import FRAME
from expunge.bench_table import Cell, Line, columns, lines, markdown
from expunge.cli import app
from expunge.config import BenchConfig, Source, parse_config
from expunge.errors import CapabilityError
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
    assert float(row["ra_avg"]) == pytest.approx(mean(numbers))
    assert float(row["ra_std"]) == pytest.approx(stdev(numbers))
    assert row["ra_n"] == row["runs"] == "2"
    assert next(r for r in rows if r["model"] == "untouched")["ra_std"] == ""
    text = (done.folder / "table.md").read_text()
    assert f"{mean(numbers):.2f} ± {stdev(numbers):.2f}" in text
    stored = json.loads((done.folder / "results.json").read_text())
    assert len(stored["cells"]) == len(done.cells)


def test_the_frame_has_a_row_per_cell_and_metric(done: BenchResult) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    frame = done.frame()
    assert frame.column_names == list(FRAME)
    assert frame.num_rows == sum(len(c.metrics) for c in done.cells)
    rows = frame.to_pylist()
    assert parquet.read_table(done.folder / "results.parquet").to_pylist() == rows
    cell = next(c for c in done.cells if c.label == "salun" and c.seed == 1)
    (ra,) = [r for r in rows if (r["label"], r["seed"], r["metric"]) == ("salun", 1, "ra")]
    assert {k: ra[k] for k in cell.metrics["ra"]} == cell.metrics["ra"]
    assert (ra["recipe"], ra["role"], ra["request"], ra["folder"]) == ("salun", "after", "class 3", cell.folder)
    assert ra["config_digest"] == json.loads((done.folder / "results.json").read_text())["config"]
    assert len({r["model_digest"] for r in rows}) == 1 < len({r["recipe_digest"] for r in rows})
    assert json.loads(ra["versions"])["torch"]
    text = list(csv.DictReader((done.folder / "results.csv").read_text().splitlines()))
    assert [(r["label"], r["metric"]) for r in text] == [(r["label"], r["metric"]) for r in rows]
    assert [r["value"] for r in text] == ["" if r["value"] is None else repr(r["value"]) for r in rows]


def test_a_failure_and_a_missing_figure_have_rows() -> None:
    missing = {"value": None, "n": 0, "note": "too few"}
    cells = [Cell("a", "after", "r", 0, "x", error="boom"), Cell("b", "after", "r", 0, "x", {"mia": missing})]
    failed, unmeasured = BenchResult(Path(), cells, [{}, {}]).rows()
    assert (failed["label"], failed["metric"], failed["value"], failed["error"]) == ("a", None, None, "boom")
    assert (unmeasured["metric"], unmeasured["value"], unmeasured["note"]) == ("mia", None, "too few")
    with pytest.raises(ValueError, match="shorter"):
        BenchResult(Path(), cells, [{}]).rows()


def test_a_table_without_pyarrow_says_so(
    done: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "results.parquet").write_bytes(b"of an earlier run")
    save(replace(done, folder=tmp_path), "t", "0" * 64)
    assert "needs pyarrow" in caplog.text
    assert not (tmp_path / "results.parquet").exists()
    assert (tmp_path / "results.csv").read_text() == (done.folder / "results.csv").read_text()
    with pytest.raises(CapabilityError, match="pip install pyarrow"):
        done.frame()


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


def test_every_cell_is_scored_against_the_untouched_model(done: BenchResult) -> None:
    values = {c.label: c.value for c in done.cells if c.seed == 0}
    original, test, gone = (values["untouched"]("ta"), values["salun"]("ta"), values["salun"]("forget_test"))
    assert original is not None
    assert test is not None
    assert gone is not None
    wanted = (1 - (original - test) / 100) / (1 + gone / 100)
    assert values["salun"]("aus") == pytest.approx(wanted)
    assert values["untouched"]("aus") != pytest.approx(wanted)


def test_measurements_that_train_are_made_but_not_of_controls(done: BenchResult, tmp_path: Path) -> None:
    changes = {"methods": BASE["methods"][1:], "seeds": [0], "reference": None, "evaluate": {"relearn": {}}}
    result = bench(config(tmp_path / "out", **changes))
    assert result.failed == []
    assert {c.role: "relearn_steps" in c.metrics for c in result.cells} == {
        "before": True,
        "after": True,
        "control": False,
    }
    assert not any("relearn_steps" in c.metrics for c in done.cells)


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


def test_models_that_draw_have_the_columns_of_drawn_images() -> None:
    def row(**values: float) -> Line:
        return Line("r", "m", "after", {k: [v] for k, v in values.items()}, 1, 0)

    drawn = [row(ua=1.0, ta=2.0, aus=3.0, gen_ua=1.0, gen_ira=2.0, gen_cra=4.0, run_time=5.0)]
    assert columns(drawn) == ["gen_ua", "gen_ira", "gen_cra", "run_time"]
    assert columns([row(ua=1.0, ta=2.0, aus=3.0)]) == ["ua", "ta", "aus"]
