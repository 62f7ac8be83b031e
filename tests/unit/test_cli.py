"""The commands, run as a user runs them, on the bundled digits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from expunge.cli import app
from expunge.config import RunConfig, load_config
from expunge.digest import combine, state_digests
from expunge.files import read_safetensors, sha256_file
from expunge.models.weights import save_weights
from expunge.patch import Dense, Manifest, Patch, Replace, Sparse

TASK = """
task:
  model: {name: mlp, input_shape: [1, 8, 8]WEIGHTS}
  data: {name: digits, limit: 300}
"""
TRAIN = "name: original\nbatch_size: 64\noptim: {lr: 0.05, epochs: 3, milestones: [], augment: false}\n" + TASK
RUN = (
    "name: forget3\nrequest: {class: 3}\nrecipe: {method: salun, batch_size: 64, optim: {lr: 0.05, epochs: 2}}\n" + TASK
)


def call(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained original, a finished run and its patch; tests only add to it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "train.yaml").write_text(TRAIN.replace("WEIGHTS", ""))
    call("train", folder / "train.yaml", f"--output={folder / 'w.safetensors'}")
    (folder / "run.yaml").write_text(RUN.replace("WEIGHTS", ", weights: w.safetensors"))
    call("run", folder / "run.yaml", "--output", folder / "run")
    return folder


def test_help_names_every_command() -> None:
    text = call("--help").stdout
    for name in [
        "demo",
        "train",
        "run",
        "bench",
        "evaluate",
        "apply",
        "revert",
        "info",
        "list",
        "report",
        "convert",
        "schema",
    ]:
        assert name in text
        assert "Usage" in call(name, "--help").stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", call("--version").stdout)


def test_a_run_leaves_everything_behind(work: Path) -> None:
    names = {p.name for p in (work / "run").iterdir()}
    assert {"patch.safetensors", "report.html", "report.json", "log.jsonl", "config.yaml", "run.json"} <= names
    roles = [r["role"] for r in json.loads((work / "run/report.json").read_text())["rows"]]
    assert roles == ["before", "after", "control", "control"]
    resolved = load_config(RunConfig, work / "run/config.yaml")
    assert resolved.build_recipe() == load_config(RunConfig, work / "run.yaml").build_recipe()


def test_a_finished_run_is_not_repeated_and_a_changed_one_is_refused(work: Path) -> None:
    before = {p: sha256_file(p) for p in (work / "run").iterdir() if p.suffix in (".safetensors", ".json", ".html")}
    again = call("run", work / "run.yaml", "--output", work / "run")
    assert "nothing was run again" in again.stdout
    assert {p: sha256_file(p) for p in before} == before
    refused = call("run", work / "run.yaml", "--output", work / "run", "--recipe.optim.lr", "0.01", code=2)
    assert "optim.lr: 0.05 there, 0.01 here" in refused.stderr
    assert {p: sha256_file(p) for p in before} == before


def test_a_changed_evaluation_makes_a_new_report_for_the_same_patch(work: Path) -> None:
    for attacks, count in (("[mia]", 1), ("[mia, mia_threshold]", 2)):
        call("run", work / "run.yaml", "--output", work / "other", "--controls", "false", "--attacks", attacks)
        report = json.loads((work / "other/report.json").read_text())
        assert sum(name in report["rows"][1]["metrics"] for name in ("mia", "mia_threshold")) == count
        assert [r["role"] for r in report["rows"]] == ["before", "after"]
    assert sha256_file(work / "other/patch.safetensors") == sha256_file(work / "run/patch.safetensors")


def contents(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Digest of every tensor, and the metadata; the order of metadata in the header is not fixed by the format."""
    tensors, metadata = read_safetensors(path)
    return state_digests(tensors), metadata


