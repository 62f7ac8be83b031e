"""SCRUB, Bad Teacher and the baselines of SCAR's tables: what they promise, on the tiny classifier."""

import copy
import json

import pytest
import torch
from baseline_runs import CLASS, SAMPLES, accuracies, context, run

from expunge.context import Context
from expunge.data.forget_indices import published_forget_indices
from expunge.digest import model_digest
from expunge.errors import ConfigError
from expunge.method import build_recipe
from expunge.methods import bad_teacher as bad_file
from expunge.methods import scrub as scrub_file
from expunge.methods._teacher import kl_divergence
from expunge.methods.scar_random_labels import ScarRandomLabels
from expunge.objectives.base import Objective
from expunge.objectives.cross_entropy import RandomLabel
from expunge.objectives.stopping import StopBelow
from expunge.patch import apply
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import LOG, unlearn
from expunge.tasks.tiny import tiny_classifier

TABLES = ("duck", "scar_neg_grad", "scar_random_labels")


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0, n_per_class=20)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


# -- baselines of the tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_stop_rule_follows_the_request(task, name):
    rule = build_recipe(name).objective.rule
    assert (rule(True).target, rule(True).below_test, rule(True).every) == (0.01, None, None)
    assert (rule(False).target, rule(False).below_test, rule(False).after_epochs) == (None, 0.015, 0)
    own = StopBelow(target=0.5)
    assert build_recipe(name).objective.model_copy(update={"until": own}).rule(True) == own
    patch = run(task, name, SAMPLES, epochs=1, lr=1e-4)
    assert any("test labels" in note for note in patch.manifest.notes)


@pytest.mark.parametrize("name", ["scar_neg_grad", "scar_random_labels"])
def test_a_baseline_forgets_stops_and_never_sees_the_retain_set(task, name, monkeypatch):
    real = type(task).load

    def guarded(self, role, *args, **kwargs):
        assert role != "retain", "a retain image was loaded"
        return real(self, role, *args, **kwargs)

    recipe = build_recipe({"method": name, "batch_size": 20, "optim": {"lr": 0.02}})
    with monkeypatch.context() as patched:
        patched.setattr(type(task), "load", guarded)
        patch = unlearn(task, CLASS, recipe)
        with pytest.raises(AssertionError, match="a retain image"):
            unlearn(task, CLASS, build_recipe("fine_tune"))
    apply(task.model, patch)
    assert accuracies(task)["forget"] < 0.01
    assert any("below 1.00 %" in note for note in patch.manifest.notes)


def labels_of(task, request, objective, step=0):
    ctx = context(task, request)
    ctx.step = step
    seen = []

    def loss(self, batch, targets=None):
        seen.append(targets)
        return targets.float()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(task), "loss", loss)
        objective.bind(ctx)({"forget": task.load("forget", ctx.split["forget"], ctx.split)})
    return seen[0]


@pytest.mark.parametrize("exclude_true", [True, False])
def test_random_labels_come_from_the_classes_that_stay(task, exclude_true):
    objective = ScarRandomLabels(exclude_true=exclude_true)
    for removed in (["ant"], ["dog"], ["ant", "cat"], ["ant", "bee", "cat"]):
        staying = {i for i, c in enumerate(task.classes) if c not in removed}
        drawn = [labels_of(task, ForgetRequest.label(*removed), objective, step) for step in range(8)]
        counts = torch.bincount(torch.cat(drawn), minlength=4)
        assert {i for i in range(4) if counts[i]} == staying
        assert int(counts.max()) < 1.5 * int(counts[list(staying)].min()), "even over the classes that stay"
    pair = labels_of(task, ForgetRequest.label("ant", "cat"), RandomLabel())
    assert bool(torch.isin(pair, torch.tensor([0, 2])).any()), "without the setting a removed class can be drawn"


