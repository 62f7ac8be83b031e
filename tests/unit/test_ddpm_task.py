"""The class-conditional diffusion task: losses, guidance, dropped classes, drawing, judging, training."""

import copy
from dataclasses import replace

import pytest
import torch

from expunge import rng
from expunge.context import Context
from expunge.data import DataSpec, load_data
from expunge.data.base import Splits
from expunge.digest import model_digest
from expunge.errors import ArtifactError, CapabilityError, ConfigError, DataError, RequestError
from expunge.evaluation import Candidate, evaluate
from expunge.method import build_recipe
from expunge.metrics.judge import cited, observe_generated
from expunge.models.class_judge import ClassJudge, train_judge
from expunge.models.ddpm import DdpmSpec, build_ddpm
from expunge.objectives.conditioning import DenoisingEsd
from expunge.objectives.cross_entropy import RandomLabel
from expunge.objectives.denoising import PublishedDenoising
from expunge.patch.apply import apply, revert
from expunge.request import ForgetRequest
from expunge.restore import evaluating
from expunge.run import unlearn
from expunge.spaces.averaged import AveragedSpace, AveragedWeights
from expunge.tasks.ddpm import DdpmTask, Sampling
from expunge.tasks.tiny import tiny_classifier, tiny_images
from expunge.tasks.tiny_ddpm import TOY, ddpm_training, tiny_ddpm, train_ddpm

REQUEST = ForgetRequest.label("cat")
QUICK = Sampling(steps=2, per_class=2)


@pytest.fixture(scope="module")
def trained():
    return tiny_ddpm(30, toy=True, sampling=QUICK)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def batch_of(task, role="retain", count=6, key=3):
    split = task.split(REQUEST)
    return replace(task.load(role, split[role][:count], split), key=key)


# -- model ---------------------------------------------------------------------------------------------------------


def test_model_and_null_class():
    model, scheduler = build_ddpm(DdpmSpec())
    assert sum(p.numel() for p in model.parameters()) == 702_753
    assert model.config.num_class_embeds == 11
    assert len(scheduler.alphas_cumprod) == 1000
    assert not model.training


def test_initial_weights_are_a_function_of_the_seed():
    def digest(seed):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        found = model_digest(build_ddpm(TOY.model_copy(update={"seed": seed}))[0])
        assert torch.equal(torch.get_rng_state(), before)
        return found

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"widths": (32, 64, 96), "size": 6}, "halved"),
        ({"widths": (30, 64)}, "groups"),
        ({"attention": (True,)}, "attention"),
    ],
)
def test_settings_that_do_not_fit(settings, says):
    with pytest.raises(ConfigError, match=says):
        DdpmSpec(**settings)


def test_a_saved_pipeline_loads(tmp_path):
    model, scheduler = build_ddpm(TOY)
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(ArtifactError, match="scheduler"):
        build_ddpm(TOY.model_copy(update={"name": str(tmp_path)}))
    scheduler.save_pretrained(tmp_path / "scheduler")
    again, _ = build_ddpm(TOY.model_copy(update={"name": str(tmp_path)}))
    assert model_digest(again) == model_digest(model)
    with pytest.raises(ConfigError, match="5 classes"):
        build_ddpm(TOY.model_copy(update={"name": str(tmp_path), "classes": 5}))
    with pytest.raises(ConfigError, match="size 8"):
        build_ddpm(TOY.model_copy(update={"name": str(tmp_path), "size": 16}))
    two = Splits("two", tiny_images(3, 0, "a", 2), tiny_images(3, 0, "b", 2))
    with pytest.raises(ConfigError, match="with the null class that makes 3"):
        DdpmTask(model, scheduler, two)


# -- loss ----------------------------------------------------------------------------------------------------------


def test_images_are_scaled(task):
    batch = batch_of(task)
    ids = task.split(REQUEST)["retain"][:6]
    assert torch.equal(batch.inputs, 2 * task.data.train.images(ids) - 1)


def test_draws_depend_on_key_and_sample_only(task):
    batch = batch_of(task)
    part = replace(batch, inputs=batch.inputs[2:4], targets=batch.targets[2:4], ids=batch.ids[2:4])
    for whole, piece in zip(task.drawn(batch), task.drawn(part), strict=True):
        assert torch.equal(whole[2:4], piece)
    assert not torch.equal(task.drawn(batch)[1], task.drawn(replace(batch, key=4))[1])


