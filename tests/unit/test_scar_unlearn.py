"""SCAR and its self-forget form as runs: what they read, when they stop, what survives, what they reach."""

import copy
import json

import pytest
import torch

from expunge.context import Context
from expunge.errors import ArtifactError, CapabilityError, ConfigError, DataError, RequestError
from expunge.features.statistics import ClassStatistics
from expunge.method import build_recipe
from expunge.methods._scar import Teacher
from expunge.methods.scar import GATES, TARGETS, Scar
from expunge.methods.scar_self import PSEUDO_ACCURACY, ScarSelf
from expunge.objectives.stopping import ACCURACY, StopBelow
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import Nested, Paired, Replay, Single
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

ANT = ForgetRequest.label("ant")
FAST = Optim(name="adam", lr=5e-4, weight_decay=0.0, epochs=2)
SAMPLES = ForgetRequest.samples(range(0, 60, 2))


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def statistics(trained, tmp_path):
    path = tmp_path / "classes.safetensors"
    ClassStatistics.fit(trained, trained.everything()).save(path)
    return str(path)


def ran(task, request, recipe, folder, **more):
    patch = unlearn(task, request, recipe, run_dir=folder, **more)
    return patch, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def forbid(task, *roles):
    """The same task, in which opening these roles is an error."""

    class Guarded(ClassifierTask):
        def load(self, role, ids, split, *, augment=None):
            if role in roles:
                raise AssertionError(f"the {role} images were opened")
            return super().load(role, ids, split, augment=augment)

    task.__class__ = Guarded
    return task


# -- what is read --------------------------------------------------------------------------------------------------


def test_scar_never_opens_the_retain_set(task, statistics, tmp_path):
    task = forbid(task, "retain")
    recipe = build_recipe({"method": "scar", "statistics": statistics, "optim": {"epochs": 2}})
    patch, _ = ran(task, ANT, recipe, tmp_path / "run")
    assert len(patch)
    assert not any("retain set" in n for n in patch.manifest.notes)
    with pytest.raises(AssertionError, match="retain images were opened"):
        unlearn(task, ANT, build_recipe({"method": "scar", "optim": {"epochs": 2}}))


def test_scar_self_opens_neither_retain_nor_forget_set(task, statistics, tmp_path):
    task = forbid(task, "retain", "forget", "test", "forget_test")
    settings = {"method": "scar_self", "statistics": statistics, "optim": {"epochs": 2}}
    patch, rows = ran(task, ANT, build_recipe(settings), tmp_path / "run")
    assert len(patch)
    assert PSEUDO_ACCURACY in rows[-1]
    with pytest.raises(AssertionError, match="forget images were opened"):
        unlearn(task, ANT, build_recipe({**settings, "oracle_stop": True}))


def test_without_a_file_the_retain_set_is_read_once_and_a_note_says_so(task):
    patch = unlearn(task, ANT, build_recipe({"method": "scar", "optim": {"epochs": 1}}))
    assert any("retain set before the run" in n for n in patch.manifest.notes)


def test_no_retain_samples_and_no_file(task):
    split = task.split(ANT)
    bare = type(split)({r: ids for r, ids in split.indices.items() if r != "retain"}, (), split.removed)
    ctx = Context(task, bare)
    for part in (Scar(), ScarSelf()):
        with pytest.raises(CapabilityError, match="'statistics' must name a file"):
            part.bind(ctx)


def test_statistics_of_another_model_or_power_are_refused(task, statistics):
    with pytest.raises(ArtifactError, match=r"taken with delta = 0.5, but 0.25"):
        unlearn(task, ANT, build_recipe({"method": "scar", "statistics": statistics, "delta": 0.25}))
    with torch.no_grad():
        task.model.conv1.weight.mul_(1.01)
    with pytest.raises(ArtifactError, match="other weights"):
        unlearn(task, ANT, build_recipe({"method": "scar", "statistics": statistics}))


