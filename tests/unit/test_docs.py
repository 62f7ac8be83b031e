"""What the documents say is true: examples run, names exist, links lead somewhere, every metric is explained."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from expunge.method import build_recipe, settings_model
from expunge.registry import registry
from expunge.tasks.base import Split

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), flags=re.M | re.S)


@pytest.fixture
def fresh_registry(monkeypatch):
    list(registry)  # whatever is loaded later would be forgotten with the copy
    monkeypatch.setattr(registry, "entries", dict(registry.entries))
    settings_model.cache_clear()
    yield
    settings_model.cache_clear()


def as_module(source: str, name: str, monkeypatch) -> ModuleType:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def test_readme_example_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = blocks(root / "README.md", "python")
    names = as_module(source, "readme_example", monkeypatch).__dict__
    assert Path("forget-3.safetensors").stat().st_size > 1000
    assert "<html" in Path("report.html").read_text("utf-8")
    rows = {row.name: row.metrics["ua"].value for row in names["report"].rows}
    assert rows["untouched"] < 10 < 90 < rows["salun"]


def test_readme_commands_run(root, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from expunge.cli import app

    monkeypatch.chdir(tmp_path)
    for name, text in zip(("train.yaml", "run.yaml"), blocks(root / "README.md", "yaml"), strict=True):
        Path(name).write_text(text, "utf-8")
    shown = [line for block in blocks(root / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in shown if line.startswith("expunge ")]
    assert len(commands) > 4
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
    assert Path("runs/digits-forget-3/report.html").exists()
    assert Path("restored.safetensors").read_bytes() != Path("forgotten.safetensors").read_bytes()


def test_readme_names_registered_methods(root):
    table = re.findall(r"\(docs/methods/(\w+)\.md\)", (root / "README.md").read_text("utf-8"))
    known = {entry.name for entry in registry.list("method")}
    assert set(table) - {"README"} <= known
    assert len(table) > 4


def test_contributing_method_is_complete(root, fresh_registry, monkeypatch):
    source = next(b for b in blocks(root / "CONTRIBUTING.md", "python") if "@method(" in b)
    before = {e.name for e in registry.list("method")}
    as_module(source, "contributed_method", monkeypatch)
    assert {e.name for e in registry.list("method")} - before == {"layer_grad"}
    recipe = build_recipe({"method": "layer_grad", "targets": ["fc"], "optim": {"lr": 0.5}})
    assert recipe.space.targets == ("fc",)
    assert (recipe.optim.lr, recipe.optim.epochs) == (0.5, 5)


def test_contributing_objective_trains(root, fresh_registry, monkeypatch):
    from expunge.context import Context
    from expunge.tasks.tiny import tiny_classifier

    source = next(b for b in blocks(root / "CONTRIBUTING.md", "python") if "@part(" in b)
    module = as_module(source, "contributed_objective", monkeypatch)
    task = tiny_classifier()
    split = Split({"forget": torch.arange(4), "retain": torch.arange(4, 12)})
    loss = module.Uniform(alpha=0.5).bind(Context(task, split))
    terms = loss({role: task.load(role, split[role], split) for role in ("forget", "retain")})
    assert terms["uniform"].values.shape == (4,)
    assert terms["retain"].weight == 0.5
    n = len(task.classes)
    assert float(terms["uniform"].values.detach().min()) >= float(torch.tensor(n).float().log()) - 1e-6


def test_every_metric_is_explained(root):
    text = (root / "docs/evidence.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    assert explained == {e.name for e in registry.list("metric") if e.obj.function.__module__.startswith("expunge.")}


def test_links_lead_somewhere(root):
    found = 0
    for page in [root / p for p in PAGES] + sorted((root / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            found += 1
    assert found > 20


def test_files_that_the_pages_name_exist(root):
    for page in ("docs/reliability.md", "docs/architecture.md", "CONTRIBUTING.md"):
        for name in re.findall(r"`(tests/[\w/]+\.py|tests/\w+/)`", (root / page).read_text("utf-8")):
            assert (root / name).exists(), f"{page}: {name}"


def test_every_fault_case_is_placed(root):
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", (root / "docs/reliability.md").read_text("utf-8"), flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert all("`tests/" in where for _, where in rows)


def test_architecture_lists_every_module(root):
    text = (root / "docs/architecture.md").read_text("utf-8").split("## Layout")[1].split("## Where")[0]
    words = set(re.findall(r"\w+", text))
    package = root / "src/expunge"
    modules = {p.stem for p in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    assert modules - words == set()


def test_generated_data_are_not_promised(root):
    banned = re.compile(r"\b(certified|guaranteed|compliant)\b", re.IGNORECASE)
    for page in sorted((root / "docs").rglob("*.md")):
        for line in page.read_text("utf-8").splitlines():
            assert not banned.search(line) or "never" in line or "Words such as" in line, f"{page.name}: {line}"
