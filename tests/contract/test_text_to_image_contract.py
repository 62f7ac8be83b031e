"""Every method on the tiny text-to-image task runs and comes off, or refuses before any work and says what it needs."""

import copy

import contract_helpers as contract
import pytest
import torch

from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.method import build_recipe
from expunge.patch import apply, revert
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

METHODS = [e.name for e in registry.list("method") if not e.name.startswith("test_")]
KEYS = ["unet.*.attn2.to_k.weight", "unet.*.attn2.to_v.weight"]
#: These must run.
RUN = {
    "random_label": {},
    "gradient_ascent": {},
    "fine_tune": {},
    "neg_grad_plus": {},
    "gaft": {},
    "salun": {"on": "random_label"},
    "barrier": {"targets": ["attn2.to_k"]},
    "ssd": {"profile": "as_published", "alpha": 1.1, "batch_size": 3},
}
#: These are tested where they belong, with settings of their own.
ELSEWHERE = {"srs_me", "cie", "esd", "uce", "uce_debias", "ablating_concepts", "forget_me_not"}
REQUEST = ForgetRequest.concept("star")


@pytest.fixture(scope="module")
def built():
    return tiny_text_to_image()


def short(name, settings):
    return contract.short(name, settings, lr=1e-3)


@pytest.mark.parametrize("name", RUN)
def test_runs_and_comes_off(built, name):
    contract.comes_off(copy.deepcopy(built), REQUEST, short(name, RUN[name]))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(RUN) - ELSEWHERE))
def test_others_run_or_refuse(built, name):
    """A method for classifiers either makes sense here or says what is missing; it never fails in the middle."""
    contract.runs_or_refuses(copy.deepcopy(built), REQUEST, short(name, {}), CapabilityError, ConfigError, RequestError)


def test_runs_are_reproducible_and_confined_to_the_space(built):
    recipe = short("fine_tune", {}).replace(space={"kind": "layers", "targets": KEYS})
    patches = [unlearn(copy.deepcopy(built), REQUEST, recipe, seed=seed) for seed in (0, 0, 1)]
    assert patches[0].digest == patches[1].digest != patches[2].digest
    assert len(patches[0].changes) == 8
    assert all("attn2.to_" in n for n in patches[0].changes)


def test_half_precision_pipelines_train_on_full_precision_masters(built):
    """Steps that bfloat16 cannot hold one by one still add up; the patch fits the pipeline's own precision."""
    task = copy.deepcopy(built)
    task.model.bfloat16()
    recipe = short("fine_tune", {}).replace(space={"kind": "layers", "targets": KEYS})
    patch = unlearn(task, REQUEST, recipe)
    assert all(p.dtype == torch.bfloat16 for p in task.model.parameters())
    before = model_digest(task.model)
    apply(task.model, patch)
    assert model_digest(task.model) != before
    revert(task.model, patch)
    assert model_digest(task.model) == before


def test_without_images_other_methods_are_refused():
    task = tiny_text_to_image(images=False)
    with pytest.raises((CapabilityError, RequestError), match="forget"):
        unlearn(task, REQUEST, short("gradient_ascent", {}))


def test_without_images_closed_forms_run():
    task = tiny_text_to_image(images=False)
    before = model_digest(task.model)
    patch = unlearn(task, REQUEST, build_recipe("uce"))
    assert len(patch) == 8
    assert model_digest(task.model) == before