def test_a_class_with_one_retain_sample_is_named(task):
    labels = task.data.train.labels
    of_bee = (labels == 1).nonzero()[1:, 0]
    with pytest.raises(DataError, match="class 'bee' has 1 sample"):
        unlearn(task, ForgetRequest.samples(of_bee.tolist()), build_recipe("scar"))


def test_self_forget_is_for_classes(task):
    with pytest.raises(RequestError, match=r"whole classes.*use scar"):
        unlearn(task, SAMPLES, build_recipe("scar_self"))


def test_self_forget_needs_a_surrogate_that_looks_like_the_class(task):
    split = task.split(ANT)
    teacher = Teacher(Context(task, split))
    other = split.with_indices(surrogate=teacher.ids[teacher.labels != 0])
    with pytest.raises(RequestError, match=r"none of the .* surrogates for 'ant'"):
        ScarSelf().bind(Context(task, other))


@pytest.mark.parametrize(
    ("part", "schedule"),
    [
        (Scar, Single(role="forget")),
        (Scar, Paired()),
        (ScarSelf, Nested()),
        (ScarSelf, Replay(epochs=(({"forget": (0,)},),))),
    ],
)
def test_schedules_of_other_roles_are_refused(part, schedule):
    with pytest.raises(ConfigError, match=rf"schedule '{schedule.kind}' must read"):
        part(schedule=schedule)


# -- targets, gates, weights ---------------------------------------------------------------------------------------


def test_targets_are_fixed_before_the_first_step(task):
    """They are those of the original model in eval mode, whatever the batch size, and training leaves them alone."""
    split = task.split(ANT)
    ctx = Context(task, split)
    part = Scar()
    part.prepare(ctx)
    part.bind(ctx)
    first = ctx.state[TARGETS].clone()
    assert bool((first[split["forget"]] != 0).all())
    small = copy.deepcopy(task)
    small.eval_batch_size = 3
    again = Context(small, split)
    part.bind(again)
    assert torch.equal(again.state[TARGETS], first)
    seen = []

    def targets(part, ctx, *rest, own=Scar.targets):
        seen.append(own(part, ctx, *rest).clone())
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scar, "targets", targets)
        unlearn(task, ANT, Recipe(name="x", objective=part, space="all", optim=FAST.model_copy(update={"lr": 0.01})))
    assert all(torch.equal(t, first[split["forget"]]) for t in seen)
    assert len(seen) > 1


def test_the_gate_lets_only_known_classes_through(task):
    ctx = Context(task, task.split(SAMPLES))
    part = Scar(gate=0.8)
    batch = task.load("forget", ctx.split["forget"], ctx.split)
    assert bool((part.weights(ctx, batch) == 1).all()), "nothing has been measured yet"
    ctx.state[GATES] = torch.tensor([0.79, 0.8, torch.nan, 1.0], dtype=torch.float64)
    weights = part.weights(ctx, batch)
    assert torch.equal(weights[batch.targets == 0], torch.zeros(int((batch.targets == 0).sum()), dtype=torch.float64))
    assert bool((weights[batch.targets == 3] == 1).all())
    assert bool((part.weights(Context(task, task.split(ANT), state=ctx.state), batch) == 1).all())


@pytest.mark.parametrize("accuracy", [0.79, 0.8])
def test_closed_gates_leave_the_keep_term(task, tmp_path, monkeypatch, accuracy):
    """Just below the gate the forget term is 0 and the keep term goes on; at the gate both act."""
    monkeypatch.setattr("expunge.methods.scar.class_accuracy", lambda *_: torch.full((4,), accuracy).double())
    part = Scar(until=StopBelow(target=-1, every=1), gate=0.8)
    recipe = Recipe(name="x", objective=part, space="all", optim=FAST.model_copy(update={"lr": 0.01, "epochs": 3}))
    _, rows = ran(task, SAMPLES, recipe, tmp_path / "a")
    assert rows[0]["forget"] > 0
    assert [row["forget"] > 0 for row in rows[1:]] == [accuracy >= 0.8] * 2
    assert rows[1]["keep"] > 0
    assert rows[1]["grad_norm"] > 0


