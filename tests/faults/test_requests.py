"""Cases 3 to 6, 8 and 13: requests and settings that cannot be carried out as stated are refused before any work."""

import copy
import sys

import inject
import pytest
import torch
from torch import nn

from expunge import guards
from expunge.digest import model_digest
from expunge.errors import ArtifactError, CapabilityError, ConfigError, DivergedError, RequestError
from expunge.method import build_recipe
from expunge.patch import apply
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.base import Split
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


# ---- 3 wrong base


def test_a_patch_for_another_base_is_refused(task):
    patch = unlearn(task, inject.REQUEST, inject.recipe())
    other = tiny_classifier(seed=1).model
    averaged = copy.deepcopy(task.model)
    with torch.no_grad():
        averaged.fc.bias.mul_(0.999)  # as in an EMA copy
    half = copy.deepcopy(task.model).half()
    bigger = tiny_classifier(n_classes=5, steps=0).model
    for model, why in ((other, "another base"), (averaged, "'fc.bias'"), (half, "precision"), (bigger, "another base")):
        before = model_digest(model)
        with pytest.raises(ArtifactError, match=why):
            apply(model, patch)
        assert model_digest(model) == before
    apply(copy.deepcopy(task.model), patch)  # the right base is accepted


def test_without_the_base_check_a_patch_lands_on_the_wrong_model(task, monkeypatch):
    patch = unlearn(task, inject.REQUEST, inject.recipe())
    other = tiny_classifier(seed=1).model
    before = model_digest(other)
    monkeypatch.setattr(sys.modules["expunge.patch.apply"], "check_base", lambda digests, patch: None)
    apply(other, patch)
    assert model_digest(other) != before


def test_a_data_parallel_model_gives_the_same_patch_and_says_so(task):
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    plain = unlearn(task, inject.REQUEST, inject.recipe())
    wrapped = ClassifierTask(Parallel(copy.deepcopy(task.model)), task.data, surrogate=task._sets["surrogate"])
    patch = unlearn(wrapped, inject.REQUEST, inject.recipe())
    assert patch.digest == plain.digest
    apply(task.model, patch)
    with pytest.warns(UserWarning, match="start with 'module.'"):
        apply(wrapped.model, plain)
    assert model_digest(wrapped.model) == model_digest(task.model)


# ---- 4 selectors


@pytest.mark.parametrize(
    "space", [{"kind": "layers", "targets": ["conv"]}, {"kind": "saliency_mask", "targets": ["conv"]}]
)
def test_a_selector_that_matches_nothing_is_refused_with_close_names(task, space, monkeypatch):
    steps = []
    with pytest.raises(RequestError, match=r"'conv' matches none of 8 parameters; did you mean .*'conv1'"):
        unlearn(task, inject.REQUEST, inject.recipe(space=space), on_step=lambda *a: steps.append(a))
    assert not steps


def test_one_bad_pattern_among_good_ones_is_refused(task):
    with pytest.raises(RequestError, match="'fcc'"):
        unlearn(task, inject.REQUEST, inject.recipe(space={"kind": "layers", "targets": ["conv1", "fcc"]}))


def test_a_protection_that_matches_nothing_is_refused(task):
    protections = [{"kind": "interval", "targets": ["atn2"]}]
    with pytest.raises(RequestError, match="atn2"):
        unlearn(task, inject.REQUEST, inject.recipe(protections=protections))
    with pytest.raises(RequestError, match="conv1"):  # it exists but cannot move here  # noqa: PT012
        space = {"kind": "layers", "targets": ["fc"]}
        unlearn(
            task, inject.REQUEST, inject.recipe(space=space, protections=[{"kind": "interval", "targets": ["conv1"]}])
        )


# ---- 5 tied weights


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 64, bias=False)
        self.outer = nn.Linear(64, 64, bias=False)
        self.outer.weight = self.inner.weight
        self.fc = nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.outer(torch.relu(self.inner(x.flatten(1)))))


def test_a_tied_tensor_is_one_tensor(task):
    tied = ClassifierTask(TiedNet(), task.data)
    patch = unlearn(tied, inject.REQUEST, inject.recipe())
    assert set(patch) == {"inner.weight", "fc.weight", "fc.bias"}
    apply(tied.model, patch)
    assert tied.model.outer.weight is tied.model.inner.weight


