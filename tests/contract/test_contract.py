"""Every registered part on the tiny classifier: constructs, runs, obeys the invariants, saves, resumes, is strict."""

import copy

import contract_helpers as contract
import pytest

from expunge.recipe import Recipe
from expunge.registry import registry
from expunge.tasks.tiny import tiny_classifier

KINDS = ("objective", "space", "protection", "edit")


def names(kind):
    return [e.name for e in registry.list(kind) if not e.name.startswith("test_")]


PARTS = [(kind, name) for kind in KINDS for name in names(kind)]
LOOPS = [(kind, name) for kind, name in PARTS if kind != "edit"]
OBJECTIVES = names("objective")
METHODS = names("method")


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def recipe_for(task, kind, name):
    recipe = contract.method_recipe(name) if kind == "method" else contract.recipe_with(kind, name)
    contract.skip_if_missing(task, recipe)
    return recipe


@pytest.mark.parametrize(("kind", "name"), [*PARTS, *(("method", m) for m in METHODS)])
def test_strict_and_describable(kind, name):
    contract.check_strict(kind, name)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_runs_and_comes_off(task, tmp_path, kind, name):
    contract.check_run(task, recipe_for(task, kind, name), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_method_runs_and_comes_off(task, tmp_path, name):
    contract.check_run(task, recipe_for(task, "method", name), tmp_path)


@pytest.mark.parametrize(("kind", "name"), LOOPS)
def test_resumes_exactly(task, tmp_path, kind, name):
    contract.check_resume(task, recipe_for(task, kind, name), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_method_resumes_exactly(task, tmp_path, name):
    recipe = recipe_for(task, "method", name)
    if recipe.edit is not None:
        pytest.skip("a one-shot edit has no steps to resume")
    contract.check_resume(task, recipe, tmp_path)


@pytest.mark.parametrize("name", names("space"))
def test_no_step_no_change(task, name):
    contract.check_control(task, recipe_for(task, "space", name))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_schedule(task, name):
    """An objective accepts each schedule its type admits, or refuses it when it is built or bound, by name."""
    from expunge.errors import CapabilityError, ConfigError

    tried = 0
    for schedule in contract.schedules_of(name):
        try:
            part = type(contract.build("objective", name))(
                **{**contract.arguments("objective", name), "schedule": schedule}
            )
            recipe = Recipe(name=name, objective=part, space="all", optim=contract.OPTIM)
            contract.skip_if_missing(task, recipe)
            patch = contract.unlearn(task, contract.REQUEST, recipe)
        except (CapabilityError, ConfigError) as error:
            assert "schedule" in str(error) or schedule.kind in str(error) or "role" in str(error), error  # noqa: PT017
            continue
        assert len(patch)
        tried += 1
    assert tried, f"no schedule works for {name}"


def test_a_part_without_an_entry_says_what_to_add(monkeypatch):
    monkeypatch.delitem(contract.ARGUMENTS, ("space", "layers"))
    with pytest.raises(pytest.fail.Exception, match=r"add `\('space', 'layers'\).*ARGUMENTS"):
        contract.build("space", "layers")


def test_the_registry_has_the_parts():
    assert {"fine_tune", "gradient_ascent", "neg_grad_plus", "random_label"} <= set(OBJECTIVES)
    assert {"all", "layers", "saliency_mask", "proximal"} <= set(names("space"))


def test_the_snapshot_sees_every_kind_of_trace(task):
    """The comparison in `check_run` can fail: each trace a careless run leaves makes a difference of its own."""
    import torch

    model = task.model
    contract.disturb(model)

    def moved_weight():
        model.fc.bias.data.add_(1)

    def gradient():
        model.fc.weight.grad.add_(1)

    def flag():
        model.conv1.weight.requires_grad_(True)

    def mode():
        model.bn1.train()

    def hook():
        model.bn2.register_forward_hook(lambda *a: None)

    def draw():
        torch.rand(1)

    def precision():
        model.half()

    fields = {
        moved_weight: "tensors", gradient: "grads", flag: "flags", mode: "modes", hook: "hooks", draw: "rng",
        precision: "dtypes",
    }  # fmt: skip
    for trace, field in fields.items():
        before = contract.snapshot(model)
        trace()
        after = contract.snapshot(model)
        assert before[field] != after[field], field