def test_random_labels_of_samples_are_wrong_and_new_at_every_step(task):
    truth = task.data.train.labels[:16]
    wrong = [labels_of(task, SAMPLES, ScarRandomLabels(), step) for step in range(40)]
    published = [labels_of(task, SAMPLES, ScarRandomLabels(exclude_true=False), step) for step in range(40)]
    assert not any(bool((w == truth).any()) for w in wrong)
    hits = torch.stack([p == truth for p in published]).double().mean()
    assert 0.15 < float(hits) < 0.35, "one in four by chance"
    assert not torch.equal(wrong[0], wrong[1])
    assert torch.equal(wrong[0], labels_of(task, SAMPLES, ScarRandomLabels(), 0))
    by_epoch = [labels_of(task, SAMPLES, RandomLabel(), step) for step in range(2)]
    assert torch.equal(*by_epoch)


def test_the_description_of_random_labels_says_what_is_set():
    assert "exclude_removed" not in RandomLabel().describe()
    for part in (RandomLabel(exclude_removed=True), ScarRandomLabels(exclude_removed=False), ScarRandomLabels()):
        assert "exclude_removed" in part.describe()
        assert Objective.parse(part.describe()) == part


# -- teachers ------------------------------------------------------------------------------------------------------


def test_divergence_of_known_logits():
    teacher, student = torch.tensor([[2.0, 1, 0], [0, 3, 1]]).double(), torch.tensor([[1.0, 1, 0], [0, 2, 2]]).double()
    assert float(kl_divergence(teacher, student).mean()) == pytest.approx(0.2190034933, abs=1e-10)
    shifted = kl_divergence(teacher, student + torch.tensor([[5.0], [-3.0]]))
    torch.testing.assert_close(shifted, kl_divergence(teacher, student))
    assert not torch.allclose(kl_divergence(student, teacher), kl_divergence(teacher, student))
    assert float(kl_divergence(teacher, teacher, 3.0).abs().max()) < 1e-15
    assert float(kl_divergence(teacher, student, 2.0).mean()) < float(kl_divergence(teacher, student).mean())


@pytest.fixture
def teachers(monkeypatch):
    """Every teacher made, with its digest when made."""
    made = []
    for file in (scrub_file, bad_file):

        def copied(task, real=file.frozen_copy):
            teacher = real(task)
            made.append((teacher, model_digest(teacher.model)))
            return teacher

        monkeypatch.setattr(file, "frozen_copy", copied)
    return made


def test_the_teacher_of_scrub_stays_the_original(task, teachers):
    base = model_digest(task.model)
    run(task, "scrub", lr=0.02, epochs=2, optim={"norm": "train"})
    [(teacher, start)] = teachers
    assert start == base == model_digest(teacher.model) != model_digest(task.model)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(m.training for m in teacher.model.modules())


def mean_divergence(task, original, role):
    split = task.split(CLASS)
    batch = task.load(role, split[role], split)
    task.model.eval()
    with torch.no_grad():
        return float(kl_divergence(original.predict(batch), task.predict(batch)).mean())


def test_the_forget_pass_of_scrub_raises_the_divergence_and_the_retain_pass_lowers_it(task):
    original = copy.deepcopy(task)
    with torch.no_grad():
        task.model.fc.weight.mul_(0.9)  # away from the point where student and teacher agree
    apart = {role: mean_divergence(task, original, role) for role in ("forget", "retain")}
    assert min(apart.values()) > 0
    for role, raised in (("forget", True), ("retain", False)):
        own = copy.deepcopy(task)
        batch = own.load(role, (split := own.split(CLASS))[role], split)
        ctx = Context(original, split)
        objective = scrub_file.Scrub(gamma=0.0, alpha=1.0, temperature=1.0)
        ctx.task = own
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(scrub_file, "frozen_copy", lambda _: original)
            loss = objective.bind(ctx)
        terms = loss({role: batch})
        assert {t.role for t in terms.values()} == {role}, "roles are read as declared"
        sum(t.weight * t.values.mean() for t in terms.values()).backward()
        with torch.no_grad():
            for p in own.model.parameters():
                p -= 0.01 * p.grad
        assert (mean_divergence(own, original, role) > apart[role]) == raised


