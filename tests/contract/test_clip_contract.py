"""Every method on the tiny two-tower task: runs and comes off, or refuses before any work by saying what it needs."""

import copy

import pytest

from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError
from expunge.method import build_recipe
from expunge.patch import apply, revert
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.tiny_clip_task import tiny_clip

METHODS = [e.name for e in registry.list("method") if not e.name.startswith("test_")]
#: SLUG and what it is compared with: these must run.
COMPARED = {
    "slug": {"on_infeasible": "best", "budget": 4},
    "gradient_ascent": {},
    "gaft": {"optim": {"lr": 1e-3}},
    "random_label": {},
    "fine_tune": {},
    "salun": {"on": "neg_grad_plus", "mixing": "sequential"},
    "neg_grad_plus": {},
    "ssd": {"profile": "as_published", "alpha": 1.2, "batch_size": 8},
    "barrier": {"targets": ["transformer.resblocks.1.mlp.c_proj", "visual.transformer.resblocks.1.mlp.c_proj"]},
}
REQUEST = ForgetRequest.concept("cat")


@pytest.fixture(scope="module")
def trained():
    return tiny_clip("open_clip", n_per_cell=4)


def short(name, settings):
    recipe = build_recipe({"method": name, **settings})
    return recipe if recipe.edit is not None else recipe.replace(optim={"max_steps": 2, "epochs": 2})


@pytest.mark.parametrize("name", COMPARED)
def test_runs_and_comes_off(trained, name):
    task = copy.deepcopy(trained)
    before = model_digest(task.model)
    patch = unlearn(task, REQUEST, short(name, COMPARED[name]))
    assert model_digest(task.model) == before
    assert len(patch)
    apply(task.model, patch)
    assert model_digest(task.model) != before
    revert(task.model, patch)
    assert model_digest(task.model) == before


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(COMPARED)))
def test_others_run_or_refuse(trained, name):
    """A method for classifiers either makes sense here or says what is missing; it never fails in the middle."""
    task = copy.deepcopy(trained)
    before = model_digest(task.model)
    refusal = ""
    try:
        patch = unlearn(task, REQUEST, short(name, {}))
    except (CapabilityError, ConfigError) as error:
        refusal = str(error)
    assert len(refusal) > 30 or len(patch)
    assert model_digest(task.model) == before