def test_apply_and_revert_are_exact(work: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    call("apply", work / "w.safetensors", work / "run/patch.safetensors", "-o", out)
    undo = tmp_path / "out.undo.safetensors"
    assert undo.stat().st_size < 1.5 * (work / "run/patch.safetensors").stat().st_size
    result = call("revert", out, "-o", back)
    assert "bit for bit" in result.stdout
    assert contents(back) == contents(work / "w.safetensors")
    assert contents(out) != contents(back)
    base_digest = Patch.load(work / "run/patch.safetensors").manifest.base_digest
    assert combine(state_digests(read_safetensors(back)[0])) == base_digest
    call("revert", out, "-o", tmp_path / "b2.safetensors", "--base", work / "w.safetensors")
    assert contents(tmp_path / "b2.safetensors") == contents(work / "w.safetensors")


def make_patches(folder: Path) -> tuple[Path, list[Path]]:
    """A base with awkward values and three patches on it."""
    base = {
        "a": torch.tensor([0.1, -0.0, 3e7, 1e-30, 0.5]),
        "b": torch.linspace(-1, 1, 40).reshape(8, 5).to(torch.bfloat16),
        "count": torch.tensor(7),
    }
    save_weights(base, folder / "base.safetensors", {"note": "kept"})
    digests = state_digests(base)
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests)
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[::3] = True
    changes: list[dict[str, Any]] = [
        {"a": Dense(torch.tensor([1e-9, 0.0, 0.1, 1.0, -0.5]))},
        {"b": Sparse(mask, torch.full((int(mask.sum()),), 0.3)), "a": Dense(torch.full((5,), 0.7))},
        {"count": Replace(torch.tensor(9))},
    ]
    paths = []
    for i, change in enumerate(changes):
        paths.append(Patch(change, manifest).save(folder / f"p{i}.safetensors"))
    return folder / "base.safetensors", paths


def test_one_of_several_patches_comes_off(tmp_path: Path) -> None:
    base, (p0, p1, p2) = make_patches(tmp_path)
    call("apply", base, p0, p1, p2, "-o", tmp_path / "all.safetensors")
    call("apply", base, p2, p0, "-o", tmp_path / "two.safetensors")
    call("revert", tmp_path / "all.safetensors", "--patch", p1, "-o", tmp_path / "left.safetensors")
    left, two, every = (read_safetensors(tmp_path / f"{n}.safetensors")[0] for n in ("left", "two", "all"))
    assert state_digests(left) == state_digests(two)
    assert state_digests(left) != state_digests(every)
    call("revert", tmp_path / "left.safetensors", "-o", tmp_path / "back.safetensors")
    assert contents(tmp_path / "back.safetensors") == contents(base)


def test_a_patch_that_stays_has_to_be_found(tmp_path: Path) -> None:
    base, (p0, p1, _) = make_patches(tmp_path)
    call("apply", base, p0, p1, "-o", tmp_path / "all.safetensors")
    elsewhere = tmp_path / "deep"
    elsewhere.mkdir()
    p0.rename(elsewhere / "moved.safetensors")
    words = ("revert", tmp_path / "all.safetensors", "--patch", p1, "-o", tmp_path / "left.safetensors")
    assert "--keep" in call(*words, code=2).stderr
    assert not (tmp_path / "left.safetensors").exists()
    call(*words, "--keep", elsewhere / "moved.safetensors")
    assert (tmp_path / "left.safetensors").exists()


def test_info_tells_the_kinds_of_files_apart(work: Path, tmp_path: Path) -> None:
    from expunge.saliency import Mask

    call("apply", work / "w.safetensors", work / "run/patch.safetensors", "-o", tmp_path / "out.safetensors")
    Mask({"w": torch.tensor([True, False])}, 0.5, 0.0, "", "").save(tmp_path / "mask.safetensors")
    patch = call("info", work / "run/patch.safetensors").stdout
    assert all(word in patch for word in ("patch", "class 3", "salun", "random_label", "saliency_mask", "fc1.weight"))
    assert "undo file" in call("info", tmp_path / "out.undo.safetensors").stdout
    assert "patches applied" in call("info", tmp_path / "out.safetensors").stdout
    assert "patches applied" not in call("info", work / "w.safetensors").stdout
    assert "saliency mask" in call("info", tmp_path / "mask.safetensors").stdout


