"""Cases 21 and 22: the model is left as found whatever happens, and stacked patches come off exactly."""

import copy
import random

import inject
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from expunge import restore
from expunge.digest import model_digest, named_tensors, tensor_digest
from expunge.edits.base import Edit
from expunge.errors import ArtifactError, ConfigError
from expunge.part import part
from expunge.patch import applied, apply, revert
from expunge.patch import stack as stack_patches
from expunge.registry import Info, registry
from expunge.request import ForgetRequest
from expunge.run import unlearn


@pytest.fixture(scope="module")
def trained():
    return inject.faulty(dropout=0.2)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def snapshot(model):
    """Field by field, what a caller could notice."""
    modules = dict(model.named_modules())
    hooks = [k for k in vars(nn.Module()) if "hook" in k]
    return {
        "classes": {n: type(m) for n, m in modules.items()},
        "tensors": {n: tensor_digest(t) for n, t in model.state_dict().items()},
        "objects": {n: id(t) for n, t in model.state_dict(keep_vars=True).items()},
        "dtypes": {n: t.dtype for n, t in model.state_dict().items()},
        "devices": {n: t.device for n, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: {k: list(getattr(m, k)) for k in hooks if hasattr(getattr(m, k), "keys")} for n, m in modules.items()
        },
        "grad mode": torch.is_grad_enabled(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
    }


def disturb(model):
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 0.5)
    model.fc.register_forward_hook(lambda module, args, kwargs, out: out, with_kwargs=True)
    model.register_forward_pre_hook(lambda module, args: None)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def make_a_mess(model):
    """Everything that careless code inside a run may leave behind."""
    torch.set_grad_enabled(False)
    model.eval()
    model.fc.bias.data.add_(3)
    model.bn1.running_mean.add_(1)
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
        p.grad = torch.zeros_like(p)
    model.conv2.register_forward_hook(lambda *a: None)
    model.fc.register_full_backward_hook(lambda *a: None)
    model.fc._forward_hooks.clear()
    parametrize.register_parametrization(model.conv2, "weight", nn.Identity())
    model.drop = nn.Sequential(nn.Dropout(0.9))
    model.add_module("extra", nn.Linear(2, 2))
    random.random()
    np.random.rand()
    torch.rand(3)


