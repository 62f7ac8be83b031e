"""DUCK: centroids, targets, and what the published list of targets does, on the tiny classifier."""

import copy

import pytest
import torch
from baseline_runs import SAMPLES, accuracies, context, run
from hypothesis import given
from hypothesis import strategies as st

from expunge.digest import model_digest
from expunge.errors import NoEffectError, RequestError
from expunge.method import build_recipe
from expunge.methods.duck import Duck, appended, centroids, cosine_distances, nearest_wrong, upfront
from expunge.objectives.stopping import StopBelow
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import Nested
from expunge.tasks.tiny import tiny_classifier


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0, n_per_class=20)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


@given(st.integers(0, 2**32), st.integers(2, 7), st.booleans())
def test_a_target_is_the_nearest_class_other_than_the_own(seed, n, removes):
    draw = torch.Generator().manual_seed(seed)
    removed = seed % n if removes else None
    classes = torch.tensor([c for c in range(n) if c != removed])
    labels = torch.full((9,), removed) if removes else torch.randint(n, (9,), generator=draw)
    distances = torch.rand(9, len(classes), generator=draw)
    targets = nearest_wrong(distances, labels, classes)
    for row, label, target in zip(distances, labels.tolist(), targets.tolist(), strict=True):
        allowed = {c: float(d) for c, d in zip(classes.tolist(), row, strict=True) if c != label}
        assert target == min(allowed, key=allowed.__getitem__)


@pytest.mark.parametrize("removed", range(5))
def test_the_class_after_the_removed_one_can_be_a_target(removed):
    """The published comparison by column misses it, except where no class follows."""
    classes = torch.tensor([c for c in range(5) if c != removed])
    nearest = min(removed + 1, int(classes[-1]))
    distances = torch.where(classes == nearest, 0.1, 0.5 + 0.1 * classes)[None]
    label = torch.tensor([removed])
    assert nearest_wrong(distances, label, classes).tolist() == [nearest]
    assert (nearest_wrong(distances, label, classes, "compact").tolist() == [nearest]) == (removed == 4)


def test_centroids_are_class_means_of_the_retain_features(task):
    ctx = context(task)
    means, kept = centroids(task, ctx, 7)
    assert kept.tolist() == [1, 2, 3]
    batch = task.load("retain", ctx.split["retain"], ctx.split)
    with torch.no_grad():
        features, _ = task.represent(batch)
    for row, c in zip(means, kept, strict=True):
        torch.testing.assert_close(row.float(), features[batch.targets == c].mean(0))
    task.data.train.x[ctx.split["forget"]] = 0.5
    assert torch.equal(centroids(task, ctx, 7)[0], means), "forget images have no part in them"
    task.data.train.x[ctx.split["retain"]] = 0.5
    assert not torch.equal(centroids(task, ctx, 7)[0], means)


def test_a_class_without_retain_samples_is_refused_by_name_or_never_chosen(task):
    bees = ForgetRequest.samples((task.data.train.labels == 1).nonzero().flatten().tolist())
    ctx = context(task, bees)
    with pytest.raises(RequestError, match="no sample of class 'bee'"):
        Duck().bind(ctx)
    means, kept = centroids(task, ctx, 20, 10)
    assert kept.tolist() == [0, 1, 2, 3]
    assert means[1].isnan().all()
    assert not means[[0, 2, 3]].isnan().any()
    assert any("bee" in note for note in ctx.notes)
    batch = task.load("retain", ctx.split["retain"], ctx.split)
    distances = cosine_distances(task.represent(batch)[0].double(), means)
    targets = nearest_wrong(distances, batch.targets, kept)
    assert not bool(((targets == 1) | (targets == batch.targets)).any())


def chosen(task, batch_size, order=None):
    """Targets of all forget samples, by id."""
    ctx = context(task, SAMPLES)
    if order is not None:
        ctx.split = ctx.split.with_indices(forget=ctx.split["forget"][order])
    means, kept = centroids(task, ctx, 16)

    def choose(batch, features):
        return nearest_wrong(cosine_distances(features.double(), means), batch.targets, kept)

    targets = upfront(ctx, choose, batch_size)
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(-1)  # what happens afterwards makes no difference
    batch = task.load("forget", torch.arange(16), ctx.split)
    return targets(batch, batch.inputs)


