"""Every method on the tiny two-tower task: runs and comes off, or refuses before any work by saying what it needs."""

import copy

import contract_helpers as contract
import pytest
from contract_helpers import short

from expunge.errors import CapabilityError, ConfigError
from expunge.registry import registry
from expunge.request import ForgetRequest
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


@pytest.mark.parametrize("name", COMPARED)
def test_runs_and_comes_off(trained, name):
    contract.comes_off(copy.deepcopy(trained), REQUEST, short(name, COMPARED[name]))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(COMPARED)))
def test_others_run_or_refuse(trained, name):
    """A method for classifiers either makes sense here or says what is missing; it never fails in the middle."""
    contract.runs_or_refuses(copy.deepcopy(trained), REQUEST, short(name, {}), CapabilityError, ConfigError)
