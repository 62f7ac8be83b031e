"""Every method on the tiny diffusion task: runs and comes off, or refuses before any work by saying what it needs."""

import copy

import contract_helpers as contract
import pytest
from contract_helpers import short

from expunge.errors import CapabilityError, ConfigError, NoEffectError
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.tiny_ddpm import tiny_ddpm

METHODS = [e.name for e in registry.list("method") if not e.name.startswith("test_")]
PAIRED = {"mixing": "paired", "batch_size": 12}
ATTENTION = ["*.attentions.*.to_q", "*.attentions.*.to_k", "*.attentions.*.to_v"]
#: What is compared on diffusion models: these must run.
COMPARED = {
    "random_label": PAIRED,
    "gradient_ascent": {"batch_size": 12},
    "fine_tune": {"batch_size": 12},
    "salun": PAIRED,
    "neg_grad_plus": PAIRED,
    "gaft": {"optim": {"lr": 1e-3}},
    "ssd": {"profile": "as_published", "alpha": 1.2, "batch_size": 8},
    "barrier": {"targets": ATTENTION, "batch_size": 12},
    "l1_sparse": {"batch_size": 12},
    "retrain": {"batch_size": 12},
    "ddpm_salun": {"batch_size": 12},
    "class_esd": {"batch_size": 12},
}
REQUEST = ForgetRequest.label("cat")


@pytest.fixture(scope="module")
def trained():
    return tiny_ddpm(8, toy=True)


@pytest.mark.parametrize("name", COMPARED)
def test_runs_and_comes_off(trained, name):
    contract.comes_off(copy.deepcopy(trained), REQUEST, short(name, COMPARED[name]))


@pytest.mark.parametrize("name", ["ddpm_salun", "class_esd", "random_label"])
def test_one_seed_one_patch(trained, name):
    runs = [unlearn(trained, REQUEST, short(name, COMPARED[name]), seed=seed).digest for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("name", ["ddpm_salun", "class_esd"])
def test_control(trained, name):
    recipe = short(name, COMPARED[name]).replace(optim={"lr": 0.0})
    with pytest.raises(NoEffectError, match="learning rate is 0"):
        unlearn(trained, REQUEST, recipe)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(COMPARED)))
def test_others_run_or_refuse(trained, name):
    """A method for classifiers either makes sense here or says what is missing; it never fails in the middle."""
    contract.runs_or_refuses(
        copy.deepcopy(trained), REQUEST, short(name, {}), CapabilityError, ConfigError, NoEffectError
    )
