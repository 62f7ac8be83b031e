"""What the settings of methods turn into, and single steps of their objectives and spaces by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.context import Context
from expunge.digest import model_digest
from expunge.method import build_recipe
from expunge.patch import apply
from expunge.protections.l1 import L1
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import Mask
from expunge.schedule import Paired, Sequential, Single
from expunge.spaces.base import DirectSpace
from expunge.spaces.layers import AllWeights
from expunge.spaces.proximal import soft_threshold
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")
SHORT = {"epochs": 2, "lr": 0.01, "augment": False}


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


@pytest.mark.parametrize("name", [e.name for e in registry.list("method")])
def test_aliases_give_the_same_recipe_and_settings_another(name):
    default = build_recipe(name)
    info = registry.get("method", name).info
    assert info.needs
    assert all(build_recipe(alias).digest == default.digest for alias in info.aliases)
    assert build_recipe({"method": name, "optim": {"lr": 0.123}}).digest != default.digest


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("retrain", {"lr": 0.1, "epochs": 182, "milestones": (91, 136), "norm": "train", "augment": True}),
        ("fine_tune", {"lr": 0.01, "epochs": 10, "momentum": 0.9, "weight_decay": 5e-4, "norm": "frozen"}),
        ("gradient_ascent", {"lr": 1e-4, "epochs": 5, "norm": "frozen"}),
        ("l1_sparse", {"lr": 0.01, "epochs": 10}),
        ("deepdive_rl", {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "epochs": 10, "augment": False}),
        ("deepdive_ga", {"lr": 5e-4, "lr_schedule": "cosine", "momentum": 0.0}),
    ],
)
def test_published_defaults(name, published):
    optim = build_recipe(name).optim
    assert {k: getattr(optim, k) for k in published} == published
    batch_size = 32 if name.startswith("deepdive") else 256
    assert build_recipe(name).objective.schedule.batch_size == batch_size


def test_settings_reach_the_parts():
    assert build_recipe({"method": "deepdive_rl", "use_mask": False}).space == AllWeights()
    assert build_recipe({"method": "deepdive_rl", "mask_thr": 0.2}).space.keep == 0.2
    assert build_recipe({"method": "salun", "on": "gradient_ascent"}).objective.part_name == "gradient_ascent"
    sparse = build_recipe({"method": "l1_sparse", "weight": 0.3, "no_l1_epochs": 2})
    assert sparse.protections == (L1(weight=0.3, no_l1_epochs=2),)
    plus = build_recipe({"method": "neg_grad_plus", "beta": 0.75}).objective
    assert (plus.alpha, plus.beta) == (0.75, 0.25)
    assert build_recipe({"method": "salun", "profile": "as_published"}).optim.lr == 0.013


@pytest.mark.parametrize(
    ("mixing", "schedule"),
    [
        ("sequential", Sequential(batch_size=16)),
        ("mixed", Single(role="mixed", batch_size=16)),
        ("forget_only", Single(role="forget", batch_size=16)),
        ("paired", Paired(batch_size=16)),
    ],
)
def test_mixing(task, mixing, schedule):
    how = build_recipe({"method": "random_label", "mixing": mixing, "batch_size": 16, "optim": SHORT})
    assert how.objective.schedule == schedule
    assert len(unlearn(task, REQUEST, how))


def test_one_paired_step_is_the_gradient_of_the_weighted_sum(task):
    optim = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "augment": False}
    how = build_recipe({"method": "neg_grad_plus", "beta": 0.75, "batch_size": 1000, "optim": optim})
    reference = copy.deepcopy(task)
    unlearn(task, REQUEST, how, inplace=True)
    split = reference.split(REQUEST)
    batches = {r: reference.load(r, split[r], split) for r in ("forget", "retain")}
    drawn = Paired(batch_size=1000).steps({r: len(split[r]) for r in batches}, 0, 0)
    assert len(drawn) == 1
    # Both roles move in steps of their own size, so one step holds each set once.
    assert {r: len(ids.unique()) for r, ids in drawn[0].items()} == {"forget": 40, "retain": 120}
    loss = {r: reference.loss(b).mean() for r, b in batches.items()}
    (0.75 * loss["retain"] - 0.25 * loss["forget"]).backward()
    moved = dict(task.model.named_parameters())
    for name, p in reference.model.named_parameters():
        torch.testing.assert_close(moved[name].detach(), p.detach() - 0.01 * p.grad, rtol=1e-4, atol=1e-6)
        assert not torch.equal(moved[name].detach(), p.detach())


def test_an_empty_mask_with_frozen_statistics_leaves_every_logit(task, tmp_path):
    file = str(tmp_path / "mask.safetensors")
    Mask({n: torch.zeros_like(p, dtype=torch.bool) for n, p in task.model.named_parameters()}, 0.5).save(file)
    split = task.split(REQUEST)
    before, digest = task.logits("test", split)[0], model_digest(task.model)
    for norm in ("frozen", "train"):
        how = build_recipe(
            {"method": "salun", "mask_file": file, "batch_size": 16, "optim": {**SHORT, "lr": 0.1, "norm": norm}}
        )
        patch = unlearn(task, REQUEST, how, allow_no_effect=True)
        assert all("running" in n or "tracked" in n for n in patch.changes)
        changed = copy.deepcopy(task)
        apply(changed.model, patch)
        same = torch.equal(changed.logits("test", split)[0], before)
        assert same == (norm == "frozen")
    assert model_digest(task.model) == digest


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), st.data())
def test_the_soft_step_shrinks_towards_zero_and_zeroes_at_least_k(values, data):
    delta = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    out = soft_threshold(delta, k)
    assert int((out == 0).sum()) >= k
    assert bool((out.abs() <= delta.abs()).all())
    assert bool((out * delta >= 0).all())
    assert torch.equal(soft_threshold(delta, 0), delta)
    assert not soft_threshold(delta, len(values)).any()


def test_l1_reads_the_epoch_and_every_weight(task):
    ctx = Context(task, task.split(REQUEST), epochs=4)
    penalty = L1(weight=0.5, no_l1_epochs=1).bind(ctx, DirectSpace(dict(task.model.named_parameters())))
    total = sum(float(p.detach().abs().sum()) for p in task.model.parameters())
    for epoch, factor in enumerate((0.5, 0.5 * 2 / 3, 0.5 / 3)):
        ctx.epoch = epoch
        term = penalty()["l1"]
        assert term.weight == pytest.approx(factor)
        assert float(term.values.detach()) == pytest.approx(total, rel=1e-5)
    ctx.epoch = 3
    assert penalty() == {}