def test_scrub_ascends_in_its_first_epochs_only_then_forgets_and_keeps_the_rest(task, tmp_path):
    recipe = build_recipe({"method": "scrub", "batch_size": 20, "optim": {"lr": 0.03, "epochs": 8}})
    unlearn(task, CLASS, recipe, run_dir=tmp_path, inplace=True)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    passes = [["forget" if "forget_teacher" in r else "retain" for r in rows if r["epoch"] == e] for e in range(8)]
    assert passes == [["forget", "retain", "retain", "retain"]] * 3 + [["retain"] * 3] * 5
    assert rows[0]["forget_teacher"] == pytest.approx(0, abs=1e-4), "student and teacher agree at first"
    assert rows[8]["forget_teacher"] > 1
    assert rows[8]["loss"] == pytest.approx(-rows[8]["forget_teacher"])
    retain = rows[-1]
    assert retain["loss"] == pytest.approx(0.001 * retain["retain_teacher"] + 0.99 * retain["retain_labels"])
    after = accuracies(task)
    assert after["forget"] < 0.2
    assert min(after["retain"], after["test"]) > 0.9


def test_bad_teacher_has_two_teachers_that_never_change(task, teachers):
    base = model_digest(task.model)
    run(task, "bad_teacher", lr=0.02, epochs=1, optim={"norm": "train"})
    digests = [model_digest(teacher.model) for teacher, _ in teachers]
    assert digests[0] == base
    assert digests[1] not in (base, model_digest(task.model))
    assert model_digest(task.model) != base
    again = bad_file.untrained(context(tiny_classifier(dropout=0.0, n_per_class=20)))
    assert model_digest(again.model) == digests[1], "a function of the seed"
    other = context(task)
    other.seed = 1
    assert model_digest(bad_file.untrained(other).model) != digests[1]
    state = torch.get_rng_state()
    bad_file.untrained(other)
    assert torch.equal(torch.get_rng_state(), state), "no global draw"


def test_bad_teacher_tells_forget_from_retain_sample_by_sample(task):
    ctx = context(task)
    task.model.eval()
    loss = bad_file.BadTeacher().bind(ctx)
    ids = torch.cat([ctx.split["forget"][:5], ctx.split["retain"][:5]])
    with torch.no_grad():
        mixed = loss({"mixed": task.load("mixed", ids, ctx.split)})["mixed"].values
        apart = loss({r: task.load(r, ctx.split[r][:5], ctx.split) for r in ("forget", "retain")})
    torch.testing.assert_close(mixed, torch.cat([apart["forget"].values, apart["retain"].values]))
    assert float(mixed[5:].abs().max()) < 1e-6, "the student begins as the competent teacher"
    assert float(mixed[:5].min()) > 0.1


def test_bad_teacher_forgets_and_keeps_the_rest(task):
    run(task, "bad_teacher", lr=0.02, epochs=10)
    after = accuracies(task)
    assert after["forget"] < 0.5
    assert min(after["retain"], after["test"]) > 0.95
    split = task.split(CLASS)
    confidence = {r: float(task.logits(r, split)[0].softmax(1).amax(1).mean()) for r in ("forget", "retain")}
    assert confidence["forget"] < 0.6 < 0.85 < confidence["retain"]


@pytest.mark.parametrize("name", ["scrub", "bad_teacher", *TABLES])
def test_a_recipe_reads_back(name):
    recipe = build_recipe(name)
    assert Recipe(**recipe.describe()) == recipe


# -- index sets ----------------------------------------------------------------------------------------------------


def test_published_index_sets_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"cifar-10.*did you mean.*'cifar10'"):
        published_forget_indices("cifar-10", 0)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match="seed"):
            published_forget_indices("cifar10", seed)
