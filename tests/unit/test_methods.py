"""Methods: what their settings mean and what a run does to the weights."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from scipy.stats import chi2

from expunge.context import Context
from expunge.errors import ConfigError
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.objectives.cross_entropy import RandomLabel
from expunge.patch import apply
from expunge.protections.interval.protection import IntervalProtection
from expunge.protections.l1 import l1_weight
from expunge.recipe import Recipe
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import LOG, differences, unlearn
from expunge.saliency import Mask
from expunge.spaces.layers import AllWeights, Layers
from expunge.spaces.proximal import Proximal, soft_threshold
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier
from expunge.track import read_log

registry.load("method")
METHODS = sorted(entry.name for entry in registry.list("method"))
REQUEST = ForgetRequest.label("ant")
DEEPDIVE = ["deepdive_ga", "deepdive_ga_small", "deepdive_rl", "deepdive_rl_split"]


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def method(name, **settings):
    return build_recipe({"method": name, **settings})


def after(task, recipe, seed=0, **how):
    """All tensors of the model with the patch of a run."""
    patched = copy.deepcopy(task)
    apply(patched.model, unlearn(patched, REQUEST, recipe, seed=seed, **how))
    return {n: t.detach().clone() for n, t in patched.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def steps_of(task, recipe, folder):
    unlearn(task, REQUEST, recipe, run_dir=folder)
    return read_log(folder / LOG)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_and_comes_back_from_its_description(name):
    recipe = method(name)
    back = Recipe(**json.loads(json.dumps(recipe.describe())))
    assert back == recipe
    assert back.digest == recipe.digest
    assert recipe.replace(optim={"lr": 2 * recipe.optim.lr}).digest != recipe.digest


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_refused(name):
    with pytest.raises(ConfigError, match="leraning_rate"):
        method(name, leraning_rate=1.0)
    with pytest.raises(ConfigError, match="lrr"):
        method(name, optim={"lrr": 1.0})


TRAINED = {"optim.norm", "optim.lr"}
MASKED = {"space.reduction", "space.rounding"}
ORDER = {"objective.exclude_true", "objective.schedule.kind", "objective.schedule.role"}
PROFILES = [
    ("random_label", {}, TRAINED | ORDER),
    ("salun", {}, TRAINED | MASKED | ORDER),
    ("salun", {"soft": True}, TRAINED | ORDER | {"space.anchor"}),
    ("salun", {"optim": {"lr": 0.02}}, MASKED | ORDER | {"optim.norm"}),
    *((n, {}, MASKED | {"space.residual", "optim.norm"}) for n in ("deepdive_ga", "deepdive_ga_small")),
    *(
        (n, {}, MASKED | {"space.residual", "optim.norm", "objective.exclude_true"})
        for n in ("deepdive_rl", "deepdive_rl_split")
    ),
    (
        "barrier",
        {"batch_size": 64},
        {"optim.norm", "optim.augment", "optim.weight_decay", "objective.exclude_true", "space.rule", "protections"},
    ),
]


def test_the_published_barrier_takes_larger_batches():
    sizes = [method("barrier", profile=p).objective.schedule.batch_size for p in ("recommended", "as_published")]
    assert sizes == [64, 256]


@pytest.mark.parametrize(("name", "settings", "documented"), PROFILES)
def test_profiles_differ_in_what_the_card_says(name, settings, documented):
    ours, theirs = method(name, **settings), method(name, profile="as_published", **settings)
    assert {d.split(":")[0] for d in differences(ours.describe(), theirs.describe())} == documented


def test_the_profiles_of_barrier_differ_in_the_profile_of_the_protection():
    ours, theirs = (method("barrier", profile=p).protections[0].describe() for p in ("recommended", "as_published"))
    assert [d.split(":")[0] for d in differences(ours, theirs)] == ["profile"]


# -- random labels -------------------------------------------------------------------------------------------------

N = 30_000


@pytest.fixture(scope="module")
def six():
    return tiny_classifier(n_classes=6, steps=0, surrogate=False)


def forget_batch(ids, n_classes=6):
    return Batch(torch.zeros(len(ids), 1), ids % n_classes, ids, "forget", torch.ones(len(ids), dtype=torch.bool))


def uneven(labels, candidates):
    """Chi-squared statistic of the counts over its 1 - 1e-6 quantile: above 1 the labels are not uniform."""
    counts = torch.stack([(labels == c).sum() for c in candidates]).double()
    assert int(counts.sum()) == len(labels)
    expected = len(labels) / len(candidates)
    return float(((counts - expected) ** 2 / expected).sum()) / chi2.ppf(1 - 1e-6, len(candidates) - 1)


@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_wrong_labels_are_never_the_truth_and_uniform_over_the_rest(six, key):
    batch = forget_batch(torch.arange(N))
    wrong = six.wrong_target(batch, key=key)
    assert not bool((wrong == batch.targets).any())
    for true in range(6):
        assert uneven(wrong[batch.targets == true], [c for c in range(6) if c != true]) < 1


@pytest.mark.parametrize("key", [0, 1, 2**63])
def test_the_published_draw_hits_the_truth_one_time_in_c(six, key):
    batch = forget_batch(torch.arange(N))
    drawn = six.wrong_target(batch, key=key, exclude_true=False)
    assert float((drawn == batch.targets).double().mean()) == pytest.approx(1 / 6, abs=5 * (5 / 36 / N) ** 0.5)
    for true in range(6):
        assert uneven(drawn[batch.targets == true], range(6)) < 1


def test_the_test_of_uniformity_sees_a_slight_preference():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (N // 6,), generator=generator)
    assert uneven(labels, range(5)) < 1
    labels[:400] = 0
    assert uneven(labels, range(5)) > 1


def labels_used(task, objective, epoch, ids):
    """The targets that an objective trains the given samples towards."""
    ctx = Context(task, task.split(REQUEST), seed=4, epoch=epoch)
    seen = {}

    def loss(batch, targets=None):
        seen[batch.role] = batch.targets if targets is None else targets
        return torch.zeros(len(batch))

    task.loss = loss
    objective.bind(ctx)({role: task.load(role, rows, ctx.split) for role, rows in ids.items()})
    return seen


def test_labels_depend_on_epoch_and_sample_only(task):
    split = task.split(REQUEST)
    ids, back = split["forget"], split["forget"].flip(0)
    one = labels_used(task, RandomLabel(), 0, {"forget": ids})["forget"]
    assert torch.equal(one, labels_used(task, RandomLabel(), 0, {"forget": back})["forget"].flip(0))
    assert torch.equal(one[:7], labels_used(task, RandomLabel(), 0, {"forget": ids[:7]})["forget"])
    assert not torch.equal(one, labels_used(task, RandomLabel(), 1, {"forget": ids})["forget"])
    fixed = RandomLabel(redraw="never")
    assert torch.equal(one, labels_used(task, fixed, 1, {"forget": ids})["forget"])


def test_retain_samples_keep_their_labels_in_every_role(task):
    split = task.split(REQUEST)
    ids = {"forget": split["forget"], "retain": split["retain"], "mixed": split["mixed"]}
    seen = labels_used(task, RandomLabel(), 0, ids)
    truth = task.data.train.labels
    assert torch.equal(seen["retain"], truth[split["retain"]])
    assert not bool((seen["forget"] == truth[split["forget"]]).any())
    wrong = seen["mixed"] != truth[split["mixed"]]
    assert torch.equal(wrong, torch.isin(split["mixed"], split["forget"]))


# -- identities ----------------------------------------------------------------------------------------------------

SHORT = {"lr": 0.01, "epochs": 2, "augment": False}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_salun_with_a_full_mask_is_random_label_bit_for_bit(task, name):
    optim = {**SHORT, "name": name}
    plain = after(task, method("random_label", batch_size=16, optim=optim))
    assert same(after(task, method("salun", keep=1.0, batch_size=16, optim=optim)), plain)
    assert not same(after(task, method("salun", keep=0.99, batch_size=16, optim=optim)), plain)


def test_barrier_without_its_penalty_is_the_base_method_bit_for_bit(task):
    settings = {"batch_size": 16, "optim": {**SHORT, "weight_decay": 0.0}}
    base = method("random_label", mixing="forget_only", **settings).replace(space=Layers(targets=("fc",)))
    expected = after(task, base)
    off = method("barrier", lambda_interval=0.0, **settings)
    assert same(after(task, off), expected)
    assert same(
        after(task, off.replace(protections=(IntervalProtection(targets=("Linear",), lambda_interval=0.0),))), expected
    )
    assert not same(after(task, method("barrier", lambda_interval=1e-3, **settings)), expected)


#: Needs that no classifier meets; methods with one of them have their own tests.
OTHER_FAMILIES = {"towers", "diffusion", "text", "class_condition", "concept"}
LOOPS = [m for m in METHODS if m != "retrain" and method(m).objective is not None]


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", [m for m in LOOPS if not OTHER_FAMILIES & method(m).needs()])
def test_without_a_learning_rate_nothing_changes(task, name, optimiser):
    optim = {"epochs": 1, "lr": 0.0, "name": optimiser, "norm": "frozen"}
    assert not len(unlearn(task, REQUEST, method(name, optim=optim), allow_no_effect=True))
    assert len(unlearn(task, REQUEST, method(name, optim={**optim, "lr": 1e-3})))


def test_the_masked_methods_of_deepdive_can_do_without(task):
    for name in DEEPDIVE:
        settings = {"optim": {**SHORT, "lr": 1e-3}, "batch_size": 16}
        full = after(task, method(name, mask_thr=1.0, **settings))
        assert isinstance(method(name, use_mask=False).space, AllWeights)
        assert same(after(task, method(name, use_mask=False, **settings)), full)


# -- l1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "quiet"), [(10, 0), (10, 3), (1, 0), (4, 3)])
def test_the_l1_schedule(epochs, quiet):
    weights = [l1_weight(0.2, e, epochs, quiet) for e in range(epochs)]
    assert weights[0] == 0.2
    assert weights[epochs - quiet - 1] == pytest.approx(0.2 / (epochs - quiet))
    assert weights[epochs - quiet :] == [0.0] * quiet
    on = weights[: epochs - quiet]
    assert all(a - b == pytest.approx(0.2 / (epochs - quiet)) for a, b in pairwise(on))


def test_the_l1_schedule_reaches_the_loss(task, tmp_path):
    recipe = method("l1_sparse", weight=0.01, no_l1_epochs=1, optim={**SHORT, "epochs": 4})
    rows = steps_of(task, recipe, tmp_path)
    for row in rows:
        factor = (row["loss"] - row["retain"]) / row["l1"] if "l1" in row else 0.0
        assert factor == pytest.approx([0.01, 0.02 / 3, 0.01 / 3, 0.0][row["epoch"]], rel=1e-4)
    norm = sum(float(p.detach().abs().sum()) for p in task.model.parameters())
    assert rows[0]["l1"] == pytest.approx(norm, rel=1e-5)


# -- soft ----------------------------------------------------------------------------------------------------------


def test_the_soft_step_golden():
    delta = torch.tensor([0.3, -0.1, 0.05, -0.4])
    torch.testing.assert_close(soft_threshold(delta, 2), torch.tensor([0.2, 0.0, 0.0, -0.3]))
    assert torch.equal(soft_threshold(delta, 0), delta)
    assert torch.equal(soft_threshold(delta, 4), torch.zeros(4))


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_alpha_weighs_the_retain_samples_of_a_mixed_batch(task):
    def losses(alpha):
        recipe = method("random_label", alpha=alpha, mixing="mixed", batch_size=1000, optim={**SHORT, "epochs": 1})
        ctx = Context(task, task.split(REQUEST))
        terms = recipe.objective.bind(ctx)({"mixed": ctx.load("mixed", ctx.split["mixed"])})
        return terms["mixed"].values.detach()

    is_forget = task.split(REQUEST).is_forget("mixed", task.split(REQUEST)["mixed"])
    full, half = losses(1.0), losses(0.5)
    assert torch.equal(half[is_forget], full[is_forget])
    assert torch.equal(half[~is_forget], 0.5 * full[~is_forget])


def test_after_every_soft_step_k_weights_are_the_original_ones_and_k_falls(task):
    recipe = method("salun", soft=True, keep=0.8, mixing="sequential", batch_size=16, optim={**SHORT, "epochs": 4})
    split = task.split(REQUEST)
    plan = [
        (epoch, step)
        for epoch in range(4)
        for step in recipe.objective.schedule.steps({r: len(split[r]) for r in ("forget", "retain")}, epoch, 0)
    ]
    length = len(plan) // 4
    forget = sum("forget" in s for e, s in plan if e == 0)
    start, back, wanted = flat(task.model), [], []

    def on_step(number, model, optimizer):
        back.append(int((flat(model) == start).sum()))
        epoch, step = plan[number - 1]
        inner = (number - 1) % length - forget if "retain" in step else 0
        left = max(0, 4 * length - (epoch * length + inner + 1))
        wanted.append(int(0.8 * (left / (4 * length) * len(start))))

    unlearn(task, REQUEST, recipe, on_step=on_step)
    assert len(back) == len(plan)
    assert all(b >= k for b, k in zip(back, wanted, strict=True))
    assert all(k > 0 for k in wanted)
    first = wanted[::length]
    assert all(a > b for a, b in pairwise(first))
    assert back[-1] < 0.5 * back[0]  # the count does follow k


def test_a_share_of_zero_shrinks_nothing(task):
    recipe = method("random_label", batch_size=16, optim=SHORT)
    free, soft = after(task, recipe), after(task, recipe.replace(space=Proximal(keep=0.0)))
    pulled = after(task, recipe.replace(space=Proximal(keep=0.5)))
    for name, value in free.items():
        torch.testing.assert_close(soft[name], value, rtol=1e-4, atol=1e-5)
    assert float((pulled["fc.weight"] - free["fc.weight"]).abs().max()) > 1e-3


# -- retrain -------------------------------------------------------------------------------------------------------

RETRAIN = {"method": "retrain", "batch_size": 32, "optim": {"lr": 0.05, "epochs": 3, "milestones": [2]}}


def weights_of(task, recipe, seed=0):
    """All tensors at the end of the run itself: adding a patch's difference to the base rounds once more."""
    last = {}
    unlearn(
        task, REQUEST, recipe, seed=seed, on_step=lambda n, model, o: last.update(copy.deepcopy(model.state_dict()))
    )
    return last