def test_targets_depend_neither_on_batches_nor_on_order_nor_on_training(task):
    want = chosen(copy.deepcopy(task), 16)
    assert torch.equal(chosen(copy.deepcopy(task), 3), want)
    assert torch.equal(chosen(copy.deepcopy(task), 5, torch.arange(15, -1, -1)), want)
    assert not bool((want == task.data.train.labels[:16]).any())
    with torch.no_grad():
        task.model.conv2.weight.mul_(torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(chosen(task, 16), want), "another original model, other targets"


@pytest.mark.parametrize("profile", ["as_intended", "as_published"])
@pytest.mark.parametrize("label", ["ant", "dog"])
def test_duck_forgets_a_class_and_keeps_the_others(task, label, profile):
    request = ForgetRequest.label(label)
    assert min(accuracies(task, request).values()) > 0.95
    patch = run(task, "duck", request, epochs=6, lr=0.01, profile=profile)
    after = accuracies(task, request)
    assert after["forget"] < 0.01
    assert min(after["retain"], after["test"]) > 0.95
    assert any("below 1.00 %" in note for note in patch.manifest.notes)


def test_without_weights_nothing_moves(task):
    with pytest.raises(NoEffectError):
        run(task, "duck", lr=0.01, epochs=1, lambda_1=0.0, lambda_2=0.0)
    assert len(run(task, "duck", lr=0.01, epochs=1, lambda_1=0.0))


@pytest.mark.parametrize("profile", ["as_intended", "as_published"])
def test_micro_batches_leave_the_targets_and_the_result(task, profile):
    changed = []
    for micro in (None, 4):
        own = copy.deepcopy(task)
        recipe = build_recipe({"method": "duck", "profile": profile, "batch_size": 8, "optim": {"augment": False}})
        objective = recipe.objective.model_copy(update={"until": StopBelow(target=-1.0)})
        optim = {"micro_batch": micro, "norm": "frozen", "epochs": 2, "lr": 1e-3}
        changed.append((own, unlearn(own, SAMPLES, recipe.replace(objective=objective, optim=optim), inplace=True)))
    (whole, _), (cut, _) = changed
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert model_digest(whole.model) != model_digest(task.model)


class Stop(Exception):  # noqa: N818
    pass


def test_the_published_list_of_targets_survives_an_interruption(task, tmp_path):
    recipe = build_recipe({"method": "duck", "profile": "as_published", "batch_size": 8, "optim": {"lr": 0.01}})
    objective = recipe.objective.model_copy(update={"until": StopBelow(target=-1.0)})
    recipe = recipe.replace(objective=objective, optim={"epochs": 3, "augment": False})
    whole = unlearn(task, SAMPLES, recipe)

    def interrupt(step, *_):
        if step == 17:  # in the second epoch, which reads what the first one wrote
            raise Stop

    with pytest.raises(Stop):
        unlearn(task, SAMPLES, recipe, run_dir=tmp_path, checkpoint_every=1, on_step=interrupt)
    assert unlearn(task, SAMPLES, recipe, run_dir=tmp_path).digest == whole.digest
    other = recipe.replace(objective=objective.model_copy(update={"assignment": "upfront"}))
    assert unlearn(task, SAMPLES, other).digest != whole.digest


def test_a_step_repeated_in_smaller_pieces_counts_once_in_the_published_list(task):
    """After an out-of-memory error the loop takes a step again."""
    ctx = context(task, SAMPLES)
    entries = iter([5, 1, 1, 2, 3])

    def choose(batch, features):
        return torch.full_like(batch.ids, next(entries))

    targets = appended(ctx, choose, 8)

    def visit(step, *ids):
        ctx.step = step
        batch = task.load("forget", torch.tensor(ids), ctx.split)
        return targets(batch, batch.inputs)

    visit(0, 0, 1, 2, 3)  # fails
    visit(0, 0, 1)
    visit(0, 2, 3)
    visit(1, 0, 1, 2, 3)
    visit(2, 4, 5, 6, 7)
    ctx.epoch = 1
    assert visit(3, 0, 1, 2, 3).tolist() == [1] * 4, "the first batch reads the first entry"
    assert visit(4, 4, 5, 6, 7).tolist() == [2] * 4, "the second batch reads the second entry, one of the first batch"
    assert visit(4, 6, 7).tolist() == [2] * 2


def test_duck_takes_the_stated_number_of_steps_per_forget_batch():
    for profile, idle in (("as_intended", 0), ("as_published", 1)):
        schedule = build_recipe(
            {"method": "duck", "profile": profile, "batch_size": 10, "repeats": 3}
        ).objective.schedule
        assert isinstance(schedule, Nested)
        steps = schedule.steps({"forget": 20, "retain": 100}, 0, 1)
        assert [("forward_only" in s) for s in steps] == ([False] * 3 + [True] * idle) * 2
        few = schedule.steps({"forget": 20, "retain": 20}, 0, 1)
        assert len(few) == 4, "no more steps than there are retain batches"