def test_gates_are_measured_with_the_stop_rule(task):
    ctx = Context(task, task.split(SAMPLES))
    part = Scar(check_every=3)
    part.prepare(ctx)
    ctx.step = 0
    assert part.measure(ctx, False) == {}
    assert GATES not in ctx.state
    ctx.step = 2
    assert ACCURACY in part.measure(ctx, False)
    assert ctx.state[GATES].shape == (4,)


# -- the loop ------------------------------------------------------------------------------------------------------


def test_the_stop_target_follows_the_request(task):
    part = Scar()
    assert part.rule(True) == StopBelow(target=0.01, every=10)
    assert part.rule(False) == StopBelow(below_test=0.015, every=10)
    published = build_recipe({"method": "scar", "profile": "as_published"}).objective
    assert published.rule(True) == StopBelow(target=0.01, every=1, after_epochs=2)


def test_published_runs_take_two_epochs_and_a_step(task, tmp_path):
    """Both profiles stop at the target, the published one not before its third epoch."""
    lengths = {}
    for profile in ("as_intended", "as_published"):
        settings = {"method": "scar", "profile": profile, "check_every": 1, "n_ret": 1, "lambda_2": 0.0}
        recipe = build_recipe({**settings, "batch_size": 40, "optim": {"lr": 0.05, "epochs": 9, "norm": "frozen"}})
        recipe = recipe.replace(optim={"norm": "frozen"})
        _, rows = ran(task, ANT, recipe, tmp_path / profile)
        assert rows[-1][ACCURACY] < 0.01
        assert all(r.get(ACCURACY, 1) >= 0.01 or r["epoch"] < 2 for r in rows[:-1])
        lengths[profile] = rows[-1]["epoch"]
    assert lengths["as_intended"] < 2 <= lengths["as_published"]


def test_steps_per_forget_batch(task):
    sizes = {"forget": 40, "surrogate": 80}
    for n_ret, per_batch in ((0, 1), (2, 3), (9, 4)):
        schedule = build_recipe({"method": "scar", "n_ret": n_ret, "batch_size": 20}).objective.schedule
        assert len(schedule.steps(sizes, 0, 0)) == 2 * per_batch


def test_no_weights_no_change_and_no_rate_no_change(task):
    for settings in ({"lambda_1": 0.0, "lambda_2": 0.0}, {"optim": {"lr": 0.0}}):
        patch = unlearn(task, ANT, build_recipe({"method": "scar", **settings}), allow_no_effect=True)
        assert not any(bool(c.dense().any()) for c in patch.changes.values())


def test_the_teacher_stays(task):
    ctx = Context(task, task.split(ANT), augment=("surrogate",))
    teacher = Teacher(ctx)
    assert teacher.live
    before = {n: t.clone() for n, t in teacher.original.model.state_dict().items()}
    batch = task.load("surrogate", ctx.split["surrogate"][:9], ctx.split)
    cached = Teacher(Context(task, ctx.split))
    assert torch.allclose(cached(batch), teacher(batch), atol=1e-5)
    with torch.no_grad():
        task.model.fc.bias.add_(1)
    task.model.train()
    task.predict(batch)
    assert torch.allclose(cached(batch), teacher(batch), atol=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in teacher.original.model.state_dict().items())