def test_antithetic_times(task):
    task.antithetic = True
    t = task.drawn(batch_of(task, count=7))[1]
    assert len(t) == 7
    assert torch.equal(t[4:], 999 - t[:3])


def test_loss_is_the_mean_over_pixels(task):
    batch = batch_of(task)
    x, t, noise = task.drawn(batch)
    want = (task.eps(x, t, batch.targets) - noise).square().mean((1, 2, 3))
    assert torch.allclose(task.loss(batch), want)
    assert not torch.allclose(task.guided(3.0).loss(batch), want)


def test_guidance_as_the_published_code_counts(task):
    """w = 2: three times the conditional prediction minus twice the unconditional one."""
    batch = batch_of(task)
    x, t, _ = task.drawn(batch)
    given, without = task.eps(x, t, batch.targets), task.eps(x, t, task.unconditional(len(batch)))
    assert torch.allclose(task.guided_eps(x, t, batch.targets, 3.0), 3 * given - 2 * without, atol=1e-5)
    assert torch.equal(task.guided_eps(x, t, batch.targets, 1.0), given)
    assert not torch.allclose(given, without)


def test_wrong_targets_pull_towards_the_other_class(task):
    batch = batch_of(task, "forget")
    wrong = (batch.targets + 1) % 4
    x, t, _ = task.drawn(batch)
    goal = task.eps(x, t, wrong).detach()
    want = (task.eps(x, t, batch.targets) - goal).square().mean((1, 2, 3))
    assert torch.allclose(task.loss(batch, wrong), want)
    # the same class as target is the plain loss, and both kinds may share a batch
    plain = task.loss(batch)
    assert torch.allclose(task.loss(batch, batch.targets.clone()), plain)
    mixed = torch.where(torch.arange(6) < 3, wrong, batch.targets)
    assert torch.allclose(task.loss(batch, mixed), torch.cat([want[:3], plain[3:]]))
    with pytest.raises(RequestError, match="probabilities"):
        task.loss(batch, torch.full((6, 4), 0.25))


def test_no_gradient_flows_into_the_target(task):
    batch = batch_of(task, "forget")
    table = task.model.class_embedding.weight
    grad = torch.autograd.grad(task.loss(batch, (batch.targets + 1) % 4).sum(), table)[0]
    assert bool(grad[2].any())
    assert not bool(grad[3].any())


def test_a_class_of_its_own_is_drawn_for_every_sample(task):
    batch = batch_of(task, count=60)
    wrong = task.wrong_target(batch, key=1)
    assert not bool((wrong == batch.targets).any())
    assert set(wrong.tolist()) == {0, 1, 2, 3}
    assert bool((task.wrong_target(batch, key=1, exclude_true=False) == batch.targets).any())


def test_classes_are_dropped_from_retain_samples_in_training(task):
    """With everything dropped the loss is the unconditional one; forget samples and evaluation keep their classes."""
    task.condition_drop = 1.0
    for role, changes in (("retain", True), ("forget", False)):
        batch = batch_of(task, role)
        still = task.loss(batch)
        task.model.train()
        moved = task.loss(batch)
        task.model.eval()
        assert torch.allclose(moved, still) is not changes
        x, t, noise = task.drawn(batch)
        null = (task.eps(x, t, task.unconditional(len(batch))) - noise).square().mean((1, 2, 3))
        assert torch.allclose(moved, null) is changes
    labels = torch.zeros(4000, dtype=torch.int64)
    many = replace(batch_of(task), ids=torch.arange(4000))
    share = float((task.dropped(many, labels, 0.1, "retain") == task.null).float().mean())
    assert share == pytest.approx(0.1, abs=0.02)


# -- objectives ----------------------------------------------------------------------------------------------------


def losses(task, objective, roles=("forget", "retain")):
    ctx = Context(task, task.split(REQUEST))
    batches = {role: batch_of(task, role) for role in roles}
    return batches, objective.bind(ctx)(batches)