@pytest.mark.parametrize(("alias", "other"), [("inner", "outer"), ("outer", "inner")])
def test_selecting_one_alias_warns_and_names_the_other(task, alias, other):
    tied = ClassifierTask(TiedNet(), task.data)
    with pytest.warns(UserWarning, match=rf"'{alias}.weight' is shared with {other}.weight"):
        patch = unlearn(tied, inject.REQUEST, inject.recipe(space={"kind": "layers", "targets": [alias]}))
    assert list(patch) == ["inner.weight"]
    both = inject.recipe(space={"kind": "layers", "targets": ["inner", "outer"]})
    assert unlearn(tied, inject.REQUEST, both).digest == patch.digest  # and no warning


# ---- 6 sets


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ForgetRequest.samples([]), "the forget set is empty"),
        (ForgetRequest.samples(range(160)), r"whole training set \(160"),
        (ForgetRequest.samples([1, 2, 2, 2]), r"2 duplicates, e.g. 2 \(3 times\)"),
        (ForgetRequest.samples([-1, 5, 160, 161]), r"3 forget indices are outside 0..159, first -1"),
        (ForgetRequest(what={"kind": "samples", "indices": [1, 2, 3]}, retain=(3, 4)), "1 samples are in both"),
        (ForgetRequest(what={"kind": "label", "classes": ["ant"]}, retain=(0, 1)), "1 samples are in both"),
        (ForgetRequest(what={"kind": "samples", "indices": [1]}, retain=(900,)), "retain indices are outside"),
        (ForgetRequest.label("aunt"), "unknown class 'aunt' among 4 classes; did you mean 'ant'"),
        (ForgetRequest.label(99), "unknown class 99 among 4"),
        (ForgetRequest.label(0, "ant"), "class 0 is named twice"),
        (ForgetRequest.label(0, 1, 2, 3), "all 4 classes"),
        (ForgetRequest.label(), "no class is named"),
        (ForgetRequest.fraction(0.001), "the forget set is empty"),
        (ForgetRequest(what={"kind": "concept", "text": "cat"}), "text models only"),
    ],
)
def test_bad_sets_are_refused_with_counts(task, request_, why):
    with pytest.raises(RequestError, match=why):
        unlearn(task, request_, inject.recipe())


def test_overlapping_sets_of_another_task_are_caught_by_the_guard(task, monkeypatch):
    bad = Split({"forget": torch.arange(5), "retain": torch.arange(3, 20), "test": torch.arange(5)})
    monkeypatch.setattr(type(task), "split", lambda self, request: bad)
    with pytest.raises(RequestError, match="2 samples are in both"):
        unlearn(task, inject.REQUEST, inject.recipe())
    monkeypatch.setattr(guards, "check_disjoint", lambda split, recipe: None)
    assert len(unlearn(task, inject.REQUEST, inject.recipe()))  # without the guard nobody would notice


def test_another_label_space_is_refused(task):
    wide = tiny_classifier(n_classes=6, steps=0).model
    mismatched = ClassifierTask(wide, task.data)
    with pytest.raises(RequestError, match=r"\[6\] outputs but the data have 4 classes"):
        unlearn(mismatched, inject.REQUEST, inject.recipe())


def test_a_model_that_never_knew_the_class_is_noted(task, monkeypatch):
    with torch.no_grad():
        task.model.fc.bias[0] = -50.0
    patch = unlearn(task, inject.REQUEST, inject.recipe(optim={"lr": 1e-4}))
    assert any("forget accuracy is already 0 %" in n for n in patch.manifest.notes)
    known = unlearn(tiny_classifier(), inject.REQUEST, inject.recipe())
    assert not any("already" in n for n in known.manifest.notes)
    monkeypatch.setattr(guards, "check_label_space", lambda ctx, roles: None)
    patch = unlearn(task, inject.REQUEST, inject.recipe(optim={"lr": 1e-4}))
    assert not any("already" in n for n in patch.manifest.notes)