@pytest.mark.parametrize("method", ["scar", "scar_self"])
@pytest.mark.parametrize("request_", [ANT, SAMPLES], ids=["class", "samples"])
def test_micro_batches_do_not_matter(task, method, request_):
    """Means over the rows that count are taken over the whole step, however it is cut."""
    if method == "scar_self" and request_ is SAMPLES:
        pytest.skip("class requests only")
    task.model.double()
    patches = []
    for micro in (None, 7):
        recipe = build_recipe({"method": method, "batch_size": 24, "optim": {"epochs": 1, "micro_batch": micro}})
        recipe = recipe.replace(optim={"name": "sgd", "momentum": 0.0})
        patches.append(unlearn(task, request_, recipe))
    whole, cut = patches
    for name, change in whole.changes.items():
        assert torch.allclose(change.dense(), cut.changes[name].dense(), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("method", ["scar", "scar_self"])
def test_one_forward_pass_gives_the_same(task, method):
    task.model.double()
    recipe = build_recipe({"method": method, "optim": {"epochs": 2}})
    patches = [
        unlearn(task, ANT, recipe.replace(objective=recipe.objective.model_copy(update={"joint": joint})))
        for joint in (False, True)
    ]
    for name, change in patches[0].changes.items():
        assert torch.allclose(change.dense(), patches[1].changes[name].dense(), rtol=1e-8, atol=1e-10), name


def test_one_forward_pass_needs_one_size(task):
    from expunge.data.base import MemoryImages

    large = MemoryImages(torch.rand(30, 1, 12, 12), torch.zeros(30, dtype=torch.int64), task.classes)
    other = ClassifierTask(task.model, task.data, surrogate=large)
    recipe = build_recipe({"method": "scar", "optim": {"epochs": 1}})
    assert len(unlearn(other, ANT, recipe))
    joint = recipe.objective.model_copy(update={"joint": True})
    with pytest.raises(ConfigError, match="one size, or set joint = false"):
        unlearn(other, ANT, recipe.replace(objective=joint))


def test_a_second_class_without_a_likeness_is_told(task):
    split = task.split(ForgetRequest.label("ant", "bee"))
    teacher = Teacher(Context(task, split))
    ctx = Context(task, split.with_indices(surrogate=teacher.ids[teacher.labels != 1]))
    ScarSelf().bind(ctx)
    assert any("no surrogate for 'bee'" in n for n in ctx.notes)


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("method", "request_", "profile"),
    [
        ("scar", ANT, "as_published"),
        ("scar", SAMPLES, "as_published"),
        ("scar", SAMPLES, "as_intended"),
        ("scar_self", ANT, "as_published"),
    ],
    ids=["class-published", "samples-published", "samples", "self-published"],
)
def test_an_interrupted_run_ends_the_same(task, tmp_path, method, request_, profile):
    """Targets chosen on the way, gates and drawn surrogates are those of the run that was never interrupted."""
    settings = {"method": method, "profile": profile, "batch_size": 16, "optim": {"epochs": 2, "max_steps": 9}}
    recipe = build_recipe(settings)

    def interrupt(number, *_):
        if number == 5:
            raise Stopped

    whole = unlearn(task, request_, recipe)
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        unlearn(task, request_, recipe, run_dir=folder, checkpoint_every=1, on_step=interrupt)
    resumed = unlearn(task, request_, recipe, run_dir=folder, checkpoint_every=1)
    assert resumed.digest == whole.digest
    shorter = unlearn(task, request_, recipe.replace(optim={"max_steps": 8}))
    assert shorter.digest != whole.digest


def test_one_seed_one_patch_and_balanced_surrogates_depend_on_it(task):
    recipe = build_recipe({"method": "scar", "optim": {"epochs": 1}})
    first, same, other = (unlearn(task, SAMPLES, recipe, seed=s).digest for s in (0, 0, 1))
    assert first == same
    assert first != other


def test_half_precision_weights_keep_their_statistics(task, tmp_path):
    task.model.bfloat16()
    path = tmp_path / "half.safetensors"
    full = copy.deepcopy(task)
    full.model.float()
    ClassStatistics.fit(full, full.everything()).save(path)
    patch = unlearn(task, ANT, build_recipe({"method": "scar", "statistics": str(path), "optim": {"lr": 0.01}}))
    assert len(patch)
