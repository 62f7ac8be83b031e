"""Mistakes that people make: one clear line, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from expunge.cli import app
from expunge.config.text import parse_overrides
from expunge.data.decode import decode_image
from expunge.diffusion.protocols import Choices, prompt_list
from expunge.errors import ConfigError, DataError, ResourceError
from expunge.files import check_writable
from expunge.guards import check_device
from expunge.metrics.estimate import Estimate
from expunge.report.model import Report, Row
from expunge.report.words import headline, percent


def test_a_short_option_is_told_from_a_file() -> None:
    with pytest.raises(ConfigError, match="--output FOLDER"):
        parse_overrides(["c.yaml", "-o", "runs/x"])
    assert parse_overrides(["c.yaml", "--seed", "-1"]) == (["c.yaml"], {"seed": -1})


def test_the_branches_of_a_choice_are_one_message() -> None:
    from expunge.config.judging import JudgingConfig

    with pytest.raises(ConfigError) as caught:
        JudgingConfig(judge="canvass")
    assert "literal[" not in str(caught.value)
    assert "should be 'canvas', or Input should be a valid dictionary (got 'canvass')" in str(caught.value)


def test_a_folder_is_checked_and_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="is a file, not a folder"):
        check_writable(tmp_path / "file/b")


def test_errors_of_the_disk_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "there/x.csv")

    monkeypatch.setattr("expunge.diffusion.protocols.prompt_list", fail)
    result = CliRunner().invoke(app, ["prompts", "canvas", "-o", str(tmp_path / "x.csv")])
    assert (result.exit_code, result.stderr) == (6, "error: there/x.csv: permission denied\n")


def test_a_device_that_is_not_there() -> None:
    check_device("cpu")
    with pytest.raises(ConfigError, match="device 'nonsense' is not available here"):
        check_device("nonsense")


def test_choices_of_prompt_lists_are_named_as_options() -> None:
    with pytest.raises(ConfigError, match=r"needs 'source' \(--from\)"):
        prompt_list("i2p")
    with pytest.raises(ConfigError, match=r"^images 0: every prompt"):
        prompt_list("canvas", Choices(images=0))
    with pytest.raises(ConfigError, match=r"^seeds 0: "):
        prompt_list("canvas", Choices(seeds=0))


def test_a_file_that_is_no_image() -> None:
    with pytest.raises(DataError, match="none of the formats JPEG") as caught:
        decode_image(b"hello", where="x.png")
    assert "0x" not in str(caught.value)


def test_drawn_images_have_a_headline_of_their_own() -> None:
    figures = {"ua": Estimate(100.0, n=6, unit="%"), "ta": Estimate(90.0, n=42, unit="%")}
    plain = Report(title="t", request={}, rows=[Row("m", "after", figures)])
    assert "The model recognises" in headline(plain)
    drawn = figures | {"gen_ua": figures["ua"], "gen_ira": figures["ta"]}
    text = headline(Report(title="t", request={}, rows=[Row("m", "after", drawn)]))
    assert text.startswith("Of images asked for others of its kind it recognises 90.0 %. No retrained model")


def test_figures_are_readable() -> None:
    assert percent(99.99999999999999) == "100 %"
    assert percent(99.9999) == ">99.99 %"
    assert str(Estimate(131072.0, unit="bytes")) == "131,072 bytes"
    assert str(Estimate(92.5, unit="%")) == "92.5 %"
