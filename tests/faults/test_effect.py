"""Cases 19 and 20: nothing moves outside the space, and a run that changed nothing is an error."""

import copy
from typing import Any

import inject
import pytest
import torch
from torch import nn

from expunge import guards, loop
from expunge.digest import model_digest, tensor_digest
from expunge.edits.base import Edit
from expunge.errors import InvariantError, NoEffectError
from expunge.objectives.base import Objective, Term
from expunge.part import part
from expunge.patch import Dense, apply
from expunge.registry import Info, registry
from expunge.run import unlearn
from expunge.schedule import Schedule, Single
from expunge.spaces.saliency import MaskedSpace

OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.01},
}
MASK = {"kind": "saliency_mask", "keep": 0.2}


@pytest.fixture(scope="module")
def trained():
    return inject.faulty()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def parts():
    """Parts registered in a test are gone after it."""
    for kind in ("objective", "edit"):
        registry.load(kind)
    known = dict(registry.entries)
    yield
    registry.entries.clear()
    registry.entries.update(known)


# ---- 19 mask drift


def moved_outside(task, patch, masks) -> int:
    base = {n: t.clone() for n, t in task.model.state_dict().items()}
    apply(task.model, patch)
    now = task.model.state_dict()
    return sum(int(((now[n].view(torch.int32) != base[n].view(torch.int32)) & ~m).sum()) for n, m in masks.items())


def watch_masks(monkeypatch) -> dict[str, torch.Tensor]:
    masks: dict[str, torch.Tensor] = {}
    real = MaskedSpace.__init__

    def init(self, parameters, mask, *rest, **settings):
        real(self, parameters, mask, *rest, **settings)
        masks.update(self.selection.bits)

    monkeypatch.setattr(MaskedSpace, "__init__", init)
    return masks


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_weights_outside_the_mask_keep_their_bits(task, monkeypatch, optimiser, foreach):
    real = loop.make_optimizer

    def make(settings, parameters):
        built = real(settings, parameters)
        for group in built.param_groups:
            group["foreach"] = foreach
        return built

    monkeypatch.setattr(loop, "make_optimizer", make)
    masks = watch_masks(monkeypatch)
    patch = unlearn(task, inject.REQUEST, inject.recipe(space=MASK, optim=OPTIMISERS[optimiser]))
    assert len(patch)
    assert any(not bool(m.all()) for m in masks.values())
    assert moved_outside(task, patch, masks) == 0


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_masking_the_gradient_only_would_let_them_drift(task, monkeypatch, optimiser):
    """The published way, and what it does: with weight decay every masked weight moves."""
    masks = watch_masks(monkeypatch)
    recipe = inject.recipe(space={**MASK, "freeze": "gradient"}, optim=OPTIMISERS[optimiser])
    patch = unlearn(task, inject.REQUEST, recipe)
    masked = sum(int((~m).sum()) for m in masks.values())
    assert moved_outside(task, patch, masks) > 0.9 * masked


def test_a_projection_that_fails_is_caught_by_the_run_itself(task, monkeypatch):
    before = model_digest(task.model)
    monkeypatch.setattr(MaskedSpace, "after_step", lambda self, optimizer: None)
    with pytest.raises(InvariantError, match=r"masked weights of '[a-z0-9]+.(weight|bias)' moved"):
        unlearn(task, inject.REQUEST, inject.recipe(space=MASK))
    assert model_digest(task.model) == before
    monkeypatch.setattr(guards, "check_masked", lambda space: None)
    assert len(unlearn(task, inject.REQUEST, inject.recipe(space=MASK)))  # the mutation: nobody would notice


def test_weights_outside_the_space_are_checked_in_every_run(task, monkeypatch):
    def meddle(number, model, optimizer):
        with torch.no_grad():
            model.conv1.weight[0, 0, 0, 0] += 1e-6

    recipe = inject.recipe(space={"kind": "layers", "targets": ["fc"]})
    with pytest.raises(InvariantError, match=r"'conv1.weight' is outside"):
        unlearn(task, inject.REQUEST, recipe, on_step=meddle)
    monkeypatch.setattr(guards, "check_outside", lambda *a: None)
    assert set(unlearn(task, inject.REQUEST, recipe, on_step=meddle)) == {"fc.weight", "fc.bias"}


def test_statistics_are_frozen_unless_asked_for_and_then_part_of_the_patch(task):
    frozen = unlearn(task, inject.REQUEST, inject.recipe())
    assert not [n for n in frozen if "running" in n or "num_batches" in n]
    moving = unlearn(task, inject.REQUEST, inject.recipe(optim={"norm": "train"}))
    assert {n for n in moving if n.startswith("bn1.")} == {
        "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"
    }  # fmt: skip
    assert moving["bn1.running_mean"].kind == "replace"
    assert int(moving["bn1.num_batches_tracked"].dense()) - int(task.model.bn1.num_batches_tracked) == 16