def test_published_sums_are_means_times_the_numbers_of_an_image(task):
    task.condition_drop = 0.0
    batches, terms = losses(task, PublishedDenoising(alpha=0.001, condition_drop=0.0))
    _, intended = losses(task, RandomLabel(alpha=0.064))
    retain = terms["retain"]
    assert torch.allclose(retain.weight * retain.values, 0.064 * intended["retain"].values, rtol=1e-5)
    assert torch.allclose(retain.values, 64 * task.loss(batches["retain"]), rtol=1e-5)
    wrong = (batches["forget"].targets + 1) % 4
    assert torch.allclose(terms["forget"].values, task.loss(batches["forget"], wrong))
    _, up = losses(task, PublishedDenoising(forget="gradient_ascent", condition_drop=0.0))
    assert up["forget"].weight == -1
    assert torch.allclose(up["forget"].values, 64 * task.loss(batches["forget"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("convention", "eta", "factor"), [("paper", 1.0, 4.0), ("current", 2.0, 4.0), ("paper", 0.0, 1)]
)
def test_class_esd_at_the_first_step(task, convention, eta, factor):
    """Student and teacher are one model: the loss is a known multiple of the squared guidance direction."""
    batches, terms = losses(task, DenoisingEsd(convention=convention, eta=eta), ("forget",))
    batch = batches["forget"]
    x, t, _ = task.drawn(batch)
    direction = task.eps(x, t, batch.targets) - task.eps(x, t, task.unconditional(len(batch)))
    assert torch.allclose(terms["forget"].values, factor * direction.square().mean((1, 2, 3)), rtol=1e-4)


def test_the_mask_averages_several_draws(task):
    space = build_recipe({"method": "ddpm_salun", "keep": 0.25, "passes": 2}).space
    ctx = Context(task, task.split(REQUEST))
    batches = list(space._batches(ctx))
    assert len({b.key for b in batches}) == len(batches) == 2
    opened = space.open(ctx)
    assert opened.selection.ones == sum(p.numel() for p in task.model.parameters()) // 4
    other = space.model_copy(update={"guidance": 3.0}).open(ctx)
    name = "conv_in.weight"
    assert not torch.equal(opened.selection.bits[name], other.selection.bits[name])


def test_other_tasks_are_refused():
    other = tiny_classifier(steps=0)
    with pytest.raises(CapabilityError, match="needs diffusion"):
        unlearn(other, ForgetRequest.label("ant"), build_recipe("class_esd"))


# -- averaging and training ----------------------------------------------------------------------------------------


def test_average_of_the_weights(task):
    weight = task.model.conv_in.weight
    space = AveragedSpace({"conv_in.weight": weight}, decay=0.15)
    start, mean = weight.detach().clone(), weight.detach().clone().double()
    for step in range(4):
        with torch.no_grad():
            weight += 0.1 * (step + 1)
        space.after_step(None)
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight.detach().double()
    found = start.double() + space.changes()["conv_in.weight"].dense().double()
    assert torch.allclose(found, mean, atol=1e-5)
    assert not torch.allclose(found, weight.detach().double(), atol=1e-3)
    again = AveragedSpace({"conv_in.weight": weight}, decay=0.15)
    again.load_state({n: t.clone() for n, t in space.state().items()})
    assert again._steps == 4
    assert torch.equal(again.average["conv_in.weight"], space.average["conv_in.weight"])


def test_an_interrupted_training_continues(tmp_path):
    """The average is part of the checkpoint."""
    recipe = ddpm_training(4, 96)
    fresh = tiny_ddpm(0, toy=True)
    whole = unlearn(fresh, REQUEST, recipe)

    def stop(number, model, optimizer):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn(fresh, REQUEST, recipe, run_dir=tmp_path, checkpoint_every=1, on_step=stop)
    resumed = unlearn(fresh, REQUEST, recipe, run_dir=tmp_path, checkpoint_every=1)
    assert resumed.digest == whole.digest
    raw = recipe.replace(space=AveragedWeights(decay=0.0))
    assert unlearn(fresh, REQUEST, raw).digest != whole.digest


def test_training_lowers_the_loss_and_excludes(trained):
    split = trained.everything()
    batch = replace(trained.load("test", torch.arange(32), split), key=1)
    untrained = tiny_ddpm(0, toy=True)
    with torch.no_grad():
        assert float(trained.loss(batch).mean()) < 0.8 * float(untrained.loss(batch).mean())
    without = copy.deepcopy(untrained)
    seen = []
    load = without.load
    without.load = lambda role, ids, split, **kw: seen.append(load(role, ids, split, **kw)) or seen[-1]
    train_ddpm(without, 2, exclude=REQUEST)
    assert all(2 not in b.targets for b in seen if b.role == "retain")
    assert model_digest(without.model) != model_digest(untrained.model)


# -- drawing -------------------------------------------------------------------------------------------------------


def test_images_depend_on_the_ask_alone(task):
    task.sampling = Sampling(steps=3, eta=1.0, per_class=2)
    asks = task.asks()
    assert len(asks) == 8
    images = task.sample(asks)
    assert images.shape == (8, 3, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.allclose(task.sample(asks[5:6]), images[5:6], atol=1e-5)
    assert not torch.allclose(images[4], images[5], atol=1e-2)
    task.sampling = Sampling(steps=3, eta=0.0, per_class=2)
    assert not torch.allclose(task.sample(asks[5:6]), images[5:6], atol=1e-2)
    with pytest.raises(DataError, match="no class"):
        task.sample([replace(asks[0], labels={"class": 4})])
    with pytest.raises(DataError, match="no class"):
        task.sample([replace(asks[0], labels={"style": 1})])


def test_no_accuracy_on_images(task):
    with pytest.raises(CapabilityError, match="draws"):
        task.logits("test", task.split(REQUEST))
    with pytest.raises(CapabilityError, match="single"):
        task.observe(task.split(ForgetRequest.samples([1, 2])))
    assert not hasattr(task, "n_classes")


def test_observed_roles(task):
    task._judge = tiny_judge(task)
    before = model_digest(task.model)
    seen = task.observe(task.split(REQUEST))
    assert model_digest(task.model) == before
    assert seen.outputs["forget"].labels.tolist() == [2, 2]
    assert sorted(set(seen.outputs["test"].labels.tolist())) == [0, 1, 3]
    found = task.further_metrics(task.split(REQUEST), seen)
    assert found["gen_ua"].value == pytest.approx(100 * float((~seen.outputs["forget"].correct).mean()))
    assert found["fid_real"].ran


def tiny_judge(task):
    model = copy.deepcopy(tiny_classifier(steps=20).model)
    return ClassJudge(model, task.classes, channels=1)


def test_a_report(task):
    task._judge = tiny_judge(task)
    recipe = build_recipe({"method": "class_esd", "batch_size": 12, "optim": {"max_steps": 2}})
    patch = unlearn(task, REQUEST, recipe)
    report = evaluate(task, REQUEST, [Candidate("class_esd", patch, "after")])
    assert [row.role for row in report.rows] == ["before", "after"]
    assert report.rows[1].metrics["ua"].n == 2
    assert report.rows[1].metrics["gen_ira"].ran
    assert "ra" not in report.rows[1].metrics
    assert [(row.prompt, row.forgotten) for row in report.samples.rows][:2] == [("cat", True), ("ant", False)]
    assert "guidance 2" in report.samples.note


def test_judge_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    data = Splits("tiny", tiny_images(80, 0, "train"), tiny_images(8, 0, "test"))
    judge = train_judge(data)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 1
    monkeypatch.setattr("expunge.train.fit", lambda *_, **__: pytest.fail("trained again"))
    again = train_judge(data)
    assert model_digest(again.model) == model_digest(judge.model)
    images = data.test.images(torch.arange(len(data.test))).expand(-1, 3, -1, -1)
    right = judge(images)["class"].argmax(1) == data.test.labels
    assert float(right.float().mean()) > 0.9
    assert judge.features(images).shape == (32, 128)
    seen = observe_generated(
        judge, (images * 255).round().byte(), tiny_ddpm(0, toy=True, sampling=Sampling(per_class=8)).asks()
    )
    assert seen.judge == cited(judge)
    with pytest.raises(DataError, match="N, 3, H, W"):
        judge(images[:, :1])


def test_digest_follows_the_draws(task):
    digest = task.data_digest()
    assert copy.copy(task).data_digest() == digest
    task.condition_drop = 0.2
    assert task.data_digest() != digest
    assert rng.key(0, "a") != rng.key(0, "b")


def test_digits_fit(monkeypatch, tmp_path):
    """The network of the demo takes the digits as they are."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    model, scheduler = build_ddpm(DdpmSpec())
    task = DdpmTask(model, scheduler, load_data(DataSpec(name="digits")))
    split = task.split(ForgetRequest.label(3))
    assert split.removed == (3,)
    with evaluating(task.model):
        assert task.loss(task.load("forget", split["forget"][:4], split)).shape == (4,)


def test_a_patch_comes_off(task):
    before = model_digest(task.model)
    patch = unlearn(task, REQUEST, build_recipe({"method": "ddpm_salun", "batch_size": 12, "optim": {"max_steps": 2}}))
    apply(task.model, patch)
    assert model_digest(task.model) != before
    revert(task.model, patch)
    assert model_digest(task.model) == before