def test_retraining_does_not_depend_on_the_weights_it_replaces(task):
    """Only the seed counts: nothing of the old network, its statistics included, survives."""
    other = tiny_classifier(steps=5)
    other.data = task.data
    recipe = build_recipe(RETRAIN)
    one = weights_of(task, recipe)
    assert same(one, weights_of(other, recipe))
    assert not same(one, weights_of(task, recipe, seed=1))
    kept = recipe.replace(from_scratch=False)
    assert not same(weights_of(task, kept), weights_of(other, kept))
    assert not any(torch.equal(one[n], p) for n, p in task.model.named_parameters())
    for name, value in after(task, recipe).items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6)


def test_retraining_reads_retain_samples_only(task, monkeypatch):
    split, seen = task.split(REQUEST), []
    real = ClassifierTask.load

    def load(self, role, ids, *rest, **how):
        seen.append((role, ids))
        return real(self, role, ids, *rest, **how)

    monkeypatch.setattr(ClassifierTask, "load", load)
    unlearn(task, REQUEST, build_recipe(RETRAIN))
    assert {role for role, _ in seen} == {"retain"}
    used = torch.cat([ids for _, ids in seen])
    assert torch.equal(used.unique(), split["retain"].sort().values)
    assert not bool(torch.isin(used, split["forget"]).any())
    seen.clear()
    unlearn(task, REQUEST, method("fine_tune", optim=SHORT))  # looks at a few forget samples beforehand
    assert {role for role, _ in seen} == {"forget", "retain"}


# -- size of a mask file -------------------------------------------------------------------------------------------


def test_the_mask_of_a_resnet18_takes_a_bit_per_weight(tmp_path):
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in build_model(ModelSpec(name="resnet18_cifar")).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    mask = Mask({n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}, 0.5)  # does not compress
    assert mask.numel == 11_173_962
    mask.save(tmp_path / "mask.safetensors")
    size = (tmp_path / "mask.safetensors").stat().st_size
    assert mask.numel / 8 <= size <= mask.numel / 8 + 4096
    back = Mask.load(tmp_path / "mask.safetensors", mask.bits)
    assert all(torch.equal(back.bits[n], b) for n, b in mask.bits.items())