def test_a_model_with_broken_weights_is_refused(task, monkeypatch):
    with torch.no_grad():
        task.model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(RequestError, match=r"'conv2.weight' has NaN"):
        unlearn(task, inject.REQUEST, inject.recipe())
    monkeypatch.setattr(guards, "check_finite_model", lambda tensors: None)
    with pytest.raises(DivergedError):  # without the guard the blame falls on the run
        unlearn(task, inject.REQUEST, inject.recipe())


# ---- 8 settings


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"space": {"kind": "saliency_mask", "keeep": 0.5}}, r"keeep'; did you mean .*'keep'"),
        ({"space": {"kind": "saliency_mask", "keep": 0}}, "keep"),
        ({"space": {"kind": "saliency_mask", "keep": 1.5}}, "keep"),
        ({"space": {"kind": "saliency_mask", "keep": "half"}}, "keep"),
        ({"space": "saliency_masks"}, "did you mean 'saliency_mask'"),
        ({"space": {"targets": ["fc"]}}, "the key 'kind'"),
        ({"objective": "random_lable"}, "did you mean 'random_label'"),
        ({"objective": {"kind": "random_label", "schedule": {"kind": "sequential", "batchsize": 3}}}, "batchsize"),
        ({"objective": {"kind": "random_label", "schedule": {"kind": "sequentially"}}}, "sequentially"),
        ({"optim": {"learning_rate": 0.1}}, "learning_rate"),
        ({"optim": {"lr": -1}}, "lr"),
        ({"optim": {"lr": float("nan")}}, "lr"),
        ({"optim": {"epochs": 0}}, "epochs"),
        ({"optim": {"name": "adamm"}}, "adamm"),
        ({"spce": "all"}, r"unknown key 'Recipe.spce'; did you mean 'space'"),
        (
            {
                "protections": [
                    {"kind": "interval", "targets": ["fc"], "lower_percentile": 0.9, "upper_percentile": 0.1}
                ]
            },
            "below",
        ),
        ({"objective": None}, "either an objective or an edit"),
    ],
)
def test_mistyped_or_impossible_settings_are_refused(settings, why):
    good = {"name": "x", "objective": "random_label", "space": "all"}
    with pytest.raises(ConfigError, match=why):
        Recipe(**{**good, **settings})
    Recipe(**good)


def test_mistyped_method_settings_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'salun'"):
        build_recipe("salunn")
    with pytest.raises(ConfigError, match=r"keeep.*did you mean .*'keep'"):
        build_recipe({"method": "salun", "keeep": 0.5})


# ---- 13 capabilities


def test_a_missing_role_is_named_and_methods_that_work_are_listed(task, monkeypatch):
    bare = ClassifierTask(task.model, task.data)
    needs_surrogate = inject.recipe(
        objective={"kind": "random_label", "schedule": {"kind": "paired", "streams": ["forget", "surrogate"]}}
    )
    steps = []
    with pytest.raises(CapabilityError, match=r"needs surrogate.*offers .*forget.*would work: .*gradient_ascent"):
        unlearn(bare, inject.REQUEST, needs_surrogate, on_step=lambda *a: steps.append(a))
    assert not steps
    assert len(unlearn(task, inject.REQUEST, needs_surrogate))
    monkeypatch.setattr(guards, "check_capabilities", lambda task, split, recipe: None)
    with pytest.raises(RequestError, match="surrogate"):  # later and less helpful, but still not silent
        unlearn(bare, inject.REQUEST, needs_surrogate)


def test_a_protection_on_an_edit_is_refused():
    from expunge.edits.base import Edit
    from expunge.part import part
    from expunge.registry import Info, registry

    @part("fault_edit", Info("Does nothing."))
    class Nothing(Edit):
        def compute(self, ctx, space):
            return {}

    try:
        with pytest.raises(ConfigError, match="protections act on a training loop"):
            Recipe(name="x", edit="fault_edit", space="all", protections=["l1"])
        Recipe(name="x", edit="fault_edit", space="all")
    finally:
        del registry.entries[("edit", "fault_edit")]


def test_a_schedule_without_the_objectives_role_is_named(task):
    recipe = inject.recipe(objective={"kind": "gradient_ascent", "schedule": {"kind": "single", "role": "retain"}})
    with pytest.raises(ConfigError, match=r"'gradient_ascent' does not fit its schedule 'single'.*'forget'"):
        unlearn(task, inject.REQUEST, recipe)
