"""The benchmark of full-size pipelines, on the tiny one: all it measures is there, whatever the numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def script(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("full_size", root / "benchmarks" / "full_size.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def measured(script: Any, monkeypatch: pytest.MonkeyPatch, method: str, *words: str) -> dict[str, Any]:
    tiny = ("full_size", "--tiny", "--steps", "2", "--sampling", "3", *words)
    monkeypatch.setattr(sys, "argv", list(tiny))
    args = script.arguments()
    found: dict[str, Any] = json.loads(json.dumps(script.Worker(args).measure(method)))
    assert method in script.line(method, found)
    return found


@pytest.mark.parametrize("method", ["srs_me", "uce", "ablating_concepts", "forget_me_not", "salun"])
def test_methods_are_measured(script: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    found = measured(script, monkeypatch, method, *(["--confined", "--checkpointing"] if method == "salun" else []))
    assert found["tensors"] > 0
    assert found["patch_bytes"] > 0
    assert found["pipeline"] > 4e6
    assert found["predicted"] == pytest.approx(found["pipeline"], rel=5)
    assert found["shared"]["weights"][0] > 5e5
    if method == "uce":
        assert "seconds" not in found
    else:
        assert min(found[n] for n in ("seconds", "over_plain", "over_plain_kv")) > 0
    if method == "salun":
        assert found["tensors"] <= 20


def test_half_precision_and_plain_passes(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(script, monkeypatch, "plain", "--repeat", "0")["seconds"] > 0
    found = measured(script, monkeypatch, "esd", "--dtype", "bfloat16", "--repeat", "0")
    assert found["seconds"] > 0
    assert "weights, half precision" in found["plan"]


def test_each_runs_in_a_process_of_its_own(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["full_size", "--tiny", "--steps", "1", "--methods", "uce", "-o", str(file)])
    script.main()
    found = json.loads(file.read_text())
    assert found["runs"]["uce"]["peak"] > 0
    assert set(found["versions"]) == {"torch", "diffusers", "transformers"}
    assert "uce" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", ["full_size", "--methods", "nothing"])
    with pytest.raises(SystemExit):
        script.arguments()
