from typing import Literal

import pytest

from expunge.errors import ConfigError
from expunge.method import build_recipe, method
from expunge.part import Part, part
from expunge.recipe import Optim, Recipe
from expunge.registry import KINDS, Info, Registry, registry
from expunge.spaces.base import Space


def test_every_entry_has_a_summary_and_a_docstring():
    for entry in registry:
        assert entry.info.summary.endswith("."), entry.name
        assert (entry.obj.__doc__ or "").strip(), entry.name


def test_names_are_refused_at_registration():
    own = Registry()
    with pytest.raises(ConfigError, match="lower_snake_case"):
        own.register("space", "Not A Name", Info("x."))
    with pytest.raises(ConfigError, match="did you mean 'space'"):
        own.register("spaces", "x", Info("x."))
    with pytest.raises(ConfigError, match="summary"):
        own.register("space", "x", Info(" "))
    own.register("space", "x", Info("x."))(int)
    with pytest.raises(ConfigError, match="already registered"):
        own.register("space", "x", Info("x."))(str)


def test_unknown_names_suggest_the_closest():
    with pytest.raises(ConfigError, match="did you mean 'random_label'"):
        registry.get("objective", "random_labl")


def test_aliases_resolve():
    assert registry.get("objective", "rl").name == "random_label"


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_empty_but_edits(kind):
    assert kind == "edit" or registry.list(kind)


def test_parts_parse_names_mappings_and_instances():
    built = Space.parse({"kind": "layers", "targets": ["fc"]})
    assert Space.parse(built) is built
    assert Space.parse(built.describe()) == built
    assert Space.parse("all").part_name == "all"
    with pytest.raises(ConfigError, match="'kind'"):
        Space.parse({"targets": ["fc"]})


def test_method_functions_must_be_fully_typed():
    with pytest.raises(ConfigError, match="keyword-only"):

        @method("bad_one", Info("x."))
        def bad(keep: float = 1.0, *, optim: Optim = Optim()) -> Recipe: ...  # noqa: B008

    with pytest.raises(ConfigError, match="optim"):

        @method("bad_two", Info("x."))
        def worse(*, keep: float = 1.0) -> Recipe: ...


def test_optim_settings_replace_the_defaults_of_a_method_one_by_one():
    plain = build_recipe("salun")
    tuned = build_recipe({"method": "salun", "optim": {"lr": "1e-4"}})
    assert tuned.optim.lr == 1e-4
    assert tuned.optim.epochs == plain.optim.epochs
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        build_recipe({"method": "salun", "keeep": 0.3})
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        build_recipe({"method": "salun", "optim": {"epoch": 3}})
    with pytest.raises(ConfigError, match="names a 'method'"):
        build_recipe({"keep": 0.3})


def test_a_part_outside_its_literal_is_refused():
    class Choice(Part):
        kind_of_part = "space"
        way: Literal["a", "b"] = "a"

    part("choice_for_test", Info("x."))(Choice)
    try:
        with pytest.raises(ConfigError, match="way"):
            Choice(way="c")
    finally:
        registry.entries.pop(("space", "choice_for_test"))