def test_evaluate_audits_a_given_patch(work: Path, tmp_path: Path) -> None:
    call("evaluate", work / "run.yaml", "--patch", work / "run/patch.safetensors", "-o", tmp_path)
    mine = json.loads((tmp_path / "report.json").read_text())
    theirs = json.loads((work / "run/report.json").read_text())
    for name in ("ua", "ra", "ta"):
        assert mine["rows"][1]["metrics"][name] == theirs["rows"][1]["metrics"][name]
    assert [r["name"] for r in mine["rows"]] == [r["name"] for r in theirs["rows"]]
    words = ("evaluate", work / "run.yaml", "-p", work / "run/patch.safetensors", "-o", tmp_path, "--request.class", 4)
    assert "another request" in call(*words, code=2).stderr or "was made for request" in call(*words, code=2).stderr


def test_report_renders_again(work: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = call("report", work / "run/report.json", "-o", page)
    assert page.read_text() == (work / "run/report.html").read_text()
    assert "UA" in result.stdout
    call("report", work / "run/report.json", "-o", tmp_path / "page.exe", code=2)


def test_train_leaves_samples_out_and_says_which(work: Path, tmp_path: Path) -> None:
    target = tmp_path / "without.safetensors"
    words = ("train", work / "train.yaml", f"--output={target}", "--exclude-class", "3", "--optim.epochs", 1)
    call(*words)
    left_out = json.loads((tmp_path / "without.excluded.json").read_text())
    assert left_out["dataset"] == "digits"
    assert len(left_out["sha256"]) == 64
    assert len(left_out["forget"]) == 30
    assert "exists" in call(*words, code=2).stderr
    # the same file serves as the reference of a run, and of that run only
    reference = ("--reference", f"{{weights: {target}}}", "--controls", "false", "--output")
    call("run", work / "run.yaml", *reference, tmp_path / "r1")
    rows = json.loads((tmp_path / "r1/report.json").read_text())["rows"]
    assert [r["role"] for r in rows] == ["before", "after", "reference"]
    wrong = call("run", work / "run.yaml", *reference, tmp_path / "r2", "--request.class", 4, code=2)
    assert "not the 30 of this request" in wrong.stderr
    both = ("--exclude-fraction", 0.1, "--exclude-class", 3)
    call("train", work / "train.yaml", *both, "--output", tmp_path / "x.safetensors", code=2)


def test_list_shows_parts_and_takes_wildcards() -> None:
    assert "salun" in call("list", "methods").stdout
    found = call("list", "methods", "deep*").stdout
    assert "deepdive_rl" in found
    assert "salun" not in found
    assert "resnet20" in call("list", "*resnet*").stdout
    for kind in ["objectives", "spaces", "protections", "edits", "metrics", "models", "data", "tasks"]:
        call("list", kind)
    assert "did you mean 'methods'" in call("list", "methds", code=2).stderr
    call("list", "methods", "zzz*", code=2)


def test_schema_is_json(tmp_path: Path) -> None:
    assert json.loads(call("schema").stdout)["title"] == "RunConfig"
    call("schema", "bench", "-o", tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["title"] == "BenchConfig"
    call("schema", "bnech", code=2)


def test_convert_takes_tensors_only(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    assert "expunge convert" in call("info", tmp_path / "m.pt", code=3).stderr
    call("convert", tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert read_safetensors(tmp_path / "m.safetensors")[0]["w"].tolist() == [1.0, 1.0]


def test_unexpected_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr("expunge.files.read_safetensors", fail)
    result = call("info", work / "w.safetensors", code=1)
    assert result.stderr.startswith("error: unexpected RuntimeError: odd thing")
    monkeypatch.setenv("EXPUNGE_DEBUG", "1")
    shown = CliRunner().invoke(app, ["info", str(work / "w.safetensors")])
    assert isinstance(shown.exception, RuntimeError)


def test_the_command_line_starts_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, expunge.cli; sys.exit(sum(m in sys.modules for m in ('torch', 'pydantic', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", f"import torch; {code}"], check=False).returncode > 0
