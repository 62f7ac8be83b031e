"""The generated pages: up to date on disk, complete, and following the registry by themselves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import cards
from expunge.method import method, settings_model
from expunge.objectives.cross_entropy import FineTune
from expunge.recipe import Optim, Recipe
from expunge.registry import Info, registry
from expunge.spaces.layers import AllWeights


@pytest.fixture
def new_method():
    registry.load("method")

    @method("made_up", Info("A method that a test made up.", needs=("retain", "telepathy"), deviations=("it is new",)))
    def made_up(*, strength: float = 0.25, optim: Optim = Optim(lr=0.125)) -> Recipe:  # noqa: B008
        """``min strength * loss``.

        Args:
            strength: How hard to try.
            optim: Optimiser settings.
        """
        return Recipe(name="made_up", objective=FineTune(), space=AllWeights(), optim=optim)

    yield "made_up"
    del registry.entries[("method", "made_up")]
    settings_model.cache_clear()


def test_pages_on_disk_are_up_to_date(root):
    # In a process of its own: other tests register parts of theirs.
    command = [sys.executable, "-m", "expunge.cards", "--check", "--docs", str(root / "docs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_and_part_has_a_card():
    pages = cards.pages()
    entries = [e for kind in cards.CARDED for e in registry.list(kind)]
    assert len(entries) > 15
    for entry in entries:
        text = pages[f"methods/{cards.card_name(entry)}.md"]
        assert entry.info.summary in text
        assert all(d in text for d in entry.info.deviations)
    for entry in registry.list("metric"):
        assert f"`{entry.name}`" in pages["metrics.md"]


def test_a_new_method_appears_by_itself(new_method, tmp_path):
    touched = cards.write(tmp_path)
    assert "methods/made_up.md" in touched
    text = (tmp_path / "methods/made_up.md").read_text()
    assert "A method that a test made up." in text
    assert "| `strength` | float | `0.25` | How hard to try. |" in text
    assert "`min strength * loss`." in text
    assert "* it is new" in text
    row = next(line for line in (tmp_path / "compatibility.md").read_text().splitlines() if "[made_up]" in line)
    assert "no: telepathy" in row
    assert cards.stale(tmp_path) == []


def test_check_notices_missing_changed_and_left_over_pages(tmp_path, capsys):
    docs = tmp_path / "docs"
    assert cards.main(["--check", "--docs", str(docs)]) == 1
    assert not docs.exists()
    assert cards.main(["--docs", str(docs)]) == 0
    capsys.readouterr()
    assert cards.main(["--check", "--docs", str(docs)]) == 0
    assert capsys.readouterr().out == ""
    (docs / "methods/salun.md").write_text("by hand")
    (docs / "methods/gone.md").write_text("left over")
    assert cards.main(["--check", "--docs", str(docs)]) == 1
    out = capsys.readouterr().out
    assert "salun.md" in out
    assert "gone.md" in out
    assert cards.main(["--docs", str(docs)]) == 0
    assert not (docs / "methods/gone.md").exists()


def test_every_setting_has_a_meaning():
    for entry in registry.list("method"):
        if not entry.obj.__module__.startswith("expunge."):
            continue
        card = cards.card(entry)
        rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", card.split("## Settings")[1], flags=re.M)
        assert [name for name, meaning in rows if not meaning.strip()] == [], entry.name


def test_links_between_pages_lead_somewhere():
    pages = cards.pages()
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", text):
            joined = (Path("/docs") / name).parent / target
            relative = joined.resolve().relative_to("/docs").as_posix()
            assert relative in pages or relative == "evidence.md", (name, target)