MESSES = {
    "an error": inject.Fault("boom"),
    "ctrl-c": KeyboardInterrupt(),
    "exit": SystemExit(3),
    "a full disk": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("name", MESSES)
@pytest.mark.parametrize("step", [1, 4])
def test_an_exception_in_the_loop_leaves_no_trace(task, name, step):
    error = MESSES[name]
    model = task.model
    disturb(model)
    before = snapshot(model)

    def on_step(number, model_, optimizer):
        if number == step:
            make_a_mess(model_)
            raise error

    with pytest.raises(type(error)):
        unlearn(task, inject.REQUEST, inject.recipe(), on_step=on_step)
    after = snapshot(model)
    for field in before:
        assert after[field] == before[field], field


def test_the_comparison_sees_each_trace(task, monkeypatch):
    """With `as_found` switched off, every field that the mess touches differs."""
    model = task.model
    disturb(model)
    before = snapshot(model)
    make_a_mess(model)
    after = snapshot(model)
    torch.set_grad_enabled(True)
    same = [f for f in before if before[f] == after[f]]
    assert same == ["dtypes", "devices"] or set(same) <= {"dtypes", "devices"}


@pytest.mark.parametrize("where", ["loss", "space", "protection", "log"])
def test_failures_elsewhere_leave_no_trace(task, monkeypatch, where, tmp_path):
    from expunge.protections.l1 import L1
    from expunge.spaces.base import DirectSpace
    from expunge.track import Tracker

    def fail(*args, **kwargs):
        raise inject.Fault(where)

    targets = {"space": (DirectSpace, "after_step"), "protection": (L1, "bind"), "log": (Tracker, "row")}
    if where == "loss":
        task.fault = fail
    else:
        monkeypatch.setattr(*targets[where], fail)
    disturb(task.model)
    before = snapshot(task.model)
    with pytest.raises(inject.Fault, match=where):
        unlearn(task, inject.REQUEST, inject.recipe(protections=["l1"]), run_dir=tmp_path)
    after = snapshot(task.model)
    for field in before:
        assert after[field] == before[field], field


def test_a_successful_run_leaves_no_trace_either(task):
    disturb(task.model)
    before = snapshot(task.model)
    recipe = inject.recipe(space={"kind": "saliency_mask", "keep": 0.5}, protections=["l1"], optim={"norm": "train"})
    patch = unlearn(task, inject.REQUEST, recipe)
    after = snapshot(task.model)
    for field in before:
        assert after[field] == before[field], field
    unlearn(task, inject.REQUEST, recipe, inplace=True)
    assert applied(task.model) == (patch,)
    with pytest.raises(ConfigError, match="carries applied patches"):
        unlearn(task, inject.REQUEST, recipe, inplace=True)
    revert(task.model)
    assert snapshot(task.model)["tensors"] == before["tensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_come_back_in_their_precision(dtype):
    task = inject.faulty()
    task.model.to(dtype)
    disturb(task.model)
    before = snapshot(task.model)
    assert len(unlearn(task, inject.REQUEST, inject.recipe()))
    with pytest.raises(inject.Fault):
        unlearn(task, inject.REQUEST, inject.recipe(), on_step=inject.raise_at(2, inject.Fault()))
    after = snapshot(task.model)
    for field in before:
        assert after[field] == before[field], field


def test_an_edit_never_adds_to_the_callers_gradients(task):
    @part("fault_gradient", Info("Leaves gradients behind."))
    class Gradient(Edit):
        def compute(self, ctx, space):
            batch = next(iter(ctx.batches("forget", 20)))
            ctx.task.loss(batch).mean().backward()
            raise inject.Fault("after backward")

    disturb(task.model)
    before = snapshot(task.model)
    try:
        with pytest.raises(inject.Fault):
            unlearn(task, inject.REQUEST, inject.Recipe(name="g", edit="fault_gradient", space="all"))
    finally:
        del registry.entries[("edit", "fault_gradient")]
    assert snapshot(task.model)["grads"] == before["grads"]


def test_as_found_restores_even_without_a_run(task):
    model = task.model
    disturb(model)
    before = snapshot(model)
    with pytest.raises(inject.Fault), restore.as_found(model):  # noqa: PT012
        model.half()
        make_a_mess(model)
        raise inject.Fault
    after = snapshot(model)
    for field in before:
        assert after[field] == before[field], field


# ---- 22 patch stack, with patches that real runs made


@pytest.fixture(scope="module")
def three(trained):
    task = copy.deepcopy(trained)
    requests = [ForgetRequest.label(c) for c in ("ant", "bee", "cat")]
    spaces = ["all", {"kind": "saliency_mask", "keep": 0.3}, {"kind": "layers", "targets": ["fc", "conv2"]}]
    return [unlearn(task, r, inject.recipe(space=s)) for r, s in zip(requests, spaces, strict=True)]


def test_revoking_b_equals_never_having_had_b(task, three):
    a, b, c = three
    start = model_digest(task.model)
    without = copy.deepcopy(task.model)
    apply(without, a, c)
    apply(task.model, a)
    apply(task.model, b)
    apply(task.model, c)
    revert(task.model, b)
    assert model_digest(task.model) == model_digest(without)
    apply(task.model, b)
    assert model_digest(task.model) != model_digest(without)
    revert(task.model)
    assert model_digest(task.model) == start


def test_order_does_not_matter_and_the_pure_stack_agrees(task, three):
    a, b, c = three
    base = {n: t.detach().clone() for n, t in named_tensors(task.model)[0].items()}
    digests = set()
    for order in ((a, b, c), (c, a, b), (b, c, a)):
        model = copy.deepcopy(task.model)
        for patch in order:
            apply(model, patch)
        digests.add(model_digest(model))
        stacked = stack_patches(base, *order)
        assert all(torch.equal(stacked[n], t) for n, t in named_tensors(model)[0].items())
    assert len(digests) == 1


def test_adding_in_the_order_of_application_would_matter(task, three):
    """The control: plain sums depend on the order for some weights."""
    w = task.model.fc.weight.detach()
    a, b, c = (p["fc.weight"].dense() for p in three)
    w2 = task.model.conv2.weight.detach()
    a2, b2, c2 = (p["conv2.weight"].dense() for p in three)
    assert not (torch.equal(w + a + b + c, w + c + b + a) and torch.equal(w2 + a2 + b2 + c2, w2 + c2 + b2 + a2))


def test_statistics_of_two_patches_conflict_by_name(task):
    recipe = inject.recipe(optim={"norm": "train"})
    a, b = (unlearn(task, ForgetRequest.label(c), recipe) for c in ("ant", "bee"))
    apply(task.model, a)
    before = model_digest(task.model)
    with pytest.raises(ArtifactError, match=r"'bn1.\w+' is replaced by one patch"):
        apply(task.model, b)
    with pytest.raises(ArtifactError, match="already applied"):
        apply(task.model, a)
    assert model_digest(task.model) == before
