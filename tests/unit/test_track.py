import json
import logging
import sys

import pytest

from expunge.errors import ArtifactError, CapabilityError
from expunge.track import Tracker, read_log

ROWS = [{"step": i, "loss": 1.0 / (i + 1), "epoch": 0} for i in range(4)]


def write(tracker, rows=ROWS, done=0):
    with tracker:
        kept = tracker.start(len(rows), done)
        for row in rows:
            tracker.row(row)
    return kept


def test_log_has_every_row_exactly(tmp_path):
    write(Tracker(tmp_path))
    assert read_log(tmp_path / "log.jsonl") == ROWS


def test_resume_keeps_earlier_rows_and_drops_later_and_torn_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"step": 4, "lo')
    kept = write(Tracker(tmp_path), ROWS[2:], done=2)
    assert kept == ROWS[:2]
    assert read_log(path) == ROWS


def test_a_torn_line_is_an_error_when_not_resuming(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"st')
    with pytest.raises(ArtifactError, match="line 2"):
        read_log(path)


def test_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(Tracker(tmp_path, ["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in ROWS])


def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    write(Tracker(tmp_path, ["wandb"], {"lr": 0.1}))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert read_log(tmp_path / "log.jsonl") == ROWS


def test_a_tracker_that_fails_never_stops_the_run(tmp_path, monkeypatch, caplog):
    class Broken:
        def init(self, **_):
            raise ConnectionError("no key")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    with caplog.at_level(logging.WARNING):
        write(Tracker(tmp_path, ["wandb"]))
    assert "no key" in caplog.text
    assert read_log(tmp_path / "log.jsonl") == ROWS


def test_a_tracker_that_is_not_installed_is_an_error_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CapabilityError, match="pip install"):
        Tracker(tmp_path, ["wandb"])
    with pytest.raises(CapabilityError, match="run folder"):
        Tracker(None, ["tensorboard"])