def test_the_lr_0_control_with_frozen_statistics_is_empty(task):
    still = inject.recipe(optim={"lr": 0.0})
    assert len(unlearn(task, inject.REQUEST, still, allow_no_effect=True)) == 0
    moving = unlearn(task, inject.REQUEST, inject.recipe(optim={"lr": 0.0, "norm": "train"}), allow_no_effect=True)
    assert len(moving)  # statistics alone change the model


# ---- 20 no-op


def test_a_learning_rate_of_0_is_named(task, tmp_path, monkeypatch):
    still = inject.recipe(optim={"lr": 0.0})
    with pytest.raises(NoEffectError, match="fault would change nothing: the learning rate is 0") as caught:
        unlearn(task, inject.REQUEST, still, run_dir=tmp_path)
    assert caught.value.exit_code == 5
    assert [f.name for f in tmp_path.iterdir()] == [".lock"]  # the folder is free for the corrected run
    unlearn(task, inject.REQUEST, still, run_dir=tmp_path, allow_no_effect=True)
    with pytest.raises(NoEffectError, match="finished run that changed nothing"):
        unlearn(task, inject.REQUEST, still, run_dir=tmp_path)
    monkeypatch.setattr(guards, "check_rate", lambda *a: None)
    monkeypatch.setattr(guards, "check_effect", lambda *a: {"share": 1.0, "changed": 0.0})
    assert len(unlearn(task, inject.REQUEST, still)) == 0  # the mutation: a finished run, an empty patch


def test_a_loss_that_does_not_reach_the_space_is_named(task, parts):
    @part("fault_constant", Info("A loss of no weight."))
    class Constant(Objective):
        schedule: Schedule = Single(role="forget", batch_size=20)

        def bind(self, ctx):
            return lambda batches: {"zero": Term(ctx.task.loss(batches["forget"]).detach(), "forget")}

    with pytest.raises(NoEffectError, match="no gradient reached the chosen space"):
        unlearn(task, inject.REQUEST, inject.recipe(objective="fault_constant", optim={"weight_decay": 0.0}))


def test_a_mask_on_dead_weights_has_no_effect(task):
    with torch.no_grad():
        task.model.fc.weight.zero_()
        task.model.bn2.bias.fill_(-100.0)  # every feature is cut off
    recipe = inject.recipe(space={"kind": "layers", "targets": ["conv1"]}, optim={"weight_decay": 0.0})
    with pytest.raises(NoEffectError, match="changed nothing"):
        unlearn(task, inject.REQUEST, recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_too_small_for_half_precision_weights_are_named(dtype):
    task = inject.faulty()
    task.model.to(dtype)
    tiny = inject.recipe(
        space={"kind": "layers", "targets": ["conv2"]}, optim={"lr": 1e-9, "weight_decay": 0.0, "epochs": 1}
    )
    with pytest.raises(NoEffectError, match="smaller than the weights' precision can hold"):
        unlearn(task, inject.REQUEST, tiny)
    assert task.model.conv2.weight.dtype == dtype


def test_half_precision_weights_accumulate_small_steps():
    """Each step is below the weights' precision, their sum is not: the run keeps fp32 masters."""
    task = inject.faulty()
    task.model.to(torch.bfloat16)
    recipe = inject.recipe(
        space={"kind": "layers", "targets": ["conv2.weight"]},
        optim={"name": "adam", "lr": 2e-5, "weight_decay": 0.0, "epochs": 8},
    )
    patch = unlearn(task, inject.REQUEST, recipe)
    before = {n: tensor_digest(t) for n, t in task.model.state_dict().items()}
    weight = task.model.conv2.weight.detach().clone()
    apply(task.model, patch)
    share = float((task.model.conv2.weight != weight).float().mean())
    naive = weight.clone()
    for _ in range(64):
        naive += 2e-5  # what a bf16 weight makes of the same steps
    assert share > 0.3
    assert float((naive != weight).float().mean()) < share
    assert {n for n, t in task.model.state_dict().items() if tensor_digest(t) != before[n]} == {"conv2.weight"}


def test_only_a_handful_of_changed_weights_is_noted():
    task = inject.faulty()
    base = {"w": torch.zeros(10_000_000)}
    delta = torch.zeros(10_000_000)
    delta[:3] = 1
    facts = guards.check_effect({"w": Dense(delta)}, base, inject.recipe())
    assert facts["changed"] == 3
    assert facts["share"] < 1e-6
    assert isinstance(task.model, nn.Module)


def test_an_edit_that_changes_more_than_its_space_names_is_refused(task, parts, monkeypatch):
    @part("fault_wide", Info("Changes everything."))
    class Wide(Edit):
        def compute(self, ctx, space):
            return {n: Dense(torch.ones_like(p)) for n, p in ctx.model.named_parameters()}

    recipe = inject.Recipe(name="wide", edit="fault_wide", space={"kind": "layers", "targets": ["fc.bias"]})
    with pytest.raises(InvariantError, match=r"changed 'conv1.weight' \(7 in all\)"):
        unlearn(task, inject.REQUEST, recipe)
    monkeypatch.setattr(guards, "check_within", lambda changes, space: None)
    assert len(unlearn(task, inject.REQUEST, recipe)) == 8
