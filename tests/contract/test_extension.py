"""A method in a file of one's own: import it, and lists, contract tests, cards and command line know it."""

import copy
import importlib
import importlib.util
import sys

import contract_helpers as contract
import pytest

from expunge.errors import ConfigError
from expunge.method import build_recipe, settings_model
from expunge.registry import registry
from expunge.tasks.tiny import tiny_classifier

SOURCE = '''
"""Forget by ascending on the forget set with a bound: a method, its objective and a space in one file."""

import torch
from pydantic import Field

from expunge.context import Context
from expunge.method import method
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.schedule import Schedule, Single
from expunge.spaces.base import DirectSpace, OpenSpace, Space, select_parameters


@part("{objective}", Info("Raise the forget loss up to a bound.", needs=("forget",)))
class Bounded(Objective):
    """``mean max(0, bound - loss(forget))``.

    Args:
        schedule: Which samples a step reads.
        bound: Loss beyond which a sample counts as forgotten.
    """

    schedule: Schedule = Single(role="forget", batch_size=20)
    bound: float = Field(default=8.0, gt=0)

    def bind(self, ctx: Context) -> LossFn:
        """Return the loss function."""
        def loss(batches):
            return {{r: Term((self.bound - ctx.task.loss(b)).clamp_min(0), r) for r, b in batches.items()}}
        return loss


@part("{space}", Info("Only weight matrices may change."))
class Matrices(Space):
    """No biases, no normalisation."""

    def open(self, ctx: Context) -> OpenSpace:
        """Open on all matrices."""
        return DirectSpace({{n: p for n, p in select_parameters(ctx.model, ["*"]).items() if p.ndim > 1}})


@method("{method}", Info("Bounded ascent on matrices.", needs=("forget",)))
def bounded(*, bound: float = 8.0, optim: Optim = Optim(lr=0.01, epochs=2)) -> Recipe:
    """Bounded ascent.

    Args:
        bound: Loss beyond which a sample counts as forgotten.
        optim: Optimiser settings.
    """
    return Recipe(name="Bounded", objective=Bounded(bound=bound), space=Matrices(), optim=optim)
'''
NAMES = {"objective": "bounded_ascent_x", "space": "matrices_x", "method": "bounded_x"}


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    for kind in NAMES:
        registry.load(kind)
    known = dict(registry.entries)
    path = tmp_path_factory.mktemp("plugin") / "bounded_plugin.py"
    path.write_text(SOURCE.format(**NAMES))
    spec = importlib.util.spec_from_file_location("bounded_plugin", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bounded_plugin"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bounded_plugin"]
    registry.entries.clear()
    registry.entries.update(known)
    settings_model.cache_clear()


@pytest.fixture
def task():
    return copy.deepcopy(tiny_classifier())


def test_before_the_import_the_name_is_unknown():
    with pytest.raises(ConfigError, match="no method is called 'never_imported_x'"):
        build_recipe("never_imported_x")


def test_the_lists_know_it(extension):
    for kind, name in NAMES.items():
        assert name in [e.name for e in registry.list(kind)]
    assert build_recipe({"method": NAMES["method"], "bound": 3, "optim": {"lr": 0.5}}).optim.lr == 0.5


def test_the_contract_holds_for_it(extension, task, tmp_path):
    for number, (kind, name) in enumerate(NAMES.items()):
        contract.check_strict(kind, name)
        recipe = contract.method_recipe(name) if kind == "method" else contract.recipe_with(kind, name)
        folder = tmp_path / str(number)
        folder.mkdir()
        patch = contract.check_run(task, recipe, folder)
        contract.check_resume(task, recipe, folder)
        if kind != "objective":
            assert set(patch) == {"conv1.weight", "conv2.weight", "fc.weight"}


def test_the_contract_catches_a_space_that_leaks(extension, task, tmp_path, monkeypatch):
    from expunge.errors import InvariantError
    from expunge.objectives.base import Term

    def leaky(self, ctx):
        def loss(batches):
            ctx.model.fc.bias.data.add_(0.1)  # outside the space
            return {r: Term(ctx.task.loss(b), r) for r, b in batches.items()}

        return loss

    monkeypatch.setattr(extension.Bounded, "bind", leaky)
    with pytest.raises(InvariantError, match=r"'fc.bias' is outside"):
        contract.check_run(task, contract.method_recipe(NAMES["method"]), tmp_path)


def test_cards_and_matrix_know_it(extension):
    cards = pytest.importorskip("expunge.cards")
    pages = cards.pages()
    assert "Bounded ascent on matrices." in pages[f"methods/{NAMES['method']}.md"]
    assert f"methods/space-{NAMES['space']}.md" in pages
    assert NAMES["method"] in pages["compatibility.md"]
    assert NAMES["method"] in pages["methods/README.md"]


def test_the_command_line_lists_it(extension):
    try:
        from expunge import cli
    except ImportError:
        pytest.skip("the command line is not there yet")
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli.app, ["list", "methods"])
    assert result.exit_code == 0, result.output
    assert NAMES["method"] in result.output


def test_a_second_part_of_that_name_is_refused(extension):
    from expunge.part import part
    from expunge.registry import Info
    from expunge.spaces.base import Space

    with pytest.raises(ConfigError, match="already registered"):

        @part(NAMES["space"], Info("Another."))
        class Other(Space):
            pass
